"""Options as users see them, and the rules about single options and pairs of them."""

from typing import Any, ClassVar

import pytest
from pydantic import Field

from mcore_core.config.export import ExportConfig
from mcore_core.config.group import ConfigGroup, also
from mcore_core.config.kernel import KERNEL_GROUPS, kernel_config
from mcore_core.config.option import collect_options
from mcore_core.config.platform_rules import PlatformFacts, check_platform, facts
from mcore_core.config.refused import REFUSED, check_refused
from mcore_core.config.rules import NEEDS, check_options
from mcore_core.config.settle import settle
from mcore_core.config.weights import parse_size
from mcore_core.errors import UsageError

GIVEN: dict[str, Any] = {"model": "m", "dataset": ["d.jsonl"], "max_epochs": 1}
CPU = PlatformFacts(cuda=False, te=False, flash_attn=False, emerging_optimizers=False)
GPU = PlatformFacts(cuda=True, te=True, flash_attn=True, emerging_optimizers=True)


def messages(**values: Any) -> list[str]:
    return [str(p) for p in check_options(kernel_config(**(GIVEN | values)))]


def test_every_option_has_help_that_fits_a_sentence_or_two() -> None:
    for option in collect_options(dict.fromkeys(KERNEL_GROUPS, "kernel")).values():
        assert option.help.endswith("."), option.name
        assert 10 < len(option.help) < 260, (option.name, len(option.help))


def test_two_groups_with_one_spelling_are_an_error() -> None:
    class A(ConfigGroup):
        title: ClassVar[str] = "A"
        depth: int = Field(1, json_schema_extra=also("layers"))
        """Depth."""

    class B(ConfigGroup):
        title: ClassVar[str] = "B"
        layers: int = 1
        """Layers."""

    with pytest.raises(UsageError, match=r"error\[MC305\]: option --layers is defined twice"):
        collect_options({A: "one", B: "two"})


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5 KB", 1500)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert kernel_config(max_shard_size=text).get("max_shard_size") == text


def test_a_plain_run_has_no_problems() -> None:
    config = kernel_config(**GIVEN)
    assert check_options(config) == []
    assert check_refused(config, {}) == []
    assert check_platform(config, CPU) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"train_iters": 3},
            "error[MC320]: --train_iters 3 and --max_epochs 1 both say when to stop\n"
            "  fix: keep one of them",
        ),
        (
            {"streaming": True, "max_epochs": None},
            "error[MC320]: --streaming data may have no end, and nothing says when to stop\n"
            "  fix: add --train_iters N, or --max_epochs N if the data ends",
        ),
        (
            {"packing": True, "padding_free": False},
            "error[MC320]: --packing joins samples in one row, which --padding_free false forbids\n"
            "  fix: leave out one of them",
        ),
        (
            {"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1},
            "error[MC320]: --lr_warmup_iters 3 and --lr_warmup_fraction 0.1 both set the warm-up\n"
            "  fix: keep one of them",
        ),
        (
            {"lr_warmup_iters": 10, "train_iters": 10, "max_epochs": None},
            "error[MC320]: a warm-up of 10 steps (--lr_warmup_iters) does not end before step 10, "
            "where the learning rate has decayed\n  fix: --lr_warmup_iters below 10",
        ),
        (
            {"fp16": True, "bf16": True},
            "error[MC320]: --fp16 and --bf16 exclude each other\n  fix: keep one of them",
        ),
        (
            {"bf16": True, "torch_dtype": "float32"},
            "error[MC320]: --bf16 and --torch_dtype float32 ask for different number types\n"
            "  fix: keep one of them",
        ),
        (
            {"min_lr": 1e-4, "lr": 1e-5},
            "error[MC320]: --min_lr 0.0001 is above --lr 1e-05\n"
            "  fix: lower min_lr, which is the learning rate at the end",
        ),
        (
            {"eval_interval": 5},
            "error[MC321]: --eval_interval 5 does nothing without --val_dataset or "
            "--split_dataset_ratio\n"
            "  fix: add --val_dataset or --split_dataset_ratio, or leave out --eval_interval",
        ),
        (
            {"recompute_method": "block"},
            "error[MC321]: --recompute_method block does nothing without "
            "--recompute_granularity full\n"
            "  fix: add --recompute_granularity full, or leave out --recompute_method",
        ),
        (
            {"interleave_prob": [0.5, 0.4], "dataset": ["a", "b"]},
            "error[MC320]: --interleave_prob 0.5 0.4 are not probabilities: they sum to 0.9\n"
            "  fix: give values of at least 0 that sum to 1",
        ),
        (
            {"dataset": []},
            "error[MC322]: no training data given\n  fix: --dataset FILE.jsonl, or a hub id",
        ),
        (
            {"model": None},
            "error[MC322]: no model given\n"
            "  fix: --model FOLDER, or a hub id such as Qwen/Qwen3-0.6B",
        ),
        (
            {"distributed_timeout_minutes": 5, "ddp_timeout": 60},
            "error[MC320]: --ddp_timeout 60 seconds and --distributed_timeout_minutes 5 "
            "(300 seconds) differ\n  fix: keep ddp_timeout",
        ),
        (
            {"node_rank": 2},
            "error[MC320]: --node_rank 2 is not below --nnodes 1; machines are numbered from 0\n"
            "  fix: give each machine its own node_rank",
        ),
    ],
)
def test_contradictions(values: dict[str, Any], text: str) -> None:
    assert messages(**values) == [text]


