"""Where a completion ends: stop tokens, and strings in the text that its tokens make."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_core.protocols import Sampling


def stop_ids(sampling: "Sampling", tokenizer: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the tokens that end a completion."""
    if sampling.stop_token_ids:
        return sampling.stop_token_ids
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (int(end),)


def reach(stop: Sequence[str]) -> int:
    """Return how many of the last tokens can be part of a stop string.

    A token has at least one byte, but for those that only begin or end a character.
    """
    return max((len(s.encode()) for s in stop), default=0) + 4


def hits(stop: Sequence[str], tail: Sequence[int], tokenizer: Any) -> bool:  # noqa: ANN401
    """Return whether the text of the last tokens has one of the strings."""
    text: str = tokenizer.decode(tail, skip_special_tokens=False)
    return any(s in text for s in stop)
