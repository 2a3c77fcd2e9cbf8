"""Deleting, adding or changing any one tensor, or damaging a file, is an error that names it."""

import json
import math

import pytest
import torch
from bridge_models import Grid, described, empty_ranks, rank_of
from family_cases import CASES
from family_cases import write as write_case
from mcore_hfbridge.load import load
from safetensors.torch import load_file, save_file

from mcore_core.errors import UsageError


@pytest.fixture(scope="module", params=["llama-biases-tied", "qwen3", "gpt_oss"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write(folder, request.param)
    return request.param, folder, load_file(folder / "model.safetensors")


def write(folder, name):
    return write_case(folder, CASES[name])


def attempt(described, folder):
    plan, architecture = described
    weights_of = empty_ranks(plan, architecture)
    load([plan], weights_of[0], folder, rank_of(weights_of, 0))
    return weights_of[0]


def error_of(described, folder):
    plan, architecture = described
    weights_of = empty_ranks(plan, architecture)
    with pytest.raises(UsageError) as error:
        load([plan], weights_of[0], folder, rank_of(weights_of, 0))
    assert all(w.isnan().all() for w in weights_of[0].values()), "written before the check"
    return str(error.value)


def test_any_missing_tensor(saved, tmp_path):
    name, folder, tensors = saved
    plan = described(folder, name)
    for gone in tensors:
        save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "model.safetensors")
        text = error_of(plan, tmp_path)
        assert text.startswith(
            f"error[MC530]: {tmp_path} lacks the tensor {gone!r}: expected "
            f"{list(tensors[gone].shape)}, found nothing\n"
        )
        assert text.count("error[") == 1


def test_any_changed_shape(saved, tmp_path):
    name, folder, tensors = saved
    plan = described(folder, name)
    for changed, tensor in tensors.items():
        grown = torch.cat([tensor, tensor[:1]])
        save_file(tensors | {changed: grown}, tmp_path / "model.safetensors")
        text = error_of(plan, tmp_path)
        assert text.startswith(
            f"error[MC532]: {tmp_path / 'model.safetensors'}: {changed!r} has another shape: "
            f"expected {list(tensor.shape)}, found {list(grown.shape)}\n"
        )
        assert text.count("error[") == 1


def test_an_added_tensor(saved, tmp_path):
    name, folder, tensors = saved
    extra = "model.layers.3.self_attn.sinks"
    save_file(tensors | {extra: torch.ones(2)}, tmp_path / "model.safetensors")
    text = error_of(described(folder, name), tmp_path)
    assert f"error[MC531]: {tmp_path / 'model.safetensors'}: {extra!r} has no place" in text


def test_all_problems_at_once(saved, tmp_path):
    name, folder, tensors = saved
    tensors = dict(tensors)
    first, second, *_ = tensors
    del tensors[first]
    tensors[second] = tensors[second].to(torch.int8)
    tensors["x"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    text = error_of(described(folder, name), tmp_path)
    assert [line[6:11] for line in text.splitlines() if line.startswith("error")] in (
        ["MC530", "MC535", "MC531"],
        ["MC530", "MC531", "MC535"],
    )
    assert f"{second!r} has another type: expected F64, F32, F16, BF16, found I8" in text


def test_rotary_buffers_are_left_out_on_purpose(tmp_path):
    write(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    plan = described(tmp_path, "llama")
    attempt(plan, tmp_path)


def test_a_tied_checkpoint_may_hold_an_equal_copy(tmp_path):
    write(tmp_path, "qwen2-tied")
    plan = described(tmp_path, "qwen2-tied")
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    attempt(plan, tmp_path)
    copy[50, 3] += 1
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as error:
        attempt(plan, tmp_path)
    assert str(error.value) == (
        f"error[MC534]: {tmp_path}: the model's embeddings are tied, and 'lm_head.weight' differs "
        "from 'model.embed_tokens.weight'\n"
        "  fix: set tie_word_embeddings to false in config.json, or remove the copy"
    )


def test_an_untied_checkpoint_without_head(tmp_path):
    write(tmp_path, "qwen2-tied")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert "lacks the tensor 'lm_head.weight'" in error_of(
        described(tmp_path, "qwen2-tied"), tmp_path
    )


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -4000])
def test_truncated_file(tmp_path, keep):
    write(tmp_path, "qwen3")
    plan = described(tmp_path, "qwen3")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    text = error_of(plan, tmp_path)
    assert text.startswith(f"error[MC522]: {path} is truncated: it has {len(data[:keep])} bytes")
    assert "fix: copy or download the file again" in text


def test_files_that_are_not_safetensors(tmp_path):
    write(tmp_path, "qwen3")
    plan = described(tmp_path, "qwen3")
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"\0")
    assert "too long" in error_of(plan, tmp_path)
    path.write_bytes((4).to_bytes(8, "little") + b"nope" + data)
    assert "not a safetensors file: its header is not JSON" in error_of(plan, tmp_path)
    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert "not a safetensors file: its header lists no tensors" in error_of(plan, tmp_path)
    path.unlink()
    assert f"error[MC520]: {tmp_path} has no model.safetensors and no" in error_of(plan, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    text = error_of(plan, tmp_path)
    assert "found: pytorch_model.bin" in text
    assert "fix: convert it once with transformers" in text


def test_sharded_checkpoint(tmp_path):
    write(tmp_path, "qwen3")
    plan = described(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    half = math.ceil(len(tensors) / 2)
    parts = {"a.safetensors": [*tensors][:half], "b.safetensors": [*tensors][half:]}
    for file, names in parts.items():
        save_file({n: tensors[n] for n in names}, tmp_path / file)
    index = {"weight_map": {n: f for f, names in parts.items() for n in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    attempt(plan, tmp_path)
    index["weight_map"]["ghost"] = "a.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "MC523" in error_of(plan, tmp_path)
    assert "lists 'ghost' in a.safetensors, which does not hold it" in error_of(plan, tmp_path)
    (tmp_path / "b.safetensors").unlink()
    assert f"error[MC521]: {tmp_path / 'b.safetensors'} is missing" in error_of(plan, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "is not an index of safetensors" in error_of(plan, tmp_path)


def test_a_model_that_does_not_fit(tmp_path):
    write(tmp_path, "llama")
    plan = described(tmp_path, "llama")
    grid = Grid(tp=2)
    weights = empty_ranks(*plan, grid)[0]
    del weights["decoder.layers.1.mlp.linear_fc2.weight"]
    weights["decoder.layers.0.mlp.router.weight"] = torch.ones(2, 3)
    weights["decoder.layers.0.mlp.linear_fc1.weight"] = torch.ones(40, 31)
    with pytest.raises(UsageError) as error:
        load([plan[0]], weights, tmp_path, rank_of([weights, weights], 0, grid))
    lines = [line for line in str(error.value).splitlines() if line.startswith("error")]
    assert lines == [
        "error[MC533]: the model's weight 'decoder.layers.0.mlp.linear_fc1.weight' does not fit "
        "family 'llama': expected [40, 32], found [40, 31]",
        "error[MC533]: the model's weight 'decoder.layers.0.mlp.router.weight' does not fit family "
        "'llama': expected no such weight, found [2, 3]",
        "error[MC533]: the model has no weight 'decoder.layers.1.mlp.linear_fc2.weight': expected "
        "[32, 40] from model.layers.1.mlp.down_proj.weight, found nothing",
    ]
