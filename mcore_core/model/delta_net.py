"""Gated delta net that can also generate: one token a slot, from the states of earlier ones.

Import it after `patch_gated_delta_net`: megatron's module must have its functions.

Shapes: T tokens of a row, S sequences, N slots, C channels of queries, keys and values together,
W taps of the convolution, V value heads, K and D sizes of a key and a value head; all of this
tensor-parallel rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, common
from torch import Tensor

from mcore_core.model.decode import Kept
from mcore_core.model.packed import PackedRow


class DeltaNet(GatedDeltaNet):  # type: ignore[misc]
    """GatedDeltaNet; rows that are kept take a path of their own."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: object = None,
        packed_seq_params: PackedRow | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor | None]:
        """Run the layer on a packed row.

        Args:
            hidden_states: [T, 1, H], with sequence parallelism T / tp of them.
            attention_mask: Not used.
            inference_context: Not used.
            packed_seq_params: The row.
            kwargs: As for GatedDeltaNet.

        Returns:
            [T, 1, H] and the bias of the output projection.
        """
        row = packed_seq_params
        if row is None or row.kept is None:
            out: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, packed_seq_params=row, **kwargs
            )
            return out
        return self._generate(hidden_states, row, row.kept)

    @property
    def _layer(self) -> int:
        return int(self.config.hf_layer(self.layer_number))

    def _generate(self, hidden: Tensor, row: PackedRow, kept: Kept) -> tuple[Tensor, Tensor | None]:
        projected, _ = self.in_proj(hidden)
        heads = self.num_value_heads // self.tp_size
        sizes = [2 * self.qk_dim_local_tp + self.v_dim_local_tp, self.v_dim_local_tp, heads, heads]
        mixed_TC, gate, beta_TV, alpha_TV = projected.squeeze(1).split(sizes, -1)
        mixed_TC = self._convolve(mixed_TC, row, kept)
        query, key, value = self._heads(mixed_TC)
        g_TV, beta_TV = self._compute_g_and_beta(self.A_log, self.dt_bias, alpha_TV, beta_TV)
        if kept.keys is None:
            last = _ends(row)[: len(_slots(row, kept))]
            out, states = common.chunk_gated_delta_rule(
                query.unsqueeze(0),
                key.unsqueeze(0),
                value.unsqueeze(0),
                g=g_TV.unsqueeze(0),
                beta=beta_TV.unsqueeze(0),
                initial_state=None,
                output_final_state=True,
                use_qk_l2norm_in_kernel=False,
                cu_seqlens=row.cu_seqlens_q,
            )
            stored = kept.state.states("recurrent", self._layer, states.float())
            stored[_slots(row, kept)] = states[: len(last)].float()
        else:
            stored = kept.state.stored("recurrent", self._layer, len(value))
            out = delta_step(stored, query, key, value, g_TV, beta_TV)
        gate = gate.reshape(len(gate), -1, self.value_head_dim)
        normed = self._apply_gated_norm(out.reshape_as(value), gate)
        result: tuple[Tensor, Tensor | None] = self.out_proj(normed.reshape(len(value), 1, -1))
        return result

    def _convolve(self, mixed_TC: Tensor, row: PackedRow, kept: Kept) -> Tensor:
        """Return the causal convolution, and keep the inputs that the next token needs."""
        weight_CW = self.conv1d.weight.squeeze(1)
        bias = self.conv1d.bias
        channels, taps = weight_CW.shape
        if kept.keys is None:
            stored = kept.state.states("conv", self._layer, mixed_TC.new_zeros(1, channels, taps))
            ends_S1 = _ends(row)[: len(_slots(row, kept))].unsqueeze(-1)
            lengths_S1 = _lengths(row)[: len(ends_S1)].unsqueeze(-1)
            back_W = torch.arange(taps - 1, -1, -1, device=mixed_TC.device)
            window_SWC = mixed_TC[(ends_S1 - back_W).clamp(min=0)]
            window_SWC = window_SWC * (back_W < lengths_S1).unsqueeze(-1)
            stored[_slots(row, kept)] = window_SWC.transpose(1, 2)
            out, _ = common.causal_conv1d(
                x=mixed_TC.unsqueeze(0),
                weight=weight_CW,
                bias=bias,
                activation=self.activation,
                initial_state=None,
                output_final_state=False,
                cu_seqlens=row.cu_seqlens_q,
            )
            first: Tensor = out.squeeze(0)
            return first
        window_NCW = kept.state.stored("conv", self._layer, len(mixed_TC))
        window_NCW.copy_(torch.cat((window_NCW[..., 1:], mixed_TC.unsqueeze(-1)), -1))
        summed = (window_NCW * weight_CW).sum(-1)
        return F.silu(summed if bias is None else summed + bias)

    def _heads(self, mixed_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys [T, V, K], normed, and values [T, V, D]."""
        both, value = torch.split(mixed_TC, [2 * self.qk_dim_local_tp, self.v_dim_local_tp], -1)
        both = both.reshape(len(both), -1, self.key_head_dim)
        if self.use_qk_l2norm:
            both = common.l2norm(both.contiguous())
        query, key = both.chunk(2, 1)
        times = self.num_value_heads // self.num_key_heads
        if times > 1:
            query, key = query.repeat_interleave(times, 1), key.repeat_interleave(times, 1)
        return query, key, value.reshape(len(value), -1, self.value_head_dim)


def delta_step(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, g_NV: Tensor, beta_NV: Tensor
) -> Tensor:
    """Take one step of the gated delta rule: the state, changed in place, and the output.

    Gated Delta Networks, arXiv:2412.06464, eq. 10.

    Args:
        state: [N, V, K, D], float32.
        query: [N, V, K], normed.
        key: [N, V, K], normed.
        value: [N, V, D].
        g_NV: Logarithm of the decay.
        beta_NV: How much of the old value is overwritten.

    Returns:
        [N, V, D], in the dtype of the value.
    """
    wide_query, wide_key, wide_value = query.float(), key.float().unsqueeze(-2), value.float()
    state *= g_NV.float().exp()[..., None, None]
    read = torch.matmul(wide_key, state).squeeze(-2)
    change = (wide_value - read) * beta_NV.float().unsqueeze(-1)
    state += wide_key.transpose(-1, -2) * change.unsqueeze(-2)
    scaled = wide_query.unsqueeze(-2) * query.shape[-1] ** -0.5
    return torch.matmul(scaled, state).squeeze(-2).to(value.dtype)


def _lengths(row: PackedRow) -> Tensor:
    cu = row.cu_seqlens_q.long()
    found: Tensor = cu[1:] - cu[:-1]
    return found


def _ends(row: PackedRow) -> Tensor:
    """Return the index of each sequence's last token, [S]."""
    found: Tensor = row.cu_seqlens_q[1:].long() - 1
    return found


def _slots(row: PackedRow, kept: Kept) -> Tensor:
    """Return the slot of each kept sequence of whole sequences, computed once a row."""
    if "slots" not in row.cache:
        starts_S = row.cu_seqlens_q[:-1].long()
        row.cache["slots"] = kept.slots_T[starts_S[starts_S < len(kept.slots_T)]]
    found: Tensor = row.cache["slots"]
    return found
