"""Megatron's token dispatchers for rows whose length differs from rank to rank.

Expert-parallel ranks work on different micro-batches, so on rows of different length. Where an
exchange takes equal lengths, rows are filled up to the longest with tokens that go to no expert.

A dispatcher is built as `cls(num_local_experts, local_expert_indices, config, groups)` and has the
methods of megatron's `MoETokenDispatcher`; the hook `mcore_dispatchers` adds others.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
)
from torch import Tensor

from mcore_core.model.moe.capacity import capacity_of


def _fill(tokens: int, group: Any, device: torch.device) -> int:  # noqa: ANN401
    """Return how many tokens this rank lacks to the longest row of a group."""
    longest = torch.tensor(tokens, device=device)
    if group.size() > 1:
        dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return int(longest) - tokens


class AllGather(MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """All tokens go to all ranks, rows of any length."""

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return tokens and weights, both filled up to the longest row of the ranks."""
        hidden, probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        more = _fill(len(hidden), self.tp_ep_group, hidden.device)
        self.routing_map = F.pad(routing_map, (0, 0, 0, more))
        return F.pad(hidden, (0, 0, 0, more)), F.pad(probs, (0, 0, 0, more))

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Return the tokens that were given."""
        out: Tensor = hidden_states[: self.hidden_shape[:-1].numel()].view(self.hidden_shape)
        return out


class AllToAll(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Tokens go to the ranks of their experts.

    With `moe_pad_expert_input_to_capacity` each rank sends every expert the same number of tokens,
    so that nothing waits for a count: as many as the row's capacity lets one rank have.
    """

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens in the order of their experts, and their weights."""
        self.given = len(hidden_states)
        if self.drop_and_pad:
            more = _fill(self.given, self.tp_ep_group, hidden_states.device)
            hidden_states = F.pad(hidden_states, (0, 0, 0, 0, 0, more))
            routing_map = F.pad(routing_map, (0, 0, 0, more))
            probs = F.pad(probs, (0, 0, 0, more))
            self.sharing = max(1, self.config.tensor_model_parallel_size) * max(
                1, self.config.context_parallel_size
            )
        found: tuple[Tensor, Tensor] = super().dispatch_preprocess(
            hidden_states, routing_map, probs
        )
        return found

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Return the tokens of each expert here; the row's capacity, not this rank's, is the limit.

        Raises nothing: what the router kept always fits.
        """
        if not self.drop_and_pad:
            counts: Tensor = super().preprocess(routing_map)
            return counts
        tokens = len(routing_map)
        capacity = capacity_of(
            tokens * self.sharing,
            topk=self.config.moe_router_topk,
            experts=self.num_experts,
            factor=self.moe_expert_capacity_factor,
        )
        self.capacity = min(capacity, tokens)
        self.num_out_tokens = self.capacity * self.num_experts
        ranks = self.tp_size * self.ep_size
        self.num_global_tokens_per_local_expert = torch.full(
            (self.num_experts * self.tp_size,), self.capacity, device=self.permute_idx_device
        )
        return torch.full((self.num_local_experts,), self.capacity * ranks)

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Return the tokens that were given."""
        out: Tensor = super().combine_postprocess(permutated_local_input_tokens)
        return out[: self.given]


class Flex(MoEFlexTokenDispatcher):  # type: ignore[misc]
    """Megatron's dispatcher over DeepEP's kernels; needs CUDA and the package deep_ep."""

    megatron_type = "flex"
