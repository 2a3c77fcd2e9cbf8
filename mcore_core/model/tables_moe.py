"""Rules of layers with experts: one HF tensor an expert, or all experts stacked in one."""

from dataclasses import dataclass, replace
from typing import Literal

from mcore_core.model.architecture import Architecture
from mcore_core.model.family import Rule, Shard, Stack
from mcore_core.model.tables import (
    LLAMA,
    Block,
    Names,
    attention,
    decoder_layers,
    dense_mlp,
    embedding,
    ending,
    linear,
    mlp,
    norm,
    plain,
    post_mlp_norm,
)
from mcore_core.model.transforms import Rows, Run

EXPERT_GATED = Shard(dim=0, blocks=2, group="etp")
EXPERT_COLUMN = Shard(dim=0, group="etp")
EXPERT_ROW = Shard(dim=1, group="etp")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoENames:
    """What families call the parts of a layer with experts."""

    block: str = "mlp"
    router: str = "gate"
    expert_bias: str = "gate.e_score_correction_bias"
    experts: str = "experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    layout: Literal["separate", "stacked", "interleaved"] = "separate"
    """separate: one tensor an expert. stacked: all experts of a layer in one, [expert, out, in], as
    transformers 5 has them in memory. interleaved: in one, [expert, in, out], where gate and up
    columns take turns, with biases (gpt_oss)."""
    bias_has_axis: bool = False
    """The bias for the choice of experts has a leading axis of length one (ernie4_5_moe)."""


QWEN_MOE = MoENames(shared="shared_expert")
DEEPSEEK_MOE = MoENames()
MIXTRAL_MOE = MoENames(
    block="block_sparse_moe", expert_bias="e_score_correction_bias", gate="w1", up="w3", down="w2"
)


def stacked(names: MoENames) -> MoENames:
    """Return the names that transformers 5 has in memory, and writes when told to."""
    return replace(names, block="mlp", layout="stacked", down="down_proj")


def moe_decoder(
    a: Architecture, moe_names: MoENames = QWEN_MOE, names: Names = LLAMA
) -> list[Rule]:
    """Return the table of a llama-like decoder with experts in some layers."""
    return [
        *embedding(a),
        *attention(a, decoder_layers(a), names),
        *mlp_or_moe(a, moe_names, names),
        *ending(a),
    ]


def mlp_or_moe(a: Architecture, moe_names: MoENames, names: Names = LLAMA) -> list[Rule]:
    """Return the second half of every layer: a dense MLP, or experts."""
    assert a.moe is not None
    dense = sorted(set(range(a.num_layers)) - set(a.moe.layers))
    rules: list[Rule] = []
    if dense:
        rules += dense_mlp(a, decoder_layers(a, dense), names)
    if a.moe.layers:
        rules += moe(a, decoder_layers(a, a.moe.layers), moe_names, names)
    return rules


def moe(a: Architecture, at: Block, moe_names: MoENames, names: Names = LLAMA) -> list[Rule]:
    """Return the norm before the experts, the router, the experts and the shared expert."""
    shape = a.moe
    assert shape is not None
    count, block = shape.num_experts, moe_names.block
    rules = norm(a, at, names.pre_mlp_norm, "pre_mlp_layernorm")
    rules.append(
        plain(at, f"{block}.{moe_names.router}.weight", "mlp.router.weight", (count, a.hidden_size))
    )
    if shape.router_bias:
        rules.append(plain(at, f"{block}.{moe_names.router}.bias", "mlp.router.bias", (count,)))
    if shape.expert_bias:
        name = f"{block}.{moe_names.expert_bias}"
        rule = plain(at, name, "mlp.router.expert_bias", (count,))
        if moe_names.bias_has_axis:
            rule = replace(rule, shapes=((1, count),), transform=Rows(pick=0))
        rules.append(rule)
    match moe_names.layout:
        case "separate":
            rules += _separate(a, at, moe_names)
        case "stacked":
            rules += _stacked(a, at, moe_names)
        case "interleaved":
            rules += _interleaved(a, at, moe_names)
    if shape.shared_ffn_hidden_size is not None:
        hf, mcore = f"{block}.{moe_names.shared}.", "mlp.shared_experts."
        rules += mlp(a, at, hf, mcore, shape.shared_ffn_hidden_size, bias=a.mlp_bias)
        if shape.shared_gate:
            name = f"{block}.{moe_names.shared_gate}.weight"
            rules.append(plain(at, name, mcore + "gate_weight", (1, a.hidden_size)))
    return rules + post_mlp_norm(a, at, names)


