"""What plugins implement and the kernel calls. Typing only: torch is imported for checkers.

Shapes: T tokens of one packed row, S sequences in it, V vocabulary, H hidden size.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mcore_core.rollout import Completion as Completion
from mcore_core.rollout import EngineContext as EngineContext
from mcore_core.rollout import Request as Request
from mcore_core.rollout import RewardFn as RewardFn
from mcore_core.rollout import Rollout as Rollout
from mcore_core.rollout import RolloutEngine as RolloutEngine
from mcore_core.rollout import Rounds as Rounds
from mcore_core.rollout import Sampling as Sampling
from mcore_core.rollout import Services as Services
from mcore_core.rollout import Split as Split
from mcore_core.rollout import Turn as Turn
from mcore_core.rollout import TurnScheduler as TurnScheduler
from mcore_core.tuning import Tuner as Tuner
from mcore_core.tuning import TunerContext as TunerContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from mcore_core.config.compose import RunConfig
    from mcore_core.context import RunContext
    from mcore_core.data.template import Template
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.family import Family, Rule

type Row = dict[str, Any]
"""One row of a dataset, as the source gives it."""
type Unit = dict[str, Any]
"""One encoded training unit (a sample, a pair, a prompt): scalars, strings and numpy arrays.

`length` is required: the number of tokens it takes in a packed row.
"""
type RowTransform = Callable[[Row], Row | None]
type ModelChunk = Any
type Optimizer = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch as one packed row. Recipes subclass it to carry more.

    Every field whose name ends in `_T` holds one value a token; the kernel pads it (with zeros),
    slices it for context parallelism and moves it to the device. Fields ending in `_S` hold one
    value a sequence and are moved as they are.
    """

    tokens_T: "Tensor"
    """Token ids, int64."""
    targets_T: "Tensor"
    """What each position predicts, int64: the next token of its own sequence; 0 at the end."""
    weights_T: "Tensor"
    """How much each target counts, float32; 0 where nothing trains. Shifted as targets_T is."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, in order; they sum to T."""
    routing_TLK: "Tensor | None" = None
    """Experts that each token goes to in each decoder layer that has some, int16; -1: the router
    chooses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Compares each token's distribution with that of a frozen model (see model/divergence.py)."""

    model: str
    """Its name in the recipe's `frozen`."""
    beta: float = 0.5
    """0: KL(teacher || student), 1: KL(student || teacher), else between them."""
    temperature: float = 1.0
    """Divides both models' logits, here alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What a loss needs of each token: something of its distribution, or other numbers.

    The head computes only the tokens with a weight, and the loss is given these alone: every `_T`
    field of the batch, `reduce` and what the head gives hold them in their order, so that
    `reduce.per_seq(values_TN)` sums what each sequence has, also under context parallelism. To read
    the last token of each sequence, a recipe gives it weight 1
    (`mcore_core.data.collate.pack_marked`).
    """

    output: Literal["logps", "scores", "hidden", "logits"] = "logps"
    """logps: log-probabilities of the targets. scores: a linear layer of `scores` outputs takes the
    place of the output layer. hidden: the final hidden state; there is no output layer. logits:
    those of the vocabulary entries in `tokens`."""
    scores: int = 0
    """Outputs of the score head, N."""
    tokens: tuple[int, ...] = ()
    """Ids of the vocabulary entries whose logits are wanted, N of them."""
    entropy: bool = False
    """Also compute the entropy of the distribution (no gradient); with output logps."""
    summary: bool = False
    """Also compute each token's mean logit, and whether its target is the likeliest one."""
    temperature: float = 1.0
    """Divides the logits."""
    divergence: Divergence | None = None
    """Also compute the divergence from a frozen model; for losses that are token-local."""

    @property
    def facts(self) -> tuple[str, ...]:
        """Fields of `HeadOut` that are wanted beside the log-probabilities."""
        entropy = ("entropy_T",) if self.entropy else ()
        return (*entropy, "mean_logit_T", "top_T") if self.summary else entropy


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOut:
    """What the head computed, float32, for this rank's tokens with a weight."""

    logps_T: "Tensor"
    """Log-probability of each target, in nats; zeros with another `HeadSpec.output`."""
    entropy_T: "Tensor | None" = None
    """Entropy of each position's distribution, in nats."""
    divergence_T: "Tensor | None" = None
    """Divergence of each position's distribution from the teacher's, in nats."""
    mean_logit_T: "Tensor | None" = None
    """Mean of each position's logits over the vocabulary, before the temperature."""
    top_T: "Tensor | None" = None
    """1 where no token is likelier than the target, else 0."""
    values_TN: "Tensor | None" = None
    """Scores, hidden states or logits, as `HeadSpec.output` says."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A sum and what to divide it by: this rank's share of both.

    Summed over micro-batches, data-parallel and context-parallel ranks they are the whole; the
    kernel divides once. `count` may depend on the batch only, not on what the model computed: the
    kernel asks for it before the forward pass.
    """

    total: "Tensor"
    count: "Tensor"
    metrics: "Mapping[str, tuple[Tensor, Tensor]]" = field(default_factory=dict)
    """Name -> (sum, count), shares as above."""
    rows: "Tensor | None" = None
    """What an evaluation keeps of this micro-batch, [R, N], for `Recipe.summarize`; the same on
    every context-parallel rank."""
    highest: "Mapping[str, Tensor]" = field(default_factory=dict)
    """Name -> a number; the metric is the largest of all shares. -inf where there is none."""
    lowest: "Mapping[str, Tensor]" = field(default_factory=dict)
    """Name -> a number; the metric is the smallest of all shares. inf where there is none."""


