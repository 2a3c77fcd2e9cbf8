"""What became of the data: rows, drops by reason, tokens, packing; printed and kept."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from mcore_core.data.store import Counts


@dataclass(slots=True)
class DataReport:
    """Counts for each source, and for the whole."""

    train: dict[str, Counts] = field(default_factory=dict)
    val: dict[str, Counts] = field(default_factory=dict)
    train_items: int | None = None
    """Samples, or packed rows; None where unknown (streaming)."""
    val_items: int = 0
    packing_fill: float | None = None
    """Share of the packed rows' room that is used; None without packing."""
    max_length: int | None = None
    """Tokens of the longest sample that was kept."""
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Yield what a user should read, one line each."""
        for label, sources in (("train", self.train), ("val", self.val)):
            for name, counts in sources.items():
                pieces = f" in {counts.units:,} pieces" if counts.units > counts.kept else ""
                yield (
                    f"{label} {name}: {counts.kept:,} of {counts.rows:,} rows{pieces}, "
                    f"{counts.tokens:,} tokens, {counts.trained:,} train"
                )
                for reason in counts.dropped:
                    yield (
                        f"  dropped {counts.dropped[reason]:,}: {reason} "
                        f"(first: {counts.examples[reason]})"
                    )
        if self.packing_fill is not None:
            yield f"packed into {self.train_items:,} rows, {self.packing_fill:.1%} full"
        yield from (f"warning: {warning}" for warning in self.warnings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for run.json."""
        return asdict(self)
