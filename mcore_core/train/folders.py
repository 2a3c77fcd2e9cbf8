"""The run folder: where it is, and the files that say how to repeat the run."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import yaml

from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.context import RunContext

CHOSEN = "MCORE_RUN_DIR"
"""Environment variable: the run folder that a launcher chose, handed to restarts."""


def choose(config: "RunConfig") -> Path:
    """Return the run folder; the same on every rank. Collective."""
    box = [os.environ.get(CHOSEN) or str(_new(config)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return Path(box[0])


def _new(config: "RunConfig") -> Path:
    save = config[CheckpointConfig].save
    if save is None:
        name = Path(config[WeightsConfig].model or "model").name
        base = Path("mcore_output") / name
    else:
        base = Path(save).expanduser()
    if not config[TrainConfig].add_version:
        return base
    taken = [p.name for p in base.iterdir()] if base.is_dir() else []
    numbers = [int(n[1:].split("-")[0]) for n in taken if n[:1] == "v" and n[1:2].isdecimal()]
    return base / f"v{max(numbers, default=-1) + 1}-{time.strftime('%Y%m%d-%H%M%S')}"


@contextmanager
def writable(folder: Path, what: str = "the run folder") -> Iterator[None]:
    """Turn what goes wrong in writing a folder's first files into a message."""
    try:
        yield
    except OSError as error:
        raise usage_error(
            "MC708",
            f"{what} {folder} cannot be written: {error.strerror or error}",
            "fix: --save with a folder of your own, on a disk with room",
        ) from error


def run_yaml(config: "RunConfig", plugins: tuple[str, ...]) -> str:
    """Return the resolved options as a file that `mcore run` repeats."""
    document: dict[str, Any] = {"plugin": list(plugins), **config.dump()}
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text


def write_facts(run: "RunContext", plugins: tuple[str, ...]) -> None:
    """Write run.yaml and run.json; on the main rank."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    (run.output_dir / "run.yaml").write_text(run_yaml(run.config, plugins), encoding="utf-8")
    facts = {
        "plugins": run.plugins,
        "layout": str(run.layout),
        "world_size": run.world_size,
        "train_iters": run.train_iters,
        "environment": run.environment,
        "data": run.data,
    }
    text = json.dumps(facts, indent=2, default=str)
    (run.output_dir / "run.json").write_text(text + "\n", encoding="utf-8")
