"""Compare a model here with transformers' on the same tokens: how far apart, and from where on.

T tokens of the test row (of a rank's part of it before it is put together), H hidden size, V
vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from mcore_core.errors import usage_error
from mcore_core.failure import RunFailure
from mcore_core.model.build import DTYPES
from mcore_core.model.config import SUBLAYERS
from mcore_core.model.names import unwrap
from mcore_core.protocols import Batch
from mcore_core.train.forward import vocab_range
from mcore_core.train.place import Placed, place
from mcore_core.train.precision_report import PrecisionReport, compare

if TYPE_CHECKING:
    from mcore_core.model.build import ModelPlan

LENGTHS = (5, 40, 211)
"""Tokens of the sequences of the test row."""
EMBEDDING, NORM, LOGITS = "embedding", "final norm", "logits"
_CLASSES = {
    "lm": "AutoModelForCausalLM",
    "scores": "AutoModelForSequenceClassification",
    "none": "AutoModel",
}
"""What opens a model in transformers, by its head."""

type Found = dict[str, Tensor]
"""Name of a place in the model -> what came out there, [T, H] or, for the logits, [T, V].

The logits of a classifier are its scores."""


@dataclass(slots=True)
class _Part:
    """What one rank holds of the test row."""

    index_T: Tensor
    """Which token of the row each of its tokens is; -1 for padding."""
    hidden: Found = field(default_factory=dict)
    logits_TV: Tensor | None = None
    vocab_start: int = 0


def layer_name(layer: int) -> str:
    """Return what a layer of the HF model is called in a report."""
    return f"layer {layer}"


def test_tokens(vocab_size: int, max_length: int) -> Batch:
    """Return the test row: token ids drawn from the whole vocabulary, the same everywhere."""
    lengths = tuple(min(n, max_length) for n in LENGTHS)
    generator = torch.Generator().manual_seed(1234)
    tokens_T = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    # the targets carry each token's position in the row through padding and slicing
    return Batch(
        tokens_T=tokens_T,
        targets_T=torch.arange(len(tokens_T)),
        weights_T=torch.ones(len(tokens_T)),
        lengths=lengths,
    )


def measure(
    chunks: Sequence[Any],
    plan: "ModelPlan",
    folder: Path,
    device: torch.device,
    *,
    dtype: str = "float32",
    device_map: Any = None,  # noqa: ANN401
) -> PrecisionReport:
    """Compare this model with what transformers makes of `folder`; collective.

    The chunks are cast to `dtype` and are of no use for training afterwards.

    Args:
        chunks: This rank's pipeline chunks, not wrapped for data parallelism.
        plan: What they were built from.
        folder: A Hugging Face model.
        device: Where this rank computes.
        dtype: In which number type both models compute.
        device_map: Where transformers puts its model; None: on `device`.

    Returns:
        The report, the same on every rank.

    Raises:
        UsageError: transformers cannot open the folder.
    """
    batch = test_tokens(plan.architecture.vocab_size, plan.architecture.max_position_embeddings)
    theirs: Found = {}
    name, trouble = "", None
    if dist.get_rank() == 0:
        try:
            where = device_map or {"": str(device)}
            name, theirs = _transformers(folder, batch, where, dtype, plan.architecture.head)
        except Exception as error:  # whatever a model's own code raises: the others wait
            trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    box = [trouble]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise usage_error(
            "MC545",
            f"transformers cannot run {folder}, so there is nothing to compare with",
            box[0],
            "fix: leave out --test_convert_precision; what was converted is complete",
        )
    ours = _ours(cast(chunks, DTYPES[dtype]), plan, batch, device)
    report: list[PrecisionReport | None] = [None]
    if ours is not None:
        layout = str(plan.layout)
        report[0] = compare(
            ours, theirs, model=name, dtype=dtype, lengths=batch.lengths, layout=layout
        )
    dist.broadcast_object_list(report, src=0)
    assert report[0] is not None
    return report[0]


def cast(chunks: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Return chunks that compute in `dtype`; the weights are changed in place."""
    for chunk in chunks:
        for module in unwrap(chunk).modules():
            if (config := getattr(module, "config", None)) is not None:
                config.params_dtype = config.pipeline_dtype = config.autocast_dtype = dtype
                config.bf16, config.fp16 = dtype is torch.bfloat16, dtype is torch.float16
    bare = [unwrap(chunk) for chunk in chunks]
    if dtype is torch.float32:
        return [chunk.float() for chunk in bare]
    return [Float16Module(chunk.config, chunk) for chunk in bare]


