"""A dense checkpoint as a mixture of experts that computes the same (Komatsuzaki et al. 2022).

Every expert is the dense MLP, so whichever a token goes to, the weighted sum is the MLP's output.
With a granularity g each MLP is cut into g experts of 1/g of its width (He et al. 2024): the rows
of the router are alike for the g parts of one copy, so that a token takes all of them or none, and
the second projection is multiplied by g, for the router's weights of all chosen ones sum to one.

Shapes: E experts, H hidden size, F width of the dense MLP.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.model.resolve import read_hf_config
from mcore_core.model.weight_files import INDEX, SINGLE
from mcore_hfbridge.export import pack
from mcore_hfbridge.hf_files import HFFiles
from mcore_hfbridge.save import copy_companions
from mcore_hfbridge.writer import Entry, Writer, file_order

if TYPE_CHECKING:
    from torch import Tensor

_MLP = re.compile(r"^(model\.layers\.\d+\.)mlp\.(gate_proj|up_proj|down_proj)\.weight$")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycling:
    """How a dense model becomes one of experts."""

    copies: int
    """Copies of each MLP."""
    granularity: int = 1
    """Experts that each copy is cut into."""
    topk: int = 2
    """Copies that a token goes to."""
    seed: int = 42

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.copies * self.granularity


@dataclass(frozen=True, slots=True)
class Target:
    """A family with experts that a dense one becomes."""

    model_type: str
    architecture: str
    experts: str
    """Where the experts of a layer are, below "model.layers.N."."""
    router: str
    names: tuple[str, str, str]
    """Its names of gate_proj, up_proj and down_proj."""
    shared: bool = False
    """It always has a shared expert: one is added whose output is zero."""


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = Target(
    "mixtral",
    "MixtralForCausalLM",
    "block_sparse_moe.experts",
    "block_sparse_moe.gate.weight",
    ("w1", "w3", "w2"),
)
TARGETS: Mapping[str, Target] = {
    "qwen3": Target("qwen3_moe", "Qwen3MoeForCausalLM", "mlp.experts", "mlp.gate.weight", _QWEN),
    "qwen2": Target(
        "qwen2_moe", "Qwen2MoeForCausalLM", "mlp.experts", "mlp.gate.weight", _QWEN, shared=True
    ),
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
}
"""model_type of the dense model -> what it becomes."""


def upcycled_config(config: Mapping[str, Any], how: Upcycling) -> dict[str, Any]:
    """Return config.json of the model with experts.

    Raises:
        UsageError: The model has no counterpart with experts, or its sizes do not divide.
    """
    kind = str(config.get("model_type"))
    target = TARGETS.get(kind)
    problems = []
    if target is None:
        problems.append(
            Problem(
                "MC324",
                f"--upcycle: models of type {kind!r} have no counterpart with experts here",
                ["known: " + ", ".join(f"{a} -> {t.model_type}" for a, t in TARGETS.items())],
            )
        )
        raise UsageError(problems)
    width = int(config["intermediate_size"])
    if width % how.granularity:
        problems.append(
            Problem(
                "MC324",
                f"--moe_upcycling_granularity {how.granularity} does not divide the model's "
                f"intermediate_size {width}",
                ["fix: give a divisor of it"],
            )
        )
    if how.topk > how.copies:
        problems.append(
            Problem(
                "MC324",
                f"--moe_router_topk {how.topk} is above --upcycle {how.copies}",
                [f"fix: give {how.copies} or less: the copies that a token goes to"],
            )
        )
    problems += [
        Problem(
            "MC324",
            f"--upcycle: {key} is true, and {target.model_type} has no such biases",
            ["fix: use a model without them"],
        )
        for key in ("mlp_bias", *(("attention_bias",) if target is _MIXTRAL else ()))
        if config.get(key)
    ]
    if problems:
        raise UsageError(problems)
    return {**config, **_fields(config, target, how, width // how.granularity)}


def _fields(
    config: Mapping[str, Any], target: Target, how: Upcycling, width: int
) -> dict[str, Any]:
    chosen = how.topk * how.granularity
    common = {
        "model_type": target.model_type,
        "architectures": [target.architecture],
        "num_experts_per_tok": chosen,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    }
    if target is _MIXTRAL:
        return common | {
            "num_local_experts": how.experts,
            "intermediate_size": width,
            "router_jitter_noise": 0.0,
            "sliding_window": config.get("sliding_window"),
        }
    fields = common | {
        "num_experts": how.experts,
        "moe_intermediate_size": width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return fields | ({"shared_expert_intermediate_size": width} if target.shared else {})


@dataclass(frozen=True, slots=True)
class _Made:
    """One tensor to write, and how it is made when its turn comes."""

    entry: Entry
    make: "Callable[[], Tensor]"


def upcycle(source: Path, path: Path, how: Upcycling, *, max_shard_size: int) -> dict[str, Any]:
    """Write the model with experts; return its config.

    One process reads and writes tensor by tensor: memory is that of one file's tensors.

    Raises:
        UsageError: What cannot be upcycled, read or written.
    """
    config = read_hf_config(source)
    new = upcycled_config(config, how)
    files = HFFiles.scan(source)
    made = {m.entry.name: m for m in _tensors(files, config, how)}
    path.mkdir(parents=True, exist_ok=True)
    runs = list(pack({n: m.entry.nbytes for n, m in made.items()}, max_shard_size))
    names = [
        SINGLE if len(runs) == 1 else f"model-{i:05d}-of-{len(runs):05d}.safetensors"
        for i in range(1, len(runs) + 1)
    ]
    try:
        with files.reading():
            for file, run in zip(names, runs, strict=True):
                entries = file_order([made[n].entry for n in run])
                writer = Writer(path / file, entries)
                for entry in entries:
                    writer.write({entry.name: made[entry.name].make()})
                writer.close()
    except OSError as error:
        raise usage_error("MC540", f"cannot write the model to {path}: {error}") from error
    if len(runs) > 1:
        weight_map = {n: file for file, run in zip(names, runs, strict=True) for n in run}
        total = sum(m.entry.nbytes for m in made.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    copy_companions(source, path, str(next(iter(made.values())).entry.dtype).split(".")[1])
    (path / "config.json").write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    return new


def _tensors(files: HFFiles, config: Mapping[str, Any], how: Upcycling) -> Iterator[_Made]:
    target = TARGETS[str(config["model_type"])]
    renamed = dict(zip(_QWEN, target.names, strict=True))
    for name, tensor in files.tensors.items():
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            raise usage_error(
                "MC324",
                f"--upcycle: {name} is {tensor.dtype}",
                "fix: use the original, unquantized weights",
            )
        whole = tuple(slice(0, n) for n in tensor.shape)
        found = _MLP.match(name)
        if found is None:
            yield _Made(Entry(name, dtype, tensor.shape), partial(files.read, name, whole))
            continue
        layer, part = found[1], found[2]
        yield from _experts(files, name, layer, part, renamed[part], target, how)
        if part == "down_proj":
            yield from _router(layer, dtype, int(tensor.shape[0]), config, target, how)


def _experts(
    files: HFFiles,
    name: str,
    layer: str,
    part: str,
    short: str,
    target: Target,
    how: Upcycling,
) -> Iterator[_Made]:
    tensor = files.tensors[name]
    dtype, dim = _DTYPES[tensor.dtype], 1 if part == "down_proj" else 0
    width = tensor.shape[dim] // how.granularity
    shape = (tensor.shape[0], width) if dim else (width, tensor.shape[1])

    def piece(segment: int, *, factor: float = how.granularity) -> "Tensor":
        where = slice(segment * width, (segment + 1) * width)
        every = slice(0, tensor.shape[1 - dim])
        values = files.read(name, (every, where) if dim else (where, every))
        return values * factor if dim else values

    for expert in range(how.experts):
        entry = Entry(f"{layer}{target.experts}.{expert}.{short}.weight", dtype, shape)
        yield _Made(entry, partial(piece, expert % how.granularity))
    if target.shared:
        entry = Entry(f"{layer}mlp.shared_expert.{part}.weight", dtype, shape)
        yield _Made(entry, partial(piece, 0, factor=0.0))


def _router(
    layer: str,
    dtype: torch.dtype,
    hidden: int,
    config: Mapping[str, Any],
    target: Target,
    how: Upcycling,
) -> Iterator[_Made]:
    std = float(config.get("initializer_range", 0.02))
    number = int(layer.split(".")[2])

    def rows() -> "Tensor":
        generator = torch.Generator().manual_seed(how.seed + number)
        copies = std * torch.randn(how.copies, hidden, generator=generator)
        return copies.repeat_interleave(how.granularity, 0).to(dtype)

    yield _Made(Entry(f"{layer}{target.router}", dtype, (how.experts, hidden)), rows)
    if target.shared:
        entry = Entry(f"{layer}mlp.shared_expert_gate.weight", dtype, (1, hidden))
        yield _Made(entry, lambda: torch.zeros(1, hidden, dtype=dtype))
