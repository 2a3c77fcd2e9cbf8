"""Every family's table against transformers' files: round trips of simulated ranks, mutations."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from bridge_models import ONE, Grid, assemble_all, load_ranks
from family_cases import CASES, family_of, hf_config, plan_for, tensors_of, write
from mcore_hfbridge.hf_files import HFFiles
from mcore_hfbridge.plan import Plan
from mcore_hfbridge.plugin import FAMILIES

from mcore_core.model.resolve import read_hf_config

DENSE = {"tp2": Grid(tp=2), "pp2": Grid(pp=2), "tp2-pp2": Grid(tp=2, pp=2)}
MOE = {
    "ep2": Grid(ep=2),
    "tp2-ep2": Grid(tp=2, ep=2),
    "tp2-ep2-etp2": Grid(tp=2, ep=2, etp=2),
    "pp2-ep2": Grid(pp=2, ep=2),
}


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    case = CASES[request.param]
    write(folder, case)
    architecture = family_of(case).architecture(read_hf_config(folder))
    return case, folder, plan_for(folder, case), architecture


def test_every_family_has_a_case():
    assert {case.family for case in CASES.values()} == set(FAMILIES)
    assert {import_module(f"mcore_hfbridge.families.{n}").FAMILY.name for n in FAMILIES} == set(
        FAMILIES
    )


def test_round_trip(saved):
    """HF -> ranks -> HF, bit for bit, under every layout; no element of any weight stays unset."""
    case, folder, plan, architecture = saved
    expected = tensors_of(folder)
    for name, grid in {"one": ONE, **DENSE, **(MOE if case.moe else {})}.items():
        weights_of = load_ranks(plan, architecture, folder, grid)
        assert all(weights_of), name
        assert not any(w.isnan().any() for weights in weights_of for w in weights.values())
        found = assemble_all(plan, weights_of, grid)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), f"{name}: {key}"
    few_rows = assemble_all(plan, weights_of, grid, bucket=900)
    assert all(torch.equal(few_rows[key], tensor) for key, tensor in expected.items())


def errors_of(plan, folder, tensors):
    return [str(problem) for problem in plan.check_files(HFFiles(folder, tensors))]


def test_any_tensor_deleted_added_or_reshaped(saved):
    """Each mutation is one error that names the tensor. (test_bridge_errors has whole loads.)"""
    _, folder, plan, _ = saved
    tensors = dict(HFFiles.scan(folder).tensors)
    assert errors_of(plan, folder, tensors) == []
    for name, tensor in tensors.items():
        (text,) = errors_of(plan, folder, {k: v for k, v in tensors.items() if k != name})
        assert text.startswith(f"error[MC530]: {folder} lacks the tensor {name!r}: ")
        grown = (tensor.shape[0] + 1, *tensor.shape[1:])
        (text,) = errors_of(plan, folder, tensors | {name: replace(tensor, shape=grown)})
        expected = f"expected {list(tensor.shape)}, found {list(grown)}"
        assert f"{name!r} has another shape: {expected}" in text
        extra = replace(tensor, name=name + "_extra")
        (text,) = errors_of(plan, folder, tensors | {extra.name: extra})
        assert f"{extra.name!r} has no place in family" in text


def test_order_is_layer_by_layer(saved):
    _, _, plan, _ = saved
    layers = [int(n.split(".")[2]) for n in plan.hf if ".layers." in n]
    assert layers == sorted(layers)


STACKED = [n for n, case in CASES.items() if family_of(case).also_reads]


@pytest.mark.parametrize("name", STACKED)
def test_reads_experts_stacked_as_transformers_has_them_in_memory(tmp_path, name):
    case = CASES[name]
    model = write(tmp_path / "usual", case)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    memory = tensors_of(tmp_path / "stacked")
    assert any(k.endswith("mlp.experts.gate_up_proj") for k in memory)
    plan = plan_for(tmp_path / "usual", case)
    family = family_of(case)
    architecture = family.architecture(read_hf_config(tmp_path / "usual"))
    others = [Plan(family, architecture, rules(architecture)) for rules in family.also_reads]
    for grid in (ONE, MOE["tp2-ep2"]):
        weights_of = load_ranks(plan, architecture, tmp_path / "stacked", grid, others=others)
        found = assemble_all(plan, weights_of, grid)
        expected = tensors_of(tmp_path / "usual")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)


HARMLESS = {
    "transformers_version", "architectures", "output_hidden_states", "return_dict", "model_type",
    "dtype", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "use_cache",
    "problem_type", "_name_or_path", "output_attentions", "pad_token_id", "bos_token_id",
    "eos_token_id", "pretraining_tp", "qk_head_dim",
    "embedding_initializer_range",
}  # fmt: skip
"""Keys that say nothing about what the model computes, or repeat others."""


class Spy(dict):
    """A config that knows which of its keys were looked at."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.seen.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("name", CASES)
def test_every_key_of_the_config_class_is_read(name):
    """A key that transformers acts on and that nobody looks at would be a wrong model, quietly."""
    from transformers import AutoConfig

    case = CASES[name]
    own = set(AutoConfig.for_model(case.model_type).to_dict())
    config = Spy(json.loads(json.dumps(hf_config(case).to_dict())))
    family_of(case).architecture(config)
    assert own - config.seen - HARMLESS == set()


NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
          "intermediate_size", "max_position_embeddings", "moe_intermediate_size",
          "n_routed_experts", "n_shared_experts", "num_experts_per_tok")  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_config_class(name):
    """A config.json that lacks every key with a default means what it means to transformers."""
    from transformers import AutoConfig

    case = CASES[name]
    # sizes are given everywhere; a dtype and MTP layers are not part of the class's meaning
    full = AutoConfig.for_model(case.model_type)
    if name == "dots1":
        full = AutoConfig.for_model(
            "dots1", n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
            norm_topk_prob=True,
        )  # fmt: skip
    if name == "deepseek_v2":
        full = AutoConfig.for_model("deepseek_v2", num_experts_per_tok=6)
    given = json.loads(json.dumps(full.to_dict()))
    short = {k: given[k] for k in NEEDED if k in given}
    if name == "dots1":
        short["norm_topk_prob"] = True
    if "num_nextn_predict_layers" in given:
        given["num_nextn_predict_layers"] = 0
    family = family_of(case)
    assert family.architecture(short) == family.architecture(given)
