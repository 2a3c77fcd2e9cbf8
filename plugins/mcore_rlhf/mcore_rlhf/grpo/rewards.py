"""Run reward functions beside each other, with a time-out, so that none can lose the batch.

Coroutine functions are called for each completion by itself, all at once. A plain function gets the
whole batch, in a thread; one with the attribute `each` is called completion by completion, and
keeps what it has scored when its time is up. N completions, F functions.
"""

import asyncio
import inspect
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcore_core.config.compose import RunConfig
from mcore_core.errors import Problem, UsageError
from mcore_core.failure import RunFailure
from mcore_core.protocols import Rollout
from mcore_rlhf import components
from mcore_rlhf.grpo.config import GRPOConfig

type Scores = NDArray[np.float64]
type Function = Callable[[Sequence[Rollout]], Any]


@dataclass(slots=True)
class Scored:
    """What the functions said of a batch."""

    rewards_NF: Scores
    """NaN where a function does not apply or failed."""
    failed_NF: NDArray[np.bool_]
    problems: list[str] = field(default_factory=list)
    """One line for each function that failed somewhere."""


class Rewards:
    """The reward functions of a run."""

    def __init__(self, functions: Mapping[str, Function], timeout: float) -> None:
        self.functions = dict(functions)
        self.timeout = timeout

    @classmethod
    def of(cls, config: RunConfig, *, device: Callable[[], Any]) -> "Rewards":
        """Load what the options name.

        Args:
            config: The run's options.
            device: Where reward models run.

        Raises:
            UsageError: Something cannot be found, imported or built.
        """
        options = config[GRPOConfig]
        functions: dict[str, Function] = {}
        problems: list[Problem] = []
        for name in options.reward_funcs:
            try:
                made = components.load("mcore_rewards", name, "--reward_funcs")
                found = made(config) if isinstance(made, type) else made
                functions[_free(_short(name), functions)] = found
            except UsageError as error:
                problems += error.problems
        for source in options.reward_model:
            made = _Later(source, device)
            functions[_free("reward_model", functions)] = made
        if problems:
            raise UsageError(problems)
        return cls(functions, options.reward_timeout)

    @property
    def names(self) -> tuple[str, ...]:
        """The functions' names, in the order of their columns."""
        return tuple(self.functions)

    def __call__(self, rollouts: Sequence[Rollout]) -> Scored:
        """Score completions.

        Raises:
            RunFailure: A function fails for every completion, or gives what is no list of numbers.
            UsageError: A reward model cannot be read.
        """
        shape = (len(rollouts), len(self.functions))
        scored = Scored(np.full(shape, np.nan), np.zeros(shape, bool))
        if not rollouts:
            return scored
        columns = asyncio.run(self._all(list(rollouts)))
        for f, (name, column) in enumerate(zip(self.functions, columns, strict=True)):
            scored.rewards_NF[:, f] = column.values
            scored.failed_NF[:, f] = column.failed
            if column.failed.any():
                scored.problems.append(column.describe(name, rollouts))
            if isinstance(column.error, UsageError):
                raise column.error
            if column.failed.all() and column.error is not None:
                raise RunFailure(
                    "MC841",
                    f"the reward {name} failed for every completion",
                    f"{type(column.error).__name__}: {column.error}",
                    f"first row: {describe_row(rollouts[0])}",
                    "fix: correct the function, or leave it out of --reward_funcs",
                )
        return scored

    async def _all(self, rollouts: list[Rollout]) -> "list[_Column]":
        return list(
            await asyncio.gather(
                *(self._one(name, f, rollouts) for name, f in self.functions.items())
            )
        )

    async def _one(self, name: str, function: Function, rollouts: list[Rollout]) -> "_Column":
        column = _Column(len(rollouts))
        if is_coroutine(function):
            await asyncio.gather(
                *(self._awaited(name, function, column, i, r) for i, r in enumerate(rollouts))
            )
            return column
        work = _each if getattr(function, "each", False) else _batch
        finished = _thread(lambda: work(name, function, rollouts, column))
        try:
            await asyncio.wait_for(finished, self.timeout)
        except TimeoutError as error:
            column.close(error)
        return column

    async def _awaited(
        self, name: str, function: Function, column: "_Column", i: int, rollout: Rollout
    ) -> None:
        try:
            found = await asyncio.wait_for(function([rollout]), self.timeout)
            column.put(i, _checked(name, found, 1)[0])
        except RunFailure:
            raise
        except TimeoutError:
            column.fail(i, TimeoutError(f"no answer in {self.timeout:g} s"))
        except Exception as error:
            column.fail(i, error)