class Reduce(Protocol):
    """The only communication a loss may do."""

    @property
    def seq_T(self) -> "Tensor":
        """Index of the sequence that each of this rank's tokens belongs to, int64."""

    @property
    def owns_S(self) -> "Tensor":
        """True where this rank holds the sequence's first token: the rank that counts it."""

    def per_seq(self, values_T: "Tensor") -> "Tensor":
        """Sum over each sequence, also where context parallelism splits it; differentiable.

        Takes [T] or [T, N]; returns [S] or [S, N].
        """

    def gather_seqs(self, values_SN: "Tensor") -> "Tensor":
        """Return the rows of all data-parallel ranks' present micro-batch, in rank order.

        Ranks may have different numbers of rows. Differentiable: each rank's gradient of a row is
        summed for the rank that has it, so a loss may count its own sequences alone. Collective:
        every rank must call it equally often.
        """

    def rows_of_gathered(self, rows: int) -> slice:
        """Return which rows of what `gather_seqs` returns are this rank's. Collective.

        Args:
            rows: How many rows this rank gives to `gather_seqs`.
        """


class LossFn(Protocol):
    """A pure function of tensors: no process groups, no state, no logging."""

    def __call__(self, out: HeadOut, batch: Any, reduce: Reduce, /) -> LossOutput:  # noqa: ANN401
        """Return the summed loss of this micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenModel:
    """A model beside the policy, which does not train.

    Without any field set it is the policy as it started: a copy or, where adapters are trained, the
    policy with its adapters off.
    """

    model: str | None = None
    """A Hugging Face folder or hub id; None: that of the policy."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    model_type: str | None = None
    """The family that reads it; None: what its config.json says."""
    load: str | None = None
    """A checkpoint of mcore to take the weights from."""
    adapters: tuple[str, ...] = ()
    """Adapters in PEFT's format to put on it."""
    adapter_load: str | None = None
    """A checkpoint of mcore that holds its adapters."""
    own_vocabulary: bool = False
    """Its vocabulary may differ from the policy's."""
    offload: bool = False
    """Its weights lie in host memory while it is not used."""
    moves: bool = False
    """The recipe blends it with the policy (StepRun.blend): checkpoints hold its weights."""


