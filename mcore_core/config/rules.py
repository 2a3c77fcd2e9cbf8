"""Options that contradict each other, or that nothing would read: checked before anything runs."""

from collections.abc import Callable, Iterator

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem

MINUTE = 60

type Needed = tuple[Callable[[RunConfig], bool], str]


def _on(name: str) -> Needed:
    return (lambda config: bool(config.get(name))), f"--{name}"


def _is(name: str, *values: str) -> Needed:
    text = " or ".join(f"--{name} {value}" for value in values)
    return (lambda config: config.get(name) in values), text


_VALIDATION: Needed = (
    lambda config: bool(config.get("val_dataset") or config.get("split_dataset_ratio")),
    "--val_dataset or --split_dataset_ratio",
)
_TRACKER: Needed = (
    lambda config: bool(config.get("report_to")),
    "--report_to wandb or --report_to swanlab",
)
_CHUNKS: Needed = (
    lambda config: any(
        config.get(name) is not None
        for name in (
            "num_virtual_stages_per_pipeline_rank",
            "num_layers_per_virtual_pipeline_stage",
            "pipeline_model_parallel_layout",
        )
    ),
    "--num_virtual_stages_per_pipeline_rank",
)

_FROZEN: Needed = (
    lambda config: any(
        config.get(name)
        for name in ("freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio")
    ),
    "--freeze_parameters or --freeze_parameters_regex or --freeze_parameters_ratio",
)

NEEDS: dict[str, Needed] = {
    "packing_length": _on("packing"),
    "packing_num_proc": _on("packing"),
    "shuffle_buffer_size": _on("streaming"),
    "stopping_strategy": _on("interleave_prob"),
    "eval_interval": _VALIDATION,
    "eval_iters": _VALIDATION,
    "recompute_method": _is("recompute_granularity", "full"),
    "recompute_num_layers": _is("recompute_granularity", "full"),
    "recompute_modules": _is("recompute_granularity", "selective"),
    "cross_entropy_fusion_impl": _on("cross_entropy_loss_fusion"),
    "manual_gc_interval": _on("manual_gc"),
    "optimizer_offload_fraction": _on("optimizer_cpu_offload"),
    "main_grads_dtype": _on("use_precision_aware_optimizer"),
    "main_params_dtype": _on("use_precision_aware_optimizer"),
    "exp_avg_dtype": _on("use_precision_aware_optimizer"),
    "exp_avg_sq_dtype": _on("use_precision_aware_optimizer"),
    "sgd_momentum": _is("optimizer", "sgd"),
    "use_precision_aware_optimizer": _on("use_distributed_optimizer"),
    "use_persistent_ckpt_worker": _on("async_save"),
    "save_interval": _is("save_strategy", "steps"),
    "exit_on_missing_checkpoint": _on("load"),
    "fp8_recipe": _on("fp8_format"),
    "fp8_amax_history_len": _on("fp8_format"),
    "fp8_amax_compute_algo": _on("fp8_format"),
    "fp8_param_gather": _on("fp8_format"),
    "wandb_project": _TRACKER,
    "wandb_exp_name": _TRACKER,
    "wandb_save_dir": _TRACKER,
    "overlap_param_gather": _on("overlap_grad_reduce"),
    "microbatch_group_size_per_virtual_pipeline_stage": _CHUNKS,
    **dict.fromkeys(
        (
            "freeze_parameters",
            "freeze_parameters_regex",
            "freeze_parameters_ratio",
        ),
        _is("tuner_type", "full"),
    ),
    "trainable_parameters": _FROZEN,
    "trainable_parameters_regex": _FROZEN,
    **dict.fromkeys(
        (
            "adapter_load",
            "merge_lora",
            "target_modules",
            "target_regex",
            "modules_to_save",
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
            "lora_bias",
            "use_rslora",
        ),
        _is("tuner_type", "lora"),
    ),
    "chat_template": _on("use_chat_template"),
    "enable_thinking": _on("use_chat_template"),
}
"""An option that was changed -> what must hold, or nothing would read it."""


def check_options(config: RunConfig) -> list[Problem]:
    """Return every contradiction that needs no model, machine or data to be seen."""
    problems = [*_required(config), *_length(config), *_data(config), *_schedule(config)]
    problems += [*_precision(config), *_machines(config), *_tuner(config)]
    for name, (holds, text) in NEEDS.items():
        if config.changed(name) and not holds(config):
            message = f"--{name} {as_typed(config.get(name))} does nothing without {text}"
            problems.append(Problem("MC321", message, [f"fix: add {text}, or leave out --{name}"]))
    return problems


def _required(config: RunConfig) -> Iterator[Problem]:
    if config.get("model") is None and config.get("load") is None:
        yield Problem(
            "MC322", "no model given", ["fix: --model FOLDER, or a hub id such as Qwen/Qwen3-0.6B"]
        )
    if not config.get("dataset"):
        yield Problem("MC322", "no training data given", ["fix: --dataset FILE.jsonl, or a hub id"])


def _length(config: RunConfig) -> Iterator[Problem]:
    iters, epochs = config.get("train_iters"), config.get("max_epochs")
    if iters is not None and epochs is not None:
        yield Problem(
            "MC320",
            f"--train_iters {iters} and --max_epochs {epochs} both say when to stop",
            ["fix: keep one of them"],
        )
    if iters is None and epochs is None and config.get("streaming"):
        yield Problem(
            "MC320",
            "--streaming data may have no end, and nothing says when to stop",
            ["fix: add --train_iters N, or --max_epochs N if the data ends"],
        )


