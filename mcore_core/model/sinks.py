"""The fused attention kernel with sinks: exact, forward and backward.

A sink is one more logit in each row's softmax that carries no value. From the output o and the
log-sum-exp l of plain attention, attention with a sink s has l' = log(exp(l) + exp(s)) and
o' = o exp(l - l'). The kernel's backward pass takes output and log-sum-exp as they are: given o'
and l' it computes exactly the gradients of attention with the sink, and the sink's own is
-exp(s - l') (o' . do), summed over queries.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import _varlen_attn, _varlen_attn_backward

from mcore_core.model.packed import VarlenPlan


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        plan: VarlenPlan,
        scale: float,
        window: int,
    ) -> Tensor:
        arguments = (plan.cu_q, plan.cu_k, plan.max_q, plan.max_k)
        plain, lse, rng = _varlen_attn(
            query, key, value, *arguments, window < 0, scale, [window, 0]
        )
        sink_H1 = sinks.float().unsqueeze(-1)
        total = torch.logaddexp(lse, sink_H1)  # [heads, T]
        kept = (lse - total).exp().t().unsqueeze(-1)
        out: Tensor = (plain.float() * kept).to(plain.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, total, rng)
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        query, key, value, sinks, out, total, rng = ctx.saved_tensors
        plan = ctx.plan
        grad = grad.contiguous()
        d_query, d_key, d_value = _varlen_attn_backward(
            grad,
            query,
            key,
            value,
            out,
            total,
            plan.cu_q,
            plan.cu_k,
            plan.max_q,
            plan.max_k,
            ctx.window < 0,
            rng,
            ctx.scale,
            [ctx.window, 0],
        )
        d_sinks = None
        if ctx.needs_input_grad[3]:
            share = (sinks.float().unsqueeze(-1) - total).exp().t()  # [T, heads]
            d_sinks = -(share * (grad.float() * out.float()).sum(-1)).sum(0).to(sinks.dtype)
        return d_query, d_key, d_value, d_sinks, None, None, None


def sink_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    plan: VarlenPlan,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """Return causal attention over a packed row with one sink a head.

    Args:
        query: [T, heads, size].
        key: [keys, groups, size].
        value: [keys, groups, size].
        sinks: [heads].
        plan: Where sequences begin.
        scale: Multiplies scores.
        window: Earlier tokens a query sees; None for all.
    """
    left = -1 if window is None else window
    out: Tensor = _SinkAttention.apply(query, key, value, sinks, plan, scale, left)  # type: ignore[no-untyped-call]
    return out
