"""The tokens of a text and the characters that each stands for.

A Hugging Face tokenizer's call prepares much that nobody reads here (attention masks, batches, two
dictionaries): a fifth of the time of a short text. Where its class leaves that call as transformers
has it, the Rust tokenizer behind it is asked directly, which gives the same tokens.
"""

from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.data.offsets import ByteLengths

if TYPE_CHECKING:
    from numpy.typing import NDArray

type Ids = "NDArray[np.int32]"
type Offsets = "NDArray[np.int64]"

CALLS = ("__call__", "_encode_plus", "_switch_to_input_mode")
"""What a tokenizer's class may change between its call and the Rust tokenizer."""


class Tokens:
    """A tokenizer's way from text to tokens. Picklable."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401
        """Decide whether the Rust tokenizer may be asked directly."""
        self.tokenizer = tokenizer
        self._fast = bool(getattr(tokenizer, "is_fast", False))
        self._direct = self._fast and _is_plain(type(tokenizer))
        self._lengths = ByteLengths.of(tokenizer.backend_tokenizer) if self._direct else None
        special_ids = list(tokenizer.all_special_ids)
        self._special = np.zeros(max(special_ids, default=-1) + 2, np.bool_)  # the last for others
        self._special[special_ids] = True

    def __call__(
        self, text: str, *, special: bool = False, located: bool = True
    ) -> tuple[Ids, "Offsets | None"]:
        """Return the tokens of a text.

        Args:
            text: Any text.
            special: Add the tokenizer's own beginning and end.
            located: Say where the tokens stand, if the tokenizer can.

        Returns:
            ids [L], and [L, 2], the first character and the one after the last; or None.
        """
        backend = self.tokenizer.backend_tokenizer if self._direct else None
        if backend is None or not self._is_unset(backend):
            located = located and self._fast
            out = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=located)
            ids = np.array(out["input_ids"], np.int32)
            return ids, _array(out["offset_mapping"]) if located else None
        lengths = None if special else self._lengths
        if lengths is not None or not located:  # without offsets it takes a fifth less
            (found,) = backend.encode_batch_fast([text], add_special_tokens=special)
            ids = np.array(found.ids, np.int32)
            offsets = lengths.offsets(text, ids) if located and lengths is not None else None
            if offsets is not None or not located:
                return ids, offsets
        found = backend.encode(text, add_special_tokens=special)
        return np.array(found.ids, np.int32), _array(found.offsets)

    def special(self, ids: Ids) -> "NDArray[np.bool_]":
        """Return which tokens are special ones of the tokenizer."""
        return self._special.take(ids, mode="clip")

    def _is_unset(self, backend: Any) -> bool:  # noqa: ANN401
        """Whether what a call would set before it asks the Rust tokenizer is so already."""
        return (
            backend.truncation is None
            and backend.padding is None
            and backend.encode_special_tokens == self.tokenizer.split_special_tokens
        )


def _array(pairs: list[tuple[int, int]]) -> Offsets:
    flat = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs))
    return flat.reshape(-1, 2)


def _is_plain(kind: type) -> bool:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - start-up stays light

    if not issubclass(kind, PreTrainedTokenizerFast):
        return False
    return all(getattr(kind, x, None) is getattr(PreTrainedTokenizerFast, x, None) for x in CALLS)