def _data(config: RunConfig) -> Iterator[Problem]:
    if config.get("packing") and not config.get("padding_free"):
        yield Problem(
            "MC320",
            "--packing joins samples in one row, which --padding_free false forbids",
            ["fix: leave out one of them"],
        )
    if config.get("val_dataset") and config.get("split_dataset_ratio"):
        yield Problem(
            "MC320",
            "--val_dataset and --split_dataset_ratio both choose the validation data",
            ["fix: keep one of them"],
        )
    if config.get("streaming") and config.get("group_by_length"):
        yield Problem(
            "MC320",
            "--group_by_length must know all lengths beforehand, which --streaming does not",
            ["fix: leave out one of them"],
        )
    chances, datasets = config.get("interleave_prob"), config.get("dataset")
    if chances is not None and len(chances) != len(datasets):
        yield Problem(
            "MC320",
            f"--interleave_prob has {len(chances)} values for {len(datasets)} datasets",
            ["fix: give one probability for each dataset, in the same order"],
        )
    if chances is not None and (any(p < 0 for p in chances) or abs(sum(chances) - 1) > 1e-6):
        yield Problem(
            "MC320",
            f"--interleave_prob {as_typed(chances)} are not probabilities: they sum to "
            f"{sum(chances):g}",
            ["fix: give values of at least 0 that sum to 1"],
        )


def _schedule(config: RunConfig) -> Iterator[Problem]:
    lr, min_lr = config.get("lr"), config.get("min_lr")
    if lr is not None and min_lr > lr:
        yield Problem(
            "MC320",
            f"--min_lr {min_lr:g} is above --lr {lr:g}",
            ["fix: lower min_lr, which is the learning rate at the end"],
        )
    warmup, fraction = config.get("lr_warmup_iters"), config.get("lr_warmup_fraction")
    if warmup and fraction is not None:
        yield Problem(
            "MC320",
            f"--lr_warmup_iters {warmup} and --lr_warmup_fraction {fraction:g} both set the "
            "warm-up",
            ["fix: keep one of them"],
        )
    decay = config.get("lr_decay_iters") or config.get("train_iters")
    if decay is not None and warmup >= decay:
        yield Problem(
            "MC320",
            f"a warm-up of {warmup} steps (--lr_warmup_iters) does not end before step {decay}, "
            "where the learning rate has decayed",
            [f"fix: --lr_warmup_iters below {decay}"],
        )


def _precision(config: RunConfig) -> Iterator[Problem]:
    dtype = config.get("torch_dtype")
    said = {n: t for n, t in (("fp16", "float16"), ("bf16", "bfloat16")) if config.get(n)}
    if len(said) == 2:
        yield Problem("MC320", "--fp16 and --bf16 exclude each other", ["fix: keep one of them"])
    elif said and dtype is not None and dtype not in said.values():
        (name,) = said
        yield Problem(
            "MC320",
            f"--{name} and --torch_dtype {dtype} ask for different number types",
            ["fix: keep one of them"],
        )


def _tuner(config: RunConfig) -> Iterator[Problem]:
    adapters, kind = config.get("adapters"), config.get("tuner_type")
    if adapters and kind != "lora":
        yield Problem(
            "MC320",
            f"--tuner_type {kind} trains no adapter, and --adapters names one",
            ["fix: leave out --tuner_type, or merge the adapter with mcore export --merge_lora"],
        )
    if adapters and config.get("adapter_load"):
        yield Problem(
            "MC320",
            "--adapters and --adapter_load both say what the adapter starts from",
            ["fix: keep one of them"],
        )
    if config.get("target_regex") is not None and config.changed("target_modules"):
        yield Problem(
            "MC320",
            "--target_regex and --target_modules both say which modules get an adapter",
            ["fix: keep one of them"],
        )
    if kind == "lora" and config.get("load_safetensors") is False:
        yield Problem(
            "MC320",
            "--load_safetensors false leaves the model at random, and adapters are trained on its "
            "weights",
            ["fix: leave out --load_safetensors"],
        )


def _machines(config: RunConfig) -> Iterator[Problem]:
    nnodes, rank = config.get("nnodes"), config.get("node_rank")
    if rank >= nnodes:
        yield Problem(
            "MC320",
            f"--node_rank {rank} is not below --nnodes {nnodes}; machines are numbered from 0",
            ["fix: give each machine its own node_rank"],
        )
    if nnodes > 1 and config.get("nproc_per_node") and config.get("master_addr") is None:
        yield Problem(
            "MC320",
            f"--nnodes {nnodes} needs the address of machine 0",
            ["fix: --master_addr HOST, the same on every machine"],
        )
    seconds, minutes = config.get("ddp_timeout"), config.get("distributed_timeout_minutes")
    changed = config.changed("ddp_timeout") and config.changed("distributed_timeout_minutes")
    if changed and seconds != minutes * MINUTE:
        yield Problem(
            "MC320",
            f"--ddp_timeout {seconds} seconds and --distributed_timeout_minutes {minutes} "
            f"({minutes * MINUTE} seconds) differ",
            ["fix: keep ddp_timeout"],
        )
    if config.get("overlap_param_gather") and not config.get("use_distributed_optimizer"):
        yield Problem(
            "MC320",
            "--overlap_param_gather gathers what --use_distributed_optimizer false never divides",
            ["fix: leave out one of them"],
        )
