"""Multi-token prediction layers, which transformers does not load: tensors written by the test."""

import json

import pytest
import torch
from bridge_models import ONE, Grid, assemble_all, described, load_ranks, loaded
from family_cases import CASES, save_tensors
from family_mtp import LAYERS, WRITERS, write_mtp

from mcore_core.errors import UsageError


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
    last = f"decoder.layers.{LAYERS - 1}."
    assert inner == {n.removeprefix(last) for n in weights if n.startswith(last)}
    outer = {"enorm.weight", "hnorm.weight", "final_layernorm.weight", "eh_proj.weight"}
    assert mtp == {f"mtp.layers.0.{n}" for n in outer} | {
        f"mtp.layers.0.transformer_layer.{n}" for n in inner
    }
    project = weights["mtp.layers.0.eh_proj.weight"]
    if name == "mimo":  # it has the hidden states first
        given = tensors["model.mtp_layers.0.input_proj.weight"]
        assert torch.equal(project, torch.cat([given[:, 32:], given[:, :32]], 1))
    embedding = {
        "qwen3_next": "mtp.pre_fc_norm_embedding",
        "mimo": "model.mtp_layers.0.token_layernorm",
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


def test_tensors_that_config_json_does_not_announce(tmp_path):
    write_mtp(tmp_path, "qwen3_next")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "'mtp.fc.weight' has no place in family 'qwen3_next'" in error_of(tmp_path, "qwen3_next")
