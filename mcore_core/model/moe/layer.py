"""Megatron's MoELayer over packed rows: the router knows which sequence each token is of.

Shapes: T tokens, K chosen experts, A = T K assignments of tokens to experts, H the hidden size.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from mcore_core.model.config import DecoderConfig
from mcore_core.model.moe.experts import GroupedMLP
from mcore_core.model.moe.tokens import RowTokens, row_tokens

if TYPE_CHECKING:
    from mcore_core.model.packed import PackedRow


class PackedMoELayer(MoELayer):  # type: ignore[misc]
    """MoELayer that reads the packed row, and divides tokens over tensor-parallel ranks itself.

    Without sequence parallelism every tensor-parallel rank holds all tokens: each takes a part to
    the experts, and the outputs are gathered again.
    """

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(config, *args, **kwargs)
        self.row: PackedRow | None = None
        """Set by the layer around this one before each forward pass."""
        groups = kwargs["pg_collection"]
        self.token_dispatcher = config.dispatcher(
            self.num_local_experts, self.local_expert_indices, config, groups
        )
        if self.shared_expert_overlap and self.shared_experts is not None:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self.tp_group = groups.tp

    @property
    def scatters(self) -> bool:
        """Whether this layer divides the tokens."""
        return bool(self.tp_group.size() > 1 and not self.config.sequence_parallel)

    @property
    def direct(self) -> bool:
        """Whether generation needs no dispatcher: all experts are here, and none is limited."""
        config = self.config
        ranks = config.expert_model_parallel_size * config.expert_tensor_parallel_size
        limited = config.moe_expert_capacity_factor is not None
        return bool(
            ranks * self.tp_group.size() == 1
            and not limited
            and not self.shared_expert_overlap
            and isinstance(self.experts, GroupedMLP)
        )

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: object = None,
        padding_mask: object = None,
    ) -> tuple[Tensor, None]:
        """Return the layer's output [T, 1, H], and no bias.

        Args:
            hidden_states: [T, 1, H] of this rank's tokens.
            intermediate_tensors: Not used.
            padding_mask: Not used: the row says it.
        """
        run = partial(self._run, self._tokens(hidden_states))
        if self.moe_layer_recompute and self.training:
            out = tensor_parallel.checkpoint(run, False, hidden_states)
        else:
            out = run(hidden_states)
        assert isinstance(out, Tensor)
        return out, None

    def _tokens(self, hidden: Tensor) -> RowTokens | None:
        if self.row is None:
            return None
        parts = self.tp_group.size()
        layer = self.config.replayed_layer(self.layer_number)
        part = self.tp_group.rank() if parts > 1 else 0
        return row_tokens(self.row, hidden.device, layer=layer, part=part, parts=parts)

    def _run(self, tokens: RowTokens | None, hidden: Tensor) -> Tensor:
        shared = self.shared_experts_compute(hidden)
        if self.row is not None and self.row.kept is not None and self.direct:
            return self._generate(hidden, tokens, shared)
        if not self.scatters:
            return self._routed(hidden, tokens, shared)
        more = -len(hidden) % self.tp_group.size()
        mine = scatter_to_sequence_parallel_region(
            F.pad(hidden, (0, 0, 0, 0, 0, more)), group=self.tp_group
        )
        out = self._routed(mine, tokens, None)
        # every rank goes on with all tokens, and has the whole gradient of them
        out = gather_from_sequence_parallel_region(
            out, tensor_parallel_output_grad=False, group=self.tp_group
        )[: len(hidden)]
        result: Tensor = out if shared is None else out + shared
        return result

    def _generate(self, hidden: Tensor, tokens: RowTokens | None, shared: Tensor | None) -> Tensor:
        """Run the experts without asking the device how many tokens each has."""
        chosen_TK, weights_TK = self.router.pick(hidden, tokens)
        topk = chosen_TK.shape[-1]
        expert_A, order_A = chosen_TK.flatten().sort(stable=True)
        experts = torch.arange(self.num_local_experts, device=hidden.device)
        ends = torch.searchsorted(expert_A, experts, right=True).to(torch.int32)
        x_AH = hidden.squeeze(1).index_select(0, order_A // topk)
        out_AH = self.experts.run(x_AH, ends, weights_TK.flatten().index_select(0, order_A))
        out = torch.empty_like(out_AH).index_copy_(0, order_A, out_AH)
        out = out.view(-1, topk, out.shape[-1]).sum(1).view_as(hidden)
        return out if shared is None else out + shared

    def _routed(self, hidden: Tensor, tokens: RowTokens | None, shared: Tensor | None) -> Tensor:
        probs, routed = self.router(hidden, tokens)
        x, probs = self.preprocess(hidden, probs, routed)
        x, probs = self.dispatch(x, probs)
        out, _ = self.routed_experts_compute(x, probs)
        out = self.combine(out)
        result: Tensor = self.postprocess(out, shared)
        return result
