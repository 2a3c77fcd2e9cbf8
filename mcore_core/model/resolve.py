"""From what the user wrote in --model to a folder, its HF config, and the family that reads it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcore_core.component import Catalogue
from mcore_core.errors import UsageError, did_you_mean, usage_error
from mcore_core.model.family import Family
from mcore_core.model.hf_head import as_language_model

WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
"""What is downloaded of a hub model."""


def resolve_model_dir(
    model: str,
    *,
    revision: str | None = None,
    use_hf: bool = True,
    token: str | None = None,
    wanted: Sequence[str] = WANTED,
    option: str = "--model",
) -> Path:
    """Return the folder of a model: itself where it is one, else a snapshot of the hub model.

    `wanted` are the patterns of the files that are fetched, `option` is what messages begin with.
    """
    path = local_model_dir(model, option)
    if path is not None:
        return path
    if not use_hf:
        raise usage_error(
            "MC513",
            f"{option} {model} is not a folder, and --use_hf false asks for another hub",
            "fix: leave --use_hf at true, or download the model and give its folder",
        )
    return _download(model, revision, token, wanted, option)


def local_model_dir(model: str, option: str = "--model") -> Path | None:
    """Return the folder of a model here; None where the name may be a hub id.

    Raises:
        UsageError: It is a path, and no folder is there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise usage_error(
            "MC513",
            f"{option} {model} is a file, not a folder",
            f"fix: give the folder that holds config.json and the weights: {option} {path.parent}",
        )
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise usage_error(
            "MC513",
            f"{option} {model}: there is no such folder",
            did_you_mean(path.name, siblings, f"{path.parent}/"),
            "fix: give an existing folder, or a hub id such as Qwen/Qwen3-0.6B",
        )
    return None


def _download(
    model: str, revision: str | None, token: str | None, wanted: Sequence[str], option: str
) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (slow; not for local folders)
    from huggingface_hub.errors import (  # noqa: PLC0415  (slow; not for local folders)
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(
            snapshot_download(model, revision=revision, token=token, allow_patterns=list(wanted))
        )
    except GatedRepoError as error:
        why, fix = "its licence must be accepted first", "accept it on the hub, give --hub_token"
        raise usage_error("MC514", f"{option} {model}: {why}", f"fix: {fix}") from error
    except RevisionNotFoundError as error:
        raise usage_error(
            "MC514",
            f"{option} {model} has no revision {revision!r}",
            "fix: correct --model_revision",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise usage_error(
            "MC514",
            f"{option} {model}{at} is neither a folder here nor a model on the hub",
            "fix: correct the name; a private model needs --hub_token",
        ) from error
    except Exception as error:  # Offline shows as one of a dozen types of three HTTP libraries.
        raise usage_error(
            "MC514",
            f"{option} {model}{at} is not a folder here and cannot be fetched from the hub",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "fix: give a local folder, or run once with network so that it is cached",
        ) from error


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
        raise usage_error(
            "MC510",
            f"{folder} has no config.json",
            "found: " + (", ".join(found) or "nothing"),
            "fix: --model takes the folder of a Hugging Face model",
        ) from error
    except (OSError, ValueError) as error:
        raise usage_error(
            "MC510",
            f"{path} cannot be read as JSON: {error}",
            "fix: copy config.json again from where the model came from",
        ) from error
    if not isinstance(config, dict):
        raise usage_error(
            "MC510",
            f"{path} holds a {type(config).__name__}, not an object",
            "fix: copy config.json again from where the model came from",
        )
    return config


def resolve_family(
    hf_config: Mapping[str, Any], catalogue: Catalogue[Family], model_type: str | None = None
) -> Family:
    """Return the family that reads this config: by --model_type, else by its architecture."""
    if model_type is not None:
        return catalogue.find(model_type, "--model_type").load()
    wanted = str((hf_config.get("architectures") or [""])[0])
    named = str(hf_config.get("model_type") or "")
    plain = as_language_model(wanted)
    components = {c.name for _, c in catalogue}
    if named in components:
        family = catalogue.find(named, "the model's model_type; choose with --model_type").load()
        if not wanted or wanted in family.architectures or plain != wanted:
            return family
    families = [c.load() for _, c in catalogue]
    reading = [f for f in families if plain in f.architectures]
    # its first architecture is a family's own; others read it under their own model_type
    for family in sorted(reading, key=lambda f: f.architectures.index(plain)):
        return family
    raise _unknown(wanted, named, families)


def _unknown(wanted: str, named: str, families: list[Family]) -> UsageError:
    known = sorted({a for f in families for a in f.architectures})
    what = f"architecture {wanted!r}" if wanted else "no architecture"
    return usage_error(
        "MC511",
        f"the model's config.json has {what} (model_type {named!r}), which no family reads",
        "known: " + (", ".join(known) or "none; is mcore-hfbridge installed?"),
        did_you_mean(wanted, known) or did_you_mean(named, {f.name for f in families}),
        "fix: use one of these, install a plugin with the family, or --model_type NAME to read it "
        "as another",
    )
