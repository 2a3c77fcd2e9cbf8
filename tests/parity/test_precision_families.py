"""The precision test finds nothing where every family's model is converted rightly."""

import pytest

from mcore_core import compat

compat.apply()  # before anything imports megatron

import torch  # noqa: E402
from family_cases import CASES, family_of, layouts_of, write  # noqa: E402
from family_runs import build  # noqa: E402

from mcore_core.model.build import ModelPlan  # noqa: E402
from mcore_core.model.names import named_weights  # noqa: E402
from mcore_core.model.resolve import read_hf_config  # noqa: E402
from mcore_core.parallel.topology import Layout  # noqa: E402
from mcore_core.testing.ranks import fork_ranks  # noqa: E402
from mcore_core.train.precision import measure  # noqa: E402

UNKNOWN = {"kimi_k2", "mimo", "internlm3"}
"""Families that transformers opens only with code from their makers."""


def report(case, folder, layout, *, spoil="", dtype="float32"):
    family = family_of(case)

    def one_rank(_):
        sizes = {"world": layout.world, "tp": layout.tp, "pp": layout.pp, "ep": layout.ep}
        sizes |= {"etp": layout.etp, "sp": layout.sp, "cp": layout.cp}
        bridge, chunks = build(folder, family, **sizes)
        bridge.load(chunks, folder)
        for name, weight in named_weights(chunks).items():
            if spoil and name == spoil:
                weight.detach().mul_(1.05)
        architecture = family.architecture(read_hf_config(folder))
        each = architecture.num_layers // layout.stages
        plan = ModelPlan(
            architecture=architecture,
            layout=layout,
            stage_layers=[each] * layout.stages,
            dtype=torch.float32,
            transformer_engine=False,
        )
        return measure(chunks, plan, folder, torch.device("cpu"), dtype=dtype)

    reports = fork_ranks(one_rank, layout.world)
    assert all(r == reports[0] for r in reports)
    return reports[0]


@pytest.mark.parity
@pytest.mark.parametrize("name", [n for n in CASES if n not in UNKNOWN])
def test_nothing_is_found(tmp_path, name):
    case = CASES[name]
    write(tmp_path, case)
    assert report(case, tmp_path, Layout()).first_over is None


LAYOUTS = [("qwen3_next", "TP2+EP2"), ("deepseek_v3", "PP2+EP2"), ("gemma3_text", "TP2+PP2")]


@pytest.mark.parity
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_in_layouts(tmp_path, name, layout):
    case = CASES[name]
    write(tmp_path, case)
    assert report(case, tmp_path, layouts_of(case)[layout]).first_over is None


@pytest.mark.parity
@pytest.mark.parametrize(
    ("spoil", "place"),
    [
        ("embedding.word_embeddings.weight", "embedding"),
        ("decoder.layers.0.self_attention.linear_kv_up_proj.weight", "layer 0"),
        ("decoder.layers.1.mlp.experts.7.linear_fc2.weight", "layer 1"),
        ("decoder.layers.1.mlp.shared_experts.linear_fc1.weight", "layer 1"),
        ("decoder.final_norm.weight", "final norm"),
        ("output_layer.weight", "logits"),
    ],
)
def test_one_spoiled_weight_is_located(tmp_path, spoil, place):
    """On the rank that holds it, a part of an expert or of a vocabulary included."""
    case = CASES["deepseek_v3"]
    write(tmp_path, case)
    found = report(case, tmp_path, layouts_of(case)["PP2+EP2"], spoil=spoil)
    assert found.first_over == place
