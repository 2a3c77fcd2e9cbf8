"""Log-probabilities of any units under any model of a run: eval mode, no gradient, every layout.

Shapes: T tokens of this rank's part of a row, L tokens of a unit, K trained tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore_core.model.head import log_probabilities
from mcore_core.model.moe.replay import RoutingRecorder
from mcore_core.model.names import unwrap
from mcore_core.protocols import Batch, Unit
from mcore_core.train.forward import ForwardStep
from mcore_core.train.offload import HostWeights
from mcore_core.train.place import Placed, place

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mcore_core.model.build import ModelPlan
    from mcore_core.protocols import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredModel:
    """A model that can score: the policy or a frozen one."""

    chunks: Sequence[Any]
    plan: "ModelPlan"
    host: HostWeights | None = None
    """Where its weights are while it is not used; None: they stay on the device."""

    def resident(self) -> AbstractContextManager[None]:
        """Have the weights on the device while the model is used."""
        return nullcontext() if self.host is None else self.host.resident()


@contextmanager
def eval_mode(chunks: Sequence[Any]) -> Iterator[None]:
    """Switch dropout and the like off, and back to what was."""
    before = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, before, strict=True):
            chunk.train(training)


class Scorer:
    """Scores units with one model."""

    def __init__(
        self,
        model: ScoredModel,
        recipe: "Recipe[Any]",
        device: torch.device,
        *,
        micro_batch_size: int,
    ) -> None:
        self.model, self.recipe, self.device = model, recipe, device
        self.micro_batch_size = micro_batch_size
        self.forward = ForwardStep(recipe, model.plan)
        self.run = get_forward_backward_func()
        self.recorder: RoutingRecorder | None = None
        """Where the pass is to tell which experts tokens go to."""
        self._taken: dict[int, Tensor] = {}

    def score_with_routing(
        self, units: Sequence[Unit]
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int16]]]":
        """Return log-probabilities, entropies and the experts of each token, [L, layers, K]."""
        self.recorder = RoutingRecorder(self.model.chunks)
        try:
            with self.recorder.recording():
                scored = self.score(units, entropy=True)
            starts = [0, *accumulate(unit["length"] for unit in units)]
            routing = self._routing
            parts = [routing[a:b].copy() for a, b in pairwise(starts)]
            return [(*pair, part) for pair, part in zip(scored, parts, strict=True)]
        finally:
            self.recorder = None

    def score(
        self, units: Sequence[Unit], *, entropy: bool = False
    ) -> "list[tuple[NDArray[np.float32], NDArray[np.float32]]]":
        """Return log-probabilities and entropies (zeros unless asked for), [L] of each unit.

        Collective over all ranks. Raises ValueError where `collate` changes a unit's length.
        """
        groups = group_units(units, self.micro_batch_size)
        batches: list[Batch] = [self.recipe.collate(list(group)) for group in groups]
        for group, batch in zip(groups, batches, strict=True):
            if sum(batch.lengths) != sum(unit["length"] for unit in group):
                raise ValueError("collate must keep a unit's tokens: its `length` is not their sum")
        # every data-parallel rank takes as many passes: experts may span them
        passes = self._passes(len(batches))
        placed = [self._place(batch) for batch in batches]
        placed += [self._place(_empty()) for _ in range(passes - len(batches))]
        self._taken.clear()
        found = self._forward(placed, entropy=entropy)
        rows = self._assemble(placed, found)
        if self.recorder is not None:
            self._routing = self._assemble_routing(placed, self.recorder)
        starts = [0, *accumulate(unit["length"] for unit in units)]
        flat = rows.cpu().numpy()
        return [(flat[0, a:b].copy(), flat[1, a:b].copy()) for a, b in pairwise(starts)]

    def _passes(self, mine: int) -> int:
        most = torch.tensor(float(mine), device=self.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        step = self.model.plan.layout.pp if self.model.plan.layout.vpp is not None else 1
        return max(1, -(-int(most.item()) // step)) * step

    def _place(self, batch: Batch) -> Placed:
        plan = self.model.plan
        return place(
            batch,
            plan.layout,
            self.device,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_group=parallel_state.get_context_parallel_group(),
            row_multiple=plan.row_multiple,
        )

    def _forward(self, placed: list[Placed], *, entropy: bool) -> list[Tensor]:
        """Return [2, T] of each micro-batch on the last pipeline stage, nothing on the others."""
        chunks = list(self.model.chunks)
        iterators = [iter(placed) for _ in chunks]
        with self.model.resident(), torch.no_grad(), eval_mode(chunks):
            found: list[Tensor] = self.run(
                forward_step_func=partial(self._step, entropy=entropy),
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(placed),
                seq_length=len(placed[0].batch.tokens_T),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return found

    def _step(
        self,
        batches: Iterator[Placed],
        chunk: Any,  # noqa: ANN401
        *_: object,
        entropy: bool,
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        item = next(batches)
        hidden = self.forward.hidden(item, chunk)
        if self.recorder is not None:
            part_TLK = self.recorder.take(len(item.source), self.device)
            before = self._taken.get(id(item))
            self._taken[id(item)] = part_TLK if before is None else before + part_TLK

        def score(output: Tensor, *, non_loss_data: bool = True) -> Tensor:
            hidden_KH = self.forward.whole(output).index_select(0, item.trained)
            spec = replace(self.recipe.head, entropy=entropy, summary=False)
            out = log_probabilities(
                hidden_KH,
                unwrap(chunk).head_weight(),
                item.batch.targets_T[item.trained],
                vocab=self.forward.vocab,
                spec=spec,
            )
            values = hidden_KH.new_zeros(2, len(item.batch.tokens_T), dtype=torch.float32)
            values[0, item.trained] = out.logps_T
            if out.entropy_T is not None:
                values[1, item.trained] = out.entropy_T
            return values

        return hidden, score

    def _assemble(self, placed: list[Placed], found: list[Tensor]) -> Tensor:
        """Put the tokens of all micro-batches back in order, on every rank, [2, all tokens]."""
        starts = [0, *accumulate(item.tokens for item in placed)]
        rows = torch.zeros(2, starts[-1], dtype=torch.float32, device=self.device)
        for start, item, values in zip(starts, placed, found, strict=False):
            real = (item.source >= 0).nonzero().squeeze(-1)
            where = start + item.source[real]
            rows[:, where.to(self.device)] = values[:, real.to(self.device)]
        context = parallel_state.get_context_parallel_group()
        if context.size() > 1:
            dist.all_reduce(rows, group=context)
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        if pipeline.size() > 1:
            dist.broadcast(rows, dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
        return rows

    def _assemble_routing(
        self, placed: list[Placed], recorder: RoutingRecorder
    ) -> "NDArray[np.int16]":
        """Put what all ranks recorded together, in order, on every rank, [all tokens, L, K]."""
        starts = [0, *accumulate(item.tokens for item in placed)]
        rows = torch.zeros(
            starts[-1], recorder.layers, recorder.topk, dtype=torch.int32, device=self.device
        )
        for start, item in zip(starts, placed, strict=False):
            real = (item.source >= 0).nonzero().squeeze(-1)
            where = (start + item.source[real]).to(self.device)
            rows[where] = self._taken[id(item)][real.to(self.device)]
        self._taken.clear()
        context = parallel_state.get_context_parallel_group()
        if context.size() > 1:
            dist.all_reduce(rows, group=context)
        whole: NDArray[np.int16] = recorder.combine(rows).to(torch.int16).cpu().numpy()
        return whole


def group_units(units: Sequence[Unit], micro_batch_size: int) -> list[list[Unit]]:
    """Divide units, in order, into rows of at most micro_batch_size times the longest unit."""
    budget = micro_batch_size * max((unit["length"] for unit in units), default=0)
    groups: list[list[Unit]] = []
    tokens = 0
    for unit in units:
        if not groups or tokens + unit["length"] > budget:
            groups.append([])
            tokens = 0
        groups[-1].append(unit)
        tokens += unit["length"]
    return groups


def _empty() -> Batch:
    none = torch.zeros(0, dtype=torch.long)
    return Batch(tokens_T=none, targets_T=none, weights_T=none.float(), lengths=())
