"""The router: which experts a token goes to, with which weights, and what keeps them balanced.

Megatron's own chooses as one family does, counts padding in its auxiliary losses and limits experts
by rank; here a result is that of the row, however its tokens are divided.

Shapes: T tokens of this rank, R of the whole row, E experts, K chosen ones.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mcore_core.model.config import DecoderConfig
from mcore_core.model.moe.balance import by_groups, over_batch, spread, z_loss
from mcore_core.model.moe.capacity import capacity_of, keep
from mcore_core.model.moe.choice import chosen_by_score, scores_of, sinkhorn, weights_of
from mcore_core.model.moe.stats import RouterStats
from mcore_core.model.moe.tokens import RowTokens, one_sequence

if TYPE_CHECKING:
    from mcore_core.model.shapes import MoEShape

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class Router(TopKRouter):  # type: ignore[misc]
    """TopKRouter that chooses by the architecture; its weights and buffers are megatron's."""

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(config, *args, **kwargs)
        moe = config.shape.moe
        assert moe is not None
        self.moe: MoEShape = moe
        if moe.router_bias and getattr(self, "bias", None) is None:
            bias: Any = torch.nn.Parameter(
                torch.zeros(moe.num_experts, dtype=config.params_dtype, device=self.weight.device)
            )
            bias.sequence_parallel = config.sequence_parallel
            self.bias = bias
        self.stats = RouterStats(moe.num_experts)
        self.chosen_TK: Tensor | None = None
        """What the last forward pass chose, where someone asked for it."""
        self.keep_choice = False

    def gating(self, input: Tensor) -> Tensor:
        """Return the logits [T, 1, E], in the router's precision."""
        weight, bias = self.weight, self.bias
        if self.tp_group.size() > 1 and not self.config.sequence_parallel:
            # the layer divided tokens over these ranks: each has a part of the gradient
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
            if bias is not None:
                bias = copy_to_tensor_model_parallel_region(bias, group=self.tp_group)
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        logits: Tensor = router_gating_linear(input, weight, bias, dtype)
        return logits

    def forward(
        self,
        input: Tensor,
        tokens: RowTokens | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the weights [T, E], zero for experts not chosen, and which are chosen [T, E].

        Args:
            input: [T, 1, H].
            tokens: What they are; None: one sequence.
        """
        self._maintain_float32_expert_bias()
        logits_TE = self.gating(input).view(-1, self.moe.num_experts)
        return self.route(logits_TE, tokens or one_sequence(len(logits_TE), logits_TE.device))

    def route(self, logits_TE: Tensor, tokens: RowTokens) -> tuple[Tensor, Tensor]:
        """Return the weights [T, E] and which experts are chosen [T, E]."""
        learns = self.training and torch.is_grad_enabled()
        scores_TE = scores_of(logits_TE, self.moe)
        chosen_TK, weights_TK = self._weighed(logits_TE, scores_TE, tokens)
        empty = torch.zeros_like(logits_TE)
        probs = empty.scatter(-1, chosen_TK, weights_TK)
        routed = empty.bool().scatter(-1, chosen_TK, True)
        kept = self._within_capacity(probs, routed, tokens)
        if self.stats.counting or learns:
            found = spread(logits_TE, tokens, self.moe)
            if self.stats.counting:
                self.stats.count_batch(found.routed_TE)
            if learns:
                demanded = routed & tokens.real_T1
                self.stats.add(scores_TE, demanded, kept, tokens.real_T1)
                for loss in self._auxiliary(logits_TE, tokens):
                    probs = MoEAuxLossAutoScaler.apply(probs, loss)
                if self.enable_expert_bias:
                    with torch.no_grad():
                        self.local_tokens_per_expert += demanded.sum(0)
        return (probs if kept is routed else probs * kept), kept

    def pick(self, input: Tensor, tokens: RowTokens | None = None) -> tuple[Tensor, Tensor]:
        """Return the chosen experts [T, K] and their weights [T, K]; takes what `forward` does.

        No expert's capacity is looked at, and nothing is counted.
        """
        self._maintain_float32_expert_bias()
        logits_TE = self.gating(input).view(-1, self.moe.num_experts)
        tokens = tokens or one_sequence(len(logits_TE), logits_TE.device)
        return self._weighed(logits_TE, scores_of(logits_TE, self.moe), tokens)

    def _weighed(
        self, logits_TE: Tensor, scores_TE: Tensor, tokens: RowTokens
    ) -> tuple[Tensor, Tensor]:
        chosen_TK = self._choose(logits_TE, scores_TE, tokens)
        if self.keep_choice:
            self.chosen_TK = chosen_TK
        return chosen_TK, weights_of(scores_TE, chosen_TK, self.moe).to(logits_TE.dtype)

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor, tokens: RowTokens) -> Tensor:
        if self.config.balance == "sinkhorn" and self.training:
            chosen_TK = self._by_sinkhorn(logits_TE, tokens)
        else:
            chosen_TK = chosen_by_score(scores_TE, self.moe, self.expert_bias)
        if tokens.replay_TK is not None:
            given_TK = tokens.replay_TK
            if self.training and torch.is_grad_enabled():
                self.stats.add_replay(chosen_TK, given_TK)
            chosen_TK = torch.where((given_TK >= 0).all(-1, keepdim=True), given_TK, chosen_TK)
        return chosen_TK

    @torch.no_grad()
    def _by_sinkhorn(self, logits_TE: Tensor, tokens: RowTokens) -> Tensor:
        """Return the experts of the balanced assignment of the row's tokens, [T, K]."""
        row, mine = self._whole_row(logits_TE.detach())
        sequence_R, _ = self._whole_row(tokens.sequence_T)
        order_R, _ = self._whole_row(tokens.order_T)
        index = order_R.masked_fill(sequence_R == 0, torch.iinfo(torch.long).max).argsort()
        real = index[: int((sequence_R > 0).sum())]
        chosen_RK = row.topk(self.moe.topk, -1).indices  # padding's
        if len(real):
            chosen_RK[real] = sinkhorn(row[real]).topk(self.moe.topk, -1).indices
        return chosen_RK[mine]

    @torch.no_grad()
    def _within_capacity(self, probs: Tensor, routed: Tensor, tokens: RowTokens) -> Tensor:
        """Return which choices are kept; padding goes nowhere where experts are limited."""
        factor = self.config.moe_expert_capacity_factor
        if factor is None:
            return routed
        whole, mine = self._whole_row(probs.detach())
        routed_RE, _ = self._whole_row(routed)
        sequence_R, _ = self._whole_row(tokens.sequence_T)
        order_R, _ = self._whole_row(tokens.order_T)
        real = (sequence_R > 0).nonzero().squeeze(-1)
        kept = torch.zeros_like(routed_RE)
        kept[real] = keep(
            whole[real],
            routed_RE[real],
            order_R[real],
            capacity=capacity_of(
                len(real), topk=self.moe.topk, experts=self.moe.num_experts, factor=factor
            ),
            policy=self.config.moe_token_drop_policy,
        )
        return kept[mine]

    def _whole_row(self, values_T: Tensor) -> tuple[Tensor, slice]:
        """Return the values of all ranks that share the row, and where this rank's are."""
        ranks, own = self.tp_cp_group.size(), len(values_T)
        if ranks == 1:
            return values_T, slice(0, own)
        plain = values_T.to(torch.uint8) if values_T.dtype is torch.bool else values_T
        parts = [torch.empty_like(plain) for _ in range(ranks)]
        dist.all_gather(parts, plain.contiguous(), group=self.tp_cp_group)
        first = self.tp_cp_group.rank() * own
        return torch.cat(parts).to(values_T.dtype), slice(first, first + own)

    def _auxiliary(self, logits_TE: Tensor, tokens: RowTokens) -> list[Tensor]:
        """Return this rank's share of each auxiliary loss, times its weight in the step's loss."""
        found, config, ranks = [], self.config, self.tp_cp_group
        weights = {config.balance: config.balance_coeff, "z_loss": config.moe_z_loss_coeff or 0.0}
        for name, weight in weights.items():
            if weight == 0 or name in ("none", "sinkhorn"):
                continue
            share = self._loss(name, logits_TE, tokens, ranks)
            # means over micro-batches, but for the loss that is over the batch already
            scale = 1.0 if name == "global_aux_loss" else config.aux_loss_scale
            self.stats.add_loss(name, share.detach() * scale)
            found.append(weight * scale * share)
        return found

    def _loss(self, name: str, logits_TE: Tensor, tokens: RowTokens, ranks: Any) -> Tensor:  # noqa: ANN401
        match name:
            case "z_loss":
                return z_loss(logits_TE, tokens, ranks)
            case "aux_loss":
                row_T = (tokens.sequence_T > 0).long()
                found = spread(logits_TE, tokens, self.moe)
                return by_groups(found, row_T, self.moe.topk, ranks)
            case "seq_aux_loss":
                found = spread(logits_TE, tokens, self.moe)
                return by_groups(found, tokens.sequence_T, self.moe.topk, ranks)
            case _:
                found = spread(logits_TE, tokens, self.moe)
                return over_batch(found, self.stats.batch_E, self.moe.topk)
