"""Megatron's optimizer and schedule from the options of a run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.learning_rate import LearningRateConfig
from mcore_core.config.optimizer import OptimizerConfig
from mcore_core.config.regularization import RegularizationConfig
from mcore_core.config.tuner import TunerConfig

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig

FULL_LR = 1e-5
"""Default peak learning rate when all weights train."""
LORA_LR = 1e-4
"""Default peak learning rate of adapters."""

_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.uint8,
}


def peak_lr(config: "RunConfig") -> float:
    """Return the peak learning rate."""
    lr = config[LearningRateConfig].lr
    if lr is not None:
        return lr
    return LORA_LR if config[TunerConfig].tuner_type == "lora" else FULL_LR


def build_optimizer(
    config: "RunConfig", chunks: Sequence[Any], dtype: torch.dtype, *, on_cpu: bool
) -> Any:  # noqa: ANN401
    """Return the optimizer of DDP-wrapped chunks."""
    options, regular = config[OptimizerConfig], config[RegularizationConfig]
    distributed = config[DistributedConfig]
    layer_wise = options.optimizer == "dist_muon"
    values: dict[str, Any] = {
        "optimizer": "muon" if layer_wise else options.optimizer,
        "lr": peak_lr(config),
        "min_lr": config[LearningRateConfig].min_lr,
        "weight_decay": regular.weight_decay,
        "clip_grad": regular.clip_grad,
        "adam_beta1": regular.adam_beta1,
        "adam_beta2": regular.adam_beta2,
        "adam_eps": regular.adam_eps,
        "sgd_momentum": regular.sgd_momentum,
        "params_dtype": dtype,
        "initial_loss_scale": 2.0**16,  # float16: fine-tuning starts from small gradients
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "use_distributed_optimizer": uses_distributed_optimizer(config),
        "use_layer_wise_distributed_optimizer": layer_wise,
        "overlap_param_gather": distributed.overlap_param_gather,
        "apply_wd_to_qk_layernorm": options.apply_wd_to_qk_layernorm,
        "optimizer_cpu_offload": options.optimizer_cpu_offload,
        "optimizer_offload_fraction": options.optimizer_offload_fraction,
        "use_precision_aware_optimizer": options.use_precision_aware_optimizer,
        "main_grads_dtype": _DTYPES[options.main_grads_dtype],
        "main_params_dtype": _DTYPES[options.main_params_dtype],
        "exp_avg_dtype": _DTYPES[options.exp_avg_dtype],
        "exp_avg_sq_dtype": _DTYPES[options.exp_avg_sq_dtype],
    }
    if "muon" in options.optimizer and on_cpu:
        # exact under tensor parallelism; a GPU has megatron's faster defaults, each rank its block
        # by itself and bfloat16 products
        values |= {"muon_tp_mode": "duplicated", "muon_fp32_matmul_prec": "highest"}
    optimizer = get_megatron_optimizer(MegatronOptimizerConfig(**values), list(chunks))
    if options.optimizer == "sgd":
        for inner in optimizer.chained_optimizers:
            inner.init_state_fn = _zero_momentum  # megatron has none: it cannot load what it saved
    return optimizer


def _zero_momentum(optimizer: torch.optim.Optimizer, _: object = None) -> None:
    """Make the state of torch's SGD, to be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault(
                "momentum_buffer", torch.zeros_like(parameter.data)
            )


def uses_distributed_optimizer(config: "RunConfig") -> bool:
    """Return whether optimizer state is divided over data-parallel ranks (adam only)."""
    return (
        config[DistributedConfig].use_distributed_optimizer
        and config[OptimizerConfig].optimizer == "adam"
    )


def build_schedule(
    config: "RunConfig",
    optimizer: Any,  # noqa: ANN401
    train_iters: int,
) -> OptimizerParamScheduler:
    """Return the learning-rate schedule, counted in optimizer steps."""
    options, decay = config[LearningRateConfig], config[RegularizationConfig].weight_decay
    decay_steps = options.lr_decay_iters or train_iters
    warmup = options.lr_warmup_iters
    if options.lr_warmup_fraction is not None:
        warmup = round(options.lr_warmup_fraction * decay_steps)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=peak_lr(config),
        min_lr=min(options.min_lr, peak_lr(config)),
        lr_warmup_steps=min(warmup, decay_steps - 1),
        lr_decay_steps=decay_steps,
        lr_decay_style=options.lr_decay_style,
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
