"""Rollouts: what engines generate, what rewards see, what a conversation of several turns asks.

`mcore_core.protocols` has these names too. Typing only: torch is imported for checkers. L tokens of
a completion.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from mcore_core.config.compose import RunConfig
    from mcore_core.model.build import ModelPlan
    from mcore_core.protocols import Bridge, ModelChunk, Row, Tuner, Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the tokens of a completion are chosen."""

    max_tokens: int
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token, with log-probabilities at 1."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the most likely ones; 0 and -1 keep all."""
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """The completion ends with the token that completes one of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The completion ends with one of these tokens; empty: the tokenizer's end of sequence."""
    seed: int = 0
    """Randomness is drawn from (seed, request id, token index): batching changes no result."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion that is wanted."""

    id: str
    """Unique within the run."""
    token_ids: tuple[int, ...]
    """The prompt, or the conversation so far."""
    sampling: Sampling
    row: "Row" = field(default_factory=dict)
    """The dataset's row, for engines that pass it on."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine generated for one request; every array has one entry a token, [L]."""

    id: str
    token_ids: tuple[int, ...]
    """The tokens after the prompt, the one that ended it included."""
    logps: "NDArray[np.float32]"
    """log-softmax(logits / temperature) of each token, before top_k, top_p and the penalty."""
    versions: "NDArray[np.int64]"
    """The policy step whose weights each token was sampled with."""
    stop: Literal["stop", "length", "cancelled"]
    trainable: "NDArray[np.bool_]"
    """True for what the model wrote; all of it, from an engine."""
    routing: "NDArray[np.int16] | None" = None
    """Experts that each token of prompt and completion went to in each decoder layer with experts,
    [prompt + L, layers, K]; -1 for a token that was not read. Of engines that record it."""


class RolloutEngine(Protocol):
    """Generates completions; requests are asynchronous and can be cancelled.

    Each data-parallel rank submits its own requests. Every method is called alike, in the same
    order, on the ranks that share a data-parallel rank (tensor, pipeline and context parallelism).
    """

    def __init__(self, context: "EngineContext") -> None:
        """Connect, or build; nothing is generated before the first `update_weights`."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests of this data-parallel rank."""

    def poll(self, *, wait: bool = True) -> list[Completion]:
        """Return what finished or was cancelled since the last call, in any order.

        With `wait` at least one, or nothing where no request is pending.
        """

    def cancel(self, ids: Sequence[str]) -> None:
        """End requests early: `poll` returns what they have so far. Unknown ids are ignored."""

    def update_weights(self, *, step: int) -> None:
        """Sample with the policy's present weights from now on, also in pending requests.

        Collective over all ranks. `step` is the number of optimizer steps that they have seen.
        """

    def sleep(self) -> None:
        """Give memory back while the policy trains; nothing is pending."""

    def wake(self) -> None:
        """Take it again."""

    def close(self) -> None:
        """Free everything; pending requests are lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineContext:
    """What an engine is built from."""

    config: "RunConfig"
    chunks: "Sequence[ModelChunk]"
    """The policy on this rank, as it trains."""
    plan: "ModelPlan"
    device: "torch.device"
    tokenizer: Any
    bridge: "Bridge"
    model_path: Path
    """The Hugging Face folder that the policy started from: its config and tokenizer."""
    tuner: "Tuner | None" = None
    optimizer: Any = None
    """The policy's optimizer, for engines that move it aside while they generate."""
    warn: "Callable[[str], None] | None" = None
    """Tells the user something, from any thread; on the first rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One completion of one prompt, as rewards see it."""

    row: "Row"
    """The dataset's row, every column of it (see --remove_unused_columns)."""
    text: str
    """What the model wrote, special tokens left out; of several turns, the last one's."""
    token_ids: Sequence[int]
    """Everything after the prompt, turns of tools and environments included."""
    finished: bool
    """False where it was cut by its length."""
    messages: Sequence[Mapping[str, Any]] = ()
    """The whole conversation, prompt and completion."""
    step: int = 0
    """The optimizer step that it is for, from 1."""


class RewardFn(Protocol):
    """Scores completions. A component names a function, or a class that is built with the config.

    It may be a coroutine function. Functions run beside each other, with a time-out.
    """

    def __call__(
        self, rollouts: Sequence[Rollout], /
    ) -> "Sequence[float | None] | Awaitable[Sequence[float | None]]":
        """Return one score for each rollout, in order; None: it does not apply to the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A conversation after the model's turn."""

    row: "Row"
    messages: Sequence[Mapping[str, Any]]
    """Prompt, earlier turns, and what the model just wrote."""
    text: str
    """What the model just wrote."""
    number: int
    """How many turns the model has had, from 1."""
    finished: bool
    """False where the turn was cut by its length."""


class TurnScheduler(Protocol):
    """Says what follows a turn of the model. Built as `scheduler(config)`."""

    def __call__(
        self, turn: Turn, /
    ) -> "Sequence[Mapping[str, Any]] | Awaitable[Sequence[Mapping[str, Any]] | None] | None":
        """Return messages (of roles user or tool) that the model answers next; None ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """How a recipe that generates takes its data: a recipe has it as the attribute `rounds`.

    A round is one call of `prepare`. It begins with prompts, all of which every data-parallel rank
    is given, and feeds one or more optimizer steps.
    """

    prompts: int
    eval_prompts: int
    steps: int
    """Optimizer steps of a round."""


@dataclass(frozen=True, slots=True)
class Split:
    """This rank's units of a step, divided into micro-batches by the recipe itself.

    As many micro-batches as the batch sizes say; some may be empty.
    """

    micros: "Sequence[list[Unit]]"


class Services(Protocol):
    """What `prepare` may ask of the kernel beyond scores: see `StepRun`."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step on each data-parallel rank."""

    @property
    def engine(self) -> RolloutEngine:
        """The engine that the recipe's attribute `engine` names."""

    def generating(self, model: str, /) -> "AbstractContextManager[RolloutEngine]":
        """Have an engine that generates with a frozen model; the native one, whatever `engine` is.

        Its weights are on the device meanwhile. Collective.
        """

    def draw(self) -> "list[Unit]":
        """Return the prompts of the next round, which `prepare` is then not called with."""

    def once[T](self, make: "Callable[[], T]", /) -> T:
        """Call a function on one of the ranks that share a data-parallel rank, for all of them.

        What it raises is raised on each. For what may differ from call to call: rewards.
        """

    def blend(self, model: str, alpha: float) -> None:
        """Move the weights of a frozen model towards the policy's: (1 - alpha) of it, alpha."""

    def score_with_routing(
        self, model: str, units: "list[Unit]"
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int16]]]":
        """Return log-probabilities and entropies, [L] each, and the experts of each token.

        The experts are [L, layers, K]: those that each token of a unit went to in each decoder
        layer that has experts, in this very pass.
        """

    def log(self, metrics: Mapping[str, float]) -> None:
        """Report numbers with the step that is prepared; the same on every rank."""

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Report completions: text, reward and whatever else, one mapping each."""

    def warn(self, key: str, text: str) -> None:
        """Warn, once for each key."""
