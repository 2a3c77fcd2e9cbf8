"""A model with experts from end to end: options act, metrics and the heat map are written."""

import json

import pytest
from commands import metrics
from conftest import make_tokenizer


@pytest.fixture(scope="module")
def experts(place, mcore):
    """A qwen3_moe of random weights."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = place / "experts"
    folder.mkdir()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=make_tokenizer(folder),
        hidden_size=48,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def command(sft, experts):
    return [experts if part == sft[4] else part for part in sft]


def test_a_run_reports_its_experts(mcore, sft, experts, place):
    ran = mcore(
        *command(sft, experts), "--train_iters", 4, "--log_interval", 2, "--save", place / "moe",
        "--moe_aux_loss_coeff", 0.01, "--moe_router_load_balancing_type", "global_aux_loss",
        "--moe_expert_capacity_factor", 1.5,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "  moe/load_max " in ran.err
    assert "layer_" not in ran.err
    folder = ran.folder()
    lines = metrics(folder)
    for name in ("load_max", "load_entropy", "router_entropy", "dropped", "global_aux_loss"):
        each = [lines[-1][f"moe/layer_{n}/{name}"] for n in (0, 2)]
        assert lines[-1][f"moe/{name}"] == pytest.approx(sum(each) / 2)
    assert lines[0]["moe/global_aux_loss"] >= 0.9  # 1 where experts are used alike
    tables = [json.loads(line) for line in (folder / "tables.jsonl").read_text().splitlines()]
    assert [(t["step"], t["steps"]) for t in tables] == [(2, 2), (4, 2)]
    loads = tables[-1]["tables"]["moe/load"]
    assert list(loads) == ["layer 0", "layer 2"]
    assert sum(loads["layer 0"]) == 2 * sum(line["tokens"] for line in lines[2:])
    page = (folder / "report.html").read_text()
    assert '<svg class="heat"' in page
    assert "Load of experts" in page


def test_what_a_model_without_experts_would_ignore(mcore, sft):
    ran = mcore(*sft, "--moe_z_loss_coeff", 0.1)
    assert ran.code == 2
    assert "error[MC615]: --moe_z_loss_coeff: the model has no experts" in ran.err


def test_an_unknown_dispatcher(mcore, sft):
    ran = mcore(*sft, "--moe_token_dispatcher_type", "alltoal")
    assert ran.code == 2
    assert "error[MC202]: no dispatcher named 'alltoal'" in ran.err
    assert "did you mean: alltoall?" in ran.err
