"""Transformer Engine's attention with rotary embeddings from the packed row."""

from typing import TYPE_CHECKING, Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention

from mcore_core.model.decode import attend_step

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_core.model.config import DecoderConfig
    from mcore_core.model.packed import PackedRow


def engine_can(config: "DecoderConfig") -> bool:
    """Return whether Transformer Engine's kernel serves every layer; else ours does.

    Windows chosen by layer, sinks, latent attention and context parallelism over packed rows run
    in our attention, where they are tested.
    """
    windows = config.shape.window_size is not None
    plain = config.softmax_type == "vanilla" and not windows and config.shape.mla is None
    return plain and config.context_parallel_size == 1


class EngineAttention(TEDotProductAttention):  # type: ignore[misc]
    """TEDotProductAttention that rotates queries and keys first, as CoreAttention does."""

    def __init__(
        self,
        config: "DecoderConfig",
        layer_number: int,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        kwargs["softmax_scale"] = kwargs.get("softmax_scale") or config.shape.softmax_scale
        super().__init__(config, layer_number, *args, **kwargs)
        self.layer = config.hf_layer(layer_number)
        self.scale = kwargs["softmax_scale"] or config.kv_channels**-0.5
        self.rotary = config.rope_of(self.layer)

    def forward(
        self,
        query: "Tensor",
        key: "Tensor",
        value: "Tensor",
        attention_mask: "Tensor | None",
        attn_mask_type: Any,  # noqa: ANN401
        packed_seq_params: "PackedRow | None" = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> "Tensor":
        """Attend within each sequence of a packed row; shapes as in CoreAttention."""
        assert packed_seq_params is not None, "attention runs on packed rows"
        if self.rotary is not None:
            query, key = self.rotary.apply(query, key, packed_seq_params)
        kept = packed_seq_params.kept
        if kept is not None:
            stored = kept.store(self.layer, key, value)
            if kept.keys is not None:
                return attend_step(query, stored, packed_seq_params, scale=self.scale).flatten(1)
        out: Tensor = super().forward(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )
        return out
