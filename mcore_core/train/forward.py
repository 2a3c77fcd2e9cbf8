"""One micro-batch through the model, the head and the recipe's loss.

Megatron's schedules call `ForwardStep`; nothing else here knows them. A loss is a sum: it is scaled
by one over the global count before the backward pass, so gradients need no division afterwards and
auxiliary losses are not divided by what the main loss happens to count.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from mcore_core.model.head import VocabRange, local_loss, log_probabilities
from mcore_core.model.names import unwrap
from mcore_core.model.scores import scores, some_logits
from mcore_core.parallel.reduce import RowReduce
from mcore_core.parallel.shares import Shares
from mcore_core.protocols import HeadOut, LossOutput
from mcore_core.train.place import Ahead, Placed, select

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan
    from mcore_core.protocols import Recipe

_SHARE = ("total", "count")


def predicts_ahead(recipe: "Recipe[Any]") -> bool:
    """Return whether a recipe trains the layers of multi-token prediction, if a model has them.

    They learn to continue the tokens that have a weight: right where those are what the model shall
    write, so by default with losses on single tokens. A recipe may say with `predicts_ahead`.
    """
    return bool(getattr(recipe, "predicts_ahead", recipe.token_local))


def vocab_range(plan: "ModelPlan") -> VocabRange:
    """Return which rows of the real vocabulary this tensor-parallel rank holds."""
    group = parallel_state.get_tensor_model_parallel_group()
    size = plan.padded_vocab_size // group.size()
    start = group.rank() * size
    rows = max(0, min(size, plan.architecture.vocab_size - start))
    return VocabRange(start=start, rows=rows, group=group)


class ForwardStep:
    """Called by megatron's schedules with an iterator of placed micro-batches."""

    def __init__(self, recipe: "Recipe[Any]", plan: "ModelPlan") -> None:
        self.recipe = recipe
        self.vocab = vocab_range(plan)
        self.sequence_parallel = plan.layout.sp
        self.hidden_size = plan.architecture.hidden_size
        self.scale: Tensor | float = 1.0
        """One over the count of the global batch."""
        half = plan.dtype is not torch.float32
        self._arguments: dict[str, Any] = {"fp32_output": False} if half else {}
        self.depths = plan.architecture.mtp_layers if predicts_ahead(recipe) else 0
        """How many tokens further the model is trained to predict."""
        self.ahead_scales: Tensor | None = None
        """What the loss of each depth is multiplied by; None: those layers do not run."""
        self.only_hidden = False
        """Leave head and loss out: the pass is for what happens in the layers."""
        self.rows: list[Tensor] | None = None
        """Where an evaluation keeps the rows of its losses."""

    def __call__(
        self,
        batches: Iterator[Placed],
        chunk: Any,  # noqa: ANN401
        *_: object,
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Shares]]]:
        """Run one chunk on the next micro-batch; return its output and the loss function of it."""
        placed = next(batches)
        return self.hidden(placed, chunk), partial(self._finish, placed, chunk)

    def hidden(self, placed: Placed, chunk: Any) -> Tensor:  # noqa: ANN401
        """Return a chunk's output: on the last one the hidden states of this rank's tokens."""
        arguments = self._arguments
        if self._ahead(chunk):
            arguments = {**arguments, "ahead": [a.tokens_T for a in placed.ahead]}
        output: Tensor = chunk(placed.batch.tokens_T, placed.row, **arguments)
        return output

    def _finish(
        self,
        placed: Placed,
        chunk: Any,  # noqa: ANN401
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor, Shares]:
        one = torch.ones((), dtype=torch.int, device=hidden.device)
        if self.only_hidden:
            return hidden.new_zeros((), dtype=torch.float32), one, Shares()
        deeper: tuple[Tensor, ...] = ()
        if self._ahead(chunk):
            hidden, *rest = hidden.chunk(1 + self.depths)
            deeper = tuple(rest)
        out = self.loss(placed, chunk, hidden)
        if self.rows is not None and out.rows is not None:
            self.rows.append(out.rows)
        shares = Shares({"loss": (out.total.detach().double(), out.count.detach().double())})
        shares.add(out)
        total = out.total * self.scale
        if deeper:
            assert self.ahead_scales is not None
            losses = [
                self._loss_ahead(chunk, h, a) for h, a in zip(deeper, placed.ahead, strict=True)
            ]
            total = total + (torch.stack([n.total for n in losses]) * self.ahead_scales).sum()
            sums = [torch.stack([getattr(n, k).detach() for n in losses]).sum() for k in _SHARE]
            shares.metrics["mtp_loss"] = (sums[0].double(), sums[1].double())
        # megatron is told one token: it neither divides nor scales by its own count
        return total.float(), one, shares

    def _ahead(self, chunk: Any) -> bool:  # noqa: ANN401
        return self.depths > 0 and self.ahead_scales is not None and bool(unwrap(chunk).training)

    def _loss_ahead(self, chunk: Any, hidden: Tensor, ahead: Ahead) -> LossOutput:  # noqa: ANN401
        """Return this rank's share of the cross-entropy of one depth of multi-token prediction."""
        kept = ahead.trained
        weights = ahead.weights_T[kept]

        def of_slice(out: HeadOut, where: slice) -> LossOutput:
            weights_C = weights[where]
            return LossOutput(-(out.logps_T * weights_C).sum(), weights_C.sum())

        return local_loss(
            self.whole(hidden).index_select(0, kept),
            unwrap(chunk).head_weight(),
            ahead.targets_T[kept],
            of_slice,
            vocab=self.vocab,
            spec=self.recipe.head,
        )

    def whole(self, hidden: Tensor, *, shared: bool = True) -> Tensor:
        """Return the hidden states of all tokens here, [T, H], on every tensor-parallel rank.

        `shared`: each rank computes a part of what follows, and their gradients are summed; else
        all compute the same.
        """
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, shared)
        elif shared:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return hidden.squeeze(1)

    def _values(self, placed: Placed, chunk: Any, hidden: Tensor) -> HeadOut:  # noqa: ANN401
        """Return what the head gives other than log-probabilities, of the tokens with a weight."""
        spec, kept = self.recipe.head, placed.trained
        shared = spec.output == "logits"
        hidden_KH = self.whole(hidden, shared=shared).index_select(0, kept)
        match spec.output:
            case "scores":
                values_KN = scores(hidden_KH, unwrap(chunk).score.weight)
            case "hidden":
                values_KN = hidden_KH.float()
            case _:
                weight = unwrap(chunk).head_weight()
                values_KN = some_logits(
                    hidden_KH,
                    weight,
                    spec.tokens,
                    vocab=self.vocab,
                    temperature=spec.temperature,
                )
        return HeadOut(logps_T=values_KN.new_zeros(len(kept)), values_TN=values_KN)

    def loss(self, placed: Placed, chunk: Any, hidden: Tensor) -> LossOutput:  # noqa: ANN401
        """Return this rank's share of the micro-batch's loss.

        Args:
            placed: The micro-batch.
            chunk: The last pipeline chunk.
            hidden: Its output, [T, 1, H] or, with sequence parallelism, [T / tp, 1, H].
        """
        recipe, kept = self.recipe, placed.trained
        # a token without weight changes nothing in a loss: its logits are never made
        batch, reduce = self._trained(placed)
        if recipe.head.output != "logps":
            return recipe.loss(self._values(placed, chunk, hidden), batch, reduce)
        weight = unwrap(chunk).head_weight()
        hidden_KH = self.whole(hidden)
        if len(kept) != len(hidden_KH):
            hidden_KH = hidden_KH.index_select(0, kept)
        if not recipe.token_local:
            out = log_probabilities(
                hidden_KH, weight, batch.targets_T, vocab=self.vocab, spec=recipe.head
            )
            return recipe.loss(out, batch, reduce)
        tokens = len(kept)

        def of_slice(out: HeadOut, where: slice) -> LossOutput:
            if where.stop - where.start == tokens:
                return recipe.loss(out, batch, reduce)
            return recipe.loss(out, select(batch, where), reduce.take(where))

        return local_loss(
            hidden_KH,
            weight,
            batch.targets_T,
            of_slice,
            vocab=self.vocab,
            spec=recipe.head,
            teacher=placed.teacher,
        )

    def _trained(self, placed: Placed) -> tuple[Any, RowReduce]:
        """Return a micro-batch with the tokens that have a weight alone."""
        kept, batch, reduce = placed.trained, placed.batch, placed.reduce
        if len(kept) == len(batch.weights_T):
            return batch, reduce
        return select(batch, kept), reduce.take(kept)

    def count(self, placed: Placed) -> Tensor:
        """Return this rank's share of the count, which depends on the batch only."""
        head = self.recipe.head
        batch, reduce = self._trained(placed)
        zeros_T = torch.zeros(len(batch.targets_T), device=batch.targets_T.device)
        wide = {"scores": head.scores, "hidden": self.hidden_size, "logits": len(head.tokens)}
        values_TN = (
            None if head.output == "logps" else zeros_T.new_zeros(len(zeros_T), wide[head.output])
        )
        zeros = HeadOut(
            logps_T=zeros_T,
            divergence_T=zeros_T if head.divergence else None,
            values_TN=values_TN,
            **dict.fromkeys(head.facts, zeros_T),
        )
        with torch.no_grad():
            return self.recipe.loss(zeros, batch, reduce).count.double()
