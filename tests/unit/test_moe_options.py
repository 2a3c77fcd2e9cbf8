"""MoE, MLA and MTP options: they are those of the specification, act, or say why not."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from mcore_moe.config import MoEConfig
from mcore_moe.rules import check_experts

from mcore_core.config.kernel import kernel_config
from mcore_core.config.layout_rules import check_layout, check_model, layout_of
from mcore_core.config.option import Option
from mcore_core.errors import UsageError
from mcore_core.model.architecture import Architecture
from mcore_core.model.overrides import override
from mcore_core.model.shapes import LinearAttentionShape, MLAShape, MoEShape
from mcore_core.parallel.topology import Layout

DATA = Path(__file__).parents[1] / "data"
SHAPE = Architecture(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=64,
    max_position_embeddings=128,
)
MOE = MoEShape(num_experts=6, topk=2, ffn_hidden_size=20, layers=(1, 3))
WITH_MOE = dataclasses.replace(SHAPE, moe=MOE)


def rows():
    with (DATA / "arguments.tsv").open(encoding="utf-8") as file:
        return [r for r in csv.DictReader(file, delimiter="\t") if r["group"] == "MoE"]


@pytest.mark.parametrize("row", rows(), ids=lambda r: r["name"])
def test_row_of_the_specification(row):
    option = Option(row["name"], MoEConfig.model_fields[row["name"]], MoEConfig, "moe")
    default = {"none": None, "true": True, "false": False}.get(row["default"], row["default"])
    if row["type"] in ("int", "float") and default is not None:
        default = json.loads(default)
    choices = row["choices"].split("|") if row["choices"] else []
    assert option.default == default
    assert list(option.choices) == choices
    assert option.type_name == row["type"]
    assert len(option.help) > 10


def test_no_option_is_beyond_the_specification():
    assert set(MoEConfig.model_fields) == {r["name"] for r in rows()}


def config(**values):
    return kernel_config(MoEConfig, **values)


def test_layout_has_the_expert_sizes():
    given = config(expert_model_parallel_size=2, expert_tensor_parallel_size=2)
    layout = layout_of(given, 8)
    assert (layout.ep, layout.etp, layout.dp) == (2, 2, 8)
    assert layout_of(kernel_config(), 8).ep == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"moe_token_dispatcher_type": "flex"},
            "--moe_token_dispatcher_type flex needs DeepEP, which is not installed (no module "
            "deep_ep)",
        ),
        (
            {"moe_permute_fusion": True},
            "--moe_permute_fusion needs Transformer Engine, which is not installed",
        ),
        (
            {"moe_enable_deepep": True},
            "--moe_enable_deepep is for the dispatcher flex, and this run has alltoall",
        ),
        (
            {"moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "allgather"},
            "--moe_shared_expert_overlap computes the shared expert while tokens travel to single "
            "ranks, and with allgather all travel to all",
        ),
        (
            {
                "moe_shared_expert_overlap": True,
                "tensor_model_parallel_size": 2,
                "sequence_parallel": False,
            },
            "--moe_shared_expert_overlap with tensor parallelism needs each rank to hold its own "
            "tokens",
        ),
        (
            {
                "moe_shared_expert_overlap": True,
                "recompute_granularity": "selective",
                "recompute_modules": ["shared_experts"],
            },
            "--moe_shared_expert_overlap and recomputation of shared_experts contradict each other",
        ),
        (
            {"moe_token_drop_policy": "position"},
            "--moe_token_drop_policy position means nothing without a capacity: every expert takes "
            "all tokens that chose it",
        ),
        (
            {
                "moe_expert_capacity_factor": 1.5,
                "moe_pad_expert_input_to_capacity": True,
                "moe_token_dispatcher_type": "allgather",
            },
            "--moe_pad_expert_input_to_capacity is for the dispatcher alltoall, and this run has "
            "allgather",
        ),
        (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.1},
            "--moe_aux_loss_coeff 0.1 has no loss to weigh: --moe_router_load_balancing_type "
            "sinkhorn",
        ),
        (
            {"moe_router_num_groups": 2, "moe_router_group_topk": 4},
            "--moe_router_group_topk 4 is above --moe_router_num_groups 2",
        ),
    ],
)
def test_refused(values, text):
    assert [p.message for p in check_experts(config(**values))] == [text]


@pytest.mark.parametrize(
    ("shape", "values", "text"),
    [
        (
            SHAPE,
            {"moe_z_loss_coeff": 0.1, "moe_aux_loss_coeff": 0.1},
            "--moe_aux_loss_coeff and --moe_z_loss_coeff: the model has no experts",
        ),
        (
            WITH_MOE,
            {"moe_router_bias_update_rate": 0.1},
            "--moe_router_bias_update_rate moves a bias that the model's routers do not have",
        ),
        (
            WITH_MOE,
            {"moe_shared_expert_overlap": True},
            "--moe_shared_expert_overlap: the model has no shared expert",
        ),
        (
            dataclasses.replace(
                SHAPE,
                activation="gpt_oss",
                moe=dataclasses.replace(MOE, shared_ffn_hidden_size=8),
            ),
            {"moe_shared_expert_overlap": True},
            "--moe_shared_expert_overlap: megatron-core's overlapped path leaves out the clamp of "
            "the model's activation",
        ),
        (
            dataclasses.replace(SHAPE, moe=dataclasses.replace(MOE, expert_bias=True)),
            {"moe_router_load_balancing_type": "sinkhorn"},
            "--moe_router_load_balancing_type sinkhorn assigns experts by itself, and the model's "
            "routers choose with a bias",
        ),
    ],
)
def test_refused_with_the_model(shape, values, text):
    assert messages(shape, Layout(), **values) == [text]


def test_defaults_are_not_refused():
    assert check_experts(config()) == []


def messages(shape, layout, **values):
    return [p.message for p in check_model(config(**values), shape, layout)]


@pytest.mark.parametrize(
    ("shape", "layout", "text"),
    [
        (
            SHAPE,
            Layout(world=2, ep=2),
            "--expert_model_parallel_size and --expert_tensor_parallel_size divide experts, and "
            "the model has none",
        ),
        (
            WITH_MOE,
            Layout(world=4, ep=4),
            "the model has 6 experts in a layer, which expert_model_parallel_size 4 does not "
            "divide",
        ),
        (
            WITH_MOE,
            Layout(world=8, etp=8),
            "the model has 20 columns in an expert, which expert_tensor_parallel_size 8 does not "
            "divide",
        ),
        (
            dataclasses.replace(
                SHAPE,
                linear_attention=LinearAttentionShape(
                    layers=(0,),
                    key_head_dim=4,
                    value_head_dim=4,
                    num_key_heads=2,
                    num_value_heads=4,
                    conv_kernel=4,
                ),
            ),
            Layout(world=4, tp=2, cp=2),
            "the model has 2 key heads of linear attention, which tensor 2 x context 2 = 4 does "
            "not divide",
        ),
        (
            dataclasses.replace(SHAPE, qk_layernorm=True, qk_norm_width="full"),
            Layout(world=4, tp=4),
            "the model has norms over all 2 heads of keys, which tensor_model_parallel_size 4 does "
            "not divide",
        ),
    ],
)
def test_layouts_that_do_not_fit(shape, layout, text):
    assert messages(shape, layout) == [text]


def test_expert_ranks_must_divide_a_stage():
    found = check_layout(config(expert_model_parallel_size=4, global_batch_size=12), 6)
    assert [p.message for p in found] == [
        "6 ranks of a pipeline stage cannot be divided by expert 4 x expert-tensor 1 = 4"
    ]


def test_options_override_the_experts():
    given = config(moe_router_topk=3, moe_layer_freq="[1,1,0,0]", moe_router_pre_softmax=True)
    moe = override(WITH_MOE, given).moe
    assert moe == dataclasses.replace(MOE, topk=3, layers=(0, 1), pre_softmax=True)
    assert override(WITH_MOE, config()).moe == MOE
    assert override(SHAPE, config()).moe is None


def test_options_make_experts():
    moe = override(SHAPE, config(num_experts=4, moe_router_topk=1, moe_layer_freq="2")).moe
    assert moe == MoEShape(num_experts=4, topk=1, ffn_hidden_size=48, layers=(0, 2))
    with pytest.raises(UsageError, match="the model has no experts, and --moe_router_topk would"):
        override(SHAPE, config(num_experts=4))


def test_options_override_latent_attention():
    mla = MLAShape(
        q_lora_rank=8, kv_lora_rank=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    )
    shape = dataclasses.replace(SHAPE, mla=mla)
    assert override(shape, config(qk_pos_emb_head_dim=6)).mla == dataclasses.replace(
        mla, qk_rope_head_dim=6
    )
    assert override(shape, config(multi_latent_attention=False)).mla is None
    with pytest.raises(UsageError, match="the model has no latent attention, and --qk_head_dim"):
        override(SHAPE, config(kv_lora_rank=4))


def test_prediction_layers_can_be_left_out_but_not_invented():
    shape = dataclasses.replace(SHAPE, mtp_layers=1)
    assert override(shape, config()).mtp_layers == 1
    assert override(shape, config(mtp_num_layers=0)).mtp_layers == 0
    with pytest.raises(UsageError, match="--mtp_num_layers 2: the model has 1 layers of multi"):
        override(shape, config(mtp_num_layers=2))


def test_every_nth_layer_without_positions():
    assert override(SHAPE, config(no_rope_freq=2)).no_rope_layers == (1, 3)
