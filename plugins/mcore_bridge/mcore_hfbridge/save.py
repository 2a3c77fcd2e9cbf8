"""Writes an HF checkpoint: each file gathered to and written by one rank, in turn."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from errno import ENOSPC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcore_core.errors import Problem, UsageError
from mcore_core.model.resolve import read_hf_config
from mcore_core.model.weight_files import INDEX, SINGLE, copy_beside
from mcore_hfbridge.export import assemble, bytes_of, dtype_of, pack, split
from mcore_hfbridge.ranks import agree
from mcore_hfbridge.writer import Entry, Writer, file_order

if TYPE_CHECKING:
    from mcore_hfbridge.plan import Plan
    from mcore_hfbridge.ranks import Ranks

BUCKET = 16 * 2**20
"""Bytes gathered at once: little enough that their memory is used again, and that caches help."""


def save(
    plan: "Plan",
    weights: Mapping[str, torch.Tensor],
    path: Path,
    ranks: "Ranks",
    max_shard_size: int,
    source: Path | None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder; collective. On an error the folder keeps the files it had."""
    agree(_make_folder(path))
    sizes = bytes_of(plan, ranks)
    files = _named(list(pack(sizes, max_shard_size)))
    mine = [f for k, f in enumerate(files) if k % ranks.replicas == ranks.replica]
    problems: list[Problem] = []
    written: list[str] = []
    # A round: every rank of the replica writes one file. Bucket after bucket is gathered to each
    # of them in turn, then all write at the same time.
    for start in range(0, len(mine), ranks.size):
        group = mine[start : start + ranks.size]
        entries = [file_order(_entries(plan, ranks, files[file])) for file in group]
        queues = [list(split(plan, {e.name: e.nbytes for e in each}, BUCKET)) for each in entries]
        writer = None
        if ranks.rank < len(group):
            file = group[ranks.rank]
            writer = Writer(path / _partial(file), entries[ranks.rank])
            written.append(file)
        for turn in range(max(map(len, queues))):
            tensors: dict[str, torch.Tensor] = {}
            for to, queue in enumerate(queues):
                if turn < len(queue):
                    tensors |= assemble(plan, weights, ranks, queue[turn], to=to)
            if tensors and not problems:
                assert writer is not None
                problems += _attempt(partial(writer.write, tensors), path)
        if writer is not None:
            problems += _attempt(writer.close, path)
    main = ranks.rank == 0 and ranks.replica == 0
    try:
        agree(problems)
    except BaseException:
        for file in written:
            (path / _partial(file)).unlink(missing_ok=True)
        raise
    for file in written:
        (path / _partial(file)).replace(path / file)
    agree([])
    agree(_finish(plan, path, files, sizes, ranks, source, config or {}) if main else [])


def save_file(
    plan: "Plan", weights: Mapping[str, torch.Tensor], path: Path, ranks: "Ranks"
) -> None:
    """Write all tensors of a plan into one file, by the first rank; collective."""
    main = ranks.rank == 0 and ranks.replica == 0
    problems = _make_folder(path.parent) if main else []
    agree(problems)
    entries = file_order(_entries(plan, ranks, list(plan.hf)))
    unfinished = path.with_name(_partial(path.name))
    writer = Writer(unfinished, entries) if main else None
    if ranks.replica == 0:
        for parts in split(plan, {e.name: e.nbytes for e in entries}, BUCKET):
            tensors = assemble(plan, weights, ranks, parts, to=0)
            if writer is not None and not problems:
                problems += _attempt(partial(writer.write, tensors), path.parent)
    if writer is not None:
        problems += _attempt(writer.close, path.parent)
    try:
        agree(problems)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if main:
        unfinished.replace(path)
    agree([])


def _named(runs: list[list[str]]) -> dict[str, list[str]]:
    """Return file name -> tensors, as transformers names them."""
    if len(runs) == 1:
        return {SINGLE: runs[0]}
    return {f"model-{i:05d}-of-{len(runs):05d}.safetensors": r for i, r in enumerate(runs, 1)}


def _partial(file: str) -> str:
    return f".partial-{file}"


def _entries(plan: "Plan", ranks: "Ranks", names: Sequence[str]) -> list[Entry]:
    return [Entry(name, dtype_of(ranks, plan.hf[name]), plan.hf[name].shape) for name in names]


def _attempt(write: Callable[[], None], folder: Path) -> list[Problem]:
    try:
        write()
    except OSError as error:
        return [_unwritable(folder, error)]
    return []


def _make_folder(path: Path) -> list[Problem]:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [_unwritable(path, error)]
    return []


def _unwritable(path: Path, error: Exception) -> Problem:
    full = getattr(error, "errno", None) == ENOSPC or "No space left" in str(error)
    why = "the disk is full" if full else str(getattr(error, "strerror", None) or error)
    with suppress(OSError):
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        why += f" ({free / 2**20:.0f} MiB free)"
    return Problem(
        "MC540",
        f"cannot write the model to {path}: {why}",
        ["fix: make room there, or save elsewhere"],
    )


def _finish(
    plan: "Plan",
    path: Path,
    files: Mapping[str, list[str]],
    sizes: Mapping[str, int],
    ranks: "Ranks",
    source: Path | None,
    config: Mapping[str, Any],
) -> list[Problem]:
    """Write what goes with the weights and remove weights of an earlier save."""
    try:
        for old in [*path.glob("model*.safetensors"), *path.glob(".partial-model*.safetensors")]:
            if old.name not in files:
                old.unlink()
        if len(files) == 1:
            (path / INDEX).unlink(missing_ok=True)
        else:
            _write_json(
                path / INDEX,
                {
                    "metadata": {"total_size": sum(sizes.values())},
                    "weight_map": {n: file for file, names in files.items() for n in names},
                },
            )
        if source is not None:
            dtype = ranks.held[next(iter(plan.hf.values())).held_by[0][0]].dtype
            copy_companions(source, path, str(dtype).removeprefix("torch."), config)
    except UsageError as error:
        return list(error.problems)
    except OSError as error:
        return [_unwritable(path, error)]
    return []


def copy_companions(
    source: Path, path: Path, dtype: str, changes: Mapping[str, Any] | None = None
) -> None:
    """Copy config.json, with the type that was written and `changes`, and the tokenizer's files."""
    config = {k: v for k, v in read_hf_config(source).items() if k != "quantization_config"}
    keys = [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]
    _write_json(path / "config.json", config | dict.fromkeys(keys, dtype) | dict(changes or {}))
    if source.resolve() == path.resolve():
        return
    copy_beside(source, path)


def _write_json(path: Path, value: Any) -> None:  # noqa: ANN401
    unfinished = path.with_name(_partial(path.name))
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)
