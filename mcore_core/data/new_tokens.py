"""`--new_special_tokens`: tokens that a tokenizer lacks, and the rows that they take in a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_core.errors import Problem, UsageError


@dataclass(frozen=True, slots=True)
class Growth:
    """How a vocabulary grows."""

    known: int
    """Rows of the weights in files that belong to tokens: the first ones."""
    file_rows: int
    """Rows of the weights in files; models may have more than tokens."""
    first: int
    """Id of the first new token."""
    end: int
    """The id after the last one."""

    @property
    def rows(self) -> int:
        """Rows of the model's weights."""
        return max(self.file_rows, self.end)


def read_new_tokens(values: Sequence[str]) -> list[str]:
    """Return the tokens that the option names, each once: as they stand, or a line each of a .txt.

    Raises:
        UsageError: Every file that cannot be read, or has no tokens.
    """
    tokens: dict[str, None] = {}
    problems = []
    for value in values:
        if not value.endswith(".txt"):
            tokens |= {value: None} if value.strip() else {}
            continue
        try:
            text = Path(value).expanduser().read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            problems.append(_unusable(value, why))
            continue
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            problems.append(_unusable(value, "it has no lines"))
        tokens |= dict.fromkeys(lines)
    if problems:
        raise UsageError(problems)
    return list(tokens)


def extend_tokenizer(tokenizer: Any, tokens: Sequence[str], file_rows: int) -> Growth | None:  # noqa: ANN401
    """Make the tokens special ones of the tokenizer, in place; those it has keep their ids.

    Args:
        tokenizer: A Hugging Face tokenizer.
        tokens: The tokens.
        file_rows: Rows of the model's embedding.

    Returns:
        What that means for the model; None where it has them all.
    """
    before = 1 + max(tokenizer.get_vocab().values())
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False
    )
    end = 1 + max(tokenizer.get_vocab().values())
    if end == before:
        return None
    return Growth(min(before, file_rows), file_rows, before, end)


def _unusable(value: str, why: str) -> Problem:
    return Problem(
        "MC433",
        f"--new_special_tokens {value} cannot be used: {why}",
        ["fix: a text file with one token a line, or the tokens themselves"],
    )
