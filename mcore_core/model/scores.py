"""What a loss may read instead of log-probabilities: scores, hidden states, logits of some tokens.

A score head is small, so every tensor-parallel rank holds all of it and computes the same numbers:
the hidden states then need no sum of gradients over these ranks, and the head's own gradient is
right as it is. Logits come from the rows of the output layer, which the ranks share.

Shapes: K tokens that have a weight, H hidden size, N numbers of each.
"""

import zlib
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from mcore_core.model.head import VocabRange

if TYPE_CHECKING:
    from mcore_core.model.config import DecoderConfig


class ScoreHead(MegatronModule):  # type: ignore[misc]
    """The weight [N, H] of a linear layer without bias, the same on every tensor-parallel rank.

    It is called in the model's forward pass, so that hooks on it (parameter gathering) run, and
    returns the hidden states as they are: the head multiplies those of the tokens it needs.
    """

    def __init__(self, config: "DecoderConfig", outputs: int) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(
            torch.zeros(outputs, config.hidden_size, dtype=config.params_dtype)
        )
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]  # no Muon

    def draw(self, seed: int) -> None:
        """Draw the weight from the seed alone: it is the same in every layout and precision."""
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(b"score.weight"))
        values = torch.randn(self.weight.shape, generator=generator)
        with torch.no_grad():
            self.weight.copy_(values * self.config.init_method_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states as they are."""
        return hidden


def score_heads(chunks: Any) -> list[ScoreHead]:  # noqa: ANN401
    """Return the score heads of these chunks: one on the last pipeline stage, none elsewhere."""
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, ScoreHead)]


def scores(hidden_KH: Tensor, weight_NH: Tensor) -> Tensor:
    """Return hidden states times the score head's weight, float32 [K, N]."""
    return hidden_KH.float() @ weight_NH.float().t()


def some_logits(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    tokens: tuple[int, ...],
    *,
    vocab: VocabRange,
    temperature: float,
) -> Tensor:
    """Return the logits of some vocabulary entries, float32 [K, N].

    Args:
        hidden_KH: The same on every tensor-parallel rank; its gradient is this rank's part.
        weight_VH: This rank's rows of the output weight.
        tokens: Global ids, N of them.
        vocab: Which rows `weight_VH` holds.
        temperature: Divides the logits.
    """
    local_N = torch.tensor(tokens, device=hidden_KH.device) - vocab.start
    mine_N = (local_N >= 0) & (local_N < vocab.rows)
    rows_NH = weight_VH[local_N.clamp(0, len(weight_VH) - 1)].float() * mine_N.unsqueeze(-1)
    logits_KN: Tensor = (hidden_KH.float() @ rows_NH.t()) / temperature
    if vocab.group is not None and vocab.group.size() > 1:
        logits_KN = reduce_from_tensor_model_parallel_region(logits_KN)
    return logits_KN