def _transformers(
    folder: Path,
    batch: Batch,
    device_map: Any,  # noqa: ANN401
    dtype: str,
    head: str,
) -> tuple[str, Found]:
    """Return the class of transformers' model, and what it computes for the row."""
    import transformers  # noqa: PLC0415  (slow to import)
    from transformers.utils import logging  # noqa: PLC0415

    quiet: Any = logging
    quiet.disable_progress_bar()
    opens: Any = getattr(transformers, _CLASSES[head])
    model: Any = opens.from_pretrained(folder, dtype=DTYPES[dtype], device_map=device_map)
    model.eval()
    tokens_T: Any = batch.tokens_T
    where = model.get_input_embeddings().weight.device
    found: dict[str, list[Tensor]] = {}
    layers = _decoder_layers(model)

    def keep(name: str, value: Any) -> None:  # noqa: ANN401
        tensor = value[0] if isinstance(value, tuple) else value
        found.setdefault(name, []).append(tensor[0].float().cpu())

    with torch.no_grad(), _watching(layers, keep), _watching_head(model, head, keep):
        for tokens in tokens_T.split(list(batch.lengths)):
            model(tokens.unsqueeze(0).to(where), use_cache=False)
    return type(model).__name__, {name: torch.cat(parts) for name, parts in found.items()}


def _decoder_layers(model: Any) -> Any:  # noqa: ANN401
    """Return the decoder layers of a model of transformers."""
    for module in (model.base_model, *model.modules()):
        if isinstance(layers := getattr(module, "layers", None), torch.nn.ModuleList):
            return layers
    raise ValueError(f"{type(model).__name__} has no list of decoder layers")


