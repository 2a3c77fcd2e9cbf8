"""How far a student's distributions are from a teacher's, chunk by chunk, vocab-parallel.

The generalized Jensen-Shannon divergence of On-Policy Distillation (arXiv:2306.13649, eq. 1), as
TRL computes it: with M = (1 - beta) S + beta T it is beta KL(T || M) + (1 - beta) KL(S || M); beta
0 means KL(T || S), beta 1 KL(S || T). Vocabularies of different size are compared on the ids that
both have, each distribution normalized over those.

Shapes: T tokens, C tokens of a chunk, V this rank's rows of the common vocabulary, H hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mcore_core.model.head import VocabRange
    from mcore_core.protocols import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What the head compares tokens with."""

    hidden_TH: Tensor
    """The teacher's hidden states of the same tokens, the same on every tensor-parallel rank."""
    weight: Tensor
    """This rank's rows of its output weight, beginning with the student's first row."""
    vocab: "VocabRange"
    """Of the ids that both have."""
    spec: "Divergence"

    def compare(self, logits_CV: Tensor, where: slice) -> "ChunkDivergence":
        """Return the divergence of the student's logits of a chunk, [C, V or more]."""
        theirs_CV = self.hidden_TH[where] @ self.weight[: self.vocab.rows].t()
        return ChunkDivergence(logits_CV[:, : self.vocab.rows], theirs_CV, self.vocab, self.spec)


def _log_probs(logits_CV: Tensor, peak_C: Tensor, lse_C: Tensor, temperature: float) -> Tensor:
    """Return log-softmax(logits / temperature), in float32 at least."""
    wide = logits_CV.to(peak_C.dtype)
    return (wide - peak_C.unsqueeze(-1)) / temperature - lse_C.unsqueeze(-1)


def _mass(logits_CV: Tensor, peak_C: Tensor, temperature: float) -> Tensor:
    """Return sum(exp((logits - peak) / temperature)), [C]."""
    wide = logits_CV.to(peak_C.dtype)
    return ((wide - peak_C.unsqueeze(-1)) / temperature).exp().sum(-1)


def _mixture(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return log((1 - beta) S + beta T) of log-probabilities."""
    return torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))


def _sums(
    mine_CV: Tensor,
    theirs_CV: Tensor,
    peak_2C: Tensor,
    lse_2C: Tensor,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return this rank's part of KL(T || M) and KL(S || M), [2, C]; M as the module says."""
    student = _log_probs(mine_CV, peak_2C[0], lse_2C[0], temperature)
    teacher = _log_probs(theirs_CV, peak_2C[1], lse_2C[1], temperature)
    middle = student if beta == 0 else teacher if beta == 1 else _mixture(student, teacher, beta)
    of_teacher = (teacher.exp() * (teacher - middle)).sum(-1)
    of_student = (student.exp() * (student - middle)).sum(-1)
    return torch.stack((of_teacher, of_student))


def _slope(
    mine_CV: Tensor,
    theirs_CV: Tensor,
    peak_2C: Tensor,
    lse_2C: Tensor,
    kl_C: Tensor,
    grad_C: Tensor,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return the gradient of the student's logits, given KL(S || M) and that of the divergence."""
    student = _log_probs(mine_CV, peak_2C[0], lse_2C[0], temperature)
    teacher = _log_probs(theirs_CV, peak_2C[1], lse_2C[1], temperature)
    grad_C1 = (grad_C / temperature).unsqueeze(-1)
    if beta == 0:
        return ((student.exp() - teacher.exp()) * grad_C1).to(mine_CV.dtype)
    middle = teacher if beta == 1 else _mixture(student, teacher, beta)
    share = 1.0 if beta == 1 else 1.0 - beta
    slope_CV = student.exp() * (student - middle - kl_C.unsqueeze(-1))
    return (slope_CV * (grad_C1 * share)).to(mine_CV.dtype)


@cache
def _kernels(fused: bool) -> dict[str, Callable[..., Tensor]]:
    """Return the element-wise parts; compiled on a GPU, where each becomes one pass over logits."""
    functions: dict[str, Callable[..., Tensor]] = {"mass": _mass, "sums": _sums, "slope": _slope}
    return {n: torch.compile(f) for n, f in functions.items()} if fused else functions


class ChunkDivergence:
    """The divergence of C tokens, and the way back to the student's logits.

    Args:
        mine_CV: The student's logits of this rank's rows of the common vocabulary.
        theirs_CV: The teacher's.
        vocab: Which rows those are.
        spec: beta and temperature.
    """

    def __init__(
        self, mine_CV: Tensor, theirs_CV: Tensor, vocab: "VocabRange", spec: "Divergence"
    ) -> None:
        self.mine_CV, self.theirs_CV, self.spec = mine_CV, theirs_CV, spec
        self.kernels = _kernels(mine_CV.is_cuda)
        wide = torch.promote_types(mine_CV.dtype, torch.float32)
        shape = (2, len(mine_CV))
        if vocab.rows:
            self.peak_2C = torch.stack([x.amax(-1).to(wide) for x in (mine_CV, theirs_CV)])
        else:  # a tensor-parallel rank may hold nothing of what both have
            self.peak_2C = mine_CV.new_full(shape, float("-inf"), dtype=wide)
        vocab.reduce(self.peak_2C, largest=True)
        mass_2C = torch.stack(
            [
                self.kernels["mass"](logits_CV, peak_C, spec.temperature)
                for logits_CV, peak_C in zip((mine_CV, theirs_CV), self.peak_2C, strict=True)
            ]
        )
        vocab.reduce(mass_2C)
        self.lse_2C = mass_2C.log()
        kl_2C = self.kernels["sums"](
            mine_CV, theirs_CV, self.peak_2C, self.lse_2C, spec.beta, spec.temperature
        )
        vocab.reduce(kl_2C)
        self.student_kl_C = kl_2C[1]
        match spec.beta:
            case 0:
                self.values_C = kl_2C[0]
            case 1:
                self.values_C = kl_2C[1]
            case beta:
                self.values_C = beta * kl_2C[0] + (1 - beta) * kl_2C[1]

    def d_logits(self, grad_C: Tensor) -> Tensor:
        """Return the gradient of the student's logits, [C, V], from that of the divergence."""
        return self.kernels["slope"](
            self.mine_CV,
            self.theirs_CV,
            self.peak_2C,
            self.lse_2C,
            self.student_kl_C,
            grad_C,
            self.spec.beta,
            self.spec.temperature,
        )
