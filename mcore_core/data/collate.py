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


def pack_marked(
    sequences: "Sequence[tuple[NDArray[np.integer], NDArray[np.floating]]]",
) -> PackedFields:
    """Concatenate sequences whose marked tokens are read, for heads that predict no next token.

    Args:
        sequences: ids [L] and marks [L] of each: marks[t] is the weight of token t itself.

    Returns:
        As `pack_sequences`, but position t has the weight marks[t].
    """
    fields = pack_sequences(sequences)
    weights = np.concatenate([marks for _, marks in sequences]).astype(np.float32)
    fields["weights_T"] = torch.from_numpy(weights)
    return fields


def last_token(ids: "NDArray[np.integer]", pad_id: int | None) -> "NDArray[np.float32]":
    """Return marks [L]: 1 at the token that transformers' classifiers read, 0 elsewhere.

    That is the last token that is not padding: where the tokenizer pads with its end-of-text token,
    an end-of-text token at the end of the sequence is passed over too.
    """
    marks = np.zeros(len(ids), np.float32)
    real = np.flatnonzero(ids != pad_id) if pad_id is not None else np.arange(len(ids))
    marks[real[-1] if len(real) else 0] = 1.0
    return marks