class _Column:
    """The scores of one function, filled as they come."""

    def __init__(self, size: int) -> None:
        self.values = np.full(size, np.nan)
        self.failed = np.zeros(size, bool)
        self.seen = np.zeros(size, bool)
        self.error: Exception | None = None
        self.first: int | None = None
        self.closed = False
        self.lock = threading.Lock()

    def put(self, i: int, value: float | None) -> None:
        """Keep a score."""
        with self.lock:
            if not self.closed:
                self.seen[i] = True
                self.values[i] = np.nan if value is None else float(value)

    def fail(self, i: int, error: Exception) -> None:
        """Note that there is none."""
        with self.lock:
            if not self.closed:
                self.seen[i] = self.failed[i] = True
                if self.first is None:
                    self.first, self.error = i, error

    def close(self, error: Exception) -> None:
        """Take nothing more: what is missing has failed."""
        with self.lock:
            self.closed = True
            late = ~self.seen
            self.failed |= late
            if late.any() and self.first is None:
                self.first = int(np.flatnonzero(late)[0])
                self.error = TimeoutError("its time was up") if not str(error) else error

    def describe(self, name: str, rollouts: Sequence[Rollout]) -> str:
        """Return what failed, where, how often."""
        assert self.first is not None
        error = self.error
        return (
            f"the reward {name} failed for {int(self.failed.sum())} of {len(rollouts)} "
            f"completions, first for the row {describe_row(rollouts[self.first])}: "
            f"{type(error).__name__}: {error}"
        )


def is_coroutine(function: Function) -> bool:
    """Return whether calling a function gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(type(function), "__call__", None)  # noqa: B004 - its kind matters
    )


def _each(name: str, function: Function, rollouts: list[Rollout], column: _Column) -> None:
    for i, rollout in enumerate(rollouts):
        try:
            column.put(i, _checked(name, function([rollout]), 1)[0])
        except RunFailure:
            raise
        except Exception as error:
            column.fail(i, error)


def _batch(name: str, function: Function, rollouts: list[Rollout], column: _Column) -> None:
    try:
        found = _checked(name, function(rollouts), len(rollouts))
    except RunFailure:
        raise
    except Exception:  # find out for which completions, and keep the others
        _each(name, function, rollouts, column)
        return
    for i, value in enumerate(found):
        column.put(i, value)


def _checked(name: str, found: Any, size: int) -> list[float | None]:  # noqa: ANN401
    """Return the scores. Raises RunFailure where they are not `size` numbers."""
    try:
        values = [None if value is None else float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise _malformed(name, f"it returned {found!r:.100}", size) from error
    if len(values) != size:
        raise _malformed(name, f"it returned {len(values)}", size)
    if any(value is not None and np.isinf(value) for value in values):
        raise _malformed(name, "it returned one that is infinite", size)
    return [None if value is not None and np.isnan(value) else value for value in values]


def _malformed(name: str, found: str, size: int) -> RunFailure:
    return RunFailure(
        "MC842",
        f"the reward {name} must return {size} number{'s' if size > 1 else ''} or None: {found}",
        "fix: return one score for each rollout, in order",
    )


def _thread(work: Callable[[], None]) -> "asyncio.Future[None]":
    """Run in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def finish(error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def target() -> None:
        raised: BaseException | None = None
        try:
            work()
        except BaseException as error:
            raised = error
        try:
            loop.call_soon_threadsafe(finish, raised)
        except RuntimeError:
            return  # its time was up, and the loop is gone

    threading.Thread(target=target, daemon=True).start()
    return future


def describe_row(rollout: Rollout) -> str:
    """Return the beginning of a row."""
    text = json.dumps(rollout.row, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else text[:200] + " ..."


def check_scored(scored: Scored, rollouts: Sequence[Rollout]) -> None:
    """Raise RunFailure where no function applies to a completion, naming its row."""
    nothing_N = (np.isnan(scored.rewards_NF) & ~scored.failed_NF).all(1)
    if nothing_N.any():
        first = int(np.flatnonzero(nothing_N)[0])
        raise RunFailure(
            "MC843",
            "no reward applies to a completion: every function returned None",
            f"row: {describe_row(rollouts[first])}",
            "fix: add a reward that applies to these rows, or leave them out of the data",
        )


class _Later:
    """A reward model that is loaded when it is first needed: on one rank of a model only."""

    def __init__(self, source: str, device: Callable[[], Any]) -> None:
        self._source, self._device = source, device
        self._model: Any = None

    def __call__(self, rollouts: Sequence[Rollout], /) -> Any:  # noqa: ANN401
        if self._model is None:
            made = components.load("mcore_rewards", "reward_model", "--reward_model")
            self._model = made(self._source, device=self._device())
        return self._model(rollouts)


def _short(name: str) -> str:
    return name.rpartition(":")[2]


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
