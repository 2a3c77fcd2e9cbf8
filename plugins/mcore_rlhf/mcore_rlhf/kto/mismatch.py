"""Pair every prompt of a global batch with another one's answer, for KTO's estimate of the KL.

Units of the global batch are sorted by a hash of their content, and each gets the answer of the one
before it: the pairs depend on what is in the batch, not on its order, its micro-batches or the
ranks that hold it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.errors import usage_error
from mcore_core.protocols import StepRun, Unit
from mcore_rlhf.reference import unit_key

if TYPE_CHECKING:
    from numpy.typing import NDArray


def mismatched(units: Sequence[Unit], run: StepRun, *, max_length: int | None) -> list[Unit]:
    """Return, for each of this rank's units, its prompt with the answer of another one.

    Where both together are longer than max_length, the prompt loses its beginning.

    Raises:
        UsageError: The global batch has one unit.
    """
    keys = [unit_key(unit) for unit in units]
    answers = [_answer(unit) for unit in units]
    everyone = [each for part in run.gather(list(zip(keys, answers, strict=True))) for each in part]
    if len(everyone) < 2:
        raise usage_error(
            "MC332",
            "a global batch of one answer: kto compares each prompt with the answer to another",
            "fix: --global_batch_size 2 or more, or --loss_type apo_zero_unpaired",
        )
    everyone.sort(key=lambda each: each[0])
    before = {key: everyone[i - 1][1] for i, (key, _) in reversed(list(enumerate(everyone)))}
    return [_joined(u, before[key], max_length) for u, key in zip(units, keys, strict=True)]


def _answer(unit: Unit) -> "tuple[NDArray[Any], NDArray[Any]]":
    at = unit["prompt_length"]
    return np.asarray(unit["input_ids"])[at:], np.asarray(unit["weights"], np.float32)[at:]


def _joined(
    unit: Unit, answer: "tuple[NDArray[Any], NDArray[Any]]", max_length: int | None
) -> Unit:
    prompt = np.asarray(unit["input_ids"])[: unit["prompt_length"]]
    ids, weights = answer
    if max_length is not None and len(prompt) + len(ids) > max_length:
        prompt = prompt[-max(1, max_length - len(ids)) :]
        ids, weights = ids[: max_length - len(prompt)], weights[: max_length - len(prompt)]
    return {
        "input_ids": np.concatenate((prompt, ids)),
        "weights": np.concatenate((np.zeros(len(prompt), np.float32), weights)),
        "length": len(prompt) + len(ids),
    }
