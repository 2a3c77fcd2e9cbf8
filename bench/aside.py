"""One side of a comparison in a process of its own: a script again, with `--side`."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one process runs."""

    side: str
    model: str
    data: str
    adapter: str
    """Folder of the PEFT adapter that it starts from."""
    steps: int
    seed: int
    platform: str = "cpu"
    held: str | None = None
    """Rows to evaluate on."""

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on the GPU."""
        return self.platform == "cuda"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a `Side` that a process of its own is given."""
    for name in ("side", "data", "adapter", "held"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--platform", default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)


def asked(options: argparse.Namespace) -> Side | None:
    """Return the side that this process is to run, if it is one."""
    if options.side is None:
        return None
    return Side(**{name: getattr(options, name) for name in Side.__dataclass_fields__})


def start_side(script: str | Path, side: Side, threads: int | None = None) -> subprocess.Popen[str]:
    """Start `script --side SIDE --OPTION VALUE ...`.

    Args:
        script: What to run.
        side: Its arguments.
        threads: For products on the CPU; the default is one for each core.
    """
    given = {name: value for name, value in asdict(side).items() if value is not None}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    environment = {"OMP_NUM_THREADS": str(threads or os.cpu_count()), **os.environ}
    if not side.on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.Popen(
        [sys.executable, str(script), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish_side(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Return the JSON document of its last line; exit with what it said where it failed."""
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"{name} failed:\n{out[-1000:]}\n{err[-3000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def run_side(script: str | Path, side: Side) -> dict[str, Any]:
    """Do both."""
    return finish_side(start_side(script, side), side.side)
