"""The router: which experts a token goes to and with which weights, and losses that balance them.

Megatron's own chooses as one family does and counts padding in its auxiliary losses; here every
family's choice is one function, and what a loss counts are the tokens of sequences.

Shapes: T tokens of this rank, E experts, K chosen ones, S sequences of the packed row.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from mcore_core.model.config import DecoderConfig

if TYPE_CHECKING:
    from mcore_core.model.shapes import MoEShape


def limit_groups(choice_TE: Tensor, moe: "MoEShape") -> Tensor:
    """Return the scores with all but the best groups of experts at minus infinity.

    A group's score is its best expert's with softmax (DeepSeek-V2), the sum of its best two with
    sigmoid (DeepSeek-V3).
    """
    assert moe.num_groups is not None
    assert moe.group_topk is not None
    grouped = choice_TE.view(*choice_TE.shape[:-1], moe.num_groups, -1)
    best = min(1 if moe.score_function == "softmax" else 2, grouped.shape[-1])
    scores_TG = grouped.topk(best, dim=-1).values.sum(-1)
    kept = torch.zeros_like(scores_TG, dtype=torch.bool)
    kept = kept.scatter(-1, scores_TG.topk(moe.group_topk, dim=-1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def choose(logits_TE: Tensor, moe: "MoEShape", bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the weights of the chosen experts [T, K] and their numbers [T, K]."""
    wide = logits_TE.float()
    scores_TE = torch.sigmoid(wide) if moe.score_function == "sigmoid" else wide.softmax(-1)
    choice_TE = scores_TE.detach()
    if bias_E is not None:
        choice_TE = choice_TE + bias_E.float()
    if moe.group_topk is not None and moe.num_groups is not None:
        choice_TE = limit_groups(choice_TE, moe)
    chosen_TK = choice_TE.topk(moe.topk, dim=-1).indices
    weights_TK = scores_TE.gather(-1, chosen_TK)
    if not moe.pre_softmax and (moe.topk > 1 or moe.score_function == "softmax"):
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * moe.scaling_factor, chosen_TK


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

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weights [T, E], zero for experts not chosen, and which are chosen [T, E].

        Args:
            logits: [T, 1, E].
            padding_mask: The sequence of each token, from 1, and 0 for padding: [T, 1]. None: one
                sequence.
        """
        logits_TE = logits.view(-1, self.moe.num_experts)
        if padding_mask is None:
            sequence_T = torch.ones(len(logits_TE), dtype=torch.long, device=logits_TE.device)
        else:
            sequence_T = padding_mask.reshape(-1)
        real_T1 = (sequence_T > 0).unsqueeze(-1)
        weights_TK, chosen_TK = choose(logits_TE, self.moe, self.expert_bias)
        empty = torch.zeros_like(logits_TE)
        probs = empty.scatter(-1, chosen_TK, weights_TK.to(logits_TE.dtype))
        routed = empty.bool().scatter(-1, chosen_TK, True)
        if self.training and torch.is_grad_enabled():
            for loss in self._auxiliary(logits_TE, sequence_T, real_T1):
                probs = MoEAuxLossAutoScaler.apply(probs, loss * self.config.aux_loss_scale)
            if self.enable_expert_bias:
                with torch.no_grad():
                    self.local_tokens_per_expert += (routed & real_T1).sum(0)
        return probs, routed

    def _auxiliary(self, logits_TE: Tensor, sequence_T: Tensor, real_T1: Tensor) -> list[Tensor]:
        """Return this rank's share of each auxiliary loss of the micro-batch."""
        found = []
        if self.is_aux_loss_enabled():
            wide = logits_TE.float()
            if self.moe.score_function == "sigmoid":
                scores_TE = torch.sigmoid(wide)
                scores_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
            else:
                scores_TE = wide.softmax(-1)
            top = scores_TE.topk(self.moe.topk, dim=-1).indices
            routed = torch.zeros_like(scores_TE).scatter(-1, top, 1.0) * real_T1
            scores_TE = scores_TE * real_T1
            by_sequence = self.get_aux_loss_coeff("seq_aux_loss")
            if by_sequence > 0:
                found.append(by_sequence * self._balance(scores_TE, routed, sequence_T))
            by_row = self.get_aux_loss_coeff("aux_loss")
            if by_row > 0:
                one_T = real_T1.squeeze(-1).long()
                found.append(by_row * self._balance(scores_TE, routed, one_T))
        if self.config.moe_z_loss_coeff:
            squares = torch.logsumexp(logits_TE.float(), -1).square() * real_T1.squeeze(-1)
            tokens = self._sum(real_T1.sum().float()).clamp(min=1)
            found.append(self.config.moe_z_loss_coeff * squares.sum() / tokens)
        return found

    def _sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks that share a row, outside of the gradient."""
        values = values.detach().clone()
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(values, group=self.tp_cp_group)
        return values

    def _balance(self, scores_TE: Tensor, routed_TE: Tensor, group_T: Tensor) -> Tensor:
        """Return this rank's share of E sum(f_e P_e), averaged over the groups of tokens.

        Args:
            scores_TE: Probabilities, zero for padding.
            routed_TE: 1 where a token goes, zero for padding.
            group_T: Which group (a sequence, or the row) a token is of, from 1; 0 for padding.
        """
        size = torch.zeros((), dtype=torch.long, device=group_T.device)
        size = torch.maximum(size, group_T.max()) if len(group_T) else size
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(size, op=dist.ReduceOp.MAX, group=self.tp_cp_group)
        count = int(size) + 1
        experts, topk = self.moe.num_experts, self.moe.topk

        def per_group(values: Tensor) -> Tensor:
            empty = values.new_zeros(count, *values.shape[1:])
            return empty.index_add(0, group_T, values)

        tokens_S1 = self._sum(per_group(torch.ones_like(scores_TE[:, :1])))
        tokens_S1 = tokens_S1.clamp(min=1)
        fraction_SE = self._sum(per_group(routed_TE)) / (tokens_S1 * topk)
        mean_SE = per_group(scores_TE) / tokens_S1
        return experts * (fraction_SE * mean_SE)[1:].sum() / max(1, count - 1)
