"""Put sequences one after another into a packed row, with the targets that each position predicts.

T tokens of the row, S sequences in it.
"""

from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class PackedFields(TypedDict):
    """The fields of `mcore_core.protocols.Batch`."""

    tokens_T: torch.Tensor
    targets_T: torch.Tensor
    weights_T: torch.Tensor
    lengths: tuple[int, ...]


def pack_sequences(
    sequences: "Sequence[tuple[NDArray[np.integer], NDArray[np.floating]]]",
) -> PackedFields:
    """Concatenate sequences.

    Args:
        sequences: ids [L] and weights [L] of each: weights[t] is that of predicting token t.

    Returns:
        Position t of a sequence has target ids[t + 1] and weight weights[t + 1]; its last position
        predicts nothing: target 0, weight 0.
    """
    lengths = tuple(len(ids) for ids, _ in sequences)
    tokens = np.concatenate([ids for ids, _ in sequences]).astype(np.int64)
    weights = np.concatenate([weights for _, weights in sequences]).astype(np.float32)
    ends = np.cumsum(lengths) - 1
    targets = np.roll(tokens, -1)
    weights = np.roll(weights, -1)
    targets[ends] = 0
    weights[ends] = 0.0
    return PackedFields(
        tokens_T=torch.from_numpy(tokens),
        targets_T=torch.from_numpy(targets),
        weights_T=torch.from_numpy(weights),
        lengths=lengths,
    )
