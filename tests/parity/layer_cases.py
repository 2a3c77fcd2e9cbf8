"""Small models with the parts that only some decoders have, on the rows of sft_case."""

import dataclasses

from mcore_sft.config import SFTConfig
from sft_case import RECOMPUTE, SGD, SHAPE, data, recipe

from mcore_core.model.shapes import LinearAttentionShape, MLAShape, MoEShape
from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import Case

MOE = MoEShape(num_experts=4, topk=2, ffn_hidden_size=20, layers=(0, 1, 2, 3))
GROUPS = MoEShape(
    num_experts=8,
    topk=3,
    ffn_hidden_size=20,
    layers=(1, 2, 3),
    shared_ffn_hidden_size=24,
    shared_gate=True,
    score_function="sigmoid",
    num_groups=4,
    group_topk=2,
    expert_bias=True,
    scaling_factor=2.5,
    aux_loss_coeff=0.1,
)
MLA = MLAShape(
    q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
)
GDN = LinearAttentionShape(
    layers=(0, 1, 2),
    key_head_dim=6,
    value_head_dim=8,
    num_key_heads=4,
    num_value_heads=8,
    conv_kernel=4,
)


def shape(**changes):
    return dataclasses.replace(SHAPE, **changes)


SHAPES = {
    "postnorm": shape(
        post_attention_norm=True,
        post_mlp_norm=True,
        qk_layernorm=True,
        qk_norm_width="full",
        zero_centered_gamma=True,
        embedding_scale=3.0,
        softmax_scale=0.4,
        rotary_interleaved=True,
        window_size=6,
        window_layers=(0, 2),
        window_rotary_base=100.0,
        no_rope_layers=(3,),
        attention_output_bias=True,
    ),
    "gate": shape(attention_output_gate=True, qk_layernorm=True, rotary_percent=0.5),
    "moe-softmax": shape(
        moe=dataclasses.replace(MOE, aux_loss_coeff=0.1), qk_layernorm=True, mlp_bias=True
    ),
    "moe-groups": shape(moe=GROUPS),
    "moe-gpt-oss": shape(
        moe=dataclasses.replace(MOE, router_bias=True, linear_bias=True),
        activation="gpt_oss",
        activation_clamp=0.05,
        attention_output_bias=True,
        add_qkv_bias=True,
        softmax_type="learnable",
        window_size=5,
        window_layers=(0, 2),
    ),
    "mla": shape(mla=MLA, num_query_groups=4, rotary_interleaved=True),
    "mla-direct": shape(mla=dataclasses.replace(MLA, q_lora_rank=None), num_query_groups=4),
    "mla-moe": shape(mla=MLA, num_query_groups=4, moe=GROUPS),
    "gdn": shape(
        linear_attention=GDN,
        attention_output_gate=True,
        qk_layernorm=True,
        zero_centered_gamma=True,
        rotary_percent=0.5,
    ),
    "mtp": shape(mtp_layers=2, qk_layernorm=True),
    "mtp-tied": shape(mtp_layers=1, tie_word_embeddings=True, embedding_scale=2.0),
    "moe-mtp-dense": shape(moe=GROUPS, mtp_layers=1, mtp_dense=True, mtp_norm=False),
    "mla-moe-mtp": shape(mla=MLA, num_query_groups=4, moe=GROUPS, mtp_layers=1),
    "gdn-moe": shape(linear_attention=GDN, moe=dataclasses.replace(MOE, shared_ffn_hidden_size=8)),
}

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(world=2, tp=2),
    "tp2-sp": Layout(world=2, tp=2, sp=True),
    "pp2": Layout(world=2, pp=2),
    "pp2-vpp2": Layout(world=2, pp=2, vpp=2),
    "cp2": Layout(world=2, cp=2),
    "dp2": Layout(world=2),
    "ep2": Layout(world=2, ep=2),
    "cp2-ep2": Layout(world=2, cp=2, ep=2),
    "tp2-sp-ep2": Layout(world=2, tp=2, sp=True, ep=2),
    "tp2-sp-etp2": Layout(world=2, tp=2, sp=True, etp=2),
    "tp2-pp2-sp": Layout(world=4, tp=2, pp=2, sp=True),
    "cp2-tp2-sp": Layout(world=4, cp=2, tp=2, sp=True),
    "pp2-ep2": Layout(world=4, pp=2, ep=2),
    "ep2-dp4": Layout(world=4, ep=2),
    "tp2-sp-ep2-etp2": Layout(world=4, tp=2, sp=True, ep=2, etp=2),
    "tp2-sp-ep4": Layout(world=4, tp=2, sp=True, ep=4),
}


STEEP = {"gdn": 0.01, "gdn-moe": 0.02}
"""Learning rates of models in which rounding grows faster than what is compared allows."""


def layer_case(name, steps=3, groups=(), **options):
    steep = {"lr": STEEP[name]} if name in STEEP else {}
    return Case(
        architecture=SHAPES[name],
        recipe=recipe,
        steps=data(steps),
        options={**SGD, **RECOMPUTE["none"], "mtp_loss_scaling_factor": 0.5, **steep, **options},
        groups=(SFTConfig, *groups),
    )
