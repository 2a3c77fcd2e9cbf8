"""One optimizer step over a global batch, and one evaluation pass: the only users of schedules."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from mcore_core.failure import RunFailure
from mcore_core.model.moe.stats import ExpertReport
from mcore_core.parallel.randomness import same_randomness
from mcore_core.parallel.reduce import (
    from_last_stage,
    gather_rows,
    largest_shares,
    sum_over_data,
    sum_shares,
)
from mcore_core.parallel.shares import Shares
from mcore_core.protocols import StepResult, Unit
from mcore_core.train.flops import StepSize, causal_pairs
from mcore_core.train.forward import ForwardStep
from mcore_core.train.place import Placed, place

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mcore_core.model.build import ModelPlan
    from mcore_core.protocols import Recipe
    from mcore_core.train.guide import Guide


SIZES = tuple(f.name for f in dataclasses.fields(StepSize))
MIN_COUNT = 1e-30
"""Below it nothing trains: no update is made, after a backward pass of zeros."""
EMPTY_STEPS = 8
"""After so many steps in a row in which nothing trained the run stops."""


@dataclass(slots=True)
class Timers:
    """Host seconds of the parts of the last step."""

    place: float = 0.0
    forward_backward: float = 0.0
    optimizer: float = 0.0


@dataclass(frozen=True, slots=True)
class Extremes:
    """Metrics that are the largest, or the smallest, of all numbers."""

    highest: dict[str, float] = dataclasses.field(default_factory=dict)
    negated: dict[str, float] = dataclasses.field(default_factory=dict)
    """The smallest ones, with the other sign."""

    def add(self, other: "Extremes") -> None:
        """Take in those of another batch."""
        for mine, theirs in ((self.highest, other.highest), (self.negated, other.negated)):
            mine |= {name: max(value, mine.get(name, value)) for name, value in theirs.items()}

    def metrics(self) -> dict[str, float]:
        """Return them by name."""
        return {**self.highest, **{name: -value for name, value in self.negated.items()}}


class Stepper:
    """Runs steps of one model under one recipe."""

    def __init__(
        self,
        chunks: Sequence[Any],
        recipe: "Recipe[Any]",
        plan: "ModelPlan",
        device: torch.device,
        *,
        optimizer: Any = None,  # noqa: ANN401
        schedule: "OptimizerParamScheduler | None" = None,
        pin_memory: bool = False,
    ) -> None:
        self.chunks, self.recipe, self.plan, self.device = list(chunks), recipe, plan, device
        self.optimizer, self.schedule = optimizer, schedule
        self.pin_memory = pin_memory and device.type == "cuda"
        self.forward = ForwardStep(recipe, plan)
        self.schedule_function = get_forward_backward_func()
        self.guide: Guide | None = None
        """The frozen model that the recipe's head compares with."""
        self.timers = Timers()
        self.size = StepSize(tokens=0, head_tokens=0, pairs=0)
        """How much data the last step had."""
        self.empty = 0
        """Steps in a row, the last one included, in which nothing trained."""
        self.wants_stop: Callable[[], bool] = lambda: False
        """Whether this rank has been asked to end the run."""
        self.stops = False
        """Whether some rank had been when the last step's numbers were put together."""
        self.config = self.chunks[0].config
        self.experts = ExpertReport(self.chunks, device)
        self.config.finalize_model_grads_func = _finalize
        if optimizer is not None:
            self.config.grad_scale_func = optimizer.scale_loss
        synced = [c for c in self.chunks if hasattr(c, "no_sync")]
        if synced and synced[0].ddp_config.overlap_grad_reduce:
            self._overlap(synced)

    def _overlap(self, synced: list[Any]) -> None:
        """Tell the schedules how to hold back and start the reductions."""
        several = len(synced) > 1
        self.config.no_sync_func = [c.no_sync for c in synced] if several else synced[0].no_sync
        if self.plan.layout.vpp is not None:
            starts = [c.start_grad_sync for c in synced]
            self.config.grad_sync_func = starts if several else starts[0]
        if synced[0].ddp_config.overlap_param_gather and self.plan.layout.vpp is not None:
            gathers = [c.start_param_sync for c in synced]
            self.config.param_sync_func = gathers if several else gathers[0]

    def place(self, micros: Sequence[list[Unit]]) -> list[Placed]:
        """Collate and lay out this rank's micro-batches."""
        rank = parallel_state.get_context_parallel_rank()
        cp_group = parallel_state.get_context_parallel_group()
        dp_group = parallel_state.get_data_parallel_group()
        return [
            place(
                self.recipe.collate(units),
                self.plan.layout,
                self.device,
                cp_rank=rank,
                cp_group=cp_group,
                dp_group=dp_group,
                row_multiple=self.plan.row_multiple,
                pin_memory=self.pin_memory,
                depths=self.forward.depths,
            )
            for units in micros
        ]

    def _guided(self, placed: list[Placed]) -> list[Placed]:
        return placed if self.guide is None else self.guide.attach(placed)

    def train(self, micros: Sequence[list[Unit]], step: int) -> StepResult:
        """Take one optimizer step.

        Args:
            micros: The units of each of this rank's micro-batches.
            step: Number of this step, from 1.

        Raises:
            RunFailure: The loss or its gradient is not finite, or nothing trains in several batches
                in a row. (In one alone no weight changes, and the loss is NaN.)
        """
        begin = time.perf_counter()
        placed = self._guided(self.place(micros))
        count, ahead = self._count(placed)
        self.forward.scale = count.clamp(min=MIN_COUNT).reciprocal()  # stays on the device
        if self.forward.depths:
            factor = self.config.mtp_loss_scaling_factor / self.forward.depths
            self.forward.ahead_scales = factor * ahead.clamp(min=MIN_COUNT).reciprocal()
        # auxiliary losses are means over micro-batches, whatever the loss counts
        self.config.aux_loss_scale = 1.0 / max(1, len(placed) * self.plan.layout.dp)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.experts.begin()
        if self.experts.counts_batch:
            self._count_choices(placed)
        self.timers.place = time.perf_counter() - begin
        shares = self._run(placed, forward_only=False)
        totals, extremes, votes = self._totals(shares, placed, votes=self.wants_stop())
        self.stops = votes > 0
        self.timers.forward_backward = time.perf_counter() - begin - self.timers.place
        self.size = StepSize(**{name: totals[name][0] for name in SIZES})
        self.empty = self.empty + 1 if float(count) <= 0 else 0
        if self.empty >= EMPTY_STEPS:
            raise RunFailure(
                "MC801",
                f"step {step}: no token of the last {EMPTY_STEPS} global batches trains",
                "every target of every sequence has weight 0; see --loss_scale and the data",
            )
        loss = totals["loss"][0] / float(count) if not self.empty else math.nan
        if not self.empty and not math.isfinite(loss):
            raise RunFailure(
                "MC802",
                f"step {step}: the loss is {loss}",
                "the optimizer step was not taken: checkpoints hold finite weights",
                "fix: lower --lr, check the data, or train in --torch_dtype bfloat16 or float32",
            )
        lr = self.optimizer.param_groups[0]["lr"]
        grad_norm = 0.0 if self.empty else self._update(step)
        if grad_norm is not None and not math.isfinite(grad_norm):  # None: float16 skips the step
            raise RunFailure(
                "MC804",
                f"step {step}: the loss is {loss:.6g}, and the norm of its gradients {grad_norm}",
                "the weights of this step are not saved: checkpoints hold finite ones",
                "fix: lower --lr, check the data, or train in --torch_dtype bfloat16 or float32",
            )
        assert self.schedule is not None
        self.schedule.step(1)
        self.timers.optimizer = (
            time.perf_counter() - begin - self.timers.place - self.timers.forward_backward
        )
        metrics, tables = self.experts.finish()
        return StepResult(
            loss=loss,
            grad_norm=float(grad_norm) if grad_norm is not None else float("nan"),
            lr=float(lr),
            tokens=int(totals["tokens"][0]),
            seconds=time.perf_counter() - begin,
            metrics={**_means(totals), **extremes.metrics(), **metrics},
            tables=tables,
        )

    def _update(self, step: int) -> float | None:
        """Change the weights; return the norm of the gradients before they were clipped."""
        try:
            norm: float | None = self.optimizer.step()[1]
        except RuntimeError as error:
            if "without overflow" not in str(error):
                raise
            raise RunFailure(
                "MC805",
                f"step {step}: the update is too large for a number of single precision",
                f"learning rate {self.optimizer.param_groups[0]['lr']:g}, "
                f"weight decay {self.optimizer.param_groups[0]['weight_decay']:g}",
                "the weights of this step are not saved: checkpoints hold finite ones",
                "fix: lower --lr or --weight_decay",
            ) from error
        return norm

    def evaluate(self, batches: Iterator[Sequence[list[Unit]]]) -> dict[str, float]:
        """Return the loss and metrics over all batches, weighted by their counts. Collective."""
        sums: dict[str, tuple[float, float]] = {}
        self.forward.rows = []
        extremes = Extremes()
        for chunk in self.chunks:
            chunk.eval()
        try:
            for micros in batches:
                placed = self._guided(self.place(micros))
                with torch.no_grad():
                    shares = self._run(placed, forward_only=True)
                totals, found, _ = self._totals(shares, placed)
                for name, (total, count) in totals.items():
                    a, b = sums.get(name, (0.0, 0.0))
                    sums[name] = (a + total, b + count)
                extremes.add(found)
        finally:
            for chunk in self.chunks:
                chunk.train()
        if not sums:
            return {}
        total, count = sums["loss"]
        loss = total / count if count else float("nan")
        return {"loss": loss, **_means(sums), **extremes.metrics(), **self._summary()}

    def _summary(self) -> dict[str, float]:
        """Return what the recipe makes of the rows that its losses have kept. Collective.

        A recipe may have `summarize(rows_RN)`, which is given those of all ranks.
        """
        rows, self.forward.rows = self.forward.rows, None
        summarize = getattr(self.recipe, "summarize", None)
        if summarize is None:
            return {}
        found = summarize(gather_rows(torch.cat(rows))) if rows else {}
        return from_last_stage({name: float(value) for name, value in found.items()})

    def _count(self, placed: list[Placed]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the losses of the global batch are divided by, float64, without waiting.

        The second tensor holds one number for each depth of multi-token prediction.
        """
        width = 1 + self.forward.depths
        counts = [
            count
            for p in placed
            for count in (self.forward.count(p), *(a.weights_T.double().sum() for a in p.ahead))
        ]
        if counts:
            total = torch.stack(counts).view(-1, width).sum(0)
        else:
            total = torch.zeros(width, dtype=torch.float64, device=self.device)
        total = sum_over_data(total)
        return total[0], total[1:]

    def _run(self, placed: list[Placed], *, forward_only: bool) -> list[Shares]:
        iterators = [iter(placed) for _ in self.chunks]
        shares: list[Shares] = self.schedule_function(
            forward_step_func=self.forward,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(placed),
            seq_length=len(placed[0].batch.tokens_T) if placed else 1,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return shares

    def _count_choices(self, placed: list[Placed]) -> None:
        """Pass over the batch without gradients, so that routers know what all of it chooses."""
        self.experts.start_counting()
        self.forward.only_hidden = True
        with same_randomness(), torch.no_grad():
            self._run(placed, forward_only=True)
        self.forward.only_hidden = False
        self.experts.stop_counting()

    def _totals(
        self, shares: list[Shares], placed: list[Placed], *, votes: int = 0
    ) -> tuple[dict[str, tuple[float, float]], "Extremes", int]:
        """Put the shares of all micro-batches and ranks together, and the ranks' votes."""
        whole = Shares()
        for share in shares:
            whole.add(share)
        summed: dict[str, Any] = dict(whole.metrics)
        # context-parallel ranks hold parts of the same rows: the first one counts them
        mine = float(parallel_state.get_context_parallel_rank() == 0)
        window, local = self.plan.architecture.window_size, self.recipe.token_local
        rows = [p.batch.lengths for p in placed]
        for name, value in (
            ("tokens", mine * sum(p.tokens for p in placed)),
            ("pairs", mine * sum(causal_pairs(lengths) for lengths in rows)),
            ("window_pairs", mine * sum(causal_pairs(lengths, window) for lengths in rows)),
            ("head_tokens", sum(len(p.trained) for p in placed) if local else None),
        ):
            summed[name] = (summed["tokens"][0] if value is None else value, 1.0)
        negated = {name: -value for name, value in whole.lowest.items()}
        extremes = Extremes(
            largest_shares(whole.highest, self.device), largest_shares(negated, self.device)
        )
        totals, voted = sum_shares(summed, None, self.device, votes=votes)
        return totals, extremes, voted


def _finalize(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:  # noqa: ANN401
    """Reduce gradients; losses were scaled already, so nothing is divided."""
    finalize_model_grads(model, None, **kwargs)


def _means(totals: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return a recipe's metrics; one that nothing counts in is left out."""
    return {
        name: total / count
        for name, (total, count) in totals.items()
        if name != "loss" and name not in SIZES and count
    }
