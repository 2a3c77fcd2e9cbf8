"""`--loss_scale`: which turns train, and whether empty think blocks do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

type Span = tuple[int, int]
"""First character and the one after the last."""

EXTRA = "ignore_empty_think"
EMPTY_THINK = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True, slots=True)
class LossScale:
    """What an option says."""

    rounds: str
    """default, last_round or all."""
    ignore_empty_think: bool

    @classmethod
    def parse(cls, value: str) -> Self:
        """Read `last_round+ignore_empty_think`; the extra alone means default with it."""
        rounds, _, extra = value.partition("+")
        return cls("default", True) if rounds == EXTRA else cls(rounds, extra == EXTRA)

    def empty_thoughts(self, text: str, spans: Sequence[Span] | None) -> list[Span]:
        """Return the empty think blocks that are not to train, with the white space after them.

        Args:
            text: A rendered sample.
            spans: The answers in it that train: a block counts where one begins with it. None: all
                of the text trains, and a block counts wherever it stands.
        """
        if not self.ignore_empty_think:
            return []
        if spans is None:
            return [found.span() for found in EMPTY_THINK.finditer(text)]
        found = (EMPTY_THINK.match(text, start, end) for start, end in spans)
        return [each.span() for each in found if each]
