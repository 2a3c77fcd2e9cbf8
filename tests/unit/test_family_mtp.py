"""Multi-token prediction layers, which transformers does not load: tensors written by the test."""

import json
from dataclasses import replace

import pytest
import torch
from bridge_models import ONE, Grid, assemble_all, described, load_ranks, loaded, rank_of
from family_cases import CASES, family_of, save_tensors, tensors_of
from family_mtp import INNER, LAYERS, WRITERS, key_of, qwen_names, write_mtp
from mcore_hfbridge.bridge import HFBridge
from mcore_hfbridge.save import save

from mcore_core.errors import UsageError
from mcore_core.model.resolve import read_hf_config


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip(tmp_path, name):
    _, _, tensors = write_mtp(tmp_path, name)
    plan, architecture = described(tmp_path, name)
    assert architecture.mtp_layers == 1
    grids = [ONE, Grid(tp=2), Grid(pp=2), *([Grid(tp=2, ep=2)] if CASES[name].moe else [])]
    for grid in grids:
        found = assemble_all(plan, load_ranks(plan, architecture, tmp_path, grid), grid)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)


@pytest.mark.parametrize("name", WRITERS)
def test_canonical_names(tmp_path, name):
    _, _, tensors = write_mtp(tmp_path, name)
    _, (weights,) = loaded(tmp_path, name)
    mtp = {n for n in weights if n.startswith("mtp.")}
    inner = {n.removeprefix(i) for n in mtp if n.startswith(i := "mtp.layers.0.transformer_layer.")}
    outer = {"enorm.weight", "hnorm.weight", "eh_proj.weight"}
    if name in INNER:  # dense beside experts
        assert {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"} < inner
    else:
        last = f"decoder.layers.{LAYERS - 1}."
        assert inner == {n.removeprefix(last) for n in weights if n.startswith(last)}
    if name != "ernie4_5_moe":
        outer.add("final_layernorm.weight")
    assert mtp == {f"mtp.layers.0.{n}" for n in outer} | {
        f"mtp.layers.0.transformer_layer.{n}" for n in inner
    }
    project = weights["mtp.layers.0.eh_proj.weight"]
    if name == "mimo":  # it has the hidden states first
        given = tensors["model.mtp_layers.0.input_proj.weight"]
        assert torch.equal(project, torch.cat([given[:, 32:], given[:, :32]], 1))
    qwen = [n for n, w in WRITERS.items() if w is qwen_names]
    embedding = {
        **dict.fromkeys(qwen, "mtp.pre_fc_norm_embedding"),
        "mimo": "model.mtp_layers.0.token_layernorm",
        "ernie4_5_moe": "model.mtp_emb_norm.0",
    }
    key = embedding.get(name, f"model.layers.{LAYERS}.enorm")
    assert torch.equal(weights["mtp.layers.0.enorm.weight"], tensors[f"{key}.weight"])


def error_of(folder, name):
    with pytest.raises(UsageError) as error:
        loaded(folder, name)
    return str(error.value)


def test_any_missing_tensor_is_named_with_the_way_out(tmp_path):
    _, _, tensors = write_mtp(tmp_path, "deepseek_v3")
    for gone in (n for n in tensors if n.startswith(f"model.layers.{LAYERS}.")):
        save_tensors({k: t for k, t in tensors.items() if k != gone}, tmp_path)
        text = error_of(tmp_path, "deepseek_v3")
        assert text.startswith(f"error[MC530]: {tmp_path} lacks the tensor {gone!r}")
        assert text.count("error[") == 1
    assert "or set num_nextn_predict_layers to 0 in config.json to go without" in text


def test_a_copy_that_differs(tmp_path):
    _, _, tensors = write_mtp(tmp_path, "deepseek_v3")
    key = f"model.layers.{LAYERS}.embed_tokens.weight"
    tensors[key][3, 4] += 1
    save_tensors(tensors, tmp_path)
    text = error_of(tmp_path, "deepseek_v3")
    assert f"the two are one weight here, and {key!r} differs from 'model.embed_tokens" in text


@pytest.mark.parametrize("name", WRITERS)
def test_tensors_that_config_json_does_not_announce(tmp_path, name):
    write_mtp(tmp_path, name)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key_of(name)]
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = error_of(tmp_path, name)
    assert f"has no place in family {name!r}" in text
    fixes = {line for line in text.splitlines() if line.startswith("  fix")}
    assert fixes == {
        f"  fix: set {key_of(name)} to 1 in config.json: it is of a layer of multi-token prediction"
    }


@pytest.mark.parametrize("name", WRITERS)
def test_a_run_may_go_without(tmp_path, name):
    """--mtp_num_layers 0: read as if they were not there, and what is saved says so."""
    _, _, tensors = write_mtp(tmp_path / "in", name)
    family = family_of(CASES[name])
    architecture = family.architecture(read_hf_config(tmp_path / "in"))
    bridge = HFBridge(family, replace(architecture, mtp_layers=0))
    found = bridge.coverage(tmp_path / "in")
    assert found.problems == []
    left = set(tensors) - {n for claim in found.claims for n in claim.tensors}
    assert left == set(found.ignored)
    (weights,) = load_ranks(bridge.plan, bridge.architecture, tmp_path / "in", ONE)
    assert not any(n.startswith("mtp") for n in weights)
    out = tmp_path / "out"
    # as the bridge calls it, with weights that no chunk holds
    changes = bridge.config_changes(tmp_path / "in")
    save(bridge.plan, weights, out, rank_of([weights], 0), 10**8, tmp_path / "in", changes)
    assert json.loads((out / "config.json").read_text())[key_of(name)] == 0
    assert family.architecture(read_hf_config(out)).mtp_layers == 0
    assert set(tensors_of(out)) == set(tensors) - left
