"""`mcore export --upcycle`: a dense checkpoint as experts that are equal to it, here and in HF."""

import json

import pytest
import torch
from commands import losses
from conftest import make_tokenizer

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def dense(folder, kind):
    import transformers

    folder.mkdir()
    torch.manual_seed(0)
    words = make_tokenizer(folder)
    config = getattr(transformers, f"{kind}Config")(vocab_size=words, **SHAPE)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def logits(folder, kind):
    import transformers

    tokens = torch.arange(3, 90).view(3, 29)
    model = getattr(transformers, f"{kind}ForCausalLM").from_pretrained(folder)
    assert type(model.config).__name__ == f"{kind}Config"
    with torch.no_grad():
        return model.eval()(tokens).logits


CASES = [
    ("Qwen3", "Qwen3Moe", {"--upcycle": 4}),
    ("Qwen3", "Qwen3Moe", {"--upcycle": 4, "--moe_upcycling_granularity": 2}),
    ("Llama", "Mixtral", {"--upcycle": 8, "--moe_router_topk": 1}),
    ("Mistral", "Mixtral", {"--upcycle": 3, "--moe_upcycling_granularity": 4}),
    ("Qwen2", "Qwen2Moe", {"--upcycle": 4, "--moe_upcycling_granularity": 2}),
]


@pytest.mark.parametrize(
    ("kind", "becomes", "options"),
    [c if i == 1 else pytest.param(*c, marks=pytest.mark.parity) for i, c in enumerate(CASES)],
)
def test_equal_at_step_0(mcore, tmp_path, dataset, kind, becomes, options):
    source, target = dense(tmp_path / "dense", kind), tmp_path / "experts"
    flat = [part for pair in options.items() for part in pair]
    ran = mcore("export", "--to_hf", "--model", source, "--save", target, *flat)
    assert ran.code == 0, ran.err
    config = json.loads((target / "config.json").read_text())
    grain = options.get("--moe_upcycling_granularity", 1)
    experts = config.get("num_experts", config.get("num_local_experts"))
    assert experts == options["--upcycle"] * grain
    topk = options.get("--moe_router_topk", 2) * grain
    assert config["num_experts_per_tok"] == topk
    assert ran.out == (
        f"wrote {target}: {config['model_type']}, {experts} experts of which a token takes {topk}\n"
    )
    expected = logits(source, kind)
    assert expected.std() > 0.1
    assert (logits(target, becomes) - expected).abs().max() < 1e-5
    if kind == "Qwen2":  # transformers reads the same tokenizer.json otherwise for that model_type
        return
    first = []
    for model in (source, target):
        run = mcore(
            "run", "--plugin", "sft", "--model", model, "--dataset", dataset,
            "--num_workers", 0, "--train_iters", 1, "--global_batch_size", 4,
            "--save", tmp_path / f"run-{model.name}",
        )  # fmt: skip
        assert run.code == 0, run.err
        first.append(losses(run.folder())[1])
    assert first[1] == pytest.approx(first[0], abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--upcycle", 4, "--moe_upcycling_granularity", 3], "does not divide the model's"),
        (["--upcycle", 2, "--moe_router_topk", 3], "--moe_router_topk 3 is above --upcycle 2"),
        (["--moe_upcycling_granularity", 2], "does nothing without --upcycle"),
        (["--upcycle", 1], "must be at least 2"),
    ],
)
def test_what_cannot_be(mcore, model, tmp_path, flags, text):
    ran = mcore("export", "--to_hf", "--model", model, "--save", tmp_path / "out", *flags)
    assert ran.code == 2
    assert text in ran.err


def test_a_model_of_experts_has_no_counterpart(mcore, model_copy, tmp_path):
    file = model_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "gemma"}))
    ran = mcore(
        "export", "--to_hf", "--model", model_copy, "--upcycle", 2, "--save", tmp_path / "o"
    )
    assert ran.code == 2
    assert "error[MC324]: --upcycle: models of type 'gemma' have no counterpart" in ran.err
