"""Tokens of a text, and the weight of each: 1 where a token stands for characters that train.

Spans of text become tokens through the tokenizer's offsets. A token that reaches over the border
to the prompt does not train (the model never writes it); whitespace after the end-of-turn token
neither.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.loss_scale import LossScale, Span
from mcore_core.data.tokens import Ids, Offsets, Tokens
from mcore_core.data.turns import ambiguous

if TYPE_CHECKING:
    from numpy.typing import NDArray

type Weights = "NDArray[np.float32]"


class Weigher:
    """A tokenizer, and which of the characters that train do not after all. Picklable."""

    def __init__(self, tokenizer: Any, scale: LossScale) -> None:  # noqa: ANN401
        self.tokenizer = tokenizer
        self.tokens = Tokens(tokenizer)
        self._scale = scale

    def __call__(
        self, text: str, spans: Sequence[Span] | None, *, special: bool = False
    ) -> tuple[Ids, Weights]:
        """Return the tokens of a text and 1 for those in the spans, all with None, 0 for others.

        `special` adds the tokenizer's own beginning.
        """
        located = spans is not None or self._scale.ignore_empty_think
        ids, offsets = self.tokens(text, special=special, located=located)
        return ids, self._weigh(text, ids, offsets, spans)

    def _weigh(
        self, text: str, ids: Ids, offsets: Offsets | None, spans: Sequence[Span] | None
    ) -> Weights:
        weights = (np.ones if spans is None else np.zeros)(len(ids), np.float32)
        thoughts = self._scale.empty_thoughts(text, spans)
        if offsets is None:
            for span in spans or ():
                weights[self._by_prefix(text, ids, span)] = 1.0
            for thought in thoughts:
                weights[self._by_prefix(text, ids, thought)] = 0.0
            return weights
        for start, end in spans or ():
            within = np.flatnonzero(inside(offsets, (start, end)))
            weights[within] = 1.0
            ends = np.flatnonzero(self.tokens.special(ids[within]))
            if len(ends) and not text[offsets[within[ends[-1]], 1] : end].strip():
                weights[within[ends[-1]] + 1 : within[-1] + 1] = 0.0
        for thought in thoughts:
            weights[inside(offsets, thought)] = 0.0
        return weights

    def _by_prefix(self, text: str, ids: Ids, span: Span) -> slice:
        """For a tokenizer without offsets: prefixes of the text must be prefixes of the tokens."""
        ends = []
        for end in span:
            prefix = self.tokenizer(text[:end], add_special_tokens=False)["input_ids"]
            lead = next((k for k in (0, 1) if ids[k : k + len(prefix)].tolist() == prefix), None)
            if lead is None:
                raise ambiguous(
                    f"the tokens of {text[:end][-60:]!r} are not a prefix of the whole's",
                    "and this tokenizer gives no offsets",
                )
            ends.append(lead + len(prefix))
        return slice(*ends)


def inside(offsets: Offsets, span: Span) -> "NDArray[np.bool_]":
    """Return which tokens stand for characters of the span alone."""
    start, end = span
    return (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
