"""Have a model answer prompts, each data-parallel rank its own."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mcore_core.protocols import Request, Sampling, StepRun, Unit

if TYPE_CHECKING:
    from mcore_core.protocols import RolloutEngine


def answers(
    engine: "RolloutEngine",
    units: Sequence[Unit],
    sampling: Sampling,
    run: StepRun,
    *,
    name: str,
    weights_of: int,
) -> list[tuple[int, ...]]:
    """Return the tokens that answer each unit's `prompt_ids`; collective over all ranks.

    Args:
        engine: What generates.
        units: This data-parallel rank's.
        sampling: How.
        run: The step.
        name: Begins the ids of the requests: unlike that of any other step. What follows depends on
            the prompts alone, so that answers are the same however the batch is divided.
        weights_of: The optimizer steps that the engine's weights have seen.
    """
    ids = [f"{name}-{key}" for key in _names(units, run)]
    engine.wake()
    engine.update_weights(step=weights_of)
    engine.submit(
        [
            Request(key, tuple(int(t) for t in unit["prompt_ids"]), sampling)
            for key, unit in zip(ids, units, strict=True)
        ]
    )
    found: dict[str, tuple[int, ...]] = {}
    # data-parallel ranks poll equally often: experts may span them
    while not all(run.gather(len(found) == len(ids))):
        found |= {done.id: done.token_ids for done in engine.poll(wait=True)}
    engine.sleep()
    return [found[key] for key in ids]


def _names(units: Sequence[Unit], run: StepRun) -> list[str]:
    """Return a name for each unit: its prompt's hash, numbered where several have that prompt."""
    mine = [
        hashlib.blake2b(np.ascontiguousarray(u["prompt_ids"], np.int32), digest_size=8).hexdigest()
        for u in units
    ]
    rank, _ = run.dp
    before = Counter(key for part in run.gather(mine)[:rank] for key in part)
    names = []
    for key in mine:
        names.append(f"{key}-{before[key]}")
        before[key] += 1
    return names
