"""Which files hold a checkpoint's weights, and what their headers say; torch-free and quick."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcore_core.errors import Problem, UsageError, usage_error

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates",
    "*.tiktoken",
    "*.py",
)
"""What is copied with a model beside config.json and weights, as patterns."""
AGAIN = "fix: copy or download the file again from where the model came from"


def copy_beside(source: Path, path: Path) -> None:
    """Copy what goes with a model's weights, config.json aside. Raises OSError."""
    for found in sorted({f for pattern in COMPANIONS for f in source.glob(pattern)}):
        if found.is_dir():
            shutil.copytree(found, path / found.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(found, path / found.name)


def check_weights(folder: Path) -> list[Problem]:
    """Return what is wrong with the folder's safetensors files, as far as headers tell."""
    problems: list[Problem] = []
    try:
        names, _ = file_names(folder)
    except UsageError as error:
        return list(error.problems)
    for name in names:
        try:
            read_header(folder / name)
        except UsageError as error:
            problems += error.problems
    return problems


def read_header(path: Path) -> dict[str, Any]:
    """Return a safetensors header, having checked that the file has the length it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(path, f"truncated: it has {size} bytes, its header alone needs more")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise usage_error("MC521", f"{path} is missing", AGAIN) from error
    except OSError as error:
        raise usage_error("MC521", f"{path} cannot be opened: {error.strerror}", AGAIN) from error
    except ValueError as error:
        raise _damaged(path, "not a safetensors file: its header is not JSON") from error
    try:
        entries: dict[str, Any] = {k: v for k, v in header.items() if k != "__metadata__"}
        end = 8 + length + max((int(e["data_offsets"][1]) for e in entries.values()), default=0)
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, "not a safetensors file: its header lists no tensors") from error
    if size != end:
        kind = "truncated" if size < end else "too long"
        raise _damaged(path, f"{kind}: it has {size} bytes, its header says {end}")
    return entries


def _damaged(path: Path, why: str) -> UsageError:
    return usage_error("MC522", f"{path} is {why}", AGAIN)


def file_names(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    """Return the files that make up the checkpoint and the index; a single file wins."""
    if (folder / SINGLE).exists():
        return [SINGLE], None
    path = folder / INDEX
    if path.exists():
        try:
            listed: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return sorted(set(listed.values())), listed
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise usage_error("MC523", f"{path} is not an index of safetensors", AGAIN) from error
    other = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt"))
    convert = (
        "fix: convert it once with transformers: from_pretrained(DIR).save_pretrained(DIR)"
        if any(not n.endswith(".safetensors") for n in other)
        else AGAIN.replace("the file", "the model")
    )
    raise usage_error(
        "MC520",
        f"{folder} has no {SINGLE} and no {INDEX}",
        "found: " + (", ".join(other[:6]) or "no file with weights"),
        convert,
    )
