"""Core attention in plain torch: packed rows, GQA, windows, sinks, context parallelism.

On the CPU one `scaled_dot_product_attention` for all segments of about the same length; on CUDA in
half precision one call of `torch.nn.attention.varlen.varlen_attn` (the FlashAttention kernel inside
torch). Keys and values are all-gathered once over the context-parallel group (their gradients
reduce-scattered): no ring and no merging of partial softmaxes.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mcore_core.model.decode import attend_step
from mcore_core.model.packed import PackedRow, Segment
from mcore_core.model.sinks import sink_attention

if TYPE_CHECKING:
    from mcore_core.model.config import DecoderConfig


HEAD_MULTIPLE = 8
"""What FlashAttention wants the size of a head to be a multiple of."""
FUSED = ("auto", "flash")
"""Values of attention_backend with which our attention may run FlashAttention's kernel."""


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Drop-in for megatron's DotProductAttention in a layer spec, for causal packed rows.

    Rotary embeddings are applied here, from the row's own positions, so that every layer may have
    its own and no layout needs to know.
    """

    def __init__(
        self,
        config: "DecoderConfig",
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,  # noqa: ANN401
        **_: object,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp
        self.layer = config.hf_layer(layer_number)
        self.softmax_scale = (
            softmax_scale or config.shape.softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = config.window_of(self.layer)
        # latent attention rotates a part of its heads itself, before it comes here
        self.rope = None if config.shape.mla is not None else config.rope_of(self.layer)
        self.softmax_offset = self._sinks(config.num_attention_heads // self.tp_group.size())

    def _sinks(self, heads: int) -> Tensor | None:
        config = self.config
        if config.softmax_type == "vanilla":
            return None
        device: Any = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        if config.softmax_type == "off-by-one":
            return torch.zeros(heads, device=device)
        sinks = torch.nn.Parameter(torch.empty(heads, device=device, dtype=config.params_dtype))
        # without the attributes the gradient norm counts only the heads of tensor-parallel rank 0
        tensor_parallel.set_tensor_model_parallel_attributes(sinks, True, 0, 1)
        if config.perform_initialization:
            config.init_method(sinks)
        return sinks

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        **_: object,
    ) -> Tensor:
        """Attend within each sequence of a packed row.

        Args:
            query: [T, heads, head size] of this rank's tokens and heads.
            key: [T, groups, head size].
            value: [T, groups, value head size].
            attention_mask: Not used: the row says who sees whom.
            packed_seq_params: The row.

        Returns:
            [T, heads * value head size].
        """
        assert packed_seq_params is not None, "attention runs on packed rows"
        row = packed_seq_params
        # context-parallel ranks generate each by itself
        cp = 1 if row.kept is not None else self.cp_group.size()
        if self.rope is not None:
            query, key = self.rope.apply(query, key, row)
        if row.kept is not None:
            stored = row.kept.store(self.layer, key, value)
            if row.kept.keys is not None:
                return attend_step(
                    query,
                    stored,
                    row,
                    scale=self.softmax_scale,
                    window=self.window,
                    sinks=self.softmax_offset,
                    fused=self.config.attention_kernel in FUSED,
                ).flatten(1)
        if cp > 1:
            size = key.shape[-1]
            both = torch.cat((key, value), dim=-1)  # one collective for both
            both = gather_from_sequence_parallel_region(both, True, group=self.cp_group)
            both = both.index_select(0, row.key_order(cp))
            key, value = both[..., :size], both[..., size:]
        if self._use_varlen(query):
            out = self._varlen(query, key, value, row, cp)
        else:
            out = self._by_segment(query, key, value, row, cp)
        return out.reshape(out.shape[0], -1)

    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def _use_varlen(self, query: Tensor) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        wanted = self.config.attention_kernel in FUSED
        return query.is_cuda and half and wanted and not self._dropout()

    def _varlen(self, q: Tensor, k: Tensor, v: Tensor, row: PackedRow, cp: int) -> Tensor:
        plan = row.varlen(self.cp_group.rank(), cp)
        if plan.key_index is not None:
            k, v = k.index_select(0, plan.key_index), v.index_select(0, plan.key_index)
        size = v.shape[-1]
        # the kernel wants heads of equal size, a multiple of 8: zeros change no product
        full = -(-q.shape[-1] // HEAD_MULTIPLE) * HEAD_MULTIPLE
        q, k, v = (
            F.pad(x, (0, full - x.shape[-1])) if x.shape[-1] < full else x for x in (q, k, v)
        )
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if self.softmax_offset is not None:
            sinks = self.softmax_offset
            scale, window = self.softmax_scale, self.window
            return sink_attention(q, k, v, sinks, plan, scale=scale, window=window)[..., :size]
        out = varlen_attn(
            q,
            k,
            v,
            plan.cu_q,
            plan.cu_k,
            plan.max_q,
            plan.max_k,
            scale=self.softmax_scale,
            window_size=(-1 if self.window is None else self.window, 0),
        )
        assert isinstance(out, Tensor)
        return out[..., :size]

    def _by_segment(self, q: Tensor, k: Tensor, v: Tensor, row: PackedRow, cp: int) -> Tensor:
        segments = row.segments(self.cp_group.rank(), cp)
        batches = row.batches(self.cp_group.rank(), cp) if len(segments) > 1 else None
        if batches is None:
            parts = [
                self._sdpa(
                    *(x.transpose(0, 1).unsqueeze(0) for x in (query, *_keys(k, v, segment)))
                )
                .squeeze(0)
                .transpose(0, 1)
                for query, segment in zip(
                    torch.split(q, [s.q_len for s in segments]), segments, strict=True
                )
            ]
            return torch.cat(parts)
        sizes = [number * length for number, length in batches.shapes]
        spread = (torch.split(batches.spread(x), sizes) for x in (q, k, v))
        parts = [
            self._sdpa(
                *(x.unflatten(0, (number, length)).transpose(1, 2) for x in (query, key, value))
            )
            .transpose(1, 2)
            .flatten(0, 1)
            for (number, length), query, key, value in zip(batches.shapes, *spread, strict=True)
        ]
        return batches.collect(torch.cat(parts))

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend; q [B, heads, queries, size], k and v [B, groups, keys, size]."""
        queries, keys = q.shape[2], k.shape[2]
        square = queries == keys and (self.window is None or self.window >= keys - 1)
        allowed = None
        if not square:
            i = torch.arange(keys - queries, keys, device=q.device)[:, None]
            j = torch.arange(keys, device=q.device)[None]
            allowed = j <= i
            if self.window is not None:
                allowed &= j >= i - self.window
        dropout = self._dropout()
        if dropout and not self.config.sequence_parallel:
            # heads differ by tensor-parallel rank: so must their masks
            with tensor_parallel.get_cuda_rng_tracker().fork():
                return self._attend(q, k, v, allowed, square, dropout)
        return self._attend(q, k, v, allowed, square, dropout)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, square: bool, dropout: float
    ) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if self.softmax_offset is None:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=square,
                scale=self.softmax_scale,
                enable_gqa=grouped,
            )
        if grouped:
            times = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = torch.matmul(q, k.transpose(-1, -2)).float() * self.softmax_scale
        if square:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        assert allowed is not None
        scores = scores.masked_fill(~allowed, float("-inf"))
        sinks = self.softmax_offset.float().view(1, -1, 1, 1).expand(len(q), -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1].to(v.dtype)
        return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the sinks, split over tensor-parallel ranks, where they are learned."""
        learned = self.config.softmax_type == "learnable"
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True) if learned else {},
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return state


def _keys(key: Tensor, value: Tensor, segment: Segment) -> tuple[Tensor, Tensor]:
    """Return the keys and values that a segment sees."""
    start, length = segment.k_start, segment.k_len
    return key.narrow(0, start, length), value.narrow(0, start, length)
