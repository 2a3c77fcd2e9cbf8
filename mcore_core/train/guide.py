"""A frozen model that runs over the micro-batches of a step, for the head to compare with.

It runs before the policy does, in the policy's layout, over the same rows. What is kept are the
hidden states of tokens that train, never logits.

Shapes: K tokens of this rank that train, H hidden size of the frozen model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mcore_core.model.divergence import Teacher
from mcore_core.model.head import VocabRange
from mcore_core.model.names import unwrap
from mcore_core.train.forward import ForwardStep, vocab_range
from mcore_core.train.place import Placed
from mcore_core.train.scoring import ScoredModel, eval_mode

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan
    from mcore_core.protocols import Divergence, Recipe


class Guide:
    """Gives micro-batches the teacher that the recipe's head wants.

    Args:
        model: The frozen model. Its vocabulary is split over tensor-parallel ranks as the policy's.
        recipe: Its head names a divergence.
        policy: The plan of the policy.
    """

    def __init__(self, model: ScoredModel, recipe: "Recipe[Any]", policy: "ModelPlan") -> None:
        assert recipe.head.divergence is not None
        assert recipe.token_local, "a divergence is computed for token-local losses"
        assert model.plan.padded_vocab_size == policy.padded_vocab_size
        self.model, self.spec = model, recipe.head.divergence
        self.forward = ForwardStep(recipe, model.plan)
        theirs, mine = self.forward.vocab, vocab_range(policy)
        rows = min(theirs.rows, mine.rows)
        self.common = VocabRange(start=mine.start, rows=rows, group=mine.group)
        self.run = get_forward_backward_func()

    def attach(self, placed: Sequence[Placed]) -> list[Placed]:
        """Return the micro-batches with what the teacher makes of them; collective."""
        if not placed:
            return []
        chunks = list(self.model.chunks)
        iterators = [iter(placed) for _ in chunks]
        with self.model.resident(), torch.no_grad(), eval_mode(chunks):
            found: list[Tensor] = self.run(
                forward_step_func=self._step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0],
                num_microbatches=len(placed),
                seq_length=len(placed[0].batch.tokens_T),
                micro_batch_size=1,
                forward_only=True,
                collect_non_loss_data=True,
            )
            if not found:
                return list(placed)
            # a tensor of its own: the model may leave the device, its head is still needed
            weight = unwrap(chunks[-1]).head_weight().detach()
        return [
            replace(item, teacher=self._teacher(hidden_KH, weight))
            for item, hidden_KH in zip(placed, found, strict=True)
        ]

    def _teacher(self, hidden_KH: Tensor, weight: Tensor) -> Teacher:
        spec: Divergence = self.spec
        return Teacher(hidden_TH=hidden_KH, weight=weight, vocab=self.common, spec=spec)

    def _step(
        self,
        batches: Iterator[Placed],
        chunk: Any,  # noqa: ANN401
        *_: object,
    ) -> tuple[Tensor, Callable[..., Tensor]]:
        item = next(batches)

        def keep(output: Tensor, *, non_loss_data: bool = True) -> Tensor:
            return self.forward.whole(output).index_select(0, item.trained)

        return self.forward.hidden(item, chunk), keep
