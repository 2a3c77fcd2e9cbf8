"""Which experts tokens go to, recorded in a forward pass, so that another pass can repeat it.

Training on what another pass, or an engine, has routed differently is a source of off-policy noise
(routing replay, arXiv 2507.18071; rollout routing replay, arXiv 2510.11370).

Shapes: T tokens of a context-parallel rank's row, L decoder layers with experts, K chosen experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from mcore_core.errors import usage_error
from mcore_core.model.moe.stats import routers

if TYPE_CHECKING:
    from mcore_core.model.moe.router import Router


class RoutingRecorder:
    """The routers of a rank's chunks, and what they choose while `recording`.

    Raises:
        UsageError: The model has no experts.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        config = chunks[0].config
        moe = config.shape.moe
        if moe is None:
            raise usage_error(
                "MC361",
                "--router_replay_mode repeats which experts tokens go to, and this model has none",
                "fix: leave it out",
            )
        self.layers = sum(n < config.shape.num_layers for n in moe.layers)
        self.topk: int = moe.topk
        self.routers: dict[int, Router] = {}
        """By their place among the decoder's layers with experts."""
        for router in routers(chunks).values():
            place = config.replayed_layer(router.layer_number)
            if place is not None:
                self.routers[place] = router
        self.group = parallel_state.get_tensor_model_parallel_group()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let the routers keep what they choose."""
        for router in self.routers.values():
            router.keep_choice, router.chosen_TK = True, None
        try:
            yield
        finally:
            for router in self.routers.values():
                router.keep_choice, router.chosen_TK = False, None

    def take(self, tokens: int, device: torch.device) -> Tensor:
        """Return what was chosen since the last call, [T, L, K] int32: experts counted from 1.

        0 where another rank has the token or the layer.

        Args:
            tokens: T, without what a layer adds to divide them over tensor-parallel ranks.
            device: Where the result shall be.
        """
        found = torch.zeros(tokens, self.layers, self.topk, dtype=torch.int32, device=device)
        for place, router in self.routers.items():
            chosen_TK, router.chosen_TK = router.chosen_TK, None
            if chosen_TK is None:
                continue
            parts = self.group.size()
            first = self.group.rank() * len(chosen_TK) if parts > 1 else 0
            real = max(0, min(len(chosen_TK), tokens - first))
            found[first : first + real, place] = chosen_TK[:real].to(torch.int32) + 1
        return found

    def combine(self, found: Tensor) -> Tensor:
        """Return the same with what the model's other ranks have, experts from 0, -1 for none.

        Collective over tensor and pipeline parallelism.
        """
        for group in (self.group, parallel_state.get_pipeline_model_parallel_group()):
            if group.size() > 1:
                dist.all_reduce(found, group=group)
        return found - 1
