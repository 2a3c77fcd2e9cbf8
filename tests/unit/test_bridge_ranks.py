"""Loading under every layout and exporting again gives the files back, bit for bit."""

import pytest
import torch
from bridge_models import MODELS, assemble_all, empty_ranks, family, plan_for, rank_of, write
from mcore_hfbridge.hf_files import HFFiles
from mcore_hfbridge.load import load


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = write(folder, request.param)
    return request.param, folder, model


def load_ranks(plan, folder, tp, pp=1, dtype=torch.float32):
    weights_of = empty_ranks(plan, tp, pp, dtype=dtype)
    for rank, weights in enumerate(weights_of):
        load(plan, weights, folder, rank_of(weights_of, rank, tp))
    return weights_of


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 3)])
def test_round_trip(saved, tp, pp):
    name, folder, model = saved
    plan = plan_for(folder, name)
    weights_of = load_ranks(plan, folder, tp, pp)
    assert not any(w.isnan().any() for weights in weights_of for w in weights.values())
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = assemble_all(plan, weights_of, tp)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_order_is_layer_by_layer(saved):
    name, folder, _ = saved
    layers = [n.split(".")[2] for n in plan_for(folder, name).hf if ".layers." in n]
    assert layers == sorted(layers)


def test_rows_of_linear_qkv_and_fc1(tmp_path):
    model = write(tmp_path, "llama").state_dict()
    plan = plan_for(tmp_path, "llama")
    weights = load_ranks(plan, tmp_path, 2)[1]
    q, k, v = (model[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    # 8 heads of 6, 4 groups: rank 1 of 2 has groups 2 and 3.
    rows = [q[24:36], k[12:18], v[12:18], q[36:48], k[18:24], v[18:24]]
    qkv = weights["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(qkv, torch.cat(rows))
    gate, up = (model[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    fc1 = weights["decoder.layers.1.mlp.linear_fc1.weight"]
    assert torch.equal(fc1, torch.cat([gate[20:], up[20:]]))


def test_fewer_query_groups_than_ranks_is_a_plain_row_split(tmp_path):
    """megatron gathers the interleaved rows and picks; the parameter is split evenly."""
    write(tmp_path, "qwen3-tied")
    plan = plan_for(tmp_path, "qwen3-tied")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    whole = load_ranks(plan, tmp_path, 1)[0][name]
    parts = [w[name] for w in load_ranks(plan, tmp_path, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_vocabulary_padding_is_zero(tmp_path):
    write(tmp_path, "llama")
    plan = plan_for(tmp_path, "llama")
    last = load_ranks(plan, tmp_path, 4)[3]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert last[name].shape == (26, 24)
        assert last[name][23:].eq(0).all()
        assert last[name][:23].ne(0).any(dim=1).all()


def test_casts_on_the_fly(tmp_path):
    model = write(tmp_path, "qwen2").state_dict()
    plan = plan_for(tmp_path, "qwen2")
    (weights,) = load_ranks(plan, tmp_path, 1, dtype=torch.bfloat16)
    assert torch.equal(
        weights["decoder.final_norm.weight"], model["model.norm.weight"].to(torch.bfloat16)
    )


def test_a_rank_reads_only_its_slices(tmp_path, monkeypatch):
    write(tmp_path, "llama")
    plan = plan_for(tmp_path, "llama")
    read = []
    original = HFFiles.read

    def spy(self, name, slices):
        box = original(self, name, slices)
        read.append(box.numel())
        return box

    monkeypatch.setattr(HFFiles, "read", spy)
    weights_of = empty_ranks(plan, 4)
    load(plan, weights_of[0], tmp_path, rank_of(weights_of, 0, 4))
    assert sum(read) == sum(w.numel() for w in weights_of[0].values())


def test_a_bucket_bounds_what_is_read(tmp_path, monkeypatch):
    model = write(tmp_path, "llama").state_dict()
    plan = plan_for(tmp_path, "llama")
    biggest = []
    original = HFFiles.read

    def spy(self, name, slices):
        box = original(self, name, slices)
        biggest.append(box.numel() * 4)
        return box

    monkeypatch.setattr(HFFiles, "read", spy)
    monkeypatch.setattr("mcore_hfbridge.load.BUCKET", 700)
    found = assemble_all(plan, load_ranks(plan, tmp_path, 2), 2)
    assert max(biggest) <= 700
    assert all(torch.equal(found[k], model[k]) for k in found)


def test_every_family_has_its_tables_checked():
    assert {family(n).name for n in MODELS} == {"llama", "qwen2", "qwen3"}
