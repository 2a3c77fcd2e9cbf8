"""Multi-head latent attention (DeepSeek): queries, keys and values through narrow projections.

Megatron's own MLASelfAttention loses, without Transformer Engine, the part of the rotary key's
gradient that the other tensor-parallel ranks' heads contribute, and has the gradients of its norms
added up twice without sequence parallelism. Here the down-projections are whole on every rank, as
Transformer Engine's are, and take this rank's tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import divide
from torch import Tensor

from mcore_core.model.config import DecoderConfig
from mcore_core.model.packed import PackedRow


@dataclass
class LatentSubmodules:
    """What the layer is built of."""

    column: Any
    """A column-parallel linear layer."""
    row: Any
    """A row-parallel one."""
    norm: Any
    core_attention: Any


class WholeLinear(torch.nn.Module):
    """A linear layer without bias, whole on every tensor-parallel rank."""

    def __init__(self, config: DecoderConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        empty = torch.empty(outputs, inputs, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(empty)
        if config.perform_initialization:
            config.init_method(self.weight)
        # under sequence parallelism each rank has the gradient of its tokens: they are added up
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the matrix."""
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):  # type: ignore[misc]
    """Self-attention of one layer, with the interface that TransformerLayer expects."""

    def __init__(
        self,
        config: DecoderConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        attn_mask_type: object = None,
        pg_collection: Any = None,  # noqa: ANN401
        **_: object,
    ) -> None:
        super().__init__(config=config)
        shape, mla = config.shape, config.shape.mla
        assert mla is not None
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group, self.mla = groups.tp, mla
        self.rope = config.rope_of(config.hf_layer(layer_number))
        self.heads = divide(shape.num_attention_heads, self.tp_group.size())
        self.query_size = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        hidden, total = config.hidden_size, shape.num_attention_heads
        if mla.q_lora_rank is None:
            self.linear_q_proj = self._column(submodules, hidden, total * self.query_size)
        else:
            self.linear_q_down_proj = WholeLinear(config, hidden, mla.q_lora_rank)
            self.q_layernorm = self._norm(submodules, mla.q_lora_rank)
            self.linear_q_up_proj = self._column(
                submodules, mla.q_lora_rank, total * self.query_size
            )
        self.linear_kv_down_proj = WholeLinear(
            config, hidden, mla.kv_lora_rank + mla.qk_rope_head_dim
        )
        self.kv_layernorm = self._norm(submodules, mla.kv_lora_rank)
        self.linear_kv_up_proj = self._column(
            submodules, mla.kv_lora_rank, total * (mla.qk_nope_head_dim + mla.v_head_dim)
        )
        self.core_attention = submodules.core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            softmax_scale=shape.softmax_scale or 1.0 / math.sqrt(self.query_size),
            pg_collection=groups,
        )
        self.linear_proj = submodules.row(
            total * mla.v_head_dim,
            hidden,
            config=config,
            init_method=config.output_layer_init_method,
            bias=shape.attention_output_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
        )
        self.recompute_core = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def _column(self, submodules: LatentSubmodules, inputs: int, outputs: int) -> Any:  # noqa: ANN401
        return submodules.column(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
        )

    def _norm(self, submodules: LatentSubmodules, size: int) -> Any:  # noqa: ANN401
        config = self.config
        return submodules.norm(config=config, hidden_size=size, eps=config.layernorm_epsilon)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each sequence of a packed row.

        Args:
            hidden_states: [T, 1, H], with sequence parallelism T / tp of them.
            attention_mask: Not used: the row says who sees whom.
            packed_seq_params: The row.

        Returns:
            [T, 1, H] and the bias of the output projection.
        """
        assert packed_seq_params is not None, "attention runs on packed rows"
        q, k, v = self._heads(hidden_states, packed_seq_params)
        if self.recompute_core and self.training:

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                out: Tensor = self.core_attention(q, k, v, None, packed_seq_params)
                return out

            out = tensor_parallel.checkpoint(attend, False, q, k, v)
        else:
            out = self.core_attention(q, k, v, attention_mask, packed_seq_params)
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(out.unsqueeze(1))
        return projected

    def _heads(self, hidden: Tensor, row: PackedRow) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys [T, heads, nope + rope] and values [T, heads, size]."""
        mla = self.mla
        if mla.q_lora_rank is None:
            q, _ = self.linear_q_proj(hidden)
        else:
            q, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        latent = self.linear_kv_down_proj(hidden)
        latent, k_rope = latent.split([mla.kv_lora_rank, mla.qk_rope_head_dim], dim=-1)
        # one rotary key serves the heads of all ranks: its gradient is the sum of theirs
        if self.tp_group.size() > 1:
            if self.config.sequence_parallel:
                k_rope = gather_from_sequence_parallel_region(k_rope, True, group=self.tp_group)
            else:
                k_rope = copy_to_tensor_model_parallel_region(k_rope, group=self.tp_group)
        kv, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        q = q.view(-1, self.heads, self.query_size)
        kv = kv.view(-1, self.heads, mla.qk_nope_head_dim + mla.v_head_dim)
        q_nope, q_rope = q.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=-1)
        k_nope, v = kv.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=-1)
        if self.rope is not None:
            q_rope, k_rope = self.rope.apply(q_rope, k_rope, row)  # k_rope [T, 1, rope]: one head
        k_rope = k_rope.expand(-1, self.heads, -1)
        return torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), v