@contextmanager
def _watching(
    layers: Sequence[Any], keep: Callable[[str, Any], None], *, first: int = 0, step: int = 1
) -> Iterator[None]:
    """Tell `keep` what enters layer 0 and what leaves each layer; `step` modules are one layer."""

    def enters(_: Any, args: Any, kwargs: Any) -> None:  # noqa: ANN401
        keep(EMBEDDING, args[0] if args else kwargs["hidden_states"])

    def leaves(name: str, module: Any, args: Any, output: Any) -> None:  # noqa: ANN401
        keep(name, output)

    handles = []
    if first == 0 and len(layers):
        handles.append(layers[0].register_forward_pre_hook(enters, with_kwargs=True))
    for number, layer in enumerate(layers[step - 1 :: step], start=first):
        handles.append(layer.register_forward_hook(partial(leaves, layer_name(number))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching_head(model: Any, head: str, keep: Callable[[str, Any], None]) -> Iterator[None]:  # noqa: ANN401
    """Tell `keep` what enters the head of a model of transformers, and what comes out of it."""
    handles = []
    if head == "none":
        after = model.register_forward_hook(lambda _m, _a, out: keep(NORM, out.last_hidden_state))
        handles.append(after)
    else:
        module = model.score if head == "scores" else model.get_output_embeddings()
        handles.append(module.register_forward_pre_hook(lambda _, args: keep(NORM, args[0])))
    if head == "scores":  # the model returns those of a sequence's last token only
        handles.append(module.register_forward_hook(lambda _m, _a, out: keep(LOGITS, out)))
    elif head == "lm":  # the model may change them after its head
        handles.append(model.register_forward_hook(lambda _m, _a, out: keep(LOGITS, out.logits)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ours(
    chunks: Sequence[Any], plan: "ModelPlan", batch: Batch, device: torch.device
) -> Found | None:
    """Run the row through all pipeline stages; return what came out of each place, on rank 0."""
    rank, group = (
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_context_parallel_group(),
    )
    layout = plan.layout
    placed = place(
        batch, layout, device, cp_rank=rank, cp_group=group, row_multiple=plan.row_multiple
    )
    real = placed.batch.weights_T > 0
    index_T = torch.where(real, placed.batch.targets_T, -1).cpu()
    part = _Part(index_T)
    tp = parallel_state.get_tensor_model_parallel_rank()
    mine = parallel_state.get_data_parallel_rank() == 0
    slice_T = index_T.chunk(layout.tp)[tp] if layout.sp else index_T

    def keep(name: str, value: Any) -> None:  # noqa: ANN401
        tensor = value[0] if isinstance(value, tuple) else value
        if mine and (layout.sp or tp == 0) and name not in part.hidden:
            part.hidden[name] = tensor[:, 0].float().cpu()

    step = partial(_forward, plan, part, keep)
    for chunk in chunks:
        chunk.eval()
    # the interleaved schedule wants a multiple of the stages; the same row is run again
    count = layout.pp if layout.vpp else 1
    rows = [iter([placed] * count) for _ in chunks]
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=rows if len(rows) > 1 else rows[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=count,
            seq_length=len(placed.batch.tokens_T),
            micro_batch_size=1,
            forward_only=True,
        )
    logits_TV = part.logits_TV if mine else None
    sent = (_Part(slice_T, part.hidden), _Part(index_T, {}, logits_TV, part.vocab_start))
    parts: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(sent, parts, dst=0)
    return None if parts is None else _joined(parts, plan, sum(batch.lengths))


def _forward(
    plan: "ModelPlan",
    part: _Part,
    keep: Callable[[str, Any], None],
    rows: Iterator[Placed],
    chunk: Any,  # noqa: ANN401
    *_: object,
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    placed = next(rows)
    half = isinstance(chunk, Float16Module)
    arguments: dict[str, Any] = {"fp32_output": False} if half else {}
    bare = unwrap(chunk)
    layers = bare.decoder.layers
    with _watching(layers, keep, first=bare.first_layer, step=SUBLAYERS):
        hidden = chunk(placed.batch.tokens_T, placed.row, **arguments)

    def finish(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        keep(NORM, hidden)
        if plan.layout.sp:
            hidden = gather_from_sequence_parallel_region(hidden, False)
        if plan.architecture.head == "scores":
            part.logits_TV = (hidden.squeeze(1) @ bare.score.weight.T).float().cpu()
        elif plan.architecture.head == "lm":
            vocab = vocab_range(plan)
            logits = hidden.squeeze(1) @ bare.head_weight()[: vocab.rows].T
            part.logits_TV = logits.float().cpu()
            part.vocab_start = vocab.start
        return hidden.new_zeros(()).float(), torch.ones((), dtype=torch.int), {}

    return hidden, finish


def _joined(parts: Sequence[tuple[_Part, _Part]], plan: "ModelPlan", tokens: int) -> Found:
    """Put together what the ranks hold, in the order of the model."""
    shape = plan.architecture
    names = [EMBEDDING, *(layer_name(i) for i in range(shape.num_layers)), NORM]
    whole = {name: torch.full((tokens, shape.hidden_size), torch.nan) for name in names}
    if shape.head != "none":
        width = shape.scores if shape.head == "scores" else shape.vocab_size
        whole[LOGITS] = torch.full((tokens, width), torch.nan)
    for hidden, head in parts:
        for name, values in hidden.hidden.items():
            kept = hidden.index_T >= 0
            whole[name][hidden.index_T[kept]] = values[kept]
        if head.logits_TV is not None:
            kept = head.index_T >= 0
            end = head.vocab_start + head.logits_TV.shape[1]
            whole[LOGITS][head.index_T[kept], head.vocab_start : end] = head.logits_TV[kept]
    return whole


def require(report: PrecisionReport) -> None:
    """Raise a RunFailure where the models differ by more than rounding."""
    if report.first_over is None:
        return
    advice = (
        "fix: the weights of that place, or how they are converted, are wrong"
        if report.dtype == "float32"
        else "fix: --test_convert_dtype float32 tells rounding from a wrong weight"
    )
    raise RunFailure(
        "MC808",
        f"the converted model differs from transformers' {report.model}, "
        f"first at {report.first_over}",
        f"relative difference there {report.row(report.first_over).relative:.1e}, "
        f"tolerance in {report.dtype} {report.tolerance:.0e}",
        advice,
    )
