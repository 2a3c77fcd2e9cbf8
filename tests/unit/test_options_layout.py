"""Whether sizes divide: the messages show the arithmetic and the nearest sizes that do."""

from typing import Any

import pytest

from mcore_core.config.kernel import kernel_config
from mcore_core.config.layout_rules import check_layout, check_model, layout_of, split_options
from mcore_core.model.architecture import Architecture
from mcore_core.parallel.topology import Layout

SHAPE: dict[str, Any] = {
    "num_layers": 6,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 12,
    "num_query_groups": 3,
    "kv_channels": 16,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


def layout_messages(world: int, **values: Any) -> list[str]:
    return [str(p) for p in check_layout(kernel_config(**values), world)]


def model_messages(world: int, shape: dict[str, Any] | None = None, **values: Any) -> list[str]:
    architecture = Architecture(**(SHAPE | (shape or {})))
    config = kernel_config(**values)
    layout = layout_of(config, world, num_layers=architecture.num_layers)
    return [str(p) for p in check_model(config, architecture, layout)]


def test_layout_of() -> None:
    config = kernel_config(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        num_layers_per_virtual_pipeline_stage=2,
    )
    assert layout_of(config, 8, num_layers=8) == Layout(world=8, tp=2, pp=2, vpp=2, sp=True)
    assert layout_of(config, 8).vpp is None
    assert layout_of(config.replace(tensor_model_parallel_size=1), 8).sp is False
    text = kernel_config(pipeline_model_parallel_layout="Et|t|t|tL", pipeline_model_parallel_size=2)
    assert layout_of(text, 2).vpp == 2
    assert split_options(text, layout_of(text, 2)).virtual == 2


@pytest.mark.parametrize(
    ("world", "values", "text"),
    [
        (
            6,
            {"tensor_model_parallel_size": 4},
            "error[MC601]: 6 ranks cannot be divided by tensor 4 x pipeline 1 x context 1 = 4\n"
            "  6 / 4 = 1.50\n"
            "  layouts near it that fit 6 ranks: tensor 3 pipeline 1 context 1 (data 2); "
            "tensor 2 pipeline 1 context 1 (data 3); tensor 3 pipeline 1 context 2 (data 1)\n"
            "  fix: choose one of these, or start 4 or 8 ranks (--nproc_per_node)",
        ),
        (
            1,
            {"context_parallel_size": 2},
            "error[MC601]: 1 rank cannot be divided by tensor 1 x pipeline 1 x context 2 = 2\n"
            "  1 / 2 = 0.50\n"
            "  layouts near it that fit 1 rank: tensor 1 pipeline 1 context 1 (data 1)\n"
            "  fix: choose one of these, or start 2 ranks (--nproc_per_node)",
        ),
        (
            4,
            {"global_batch_size": 10, "micro_batch_size": 2},
            "error[MC602]: global_batch_size 10 is not a multiple of micro_batch_size 2 x "
            "data-parallel size 4\n"
            "  2 x 4 = 8, and 10 / 8 = 1.25\n"
            "  data-parallel size: 4 ranks / (tensor 1 x pipeline 1 x context 1) = 4\n"
            "  fix: --global_batch_size 8 or 16",
        ),
        (
            2,
            {"global_batch_size": 6, "micro_batch_size": 2},
            "error[MC602]: global_batch_size 6 is not a multiple of micro_batch_size 2 x "
            "data-parallel size 2\n"
            "  2 x 2 = 4, and 6 / 4 = 1.50\n"
            "  data-parallel size: 2 ranks / (tensor 1 x pipeline 1 x context 1) = 2\n"
            "  fix: --global_batch_size 4 or 8, or --micro_batch_size 1",
        ),
        (
            2,
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t|tL"},
            "error[MC604]: --pipeline_model_parallel_layout 'Et|t|tL' has 3 stages, which "
            "--pipeline_model_parallel_size 2 does not divide\n  fix: write 2 or 4 stages",
        ),
        (
            1,
            {"decoder_first_pipeline_num_layers": 1},
            "error[MC603]: --decoder_first_pipeline_num_layers divide the layers of a pipeline, "
            "and there is none\n"
            "  fix: add --pipeline_model_parallel_size 2 or more, or leave them out",
        ),
        (
            2,
            {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "global_batch_size": 3,
            },
            "error[MC605]: an interleaved pipeline of 2 stages takes micro-batches in groups of 2, "
            "and a step has 3\n"
            "  global_batch_size 3 / (micro_batch_size 1 x data-parallel size 1) = 3\n"
            "  fix: --global_batch_size 2 or 4",
        ),
    ],
)
def test_layout_that_does_not_fit(world: int, values: dict[str, Any], text: str) -> None:
    assert layout_messages(world, **values) == [text]


@pytest.mark.parametrize(
    ("world", "values"),
    [
        (1, {}),
        (16, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
        (4, {"global_batch_size": 8, "micro_batch_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}),
        (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*3|tttL"}),
    ],
    ids=str,
)
def test_layout_that_fits(world: int, values: dict[str, Any]) -> None:
    assert layout_messages(world, **values) == []


def test_model_that_does_not_divide_over_tensor_ranks() -> None:
    assert model_messages(5, tensor_model_parallel_size=5) == [
        "error[MC611]: the model has 12 attention heads, which tensor_model_parallel_size 5 does "
        "not divide\n  12 / 5 = 2.40\n  fix: --tensor_model_parallel_size 1 or 3 or 6 or 12",
        "error[MC611]: the model has 96 columns in its MLPs, which tensor_model_parallel_size 5 "
        "does not divide\n  96 / 5 = 19.20\n  fix: --tensor_model_parallel_size 1 or 3 or 6 or 12",
        "error[MC611]: the model has 3 heads of keys and values, neither a multiple nor a divisor "
        "of tensor_model_parallel_size 5\n  fix: --tensor_model_parallel_size 1 or 3 or 6 or 12",
    ]


def test_model_that_does_not_divide_over_stages() -> None:
    (text,) = model_messages(4, pipeline_model_parallel_size=4)
    assert text.startswith(
        "error[MC612]: the model's layers do not fit the pipeline: 6 layers do not divide over 4 "
        "stages (6 / 4); [2, 3, 6] do\n  fix: change --pipeline_model_parallel_size"
    )
    (text,) = model_messages(
        2, pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2
    )
    assert text == (
        "error[MC612]: 6 layers do not divide over 2 stages in chunks of 2 "
        "(--num_layers_per_virtual_pipeline_stage)\n"
        "  2 x 2 = 4, and 6 / 4 = 1.50\n"
        "  fix: choose sizes whose product divides the layers"
    )


@pytest.mark.parametrize(
    ("world", "values"),
    [
        (1, {}),
        (3, {"tensor_model_parallel_size": 3}),
        (6, {"tensor_model_parallel_size": 6}),  # 3 groups: a divisor of 6
        (3, {"pipeline_model_parallel_size": 3}),
        (2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}),
        (
            4,
            {
                "pipeline_model_parallel_size": 4,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
        ),
        (3, {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 4}),
    ],
    ids=str,
)
def test_model_that_fits(world: int, values: dict[str, Any]) -> None:
    assert model_messages(world, **values) == []


def test_two_ways_to_divide_are_one_too_many() -> None:
    (text,) = layout_messages(
        2,
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=2,
        num_layers_per_virtual_pipeline_stage=1,
    )
    assert text == (
        "error[MC603]: --num_virtual_stages_per_pipeline_rank and "
        "--num_layers_per_virtual_pipeline_stage each say how a stage is divided\n"
        "  fix: keep one of them"
    )


@pytest.mark.parametrize("name", ["muon", "dist_muon"])
def test_muon_in_float16(name: str) -> None:
    refused = [
        f"error[MC613]: --optimizer {name} scales no losses, and this run is in float16\n"
        "  fix: --bf16, or --optimizer adam"
    ]
    assert model_messages(1, optimizer=name, fp16=True) == refused
    assert model_messages(1, {"dtype": "float16"}, optimizer=name) == refused
    assert model_messages(1, {"dtype": "float16"}, optimizer=name, bf16=True) == []
    assert model_messages(1, optimizer=name) == []
