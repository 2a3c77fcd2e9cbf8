"""reasoning-gym's generated tasks, as a dataset and as a reward.

`--dataset 'reasoning_gym://leg_counting?size=1000&seed=1' --reward_funcs reasoning_gym`. What
stands in the query beside size and seed are options of the task: `&max_animals=5`.
"""

import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

from mcore_core.errors import did_you_mean, usage_error
from mcore_core.protocols import Rollout, Row

INSTRUCTION = "\nGive your final answer between <answer> and </answer>."


def _package() -> Any:  # noqa: ANN401
    try:
        import reasoning_gym  # noqa: PLC0415 - slow, and only where it is used
    except ImportError as error:
        raise usage_error(
            "MC342",
            "reasoning_gym:// and the reward reasoning_gym need the package reasoning-gym",
            f"{type(error).__name__}: {error}",
            "fix: uv pip install reasoning-gym",
        ) from error
    return reasoning_gym


def rows(path: str, *, streaming: bool = False) -> Iterator[Row]:
    """Yield the tasks: `prompt`, `answer`, and what scoring needs.

    Args:
        path: TASK?size=N&seed=N&..., several tasks joined by +.
        streaming: The same either way; tasks are generated one by one.

    Raises:
        UsageError: reasoning-gym is missing, or has no such task or option.
    """
    names, _, query = path.partition("?")
    options: dict[str, Any] = {key: _value(text) for key, text in parse_qsl(query)}
    instruction = options.pop("instruction", INSTRUCTION)
    for name in names.split("+"):
        yield from _task(name, options, instruction)


def _task(name: str, options: dict[str, Any], instruction: Any) -> Iterator[Row]:  # noqa: ANN401
    package = _package()
    known = package.factory.DATASETS
    if name not in known:
        raise usage_error(
            "MC343",
            f"reasoning-gym has no task {name!r}",
            did_you_mean(name, known),
            f"it has {len(known)}, such as {', '.join(sorted(known)[:6])}",
        )
    state = random.getstate()  # it draws from the global generator in places
    try:
        made = package.create_dataset(name, **{"size": 500, "seed": 42, **options})
    except (TypeError, AssertionError, ValueError) as error:
        raise usage_error(
            "MC343",
            f"reasoning-gym's task {name!r} does not take these options: {error}",
            f"given: {options}",
        ) from error
    finally:
        random.setstate(state)
    for entry in made:
        yield {
            "prompt": entry["question"] + (str(instruction) if instruction else ""),
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "task": name,
            "task_options": json.dumps(options),
            "entry": json.dumps(entry, default=str),
        }


def _value(text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except ValueError:
        return text


@cache
def _scorer(task: str, options: str) -> Any:  # noqa: ANN401
    return _package().create_dataset(task, **{"size": 1, "seed": 0, **_small(json.loads(options))})


def _small(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("size", "seed")}


def score(rollouts: Sequence[Rollout], /) -> list[float | None]:
    """Return each task's own score, from 0 to 1; None for rows of other datasets.

    The answer is what stands last between <answer> and </answer>, else the whole text after
    </think>.
    """
    return [_score(rollout) for rollout in rollouts]


def _score(rollout: Rollout) -> float | None:
    row = rollout.row
    if "task" not in row or "entry" not in row:
        return None
    text = rollout.text.rpartition("</think>")[2]
    if "<answer>" in text:
        text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    scorer = _scorer(row["task"], row.get("task_options") or "{}")
    return float(scorer.score_answer(answer=text.strip(), entry=json.loads(row["entry"])))