def _experts(a: Architecture, at: Block, names: MoENames) -> Block:
    """Return every expert of every layer."""
    assert a.moe is not None
    return Block(
        f"{at.hf}{names.block}.{names.experts}.",
        at.mcore + "mlp.experts.{e}.",
        {**at.over, "e": range(a.moe.num_experts)},
    )


def _separate(a: Architecture, at: Block, names: MoENames) -> list[Rule]:
    assert a.moe is not None
    each, width = _experts(a, at, names), a.moe.ffn_hidden_size
    each = replace(each, hf=each.hf + "{e}.")
    gate_up = Rule(
        hf=(f"{each.hf}{names.gate}.weight", f"{each.hf}{names.up}.weight"),
        shapes=((width, a.hidden_size),) * 2,
        mcore=f"{each.mcore}linear_fc1.weight",
        transform=Stack(),
        shard=EXPERT_GATED,
        over=each.over,
    )
    return [
        gate_up,
        *linear(each, names.down, "linear_fc2", (a.hidden_size, width), EXPERT_ROW),
    ]


def _stacked(a: Architecture, at: Block, names: MoENames) -> list[Rule]:
    assert a.moe is not None
    count, width, hidden = a.moe.num_experts, a.moe.ffn_hidden_size, a.hidden_size
    each, pick = _experts(a, at, names), Rows(pick="e")
    return [
        _one_tensor(each, "gate_up_proj", "linear_fc1.weight", (count, 2 * width, hidden), pick,
                     EXPERT_GATED),
        _one_tensor(each, names.down, "linear_fc2.weight", (count, hidden, width), pick,
                     EXPERT_ROW),
    ]  # fmt: skip


def _one_tensor(
    each: Block, hf: str, mcore: str, shape: tuple[int, ...], transform: Rows, shard: Shard
) -> Rule:
    """Return the rule of one tensor that holds a part of every expert."""
    return Rule(
        hf=(each.hf + hf,),
        shapes=(shape,),
        mcore=each.mcore + mcore,
        transform=transform,
        shard=shard,
        over=each.over,
    )


def _interleaved(a: Architecture, at: Block, names: MoENames) -> list[Rule]:
    assert a.moe is not None
    count, width, hidden = a.moe.num_experts, a.moe.ffn_hidden_size, a.hidden_size
    each = _experts(a, at, names)
    turns = (Run(0, 0, width, 2), Run(0, 1, width, 2))
    fc1, fc2 = Rows(runs=turns, pick="e", transpose=True), Rows(pick="e", transpose=True)
    bias1, bias2 = Rows(runs=turns, pick="e"), Rows(pick="e")
    return [
        _one_tensor(each, "gate_up_proj", "linear_fc1.weight", (count, hidden, 2 * width), fc1,
                     EXPERT_GATED),
        _one_tensor(each, "gate_up_proj_bias", "linear_fc1.bias", (count, 2 * width), bias1,
                     EXPERT_GATED),
        _one_tensor(each, "down_proj", "linear_fc2.weight", (count, width, hidden), fc2,
                     EXPERT_ROW),
        _one_tensor(each, "down_proj_bias", "linear_fc2.bias", (count, hidden), bias2, Shard()),
    ]  # fmt: skip
