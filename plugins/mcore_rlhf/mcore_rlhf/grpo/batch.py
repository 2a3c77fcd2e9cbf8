"""A micro-batch of completions, and what each token's loss is multiplied by and divided by.

Shapes: T tokens of the packed row, P tokens of a prompt, L tokens after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mcore_core.data.collate import pack_sequences
from mcore_core.protocols import Batch, Unit

type Divisor = Literal["sequences", "micro_batches", "length", "tokens"]
"""What a sum over tokens is divided by, see `shares`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOBatch(Batch):
    """A packed row of prompts with their completions; weights_T is 1 on what the model wrote."""

    advantages_T: Tensor
    policy_T: Tensor
    """Multiplies the policy term: importance correction, and 0 below the entropy quantile."""
    share_T: Tensor
    """Multiplies the whole loss of a token; 0 on what overlong_filter left out."""
    count_T: Tensor
    """What each token adds to the divisor."""
    old_T: Tensor | None
    """Log-probabilities at the start; None: those of this very pass, so that the ratio is 1."""
    ref_T: Tensor | None
    rollout_T: Tensor
    """Log-probabilities that the engine gave."""


def collate(units: Sequence[Unit], *, divisor: Divisor, length: int) -> GRPOBatch:
    """Pack completions.

    Args:
        units: Each has `input_ids` [P + L], `trains` bool [P + L], `advantage`, `kept` (false where
            overlong_filter left it out), and where they are known `policy`, `old`, `ref` and
            `rollout`, float32 [P + L], all at the position of the token itself; and `routing`, the
            experts of each token, int16 [P + L, layers, K].
        divisor: As the loss says.
        length: max_completion_length.
    """
    if not units:
        return _empty()
    trains = [np.asarray(unit["trains"], bool) for unit in units]
    kept = [bool(unit["kept"]) for unit in units]
    share, count = shares(trains, kept, divisor=divisor, length=length)
    fields = pack_sequences(
        [
            (np.asarray(u["input_ids"]), t.astype(np.float32))
            for u, t in zip(units, trains, strict=True)
        ]
    )

    def shifted(values: Sequence[Any]) -> Tensor:
        """Return [T]: at each position the value of the next token, 0 at ends of sequences."""
        moved = [np.append(np.asarray(v, np.float32)[1:], np.float32(0)) for v in values]
        return torch.from_numpy(np.concatenate(moved))

    def optional(name: str) -> Tensor | None:
        if units[0].get(name) is None:
            return None
        return shifted([unit[name] for unit in units])

    routing = None
    if units[0].get("routing") is not None:
        routing = torch.from_numpy(np.concatenate([np.asarray(u["routing"]) for u in units]))
    ones = [np.ones(len(t), np.float32) for t in trains]
    policy_T, rollout_T = optional("policy"), optional("rollout")
    return GRPOBatch(
        **fields,
        routing_TLK=routing,
        advantages_T=shifted(
            [one * np.float32(unit["advantage"]) for one, unit in zip(ones, units, strict=True)]
        ),
        policy_T=shifted(ones) if policy_T is None else policy_T,
        share_T=shifted(share),
        count_T=shifted(count),
        old_T=optional("old"),
        ref_T=optional("ref"),
        rollout_T=torch.zeros_like(fields["weights_T"]) if rollout_T is None else rollout_T,
    )


def _empty() -> GRPOBatch:
    none = torch.zeros(0)
    return GRPOBatch(
        tokens_T=none.long(),
        targets_T=none.long(),
        weights_T=none,
        lengths=(),
        advantages_T=none,
        policy_T=none,
        share_T=none,
        count_T=none,
        old_T=None,
        ref_T=None,
        rollout_T=none,
    )


def shares(
    trains: Sequence[NDArray[np.bool_]],
    kept: Sequence[bool],
    *,
    divisor: Divisor,
    length: int,
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Return what multiplies each token's loss and what it adds to the divisor, [P + L] of each.

    sequences: a mean over completions of means over tokens. micro_batches: a mean over
    micro-batches of means over their tokens. length: a sum over completions * length. tokens: a
    mean over the tokens of the global batch. A completion that is not kept has no loss; it still
    counts among sequences and lengths, as in TRL, and its tokens count nowhere.
    """
    live = [t & k for t, k in zip(trains, kept, strict=True)]
    in_batch = max(1, sum(int(t.sum()) for t in live))
    share, count = [], []
    for i, (t, on) in enumerate(zip(trains, live, strict=True)):
        first = np.zeros(len(t), np.float32)
        first[np.flatnonzero(t)[:1]] = 1.0
        weight = on.astype(np.float32)
        match divisor:
            case "sequences":
                share.append(weight / np.float32(max(1, int(on.sum()))))
                count.append(first)
            case "micro_batches":
                share.append(weight / np.float32(in_batch))
                count.append(first if i == 0 else np.zeros_like(first))
            case "length":
                share.append(weight)
                count.append(first * np.float32(length))
            case "tokens":
                share.append(weight)
                count.append(weight)
    return share, count
