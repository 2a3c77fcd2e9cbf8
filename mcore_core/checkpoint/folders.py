"""Checkpoint folders: their names, which of them are complete, which is the newest, which go.

`checkpoint-100` is complete exactly when it holds training.json, which is written last; until then
the folder is called `.partial-checkpoint-100`.
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_core.errors import usage_error

STATE = "mcore"
"""Folder of the torch_dist state inside a checkpoint."""
TRAINING = "training.json"
ADAPTER = "adapter_config.json"
"""PEFT's file about an adapter."""
DIVIDED = "distributed_optimizer"
"""Key in training.json: whether the state is that of megatron's distributed optimizer."""
MOVED = "moved_models"
"""Key in training.json: models beside the policy whose weights are in the state."""
_NAME = re.compile(r"^checkpoint-(\d+)$")
_PARTIAL = ".partial-checkpoint-"
_DOOMED = ".deleting-checkpoint-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One complete checkpoint."""

    path: Path
    training: dict[str, Any]
    """What training.json says."""

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return int(self.training["step"])

    @property
    def state(self) -> Path:
        """Folder of the training state."""
        return self.path / STATE


def final_path(run: Path, step: int) -> Path:
    """Return the folder of a complete checkpoint."""
    return run / f"checkpoint-{step}"


def merged_path(run: Path, step: int) -> Path:
    """Return the folder of the model that a checkpoint's adapters make, merged."""
    return run / f"checkpoint-{step}-merged"


def partial_path(run: Path, step: int) -> Path:
    """Return the folder in which a checkpoint is written."""
    return run / f"{_PARTIAL}{step}"


def read(path: Path) -> Checkpoint | None:
    """Return the checkpoint in a folder; None where it is not complete."""
    try:
        training = json.loads((path / TRAINING).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return Checkpoint(path, training) if "step" in training else None


def complete(run: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of one run folder, oldest step first."""
    if not run.is_dir():
        return []
    found = [read(p) for p in run.iterdir() if _NAME.match(p.name)]
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def find(load: Path) -> Checkpoint | None:
    """Return what `--load` means: a checkpoint, its `mcore` folder, a run folder, or its parent.

    Of several runs below a parent the one that saved last is meant.
    """
    for folder in (load, load.parent if load.name == STATE else load):
        if (checkpoint := read(folder)) is not None:
            return checkpoint
    candidates = [c[-1] for run in _runs(load) if (c := complete(run))]
    return max(candidates, key=lambda c: (c.training.get("time", 0.0), c.step), default=None)


def _runs(folder: Path) -> Iterator[Path]:
    yield folder
    if folder.is_dir():
        yield from (p for p in folder.iterdir() if p.is_dir() and not _NAME.match(p.name))


def require(load: Path, option: str = "--load", *, restart: bool = True) -> Checkpoint:
    """Return `find(load)`, or say what is there instead; `restart`: a run may begin without it."""
    found = find(load)
    if found is not None:
        return found
    if not load.exists():
        raise usage_error(
            "MC701",
            f"{option} {load}: no such folder",
            "fix: give the run folder of an earlier run (its --save) or one of its checkpoint-N",
        )
    entries = sorted(p.name for p in load.iterdir())[:8] if load.is_dir() else []
    unfinished = [n for n in entries if n.startswith(_PARTIAL)]
    raise usage_error(
        "MC702",
        f"{option} {load} holds no complete checkpoint",
        f"found: {', '.join(entries) or 'nothing'}",
        f"unfinished and not usable: {', '.join(unfinished)}" if unfinished else "",
        "fix: give a folder that holds checkpoint-N with training.json"
        + (
            ", or --exit_on_missing_checkpoint false to start from the beginning"
            if option == "--load" and restart
            else ""
        ),
    )


def require_adapter(folder: Path, option: str = "--adapters") -> Path:
    """Return PEFT's file about the adapter in a folder, or say what is there instead."""
    file = folder / ADAPTER
    if file.is_file():
        return file
    entries = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else []
    raise usage_error(
        "MC550",
        f"{option} {folder}: no {ADAPTER} there",
        f"found: {', '.join(entries) or 'nothing'}",
        "fix: give a folder that PEFT's save_pretrained wrote, or a checkpoint-N of a LoRA run",
    )


def clean(run: Path) -> None:
    """Remove what a killed run left: unfinished checkpoints and half-deleted ones."""
    if not run.is_dir():
        return
    for path in run.iterdir():
        if path.name.startswith((_PARTIAL, _DOOMED)) or (
            _NAME.match(path.name) and read(path) is None and (path / STATE).is_dir()
        ):
            shutil.rmtree(path, ignore_errors=True)


def retain(run: Path, interval: int | None) -> list[Path]:
    """Delete checkpoints that are neither the newest nor a multiple of `interval`; return them."""
    if interval is None:
        return []
    gone = []
    for checkpoint in complete(run)[:-1]:
        if checkpoint.step % interval:
            doomed = run / f"{_DOOMED}{checkpoint.step}"
            checkpoint.path.rename(doomed)  # at once, so that no half-deleted one looks complete
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(merged_path(run, checkpoint.step), ignore_errors=True)
            gone.append(checkpoint.path)
    return gone
