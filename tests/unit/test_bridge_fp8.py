"""Checkpoints in fp8 with one scale a block of rows and columns are read as what they stand for."""

import json

import pytest
import torch
from bridge_models import Grid, loaded
from family_cases import CASES, save_tensors, tensors_of, write
from mcore_hfbridge.save import copy_companions

from mcore_core.errors import UsageError

BLOCK = (16, 24)
"""Divides no dimension of the model."""


def quantize(tensor):
    """Return fp8 values, scales, and what they stand for."""
    rows, columns = tensor.shape
    scale = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    low = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    whole = torch.empty_like(tensor)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (
                slice(i * BLOCK[0], (i + 1) * BLOCK[0]),
                slice(j * BLOCK[1], (j + 1) * BLOCK[1]),
            )
            scale[i, j] = tensor[at].abs().max() / 448
            low[at] = (tensor[at] / scale[i, j]).to(torch.float8_e4m3fn)
            whole[at] = low[at].float() * scale[i, j]
    return low, scale, whole


@pytest.fixture
def folder(tmp_path):
    """A DeepSeek-V3 whose projections are fp8; beside it, `expected.safetensors` stands for it."""
    write(tmp_path, CASES["deepseek_v3"])
    tensors, expected = {}, {}
    for name, tensor in tensors_of(tmp_path).items():
        if name.endswith("_proj.weight") or "_mqa" in name:
            low, scale, whole = quantize(tensor)
            tensors |= {name: low, name + "_scale_inv": scale}
            expected[name] = whole
        else:
            tensors[name] = expected[name] = tensor
    (tmp_path / "plain").mkdir()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    save_tensors(expected, tmp_path / "plain")
    save_tensors(tensors, tmp_path)
    quantization = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": quantization})
    )
    return tmp_path


@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, ep=2), Grid(tp=4, ep=2, etp=2)])
@pytest.mark.parametrize("bucket", [None, 300])
def test_values(folder, monkeypatch, grid, bucket):
    if bucket:
        monkeypatch.setattr("mcore_hfbridge.load.BUCKET", bucket)
    found = loaded(folder, "deepseek_v3", grid)[1]
    expected = loaded(folder / "plain", "deepseek_v3", grid)[1]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_a_weight_without_scales(folder):
    tensors = tensors_of(folder)
    name = "model.layers.0.self_attn.o_proj.weight"
    del tensors[name + "_scale_inv"]
    save_tensors(tensors, folder)
    with pytest.raises(UsageError) as error:
        loaded(folder, "deepseek_v3")
    text = str(error.value)
    assert text.startswith(f"error[MC535]: {folder / 'model.safetensors'}: {name!r} has another ")
    assert f"found F8_E4M3 without {name}_scale_inv" in text


def test_no_block_size(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UsageError, match="of quantized weights only fp8 with weight_block_size"):
        loaded(folder, "deepseek_v3")
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"MC536.*does not say their weight_block_size"):
        loaded(folder, "deepseek_v3")


def test_what_is_saved_is_not_quantized(folder):
    copy_companions(folder, folder / "plain", "bfloat16")
    config = json.loads((folder / "plain/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
