"""Hidden states to log-probabilities (and a loss) in chunks of tokens, vocab-parallel.

No [tokens, vocabulary] tensor in float32 exists beyond one chunk. A *token-local* loss is called on
each chunk while its logits are at hand, so one pass gives loss and gradients without recomputation;
any other loss gets the log-probabilities of all tokens, and the backward pass recomputes logits
unless one chunk held them all.

Shapes: T tokens, C tokens of a chunk, V this rank's vocabulary rows, H hidden size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from mcore_core.model.head_kernels import kernels
from mcore_core.parallel.shares import Shares
from mcore_core.protocols import HeadOut, HeadSpec, LossOutput

if TYPE_CHECKING:
    from mcore_core.model.divergence import Teacher

CHUNK_BYTES = 384 * 2**20
"""How much one [C, V] buffer may take."""

type ChunkLoss = Callable[[HeadOut, slice], LossOutput]
"""Log-probabilities of the tokens of a slice -> their share of the loss."""


class HeadLayer(ColumnParallelLinear):  # type: ignore[misc]
    """An output layer that owns its weight and returns hidden states: the head reads both.

    It is called in the model's forward pass, so hooks on it (parameter gathering) still run.
    """

    def forward(self, input_: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, None]:
        """Return the hidden states as they are."""
        return input_, None


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabRange:
    """Which vocabulary rows this tensor-parallel rank holds."""

    start: int
    """Global id of this rank's first row."""
    rows: int
    """Rows of the real vocabulary here; what padding adds is left out of every sum."""
    group: Any = None
    """The tensor-parallel group; None on one rank."""

    def reduce(self, values: Tensor, *, largest: bool = False) -> None:
        """Sum (or take the maximum) over the ranks, in place."""
        if self.group is not None and self.group.size() > 1:
            op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(values, op=op, group=self.group)


class _Chunk:
    """Logits of C tokens, their log-probabilities, and the way back."""

    def __init__(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        targets_C: Tensor,
        vocab: VocabRange,
        spec: HeadSpec,
    ) -> None:
        self.kernels = kernels(hidden_CH.is_cuda)
        self.hidden_CH, self.weight_VH, self.temperature = hidden_CH, weight_VH, spec.temperature
        self.logits_CV = hidden_CH @ weight_VH.t()
        # a tensor-parallel rank may hold nothing but padding
        self.peak_C = (
            self.kernels["peak"](self.logits_CV)
            if vocab.rows
            else hidden_CH.new_full((len(hidden_CH),), float("-inf"), dtype=torch.float32)
        )
        vocab.reduce(self.peak_C, largest=True)
        local_C = targets_C - vocab.start
        self.mine_C = (local_C >= 0) & (local_C < vocab.rows)
        self.index_C1 = local_C.clamp(0, max(vocab.rows - 1, 0)).unsqueeze(-1)
        picked_C = torch.zeros_like(self.peak_C)
        if vocab.rows:
            picked_C = self.logits_CV.gather(-1, self.index_C1).squeeze(-1).float() - self.peak_C
            picked_C = torch.where(self.mine_C, picked_C / spec.temperature, 0.0)
        kernel = self.kernels["sums" if spec.entropy else "sum"]
        parts = [kernel(self.logits_CV, self.peak_C, spec.temperature), picked_C[None]]
        if spec.summary:
            rows_1C = torch.full_like(picked_C, vocab.rows)[None]
            parts += [self.kernels["total"](self.logits_CV), rows_1C]
        sums = torch.cat(parts)
        vocab.reduce(sums)
        self.lse_C = sums[0].log()
        picked_C = sums[1 + spec.entropy]
        self.logps_C = picked_C - self.lse_C
        self.facts: dict[str, Tensor] = {}
        """Fields of HeadOut beside the log-probabilities."""
        if spec.entropy:
            self.facts["entropy_T"] = self.lse_C - sums[1] / sums[0]
        if spec.summary:
            self.facts["mean_logit_T"] = sums[-2] / sums[-1]
            self.facts["top_T"] = (picked_C >= 0).float()

    def d_logits(self, grad_C: Tensor) -> Tensor:
        """Return the gradient of the logits from that of the log-probabilities; once only.

        It takes the place of the logits.
        """
        slope_CV = self.kernels["slope"](
            self.logits_CV, self.peak_C, self.lse_C, grad_C, self.temperature
        )
        if not slope_CV.shape[1]:
            return slope_CV
        hit_C = torch.where(self.mine_C, grad_C / self.temperature, 0.0).to(slope_CV.dtype)
        return slope_CV.scatter_add_(-1, self.index_C1, hit_C.unsqueeze(-1))


