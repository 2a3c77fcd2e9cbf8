"""The decoder: megatron's HybridModel whose forward pass ends in hidden states."""

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from mcore_core.compat.grad_fusion import without_apex
from mcore_core.model.head import HeadLayer
from mcore_core.model.packed import PackedRow


class Decoder(HybridModel):  # type: ignore[misc]
    """One pipeline chunk: embedding, layers and final norm, as far as this chunk has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        with without_apex():
            super().__init__(*args, **kwargs)
        if self.post_process:
            # HybridModel builds its output layer by class name and always computes logits in it;
            # the same module as a HeadLayer keeps the weight, its sharding and its hooks
            self.output_layer.__class__ = HeadLayer

    def forward(self, tokens_T: Tensor, row: PackedRow) -> Tensor:
        """Run this chunk.

        Args:
            tokens_T: Token ids of this rank's part of the row.
            row: The packed row.

        Returns:
            Hidden states [T, 1, H] (with sequence parallelism, T / tp of them).
        """
        hidden = self.embed(tokens_T) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=None,
            packed_seq_params=row,
            padding_mask=self._sequences(row),
        )
        if self.post_process:
            hidden, _ = self.output_layer(hidden)
        assert isinstance(hidden, Tensor)
        return hidden

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Return the embeddings of tokens, [T, 1, H] (with sequence parallelism, T / tp of them)."""
        hidden: Tensor = self.embedding(input_ids=tokens_T.unsqueeze(0), position_ids=None)
        scale = self.config.shape.embedding_scale
        if scale != 1.0:
            # rounded to the model's precision, as checkpoints were trained with
            hidden = hidden * torch.tensor(scale, dtype=hidden.dtype, device=hidden.device)
        return hidden

    def _sequences(self, row: PackedRow) -> Tensor | None:
        """Return what experts want to know: the sequence of each token in the layers, [1, T]."""
        if self.config.shape.moe is None or row.sequence_T is None:
            return None
        sequence_T = row.sequence_T
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            sequence_T = sequence_T.chunk(group.size())[group.rank()]
        return sequence_T.unsqueeze(0)

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the output weight [V / tp, H]."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight
