"""Whether an answer equals the row's `solution`, as mathematics: math-verify decides."""

import logging
import re
from functools import lru_cache
from typing import Any

from mcore_core.config.compose import RunConfig
from mcore_core.errors import usage_error
from mcore_core.protocols import Rollout

LONGEST = 2000
"""Characters of an answer that are read: what stands last."""
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
PLAIN = re.compile(r"-?\d+(\.\d+)?")


class Accuracy:
    r"""1 where the answer equals `solution`, 0 where not; None where the row has none that parses.

    The answer is the last \boxed{} of a completion, or else the last expression in it; what stands
    before </think> is left out.
    """

    each = True
    """Scored one by one: a completion that takes for ever costs only itself."""

    def __init__(self, config: RunConfig | None = None) -> None:
        """Import math-verify. Raises UsageError where it is missing."""
        try:
            import math_verify  # noqa: PLC0415, F401 - slow, and only where it is used
        except ImportError as error:
            raise usage_error(
                "MC341",
                "the reward accuracy needs the package math-verify",
                f"{type(error).__name__}: {error}",
                "fix: uv pip install math-verify",
            ) from error
        # its time-outs are signals, which threads have not; the run's --reward_timeout holds
        for name in ("math_verify.parser", "math_verify.grader"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def __call__(self, rollouts: list[Rollout], /) -> list[float | None]:
        """Return the scores."""
        return [self._score(rollout) for rollout in rollouts]

    def _score(self, rollout: Rollout) -> float | None:
        solution = rollout.row.get("solution")
        if solution is None:
            return None
        gold = _gold(str(solution))
        if not gold:
            return None
        text = rollout.text.rpartition("</think>")[2][-LONGEST:]
        boxed = BOXED.findall(text)
        if boxed and PLAIN.fullmatch(boxed[-1].strip()) and boxed[-1].strip() == solution:
            return 1.0
        return float(_equal(list(gold), text))


@lru_cache(maxsize=100_000)
def _gold(solution: str) -> tuple[Any, ...]:
    from math_verify import parse  # noqa: PLC0415

    found = tuple(parse(solution, parsing_timeout=None))
    if not found and "$" not in solution and "\\boxed" not in solution:
        found = tuple(parse(f"${solution}$", parsing_timeout=None))
    return found


def _equal(gold: list[Any], text: str) -> bool:
    from latex2sympy2_extended import NormalizationConfig  # noqa: PLC0415
    from math_verify import (  # noqa: PLC0415
        ExprExtractionConfig,
        LatexExtractionConfig,
        parse,
        verify,
    )

    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    found = parse(
        text,
        extraction_config=[latex, ExprExtractionConfig()],
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    return bool(found) and bool(verify(gold, found, timeout_seconds=None))