class _Gradients:
    """Accumulates the gradients of hidden states and weight over chunks."""

    def __init__(self, hidden_TH: Tensor, weight_VH: Tensor, *, hidden: bool, weight: bool) -> None:
        self.hidden_TH = torch.empty_like(hidden_TH) if hidden else None
        self.weight_VH: Tensor | None = None
        if weight:
            # float32 over chunks; the sum is rounded to the parameter's dtype once
            self.weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)

    def add(
        self, chunk: _Chunk, where: slice, grad_C: Tensor | None, more_CV: Tensor | None = None
    ) -> None:
        """Add what one chunk contributes.

        Args:
            chunk: Its logits, which are overwritten.
            where: Its tokens.
            grad_C: Gradient of its log-probabilities; None where the loss has none of them.
            more_CV: Gradient of its first logits from elsewhere.
        """
        d_logits_CV = chunk.logits_CV.zero_() if grad_C is None else chunk.d_logits(grad_C)
        if more_CV is not None:
            d_logits_CV[:, : more_CV.shape[1]] += more_CV
        if self.hidden_TH is not None:
            self.hidden_TH[where] = torch.mm(d_logits_CV, chunk.weight_VH)
        if self.weight_VH is not None:
            rows = self.weight_VH[: d_logits_CV.shape[1]]
            _accumulate(rows, d_logits_CV, chunk.hidden_CH)


def _accumulate(rows_VH: Tensor, d_logits_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add d_logits^T hidden to a float32 sum."""
    if d_logits_CV.is_cuda and d_logits_CV.dtype is torch.float32:
        rows_VH.addmm_(d_logits_CV.t(), hidden_CH)
    elif d_logits_CV.is_cuda:  # one kernel that reads 16 bits and adds in 32
        torch.addmm(rows_VH, d_logits_CV.t(), hidden_CH, out_dtype=torch.float32, out=rows_VH)
    else:  # a part of the vocabulary at a time: no second [V, H] tensor
        size = max(1, 2**24 // hidden_CH.shape[1])
        for start in range(0, len(rows_VH), size):
            some_CV = d_logits_CV[:, start : start + size]
            rows_VH[start : start + size] += torch.mm(some_CV.t(), hidden_CH)


def _bytes(hidden_TH: Tensor) -> int:
    """Return what a logit counts; twice on a CPU, where small chunks cost no time."""
    return hidden_TH.element_size() * (1 if hidden_TH.is_cuda else 2)


def chunks_of(tokens: int, vocab_rows: int, element_size: int) -> Iterator[slice]:
    """Yield equal-sized slices of tokens whose logits fit CHUNK_BYTES."""
    size = max(16, CHUNK_BYTES // max(1, vocab_rows * element_size))
    for start in range(0, tokens, size):
        yield slice(start, min(tokens, start + size))


class _LocalLoss(torch.autograd.Function):
    """Sum of a token-local loss; its gradients are computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        hidden_TH: Tensor,
        weight: Tensor,
        targets_T: Tensor,
        vocab: VocabRange,
        spec: HeadSpec,
        loss: ChunkLoss,
        teacher: "Teacher | None",
        sink: list[LossOutput],
    ) -> tuple[Tensor, Tensor]:
        weight_VH = weight[: vocab.rows]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        training = wants_hidden or wants_weight
        grads = _Gradients(hidden_TH, weight, hidden=wants_hidden, weight=wants_weight)
        total = torch.zeros((), dtype=torch.float64, device=hidden_TH.device)
        count = torch.zeros_like(total)
        # a teacher's logits, and float32 copies of both, are there at the same time
        width = _bytes(hidden_TH) * (1 if teacher is None else 6)
        pieces = list(chunks_of(len(targets_T), vocab.rows, width))
        for where in pieces or [slice(0, 0)]:
            if not pieces:  # nothing trains here: the loss still says what it counts
                zeros_T = hidden_TH.new_zeros(0, dtype=torch.float32)
                out = loss(HeadOut(logps_T=zeros_T, divergence_T=zeros_T), where)
                total, count = total + out.total, count + out.count
                sink.append(out)
                break
            chunk = _Chunk(hidden_TH[where], weight_VH, targets_T[where], vocab, spec)
            logps_C = chunk.logps_C.requires_grad_(training)
            inputs = {"logps_T": logps_C}
            compared = None
            if teacher is not None:
                compared = teacher.compare(chunk.logits_CV, where)
                inputs["divergence_T"] = compared.values_C.requires_grad_(training)
            with torch.set_grad_enabled(training):
                out = loss(HeadOut(**inputs, **chunk.facts), where)
            if training:
                found = torch.autograd.grad(out.total, list(inputs.values()), allow_unused=True)
                more_CV = None
                if compared is not None and found[1] is not None:
                    more_CV = compared.d_logits(found[1])
                grads.add(chunk, where, found[0], more_CV)
            total, count = total + out.total.detach(), count + out.count
            sink.append(out)
            del chunk, compared  # their logits, before the next ones are made
        ctx.hidden_grad, ctx.weight_grad = grads.hidden_TH, grads.weight_VH
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        hidden, weight = ctx.hidden_grad, ctx.weight_grad
        ctx.hidden_grad = ctx.weight_grad = None
        if hidden is not None:
            hidden = hidden.mul_(grad.to(hidden.dtype))
        if weight is not None:
            weight = weight.mul_(grad.to(weight.dtype)).to(ctx.weight_dtype)
        return hidden, weight, *[None] * 6


