"""Numbers that reports show: parameters, norms, floating-point operations, versions."""

import platform as machine
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from mcore_core.model.names import unwrap

if TYPE_CHECKING:
    from mcore_core.data.pipeline import DataBundle
    from mcore_core.platform.base import Platform

PACKAGES = (
    "mcore-core",
    "torch",
    "megatron-core",
    "transformers",
    "datasets",
    "transformer-engine",
    "flash-attn",
)


def environment(platform: "Platform") -> dict[str, str]:
    """Return versions, machine and device."""
    found = {"python": machine.python_version(), "device": platform.device_name()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _own_parameters(chunks: Sequence[Any]) -> Iterator[tuple[torch.nn.Parameter, bool]]:
    """Yield each parameter that this rank alone counts, and whether it is split over TP ranks."""
    first_tp = parallel_state.get_tensor_model_parallel_rank() == 0
    for wrapped in chunks:
        chunk = unwrap(wrapped)
        for name, parameter in chunk.named_parameters():
            copy = name == "output_layer.weight" and chunk.share_embeddings_and_output_weights
            split = bool(getattr(parameter, "tensor_model_parallel", False))
            if not copy and (split or first_tp):
                yield parameter, split


def count_parameters(chunks: Sequence[Any]) -> tuple[int, int]:
    """Return (all, trainable) parameters of the whole model; collective."""
    counts = torch.zeros(2, dtype=torch.float64)
    for parameter, _ in _own_parameters(chunks):
        counts[0] += parameter.numel()
        counts[1] += parameter.numel() if parameter.requires_grad else 0
    total, trainable = _sum_over_model(counts).tolist()
    return int(total), int(trainable)


def params_norm(chunks: Sequence[Any]) -> float:
    """Return the L2 norm of all weights of the model; collective."""
    square = torch.zeros(1, dtype=torch.float64)
    for parameter, _ in _own_parameters(chunks):
        square += parameter.detach().double().square().sum().cpu()
    return float(_sum_over_model(square).sqrt())


def _sum_over_model(values: torch.Tensor) -> torch.Tensor:
    moved = values.to(torch.cuda.current_device())
    dist.all_reduce(moved, group=parallel_state.get_model_parallel_group())
    return moved.cpu()


def data_facts(data: "DataBundle") -> dict[str, Any]:
    """Return the counts and hashes of the data, as reports and run.json show them."""
    facts: dict[str, Any] = {"fingerprint": data.fingerprint, **data.report.to_dict()}
    for part, sources in (("train", data.report.train), ("eval", data.report.val)):
        if sources:
            dropped: dict[str, int] = {}
            for counts in sources.values():
                for reason, number in counts.dropped.items():
                    dropped[reason] = dropped.get(reason, 0) + number
            facts[part] = {
                "rows": sum(c.kept for c in sources.values()),
                "tokens": sum(c.tokens for c in sources.values()),
                "dropped": dropped,
            }
            pieces = sum(c.units for c in sources.values())
            if pieces > facts[part]["rows"]:
                facts[part]["pieces"] = pieces
    if data.report.packing_fill is not None and "train" in facts:
        facts["train"]["packs"] = data.report.train_items
    return facts