def test_all_contradictions_are_reported_at_once() -> None:
    assert len(messages(train_iters=1, fp16=True, bf16=True, packing_length=4)) == 3


@pytest.mark.parametrize("name", NEEDS)
def test_what_an_option_needs_is_an_option(name: str) -> None:
    config = kernel_config()
    assert name in config.names
    holds, text = NEEDS[name]
    assert holds(config) in (True, False)
    assert all(w.lstrip("-") in config.names for w in text.split() if w.startswith("--"))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"vit_lr": 0.1},
            "--vit_lr 0.1 cannot be honoured: vision towers: models here read text only, until "
            "multimodal models come",
        ),
        (
            {"position_embedding_type": "mrope"},
            "--position_embedding_type mrope cannot be honoured: attention here knows rotary "
            "positions (rope) and none",
        ),
        (
            {"recompute_modules": ["moe_act", "mlp"]},
            "--recompute_modules moe_act mlp cannot be honoured: moe_act and mla_up_proj are not "
            "recomputed by themselves; core_attn, mlp, layernorm, moe and shared_experts can be",
        ),
        (
            {"dataloader_type": "external"},
            "--dataloader_type external cannot be honoured: external is for code that calls "
            "megatron with a loader of its own; a plugin's mcore_datasets hook brings data in",
        ),
    ],
)
def test_refused(values: dict[str, Any], text: str) -> None:
    problems = check_refused(kernel_config(**values), {})
    assert [p.message for p in problems] == [text]
    assert problems[0].code == "MC311"


def test_values_that_are_not_refused() -> None:
    config = kernel_config(
        position_embedding_type="none", recompute_modules=["mlp"], dataloader_type="single"
    )
    assert check_refused(config, {}) == []


def test_every_refused_option_exists_and_is_not_refused_by_default() -> None:
    config = kernel_config(ExportConfig)
    assert set(REFUSED) <= set(config.names)
    given = config.replace(**{name: config.get(name) for name in REFUSED})
    assert check_refused(given, {}) == []


def test_a_recipe_refuses_only_what_was_changed() -> None:
    refusals = {"packing": ("dpo", "pairs are packed together"), "seed": ("dpo", "never")}
    problems = check_refused(kernel_config(packing=True, seed=42), refusals)
    assert [str(p) for p in problems] == [
        "error[MC310]: --packing true: the plugin 'dpo' cannot use it: pairs are packed together\n"
        "  fix: leave the option out"
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"transformer_impl": "transformer_engine"},
            "error[MC312]: --transformer_impl transformer_engine needs a CUDA GPU and Transformer "
            "Engine, which is not installed\n"
            "  fix: run on a machine with one, or use --transformer_impl auto",
        ),
        (
            {"distributed_backend": "nccl"},
            "error[MC312]: --distributed_backend nccl needs a CUDA GPU\n"
            "  fix: run on a machine with one, or use --distributed_backend gloo",
        ),
        (
            {"optimizer": "dist_muon"},
            "error[MC312]: --optimizer dist_muon needs the package emerging-optimizers, which is "
            "not installed\n  fix: uv pip install 'mcore-core[muon]', or use --optimizer adam",
        ),
        (
            {"optimizer_cpu_offload": True},
            "error[MC312]: --optimizer_cpu_offload true needs a CUDA GPU\n"
            "  fix: run on a machine with one, or use --optimizer_cpu_offload false",
        ),
    ],
)
def test_platform(values: dict[str, Any], text: str) -> None:
    config = kernel_config(**values)
    assert [str(p) for p in check_platform(config, CPU)] == [text]
    assert check_platform(config, GPU) == []


@pytest.mark.parametrize(
    "values",
    [
        {"fp8_format": "hybrid"},
        {"use_precision_aware_optimizer": True},
        {"tp_comm_overlap": True},
        {"attention_backend": "flash"},
        {"attention_backend": "fused"},
        {"cross_entropy_fusion_impl": "te"},
    ],
    ids=str,
)
def test_gpu_options(values: dict[str, Any]) -> None:
    config = kernel_config(**values)
    assert [p.code for p in check_platform(config, CPU)] == ["MC312"]
    assert check_platform(config, GPU) == []


def test_facts_do_not_import_what_they_look_for() -> None:
    assert facts(cuda=True).cuda
    assert not facts(cuda=False).cuda


def test_settle() -> None:
    config, notes = settle(
        kernel_config(
            sequence_parallel=True, distributed_timeout_minutes=20, recompute_granularity="full"
        )
    )
    got = {
        name: config.get(name)
        for name in (
            "sequence_parallel",
            "ddp_timeout",
            "max_epochs",
            "recompute_method",
            "recompute_num_layers",
        )
    }
    assert got == {
        "sequence_parallel": False,
        "ddp_timeout": 1200,
        "max_epochs": 1,
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    assert notes == [
        "sequence_parallel is off: it needs tensor_model_parallel_size over 1",
        "max_epochs is 1: neither train_iters nor max_epochs was given",
    ]
    assert settle(config) == (config, [])


def test_settle_leaves_what_was_given() -> None:
    config = kernel_config(train_iters=5, sequence_parallel=True, tensor_model_parallel_size=2)
    assert settle(config) == (config, [])
