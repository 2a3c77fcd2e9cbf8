"""gpt_oss as it is published, in mxfp4, is read as what transformers makes of it."""

import json

import pytest
import torch
from bridge_models import Grid, loaded
from family_cases import CASES, save_tensors, tensors_of, write

from mcore_core.errors import UsageError

NAMES = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder in mxfp4; in `plain` what transformers unpacks from it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path_factory.mktemp("mxfp4")
    write(folder, CASES["gpt_oss"], hidden_size=64, intermediate_size=96)
    draw = torch.Generator().manual_seed(1)
    tensors, plain = tensors_of(folder), tensors_of(folder)
    for name in [n for n in tensors if n.endswith(NAMES)]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(119, 129, shape, generator=draw, dtype=torch.uint8)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "plain").mkdir()
    (folder / "plain/config.json").write_text(json.dumps(config))
    save_tensors(plain, folder / "plain")
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    save_tensors(tensors, folder)
    return folder


@pytest.mark.parametrize("grid", [Grid(), Grid(tp=2, ep=2), Grid(tp=4, ep=2, etp=2)])
@pytest.mark.parametrize("bucket", [None, 300])
def test_values_equal_transformers(published, monkeypatch, grid, bucket):
    if bucket:
        monkeypatch.setattr("mcore_hfbridge.load.BUCKET", bucket)
    found = loaded(published, "gpt_oss", grid)[1]
    expected = loaded(published / "plain", "gpt_oss", grid)[1]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
        assert any(n.endswith("linear_fc1.weight") for n in mine)


@pytest.mark.parametrize("part", ["_blocks", "_scales"])
def test_a_part_that_is_missing_is_named(published, tmp_path, part):
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = tensors_of(published)
    del tensors[name + part]
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    save_tensors(tensors, tmp_path)
    with pytest.raises(UsageError) as error:
        loaded(tmp_path, "gpt_oss")
    text = str(error.value)
    assert f"lacks the tensor {name!r}" in text
    rest = {"_blocks": "_scales", "_scales": "_blocks"}[part]
    assert f"{name + rest!r} has no place" in text
