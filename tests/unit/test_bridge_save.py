"""A saved folder is one that transformers opens, and an interrupted save harms nothing."""

import json

import pytest
import torch
from bridge_models import loaded as load_all
from bridge_models import rank_of
from family_cases import CASES
from family_cases import write as write_case
from mcore_hfbridge.export import bytes_of, export, pack
from mcore_hfbridge.save import save
from mcore_hfbridge.writer import Entry, Writer, file_order, header
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mcore_core.errors import UsageError

GB = 10**9


def write(folder, name):
    return write_case(folder, CASES[name])


def loaded(folder, name, dtype=torch.float32):
    plan, weights_of = load_all(folder, name, dtype=dtype)
    return plan, weights_of[0], rank_of(weights_of, 0)


OPENED = [n for n, case in CASES.items() if case.model_type == case.family]
"""transformers has no class for the others."""


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("limit", [GB, 20_000])
def test_transformers_opens_what_was_saved(tmp_path, name, limit):
    model = write(tmp_path / "in", name)
    plan, weights, ranks = loaded(tmp_path / "in", name)
    save(plan, weights, tmp_path / "out", ranks, limit, tmp_path / "in")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def test_files_and_index(tmp_path):
    write(tmp_path / "in", "llama")
    plan, weights, ranks = loaded(tmp_path / "in", "llama")
    save(plan, weights, tmp_path / "out", ranks, 20_000, None)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(plan.hf)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in _tensors(plan, weights, ranks))
    assert max(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")) < 20_000 + 4000
    # A smaller save over it leaves no file of the first one.
    save(plan, weights, tmp_path / "out", ranks, GB, None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def _tensors(plan, weights, ranks):
    return [t for _, t in export(plan, weights, ranks)]


def test_companions_and_dtype(tmp_path):
    write(tmp_path / "in", "qwen3")
    for name in ("tokenizer.json", "chat_template.jinja", "optimizer.pt", "README.md"):
        (tmp_path / "in" / name).write_text(name)
    plan, weights, ranks = loaded(tmp_path / "in", "qwen3", torch.bfloat16)
    save(plan, weights, tmp_path / "out", ranks, GB, tmp_path / "in")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    before, after = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("in", "out"))
    assert before == after | {"dtype": "float32"}
    assert after["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.bfloat16


def test_saving_over_the_source(tmp_path):
    write(tmp_path, "qwen2")
    plan, weights, ranks = loaded(tmp_path, "qwen2")
    weights["decoder.final_norm.weight"].fill_(3.0)
    save(plan, weights, tmp_path, ranks, GB, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.model.norm.weight.eq(3.0).all()


def test_full_disk(tmp_path, monkeypatch):
    write(tmp_path / "in", "llama")
    plan, weights, ranks = loaded(tmp_path / "in", "llama")
    save(plan, weights, tmp_path / "out", ranks, GB, None)
    before = (tmp_path / "out/model.safetensors").read_bytes()
    written = []
    original = Writer.write

    def fail(self, tensors):
        if written:
            raise OSError(28, "No space left on device")
        written.append(self.path)
        original(self, tensors)

    monkeypatch.setattr(Writer, "write", fail)
    weights["decoder.final_norm.weight"].zero_()
    with pytest.raises(UsageError) as error:
        save(plan, weights, tmp_path / "out", ranks, 20_000, None)
    assert str(error.value).startswith(
        f"error[MC540]: cannot write the model to {tmp_path / 'out'}: the disk is full ("
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == before


def test_a_file_where_the_folder_should_be(tmp_path):
    write(tmp_path / "in", "llama")
    plan, weights, ranks = loaded(tmp_path / "in", "llama")
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="MC540"):
        save(plan, weights, tmp_path / "out", ranks, GB, None)


def test_no_more_than_a_bucket_is_gathered_at_once(tmp_path, monkeypatch):
    write(tmp_path / "in", "llama")
    plan, weights, ranks = loaded(tmp_path / "in", "llama")
    sizes, original = [], Writer.write

    def spy(self, tensors):
        sizes.append(sum(t.nbytes for t in tensors.values()))
        original(self, tensors)

    monkeypatch.setattr(Writer, "write", spy)
    monkeypatch.setattr("mcore_hfbridge.save.BUCKET", 700)  # the embedding alone is 12,928
    save(plan, weights, tmp_path / "out", ranks, GB, None)
    assert len(sizes) > 100
    assert max(sizes) <= 700
    again = load_file(tmp_path / "out/model.safetensors")
    before = load_file(tmp_path / "in/model.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[k], before[k]) for k in before)


def test_types_are_aligned_in_a_file(tmp_path):
    """An odd number of bfloat16 values does not push float32 ones off their alignment."""
    tensors = {
        "odd": torch.randn(3).to(torch.bfloat16),
        "wide": torch.randn(2, 2),
        "half": torch.randn(1).to(torch.float16),
        "widest": torch.randn(1, dtype=torch.float64),
    }
    entries = file_order([Entry(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
    assert [e.name for e in entries] == ["widest", "wide", "odd", "half"]
    assert len(header(entries)) % 8 == 0
    writer = Writer(tmp_path / "x.safetensors", entries)
    writer.write({e.name: tensors[e.name] for e in entries})
    writer.close()
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_pack():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 5}
    assert list(pack(sizes, 7)) == [["a", "b"], ["c"], ["d", "e"]]
    assert list(pack({}, 7)) == []


def test_bytes_follow_the_weights(tmp_path):
    write(tmp_path, "llama")
    plan, _, ranks = loaded(tmp_path, "llama", torch.bfloat16)
    assert bytes_of(plan, ranks)["model.norm.weight"] == 64
