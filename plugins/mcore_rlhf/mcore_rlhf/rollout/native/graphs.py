"""CUDA graphs of decode steps: what a step launches is recorded once, then replayed as a whole."""

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcore_core.model.moe.experts import has_grouped_product

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan
    from mcore_rlhf.rollout.native.forward import Forward

_LOG = logging.getLogger(__name__)


def refusal(plan: "ModelPlan", forward: "Forward", device: torch.device) -> str | None:
    """Return why steps of a model cannot be recorded; None where they can."""
    layout, config = plan.layout, forward.decoders[0].config
    if device.type != "cuda":
        return "there is no GPU"
    if layout.pp > 1:
        return "pipeline stages wait for each other"
    if layout.sp:
        return "megatron sets the random state of dropout in each pass"
    if layout.tp > 1 and dist.get_backend(forward.tp_group) != "nccl":
        return "tensor-parallel ranks talk through the host"
    if config.fp8:
        return "FP8 keeps scales between passes"
    if plan.architecture.moe is not None and not _experts_can(forward, config):
        return "experts ask how many tokens each of them has"
    return None


def _experts_can(forward: "Forward", config: Any) -> bool:  # noqa: ANN401
    layers = [m for d in forward.decoders for m in d.modules() if hasattr(m, "router")]
    weights = [
        p for layer in layers for name, p in layer.experts.named_parameters() if "weight" in name
    ]
    return bool(config.moe_grouped_gemm) and all(
        [*(layer.direct for layer in layers), *(has_grouped_product(w) for w in weights)]
    )


class Graphs:
    """Graphs by key. A step of a new key runs as it is, which warms it up; the next is recorded.

    What a step reads and writes must lie where it lay when it was recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._warm: set[Hashable] = set()
        self._works = True

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Do what the step does, by its graph if there is one."""
        if self._works and key in self._warm and key not in self._graphs:
            self._record(key, step)
        graph = self._graphs.get(key)
        if graph is None:
            step()
            self._warm.add(key)
        else:
            graph.replay()

    def clear(self) -> None:
        """Forget all graphs, and give their memory back."""
        self._graphs.clear()
        self._warm.clear()
        # a pool that no graph uses any more is gone: recording into it fails
        self._pool = torch.cuda.graph_pool_handle()

    def _record(self, key: Hashable, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        except Exception as error:
            self._works = False
            torch.cuda.synchronize()
            _renew_random_state(self._stream.device)
            cause = str(error.__context__ or error).partition("\n")[0]
            _LOG.warning("decode steps run without CUDA graphs: %s", cause)
            return
        torch.cuda.current_stream().wait_stream(self._stream)
        self._graphs[key] = graph


def _renew_random_state(device: torch.device) -> None:
    """Give the device's generator a state of the same values.

    A recording that fails leaves the old one marked as being recorded: it would draw no more.
    """
    generator = torch.cuda.default_generators[device.index or 0]
    fresh = torch.Generator(device)
    fresh.set_state(generator.get_state())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())
