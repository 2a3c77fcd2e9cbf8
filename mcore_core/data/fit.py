"""Make a tokenized sample fit max_length: leave it out, cut it, or make several of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcore_core.data.rows import RowDropped

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOO_LONG = "longer than --max_length"
NOTHING_TRAINS = "nothing to train on"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sample: weights[t] is the weight of predicting token t from those before it."""

    input_ids: "NDArray[np.int32]"
    weights: "NDArray[np.float32]"


def fitted(
    ids: "NDArray[np.int32]",
    weights: "NDArray[np.float32]",
    max_length: int | None,
    strategy: str,
) -> list[Encoded]:
    """Return the sample, or its pieces with the strategy `split`, as far as something trains.

    A piece begins with the last token of the one before: so every token but the very first is
    predicted once, from up to `max_length - 1` tokens before it, and none is lost.

    Args:
        ids: [L].
        weights: [L]; the first is set to 0, since nothing comes before it.
        max_length: Of a sample or piece, at least 2; None: any.
        strategy: A value of `--truncation_strategy`.

    Raises:
        RowDropped: It is too long, or nothing trains.
    """
    if max_length is None or len(ids) <= max_length:
        spans = [slice(0, len(ids))]
    elif strategy == "left":
        spans = [slice(len(ids) - max_length, len(ids))]
    elif strategy == "right":
        spans = [slice(0, max_length)]
    elif strategy == "split":
        starts = range(0, len(ids) - 1, max_length - 1)
        spans = [slice(start, start + max_length) for start in starts]
    else:
        raise RowDropped(TOO_LONG)
    pieces = [Encoded(ids[span], weights[span].copy()) for span in spans]
    for piece in pieces:
        piece.weights[:1] = 0.0
    kept = [piece for piece in pieces if piece.weights.any()]
    if not kept:
        raise RowDropped(NOTHING_TRAINS)
    return kept
