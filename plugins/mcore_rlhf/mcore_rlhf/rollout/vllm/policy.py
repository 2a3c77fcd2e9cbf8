"""The policy's weights as vLLM loads them: whole, merged, under their Hugging Face names."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from torch import Tensor

    from mcore_core.protocols import EngineContext


ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def exported(context: "EngineContext") -> "Iterator[tuple[str, Tensor]]":
    """Yield every tensor on every rank; collective. Adapters are added out of place.

    Raises:
        UsageError: The tuned model has parts that no model of this architecture has.
    """
    tuner = context.tuner
    if tuner is None:
        yield from context.bridge.export(context.chunks)
        return
    if not tuner.mergeable:
        raise usage_error(
            "MC365",
            "what is trained cannot be merged into the model's weights, which vLLM needs",
            "fix: --vllm_enable_lora true, or --rollout_engine native",
        )
    yield from context.bridge.export(context.chunks, weights=tuner.merged(context.chunks))


def adapter(context: "EngineContext") -> tuple[bytes, ...]:
    """Return the contents of ADAPTER_FILES, of the policy's adapter, on every rank; collective."""
    assert context.tuner is not None
    with tempfile.TemporaryDirectory(prefix="mcore-adapter-") as mine:
        folder = Path(from_first(lambda: mine))
        context.tuner.export(context.chunks, folder)
        return from_first(lambda: tuple((folder / name).read_bytes() for name in ADAPTER_FILES))


def from_first[T](make: Callable[[], T] | None) -> T:
    """Call on the first rank; return or raise on all. Collective over all ranks."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        assert make is not None
        try:
            box = [(make(), None)]
        except Exception as error:
            box = [(None, error)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    result, raised = box[0]
    if raised is not None:
        raise raised
    found: T = result
    return found
