"""A micro-batch of supervised fine-tuning."""

from dataclasses import dataclass

from torch import Tensor

from mcore_core.protocols import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTBatch(Batch):
    """A packed row whose tokens carry their share of the loss's divisor."""

    count_T: Tensor
    """What each token adds to the count, float32: its weight, or, where the loss is an average over
    sequences, 1 at the first token of each sequence that trains."""
    channel_T: Tensor | None = None
    """The channel of each token's sample, int64: 1 is the first of `channels`, 0 none."""
    channels: tuple[str, ...] = ()
    """The names of all channels that the run has seen, the same on every rank."""
