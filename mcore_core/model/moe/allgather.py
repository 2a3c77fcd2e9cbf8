"""Megatron's all-gather dispatcher for rows whose length differs from rank to rank.

Expert-parallel ranks work on different micro-batches, so on rows of different length, which
megatron's own gathers as if they were alike. Here each is filled up to the longest with tokens that
go to no expert.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor


class UnevenAllGather(MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """MoEAllGatherTokenDispatcher that takes rows of any length."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and weights, both filled up to the longest row of the ranks."""
        hidden, probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        longest = torch.tensor(len(hidden), device=hidden.device)
        if self.tp_size > 1 or self.ep_size > 1:
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.tp_ep_group)
        more = int(longest) - len(hidden)
        self.routing_map = F.pad(routing_map, (0, 0, 0, more))
        return F.pad(hidden, (0, 0, 0, more)), F.pad(probs, (0, 0, 0, more))

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the tokens that were given."""
        out: Tensor = hidden_states[: self.hidden_shape[:-1].numel()].view(self.hidden_shape)
        return out
