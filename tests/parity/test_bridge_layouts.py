"""Real ranks: what is loaded under a layout is exported and saved again bit for bit."""

import pytest
import torch
from family_cases import CASES, family_of, tensors_of
from family_cases import write as write_case
from family_runs import build as build_family

from mcore_core.testing.ranks import fork_ranks

FOUR_LAYERS = {"num_hidden_layers": 4}
LAYOUTS = {
    "tp2": {"tp": 2, "world": 2},
    "pp2": {"pp": 2, "world": 2},
    "tp2-pp2": {"tp": 2, "pp": 2, "world": 4},
    "pp2-vpp2": {"pp": 2, "vpp": 2, "world": 2},
    "tp2-dp2": {"tp": 2, "world": 4},
    "ep2-dp2": {"ep": 2, "world": 4},
    "tp2-ep2-etp1": {"tp": 2, "ep": 2, "world": 4, "sp": True},
    "tp2-ep2-etp2": {"tp": 2, "ep": 2, "etp": 2, "world": 4, "sp": True},
    "pp2-vpp2-ep2": {"pp": 2, "vpp": 2, "ep": 2, "world": 4},
}


def write(folder, name):
    return write_case(folder, CASES[name], **FOUR_LAYERS)


def build(folder, name, **sizes):
    return build_family(folder, family_of(CASES[name]), **sizes)


def _round_trip(folder, out, name, sizes):
    bridge, chunks = build(folder, name, **sizes)
    for chunk in chunks:
        for p in chunk.parameters():
            p.data.fill_(float("nan"))
    bridge.load(chunks, folder)
    exported = list(bridge.export(chunks))
    bridge.save(chunks, out, max_shard_size=12_000, source=folder)
    return [(n, t.clone()) for n, t in exported]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama", "tp2"),
        ("llama-biases-tied", "pp2"),
        ("qwen2", "tp2-pp2"),
        ("qwen3", "pp2-vpp2"),
        ("qwen3", "tp2-dp2"),
        ("qwen3-tied", "tp2-pp2"),
        ("mixtral", "ep2-dp2"),
        ("qwen3_moe", "tp2-ep2-etp1"),
        ("solar_open", "tp2-ep2-etp2"),
        ("solar_open", "pp2-vpp2-ep2"),
    ],
)
def test_round_trip(tmp_path, name, layout):
    from transformers import AutoModelForCausalLM

    sizes = LAYOUTS[layout]
    model = write(tmp_path / "in", name)
    ranks = fork_ranks(
        lambda _: _round_trip(tmp_path / "in", tmp_path / "out", name, sizes), sizes["world"]
    )
    expected = tensors_of(tmp_path / "in")
    for exported in ranks:
        assert [n for n, _ in exported] == [n for n, _ in ranks[0]]
        assert {n for n, _ in exported} == set(expected)
        for key, tensor in exported:
            assert torch.equal(tensor, expected[key]), key
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 4
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def _fail(folder):
    from mcore_core.errors import UsageError

    bridge, chunks = build(folder, "qwen2", tp=2, world=2)
    try:
        bridge.load(chunks, folder)
    except UsageError as error:
        return str(error)
    return "loaded"


def test_every_rank_raises_the_same(tmp_path):
    write(tmp_path, "qwen2")
    (tmp_path / "model.safetensors").unlink()
    first, second = fork_ranks(lambda _: _fail(tmp_path), 2)
    assert first == second
    assert first.startswith(f"error[MC520]: {tmp_path} has no model.safetensors")
    assert first.count("error[") == 1


def test_the_copy_of_tied_embeddings_on_the_last_stage_is_loaded(tmp_path):
    write(tmp_path, "qwen3-tied")

    def head(_):
        bridge, chunks = build(tmp_path, "qwen3-tied", pp=2, world=2)
        for p in chunks[0].parameters():
            p.data.fill_(float("nan"))
        bridge.load(chunks, tmp_path)
        return chunks[0].shared_embedding_or_output_weight().detach()

    first, last = fork_ranks(head, 2)
    assert torch.equal(first, last)
    assert not first.isnan().any()
