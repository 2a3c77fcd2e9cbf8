"""How far two models' activations are apart, place by place, as numbers and as a table.

T tokens, H hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
"""Largest relative difference that rounding explains, by number type."""
EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two models are apart at one place."""

    name: str
    largest: float
    """Largest absolute difference of any value."""
    mean: float
    """Mean absolute difference."""
    relative: float
    """Over tokens, the largest ratio of the difference's norm to the reference's norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionReport:
    """The comparison of a model with transformers'."""

    model: str
    """Class of transformers' model."""
    dtype: str
    lengths: Sequence[int]
    """Tokens of each sequence compared."""
    layout: str
    rows: Sequence[Difference]
    """In the order of the model: embedding, layers, final norm, logits."""
    spread: float | None
    """Standard deviation of the reference's logits; None for a model without any."""
    agreement: float | None
    """Share of tokens for which both models find the same token or label most likely."""

    @property
    def tolerance(self) -> float:
        """Largest relative difference that rounding explains."""
        return TOLERANCE[self.dtype]

    @property
    def first_over(self) -> str | None:
        """The first place that differs by more than the tolerance."""
        # not "over": NaN is no agreement either
        return next((r.name for r in self.rows if not r.relative <= self.tolerance), None)

    def row(self, name: str) -> Difference:
        """Return the row of a place."""
        return next(r for r in self.rows if r.name == name)

    def table(self) -> str:
        """Return the report as text."""
        tokens = sum(self.lengths)
        lines = [
            f"precision: {self.dtype}, {self.layout}, against transformers' {self.model}, "
            f"{tokens} tokens in {len(self.lengths)} sequences",
            f"  {'':12}{'largest':>10}{'mean':>10}{'relative':>10}",
        ]
        for row in self.rows:
            mark = "  <- first over the tolerance" if row.name == self.first_over else ""
            lines.append(
                f"  {row.name:12}{row.largest:10.1e}{row.mean:10.1e}{row.relative:10.1e}{mark}"
            )
        if self.spread is not None and self.agreement is not None:
            logits = self.row(LOGITS)
            agreed = round(self.agreement * tokens)
            lines += [
                f"  logits: largest difference {logits.largest:.2e}, mean {logits.mean:.2e}, "
                f"of a standard deviation of {self.spread:.3g}",
                f"  top-1 agreement: {self.agreement:.2%} ({agreed} of {tokens} tokens)",
            ]
        verdict = (
            f"every place is within {self.tolerance:.0e} of the reference"
            if self.first_over is None
            else f"from {self.first_over} on they differ by more than {self.tolerance:.0e}"
        )
        return "\n".join([*lines, f"  {verdict}"])


def compare(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    *,
    model: str,
    dtype: str,
    lengths: Sequence[int],
    layout: str,
) -> PrecisionReport:
    """Compare activations, each [T, H], by the name of their place."""
    spread = agreement = None
    if LOGITS in ours:
        logits_TV, reference_TV = ours[LOGITS], theirs[LOGITS][:, : ours[LOGITS].shape[1]]
        agreed_T = logits_TV.argmax(1) == reference_TV.argmax(1)
        spread, agreement = float(reference_TV.std()), float(agreed_T.float().mean())
    return PrecisionReport(
        model=model,
        dtype=dtype,
        lengths=lengths,
        layout=layout,
        rows=[_difference(name, ours[name], theirs[name]) for name in ours],
        spread=spread,
        agreement=agreement,
    )


def _difference(name: str, ours_TH: Tensor, theirs_TH: Tensor) -> Difference:
    theirs_TH = theirs_TH[:, : ours_TH.shape[1]].double()
    apart_TH = ours_TH.double() - theirs_TH
    relative_T = apart_TH.norm(dim=1) / theirs_TH.norm(dim=1).clamp(min=1e-12)
    return Difference(
        name,
        float(apart_TH.abs().max()),
        float(apart_TH.abs().mean()),
        float(relative_T.max()),
    )
