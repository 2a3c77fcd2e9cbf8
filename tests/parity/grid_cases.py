"""The whole grid: recipes x architectures x layouts. What is missing from it has a reason here."""

import re
from functools import cache

from grid_recipes import RECIPES
from layer_cases import GDN, GROUPS, MLA, STEEP, shape
from sft_case import RECOMPUTE, SGD

from mcore_core.parallel.topology import Layout
from mcore_core.testing.cases import Case

ARCHITECTURES = {
    "dense": shape(qk_layernorm=True),
    "moe": shape(moe=GROUPS, add_qkv_bias=True),
    "mla-moe-mtp": shape(mla=MLA, num_query_groups=4, moe=GROUPS, mtp_layers=1),
    "gdn": shape(
        linear_attention=GDN,
        attention_output_gate=True,
        qk_layernorm=True,
        zero_centered_gamma=True,
        rotary_percent=0.5,
    ),
}
"""4 layers each; a vocabulary that no tensor-parallel size divides."""

LAYOUTS = [
    "tp2",
    "tp4",
    "tp2-sp",
    "tp4-sp",
    "pp2",
    "pp4",
    "pp2-vpp2",
    "cp2",
    "cp4",
    "dp2",
    "dp4",
    "ep2",
    "ep4",
    "tp2-sp-ep2",
    "tp2-sp-etp2",
    "tp4-sp-etp2",
    "tp2-pp2",
    "tp2-cp2",
    "tp2-dp2",
    "tp2-dp4",
    "tp2-sp-pp2",
    "tp2-sp-pp2-vpp2",
    "tp2-sp-cp2",
    "tp2-sp-dp2",
    "tp4-sp-pp2",
    "tp4-sp-dp2",
    "pp2-cp2",
    "pp2-dp2",
    "pp2-vpp2-cp2",
    "pp2-vpp2-dp2",
    "pp4-cp2",
    "pp4-dp2",
    "tp2-sp-pp4",
    "cp2-dp2",
    "cp4-dp2",
    "pp2-cp4",
    "pp2-dp4",
    "tp2-sp-dp4",
    "cp2-dp4",
    "tp2-sp-cp4",
    "tp4-sp-cp2",
    "tp2-sp-pp2-cp2",
    "tp2-sp-pp2-dp2",
    "tp2-sp-cp2-dp2",
    "pp2-cp2-dp2",
    "ep2-dp4",
    "ep2-cp2",
    "ep4-cp2-dp2",
    "ep2-pp2",
    "ep2-pp2-vpp2-dp2",
    "ep4-tp2-sp-dp2",
    "ep2-tp2-sp-pp2-dp2",
    "ep2-tp2-sp-cp2",
    "ep2-etp2-tp2-sp-dp2",
    "ep4-pp2-dp4",
]
"""TP, PP, VPP, CP, DP, EP and ETP of up to 8 ranks: each alone, every pair, and mixes of three."""


@cache
def layout(name: str) -> Layout:
    """Return the layout of a name such as "tp2-sp-pp2"."""
    sizes = {k: int(v) for k, v in re.findall(r"([a-z]+)(\d+)", name)}
    dp = sizes.pop("dp", 1)
    # experts are divided over ranks of the other dimensions: a name without enough gets DP
    inner = sizes.get("tp", 1) * sizes.get("cp", 1) * dp
    dp *= max(1, sizes.get("ep", 1) * sizes.get("etp", 1) // inner)
    world = sizes.get("tp", 1) * sizes.get("pp", 1) * sizes.get("cp", 1) * dp
    return Layout(world=world, sp="sp" in name.split("-"), **sizes)


def reason(architecture: str, name: str) -> str | None:
    """Return why a cell is not run, from a closed list; None: it is."""
    sizes, shape = layout(name), ARCHITECTURES[architecture]
    if shape.moe is None and (sizes.ep > 1 or sizes.etp > 1):
        return "no experts to divide"
    if shape.moe is not None and sizes.tp > 1 and not sizes.sp:
        return "megatron-core has no MoE under TP without SP"
    linear = shape.linear_attention
    if linear is not None and linear.num_key_heads % (sizes.tp * sizes.cp):
        return "more ranks of TP x CP than heads of linear attention (MC618)"
    return None


def grid_case(recipe: str, architecture: str) -> Case:
    """Return what is trained in a row of the grid."""
    chosen = RECIPES[recipe]
    steep = {"lr": STEEP[architecture]} if architecture in STEEP else {}
    base = {**SGD, **RECOMPUTE["none"], "mtp_loss_scaling_factor": 0.5}
    return Case(
        architecture=ARCHITECTURES[architecture],
        recipe=chosen.build,
        steps=chosen.steps(),
        options={**base, **chosen.options, **steep, **chosen.steep.get(architecture, {})},
        groups=chosen.groups,
        frozen=chosen.frozen,
        engine=chosen.engine,
    )


def cells() -> list[tuple[str, str, str]]:
    """Return every cell that is run."""
    return [
        (recipe, architecture, name)
        for recipe in RECIPES
        for architecture in ARCHITECTURES
        for name in LAYOUTS
        if reason(architecture, name) is None
    ]


def covering() -> set[tuple[str, str, str]]:
    """Return a covering set: each architecture in each layout once, the recipes taking turns."""
    names = list(RECIPES)
    chosen, turn = set(), 0
    for architecture in ARCHITECTURES:
        for name in LAYOUTS:
            if reason(architecture, name) is None:
                chosen.add((names[turn % len(names)], architecture, name))
                turn += 1
    return chosen
