"""A parallel layout as plain arithmetic: sizes, and which HF layers a pipeline chunk holds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of every parallel dimension. `world` is tp * pp * cp * dp."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int | None = None
    """Chunks on each pipeline rank; None without virtual pipeline."""
    sp: bool = False

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tp * self.pp * self.cp)

    @property
    def stages(self) -> int:
        """Pipeline chunks in all."""
        return self.pp * (self.vpp or 1)

    @property
    def seq_multiple(self) -> int:
        """What each sequence of a packed row is padded to."""
        if self.cp == 1:
            return 1
        return 2 * self.cp * (self.tp if self.sp else 1)

    @property
    def row_multiple(self) -> int:
        """What a packed row is padded to."""
        return self.tp if self.sp and self.cp == 1 else 1

    def __str__(self) -> str:
        names = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "ep": self.ep, "dp": self.dp}
        parts = [f"{k}{v}" for k, v in names.items() if v > 1]
        if self.vpp:
            parts.append(f"vpp{self.vpp}")
        if self.sp:
            parts.append("sp")
        return "+".join(parts) or "one rank"
