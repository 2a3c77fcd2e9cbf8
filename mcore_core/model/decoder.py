"""The decoder: megatron's HybridModel whose forward pass ends in hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from mcore_core.compat.grad_fusion import without_apex
from mcore_core.model.head import HeadLayer
from mcore_core.model.packed import PackedRow
from mcore_core.model.scores import ScoreHead


class Decoder(HybridModel):  # type: ignore[misc]
    """One pipeline chunk: embedding, layers and final norm, as far as this chunk has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        with without_apex():
            super().__init__(*args, **kwargs)
        self.score: ScoreHead | None = None
        shape = self.config.shape
        # rounded to the model's precision, as checkpoints were trained with
        rounded = torch.tensor(shape.embedding_scale, dtype=self.config.params_dtype)
        self.scale: float = rounded.item()
        """Of embeddings."""
        if shape.head != "lm":
            self.output_layer: Any = None
            if self.post_process and shape.head == "scores":
                self.score = ScoreHead(self.config, shape.scores)
            return
        if self.post_process:
            # HybridModel builds its output layer by class name and always computes logits in it;
            # the same module as a HeadLayer keeps the weight, its sharding and its hooks
            self.output_layer.__class__ = HeadLayer
        tied = self.share_embeddings_and_output_weights
        if self.mtp_process and tied and not self.pre_process:
            # this stage has the embedding, whose weight is the head's: megatron-core 0.19 builds a
            # second one beside it, which nothing reads and no checkpoint can hold
            del self.output_layer.weight
            self.output_layer.weight = None

    def forward(self, tokens_T: Tensor, row: PackedRow, *, ahead: Sequence[Tensor] = ()) -> Tensor:
        """Run this chunk.

        Args:
            tokens_T: Token ids of this rank's part of the row.
            row: The packed row.
            ahead: For each depth of multi-token prediction that is to run, the token ids that many
                positions later.

        Returns:
            Hidden states [T, 1, H] (with sequence parallelism, T / tp of them). The last chunk
            returns those of each depth too, one after another: [(1 + depths) T, 1, H].
        """
        hidden = self.embed(tokens_T) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=None,
            packed_seq_params=row,
        )
        if self.mtp_process and len(ahead):
            hidden = self._predict(hidden, row, ahead)
        if self.score is not None:
            hidden = self.score(hidden)
        elif self.post_process and self.output_layer is not None:
            hidden, _ = self.output_layer(hidden)
        assert isinstance(hidden, Tensor)
        return hidden

    def _predict(self, hidden: Tensor, row: PackedRow, ahead: Sequence[Tensor]) -> Tensor:
        found = [hidden]
        for layer, later_T in zip(self.mtp.layers, ahead, strict=True):
            found.append(layer(found[-1], self.embed(later_T), row, self.decoder.final_norm))
        return torch.cat(found)

    def embed(self, tokens_T: Tensor) -> Tensor:
        """Return the tokens' embeddings, [T, 1, H] (with sequence parallelism T / tp of them)."""
        hidden: Tensor = self.embedding(input_ids=tokens_T.unsqueeze(0), position_ids=None)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return hidden

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the weights for distributed checkpoints; megatron's asks for an output layer."""
        above: Any = super() if self.config.shape.head == "lm" else super(LanguageModule, self)
        found: dict[str, Any] = above.sharded_state_dict(prefix, sharded_offsets, metadata)
        return found

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the output weight [V / tp, H]."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight
