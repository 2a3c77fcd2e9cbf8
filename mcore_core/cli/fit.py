"""A warning before a model is built that will not fit, with what would."""

import os
import sys
from typing import TYPE_CHECKING

from mcore_core.planning.memory import GIB, Memory, memory
from mcore_core.planning.render import command_of
from mcore_core.planning.search import PARTS, Cluster, search

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.platform.base import Platform
    from mcore_core.train.plan import ModelSource

PROCESS = round(0.6 * GIB)
"""Host memory of a rank's Python, torch and megatron."""


def warn_if_too_large(config: "RunConfig", source: "ModelSource", platform: "Platform") -> None:
    """Print a warning on the main rank where the run's estimate is above what there is."""
    if int(os.environ.get("RANK", "0")) == 0 and (text := too_large(config, source, platform)):
        sys.stderr.write(text)


def too_large(config: "RunConfig", source: "ModelSource", platform: "Platform") -> str | None:
    """Return the warning; None where the run fits."""
    gpu, capacity = platform.name == "cuda", platform.memory_total()
    ranks = memory(
        config,
        source.architecture,
        source.layout,
        source.stage_layers,
        capacity=capacity,
        gpu=gpu,
    )
    if gpu:
        worst = max(ranks, key=lambda m: m.total)
        where = f"pipeline rank {worst.rank}" if len(ranks) > 1 else "each rank"
        if worst.total <= capacity:
            return None
        lines = [_line(f"{where} will need about", worst.total, capacity, "its GPU"), _parts(worst)]
        lines += _instead(config, source, capacity)
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", str(source.layout.world)))
        each = sum(m.total for m in ranks) / len(ranks)
        total = here * (each + PROCESS)
        if total <= capacity:
            return None
        worst = max(ranks, key=lambda m: m.total)
        ranks_here = "1 rank" if here == 1 else f"{here} ranks"
        lines = [_line(f"{ranks_here} here will need about", total, capacity, "this machine")]
        lines += [_parts(worst), "fix: fewer ranks a machine, a smaller --max_length, or GPUs"]
    return "\n  ".join(lines) + "\n"


def _line(who: str, need: float, have: int, what: str) -> str:
    return (
        f"warning[MC630]: {who} {need / GIB:.1f} GiB, and {what} has {have / GIB:.1f}: the run may "
        "end for lack of memory"
    )


def _parts(worst: Memory) -> str:
    found = ", ".join(
        f"{name} {size / GIB:.1f}" for name in PARTS if (size := getattr(worst, name)) > GIB / 20
    )
    return f"the largest rank, in GiB: {found}"


def _instead(config: "RunConfig", source: "ModelSource", capacity: int) -> list[str]:
    world = source.layout.world
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(min(world, 8))))
    cluster = Cluster(gpus=world, memory=capacity, per_node=local)
    fitting = [c for c in search(config, source.architecture, cluster) if not c.reason]
    if not fitting:
        return [
            f"no layout of {world} ranks fits; mcore plan --gpus N tells how many would",
        ]
    best = fitting[0]
    return [f"fix: {command_of(best) or 'leave out the sizes of the layout'}", "mcore plan: others"]
