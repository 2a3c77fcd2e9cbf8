"""Multi-token prediction: layers after the decoder that each predict one token further ahead."""

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule

from mcore_core.model.config import SUBLAYERS, DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_core.model.packed import PackedRow


class PredictionLayer(MegatronModule):  # type: ignore[misc]
    """One depth: joins a hidden state with the embedding of a later token, then runs a layer.

    Built by megatron's MultiTokenPredictionBlock, which numbers depths from 1. Its inner layer
    counts as the HF layer after the decoder's, so that per-layer settings reach it.

    Args:
        config: The decoder's configuration.
        layer_number: The depth, from 1.
        pg_collection: Process groups.
        mtp_layer_pattern: The two positions of the inner layer.
        hybrid_submodules: What the inner layer is built of.
        norm: Builds a norm.
        column: Builds a column-parallel linear layer.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer_number: int = 1,
        pg_collection: Any = None,  # noqa: ANN401
        mtp_layer_pattern: str = "*-",
        hybrid_submodules: Any = None,  # noqa: ANN401
        *,
        norm: Any,  # noqa: ANN401
        column: Any,  # noqa: ANN401
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.layer_number, self.tp_group = layer_number, pg_collection.tp
        sizes = {
            "config": config,
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        self.enorm: torch.nn.Module = norm(**sizes)
        self.hnorm: torch.nn.Module = norm(**sizes)
        self.eh_proj = column(
            2 * config.hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="mtp_eh_proj",
            tp_group=pg_collection.tp,
        )
        layers = config.shape.num_layers + layer_number - 1
        # megatron's schedules know the inner layer by this name
        self.mtp_model_layer = HybridStack(
            config=config,
            submodules=hybrid_submodules,
            layer_type_list=list(mtp_layer_pattern),
            pp_layer_offset=layers * SUBLAYERS,
            post_layer_norm=False,
            pg_collection=pg_collection,
            is_mtp_layer=True,
        )
        if config.shape.mtp_norm:
            self.final_layernorm: torch.nn.Module = norm(**sizes)

    def forward(
        self,
        hidden: "Tensor",
        embedded: "Tensor",
        row: "PackedRow",
        final_norm: torch.nn.Module,
    ) -> "Tensor":
        """Return the hidden states that predict one token further, [T, 1, H].

        Args:
            hidden: Of the depth before, normed, [T, 1, H] (with sequence parallelism, T / tp).
            embedded: Embeddings of the tokens that the depth before predicts.
            row: The packed row.
            final_norm: The decoder's, for a model whose prediction layers have none.
        """
        joined = torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)
        joined, _ = self.eh_proj(joined)
        if self.tp_group.size() > 1:
            joined = gather_from_tensor_model_parallel_region(joined, group=self.tp_group)
            if self.config.sequence_parallel:
                joined = scatter_to_sequence_parallel_region(joined, group=self.tp_group)
        out = self.mtp_model_layer(
            hidden_states=joined,
            attention_mask=None,
            rotary_pos_emb=None,
            packed_seq_params=row,
        )
        last = self.final_layernorm if self.config.shape.mtp_norm else final_norm
        normed: Tensor = last(out)
        return normed
