"""What each rank's part of a weight holds, and how it is read (test_family_tables: trips)."""

import pytest
import torch
from bridge_models import Grid, assemble_all, described, empty_ranks, loaded, rank_of
from family_cases import CASES, write
from mcore_hfbridge.hf_files import HFFiles
from mcore_hfbridge.load import load

TP2, TP4 = Grid(tp=2), Grid(tp=4)


def test_rows_of_linear_qkv_and_fc1(tmp_path):
    model = write(tmp_path, CASES["llama"]).state_dict()
    weights = loaded(tmp_path, "llama", TP2)[1][1]
    q, k, v = (model[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    # 4 heads of 6, 2 groups: rank 1 of 2 has group 1.
    qkv = weights["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(qkv, torch.cat([q[12:24], k[6:12], v[6:12]]))
    gate, up = (model[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    fc1 = weights["decoder.layers.1.mlp.linear_fc1.weight"]
    assert torch.equal(fc1, torch.cat([gate[20:], up[20:]]))


def test_rows_of_gated_attention(tmp_path):
    """HF: each head's q, then its gate; here: a group's q heads, its gates, k, v."""
    model = write(tmp_path, CASES["qwen3_next"]).state_dict()
    _, (weights,) = loaded(tmp_path, "qwen3_next")
    q, k, v = (model[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    heads, gates = q.view(4, 2, 16, 32).unbind(1)
    expected = [
        torch.cat([*heads[2 * g : 2 * g + 2], *gates[2 * g : 2 * g + 2], k[at], v[at]])
        for g, at in enumerate((slice(0, 16), slice(16, 32)))
    ]
    found = weights["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(found, torch.cat(expected))


def test_rows_of_a_delta_net(tmp_path):
    """Under TP2 a rank has its key head's q, k, its value heads' v, z, b, a, in that order."""
    model = write(tmp_path, CASES["qwen3_next"]).state_dict()
    weights = loaded(tmp_path, "qwen3_next", TP2)[1][1]
    qkvz = model["model.layers.0.linear_attn.in_proj_qkvz.weight"].view(2, 44, 32)[1]
    ba = model["model.layers.0.linear_attn.in_proj_ba.weight"].view(2, 4, 32)[1]
    found = weights["decoder.layers.0.self_attention.in_proj.weight"]
    assert torch.equal(found, torch.cat([qkvz, ba]))
    conv = model["model.layers.0.linear_attn.conv1d.weight"]
    found = weights["decoder.layers.0.self_attention.conv1d.weight"]
    assert torch.equal(found, torch.cat([conv[6:12], conv[18:24], conv[40:56]]))


def test_columns_of_interleaved_experts(tmp_path):
    """gpt_oss, EP2: gate and up columns take turns; experts 2 and 3 are rank 1's."""
    model = write(tmp_path, CASES["gpt_oss"]).state_dict()
    weights = loaded(tmp_path, "gpt_oss", Grid(ep=2))[1][1]
    assert {n.split(".")[5] for n in weights if ".experts." in n} == {"2", "3"}
    whole = model["model.layers.0.mlp.experts.gate_up_proj"][3]
    found = weights["decoder.layers.0.mlp.experts.3.linear_fc1.weight"]
    assert torch.equal(found, torch.cat([whole[:, ::2].T, whole[:, 1::2].T]))
    bias = model["model.layers.0.mlp.experts.gate_up_proj_bias"][3]
    found = weights["decoder.layers.0.mlp.experts.3.linear_fc1.bias"]
    assert torch.equal(found, torch.cat([bias[::2], bias[1::2]]))
    down = model["model.layers.0.mlp.experts.down_proj"][3]
    assert torch.equal(weights["decoder.layers.0.mlp.experts.3.linear_fc2.weight"], down.T)


def test_experts_are_cut_over_their_own_tensor_parallelism(tmp_path):
    """TP2 with ETP1: attention is cut, experts are whole."""
    write(tmp_path, CASES["mixtral"])
    _, (first, second) = loaded(tmp_path, "mixtral", Grid(tp=2, ep=2))
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    assert first[name].shape == second[name].shape == (32, 12)
    assert first["decoder.layers.0.mlp.experts.1.linear_fc1.weight"].shape == (80, 32)
    assert second["decoder.layers.0.mlp.experts.2.linear_fc2.weight"].shape == (32, 40)
    assert "decoder.layers.0.mlp.experts.1.linear_fc1.weight" not in second


def test_fewer_query_groups_than_ranks_is_a_plain_row_split(tmp_path):
    """megatron gathers the interleaved rows and picks; the parameter is split evenly."""
    write(tmp_path, CASES["qwen3-tied"])
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    whole = loaded(tmp_path, "qwen3-tied")[1][0][name]
    parts = [w[name] for w in loaded(tmp_path, "qwen3-tied", TP4)[1]]
    assert torch.equal(torch.cat(parts), whole)


def test_vocabulary_padding_is_zero(tmp_path):
    write(tmp_path, CASES["llama"])
    last = loaded(tmp_path, "llama", TP4)[1][3]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert last[name].shape == (26, 32)
        assert last[name][23:].eq(0).all()
        assert last[name][:23].ne(0).any(dim=1).all()


def test_casts_on_the_fly(tmp_path):
    model = write(tmp_path, CASES["qwen2"]).state_dict()
    _, (weights,) = loaded(tmp_path, "qwen2", dtype=torch.bfloat16)
    expected = model["model.norm.weight"].to(torch.bfloat16)
    assert torch.equal(weights["decoder.final_norm.weight"], expected)


@pytest.fixture
def read(monkeypatch):
    """Bytes of each read."""
    sizes = []
    original = HFFiles.read

    def spy(self, name, slices):
        box = original(self, name, slices)
        sizes.append(box.numel() * 4)
        return box

    monkeypatch.setattr(HFFiles, "read", spy)
    return sizes


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_a_rank_reads_only_its_slices(tmp_path, read, name):
    write(tmp_path, CASES[name])
    plan, architecture = described(tmp_path, name)
    grid = Grid(tp=2, ep=2) if architecture.moe else TP4
    weights_of = empty_ranks(plan, architecture, grid)
    load([plan], weights_of[0], tmp_path, rank_of(weights_of, 0, grid))
    assert sum(read) == sum(w.nbytes for w in weights_of[0].values())


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_bucket_bounds_what_is_read(tmp_path, read, monkeypatch, name):
    model = write(tmp_path, CASES[name]).state_dict()
    monkeypatch.setattr("mcore_hfbridge.load.BUCKET", 700)
    plan, weights_of = loaded(tmp_path, name, TP2)
    found = assemble_all(plan, weights_of, TP2)
    assert max(read) <= 700
    assert all(torch.equal(found[k], model[k]) for k in found)