class _LogProbabilities(torch.autograd.Function):
    """Log-probabilities of all tokens, and facts about them that have no gradient.

    The backward pass recomputes logits, unless there is one chunk: its logits are still there. They
    are no more at a time than the backward pass makes again.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        hidden_TH: Tensor,
        weight: Tensor,
        targets_T: Tensor,
        vocab: VocabRange,
        spec: HeadSpec,
        sink: dict[str, Tensor],
    ) -> Tensor:
        weight_VH = weight[: vocab.rows]
        pieces = list(chunks_of(len(targets_T), vocab.rows, _bytes(hidden_TH)))
        logps_T = torch.empty(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
        ctx.chunk = None
        for where in pieces:
            chunk = _Chunk(hidden_TH[where], weight_VH, targets_T[where], vocab, spec)
            logps_T[where] = chunk.logps_C
            for name, values_C in chunk.facts.items():
                sink.setdefault(name, torch.zeros_like(logps_T))[where] = values_C
            if len(pieces) == 1 and any(ctx.needs_input_grad[:2]):
                ctx.chunk = chunk
            del chunk  # its logits, before the next ones are made
        ctx.save_for_backward(hidden_TH, weight, targets_T)
        ctx.vocab, ctx.spec = vocab, HeadSpec(temperature=spec.temperature)
        return logps_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # noqa: ANN401
        hidden_TH, weight, targets_T = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grads = _Gradients(hidden_TH, weight, hidden=wants_hidden, weight=wants_weight)
        weight_VH, kept, ctx.chunk = weight[: ctx.vocab.rows], ctx.chunk, None
        for where in chunks_of(len(targets_T), ctx.vocab.rows, _bytes(hidden_TH)):
            chunk, kept = kept, None
            if chunk is None:
                chunk = _Chunk(hidden_TH[where], weight_VH, targets_T[where], ctx.vocab, ctx.spec)
            grads.add(chunk, where, grad_T[where])
            del chunk
        weight_grad = None if grads.weight_VH is None else grads.weight_VH.to(weight.dtype)
        return grads.hidden_TH, weight_grad, *[None] * 4


def log_probabilities(
    hidden_TH: Tensor, weight: Tensor, targets_T: Tensor, *, vocab: VocabRange, spec: HeadSpec
) -> HeadOut:
    """Return the log-probability of each target, and what else `spec` asks for.

    Args:
        hidden_TH: Hidden states of the tokens, the same on every tensor-parallel rank.
        weight: This rank's rows of the output weight, [V or more, H].
        targets_T: Global token ids, int64.
        vocab: Which rows `weight` holds.
        spec: Temperature, and whether entropies and the summary are wanted.

    Returns:
        Values in nats, float32. The gradient of `hidden_TH` is this rank's part of it: the caller
        sums it over tensor-parallel ranks.
    """
    empty_T = torch.zeros(len(targets_T), dtype=torch.float32, device=hidden_TH.device)
    facts: dict[str, Tensor] = dict.fromkeys(spec.facts, empty_T) if not len(targets_T) else {}
    logps_T = _LogProbabilities.apply(hidden_TH, weight, targets_T, vocab, spec, facts)  # type: ignore[no-untyped-call]
    return HeadOut(logps_T=logps_T, **facts)


def local_loss(
    hidden_TH: Tensor,
    weight: Tensor,
    targets_T: Tensor,
    loss: ChunkLoss,
    *,
    vocab: VocabRange,
    spec: HeadSpec,
    teacher: "Teacher | None" = None,
) -> LossOutput:
    """Return the sum of a token-local loss over all tokens, chunk by chunk.

    Arguments as in `log_probabilities`; `loss` maps the log-probabilities of a slice of the tokens
    to its share. With a `teacher` it is given the tokens' divergence too. `total` is differentiable
    in `hidden_TH` and `weight`, float64.
    """
    found: list[LossOutput] = []
    total, count = _LocalLoss.apply(  # type: ignore[no-untyped-call]
        hidden_TH, weight, targets_T, vocab, spec, loss, teacher, found
    )
    shares = Shares()
    for out in found:
        shares.add(out)
    return LossOutput(total, count, shares.metrics, highest=shares.highest, lowest=shares.lowest)
