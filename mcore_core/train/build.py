"""Build the model of a run: chunks, weights, wrappers, optimizer, schedule."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.fp8 import FP8Config
from mcore_core.config.model import ModelConfig
from mcore_core.config.optimizer import OptimizerConfig
from mcore_core.config.precision import PrecisionConfig
from mcore_core.config.train import TrainConfig
from mcore_core.errors import usage_error
from mcore_core.model.build import DTYPES, ModelPlan, build_chunks, decoder_config
from mcore_core.model.scores import score_heads
from mcore_core.train.optimizer import uses_distributed_optimizer
from mcore_core.train.plan import ModelSource

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.platform.base import Platform


FP8_TOKENS = 32
"""Tokens of a rank's part of a row must be a multiple of this for FP8 matrix products."""


def model_plan(
    source: ModelSource,
    config: "RunConfig",
    platform: "Platform",
    *,
    max_length: int | None,
    dispatcher: Any = None,  # noqa: ANN401
    least_vocab: int = 0,
) -> ModelPlan:
    """Return what is to be built.

    The vocabulary is padded to `least_vocab` rows at least, so that models whose vocabularies
    differ in size are split over tensor-parallel ranks at the same ids.
    """
    return ModelPlan(
        architecture=source.architecture,
        layout=source.layout,
        stage_layers=source.stage_layers,
        dtype=DTYPES[config[PrecisionConfig].dtype(source.architecture.dtype)],
        transformer_engine=uses_engine(config, platform),
        max_length=max_length,
        dispatcher=dispatcher,
        padded_vocab=_padded_vocab(config, source, least_vocab),
        row_multiple=FP8_TOKENS * source.layout.cp * source.layout.tp
        if config[FP8Config].fp8_format
        else 1,
    )


def longest(max_length: int | None, recipe: Any, limit: int | None) -> int | None:  # noqa: ANN401
    """Return the tokens of the longest sequence of a run, None where nothing bounds it.

    Args:
        max_length: Of what is encoded.
        recipe: One that generates says by `generated_length` how many tokens may follow.
        limit: The model's own.
    """
    if max_length is None:
        return None
    total = max_length + int(getattr(recipe, "generated_length", 0))
    return total if limit is None else max(max_length, min(total, limit))


def uses_engine(config: "RunConfig", platform: "Platform") -> bool:
    """Return whether Transformer Engine's layers run."""
    wanted = config[ModelConfig].transformer_impl
    if wanted != "auto":
        return wanted == "transformer_engine"
    if platform.name == "cpu":
        return False
    from megatron.core.utils import is_te_min_version  # noqa: PLC0415  (imports TE if it is there)

    try:
        import transformer_engine.pytorch  # noqa: F401, PLC0415
    except (ImportError, OSError):
        return False
    return bool(is_te_min_version("2.0.0"))


def _padded_vocab(config: "RunConfig", source: ModelSource, least: int) -> int | None:
    size = config[ModelConfig].padded_vocab_size
    tp, vocab = source.layout.tp, max(source.architecture.vocab_size, least)
    if size is None and vocab > source.architecture.vocab_size:
        size = -(-vocab // tp) * tp
    if size is not None and (size < vocab or size % tp):
        raise usage_error(
            "MC506",
            f"--padded_vocab_size {size}: must be at least the vocabulary ({vocab}) and a multiple "
            f"of tensor_model_parallel_size ({tp})",
            f"fix: {-(-vocab // tp) * tp} is the smallest",
        )
    return size


def build_model(
    plan: ModelPlan, config: "RunConfig", *, on_cpu: bool, initialize: bool = True
) -> list[Any]:
    """Return this rank's chunks in training precision, not yet wrapped for data parallelism.

    `initialize` draws random weights; without it they hold anything until they are loaded.
    """
    decoder = decoder_config(plan, config, on_cpu=on_cpu, initialize=initialize)
    chunks: list[Any] = list(build_chunks(plan, decoder))
    for head in score_heads(chunks):
        head.draw(config[TrainConfig].seed)
    if not on_cpu:
        for chunk in chunks:
            chunk.cuda(torch.cuda.current_device())
    if plan.dtype is not torch.float32:
        chunks = [Float16Module(decoder, chunk) for chunk in chunks]
    return chunks


def wrap(chunks: Sequence[Any], config: "RunConfig") -> list[Any]:
    """Wrap chunks for data-parallel gradient reduction."""
    distributed = config[DistributedConfig]
    half = chunks[0].config.params_dtype is not torch.float32
    fp32_grads = half and config[OptimizerConfig].main_grads_dtype == "fp32"
    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=fp32_grads,
        overlap_grad_reduce=distributed.overlap_grad_reduce,
        overlap_param_gather=distributed.overlap_param_gather,
        use_distributed_optimizer=uses_distributed_optimizer(config),
        fp8_param_gather=config[FP8Config].fp8_param_gather,
        bucket_size=max(40_000_000, 1_000_000 * torch.distributed.get_world_size())
        if distributed.overlap_grad_reduce
        else None,
    )
    return [
        DistributedDataParallel(chunk.config, options, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