class Recipe[B: Batch](Protocol):
    """One training method. The kernel owns the step; a recipe never sees groups or devices."""

    frozen: "Mapping[str, FrozenModel]"
    """The models beside the policy that the kernel builds, by name: "ref", "teacher"."""
    head: HeadSpec
    """Fixed when the recipe is built: the model is built with the head that it names."""
    token_local: bool
    """True where `loss` treats every token by itself: it is then called on chunks of tokens."""

    def __init__(self, config: "RunConfig", template: "Template") -> None:
        """Keep what encoding and the loss need."""

    def encode(self, row: Row) -> Unit | list[Unit] | None:
        """Turn a row into a unit, or several; None drops it. Raises RowError if it is malformed.

        A recipe that makes several says so with `splits = True`. One that generates says how many
        tokens may follow a unit with `generated_length`.
        """

    def prepare(self, units: list[Unit], run: "StepRun") -> Iterator[list[Unit] | Split]:
        """Yield this rank's units of each optimizer step over the global batch.

        A checkpoint may be taken after each yield but the last. A recipe that yields more than once
        puts the rest into its state, and yields it from `resume(run)`, which is called first after
        such a checkpoint was loaded.
        """

    def collate(self, units: list[Unit]) -> B:
        """Return one micro-batch, packed."""

    def loss(self, out: HeadOut, batch: B, reduce: Reduce, /) -> LossOutput:
        """Return this micro-batch's share of the loss."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs beyond the model and the data cursor."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""


class StepRun(Services, Protocol):
    """What `Recipe.prepare` may ask of the kernel.

    Every method is collective: model-parallel ranks call alike, with equal arguments, and
    data-parallel ranks call equally often.
    """

    @property
    def step(self) -> int:
        """Number of the step that is prepared, from 1."""

    @property
    def training(self) -> bool:
        """False in an evaluation."""

    @property
    def dp(self) -> tuple[int, int]:
        """This data-parallel rank and how many there are."""

    def gather(self, value: Any, /) -> list[Any]:  # noqa: ANN401
        """Return the value of each data-parallel rank, in order; picklable."""

    def score(self, model: str, units: list[Unit]) -> "list[NDArray[np.float32]]":
        """Return the log-probability of each target of each unit, in nats.

        Args:
            model: "policy", or a name in the recipe's `frozen`.
            units: Any units that the recipe can collate.

        Returns:
            For each unit one value a token, in the order of its tokens in `collate`: position i
            belongs to target i, as `targets_T`; 0 where `weights_T` is 0. Computed in eval mode
            without gradients, by the recipe's head, its temperature included.
        """

    def score_with_entropy(
        self, model: str, units: list[Unit]
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32]]]":
        """Return log-probabilities as `score` does, and each position's entropy in nats."""


class Bridge(Protocol):
    """Moves weights between Hugging Face safetensors and megatron-core, by a family's table."""

    def __init__(self, family: "Family", architecture: "Architecture") -> None:
        """Derive the plans from the table."""

    def load(self, chunks: Sequence[ModelChunk], path: Path) -> None:
        """Fill this rank's parameters from the folder. Raises UsageError naming every problem."""

    def save(
        self,
        chunks: Sequence[ModelChunk],
        path: Path,
        *,
        max_shard_size: int,
        source: Path | None,
        weights: "Mapping[str, Tensor] | None" = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an HF checkpoint; collective.

        `source` gives config.json, into which `config` is merged, and tokenizer files.

        `weights` are written in place of the chunks' own, by canonical name: those of
        `Tuner.merged`, for example.
        """

    def export(
        self,
        chunks: Sequence[ModelChunk],
        *,
        weights: "Mapping[str, Tensor] | None" = None,
    ) -> "Iterator[tuple[str, Tensor]]":
        """Yield full HF-named tensors, in the same order on every rank; collective."""

    def load_table(
        self, rules: "Sequence[Rule]", tensors: "Mapping[str, Tensor]", file: Path
    ) -> None:
        """Fill tensors that a tuner has added from one safetensors file, by a table of their own.

        Args:
            rules: How the file's tensors make up the given ones.
            tensors: This rank's parts, by canonical name.
            file: The file.

        Raises:
            UsageError: Naming every tensor that is missing, left over or of another shape.
        """

    def save_table(
        self, rules: "Sequence[Rule]", tensors: "Mapping[str, Tensor]", file: Path
    ) -> None:
        """Write such a file; collective."""


class DatasetLoader(Protocol):
    """Opens a dataset reference."""

    def __call__(self, path: str, *, streaming: bool) -> Iterable[Row]:
        """Return the rows."""


class Reporter(Protocol):
    """A metric sink, built on the main rank. An error in log() is warned about; training goes on.

    `log` is called every `log_interval` steps and after each evaluation (names begin with "eval/").
    Beside these methods a sink may have `notes`, which are shown as warnings once it is open, and
    `where`, which the end of the run prints.
    """

    def __init__(self, run: "RunContext") -> None:
        """Open the sink."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step."""

    def close(self) -> None:
        """Flush."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step produced, already reduced over all ranks."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    """Tokens of the global batch, padding not counted."""
    seconds: float
    metrics: Mapping[str, float]
    tables: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    """What is more than one number, and adds up over steps: name -> row's label -> values."""
