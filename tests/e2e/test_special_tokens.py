"""`--new_special_tokens`: trained, exported, resumed, in layouts, with adapters and references."""

import json
import math

import pytest
import torch
from commands import losses
from conftest import make_model
from safetensors.torch import load_file

TOKENS = ["<calc>", "<out>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def data(place, dataset):
    """Sums, the question and the answer each behind a token of their own."""
    file = place / "new_tokens.jsonl"
    with file.open("w") as out:
        for line in dataset.read_text().splitlines():
            talk = json.loads(line)["messages"]
            for message, token in zip(talk, TOKENS, strict=True):
                message["content"] = token + message["content"]
            out.write(json.dumps({"messages": talk}) + "\n")
    return file


@pytest.fixture(scope="module")
def untied(place):
    return make_model(place / "untied", tie_word_embeddings=False)


@pytest.fixture
def start(mcore, data, model, tmp_path):
    def run(*more, base=model, ranks=1, plugin="sft", save="run", rows=data, tokens=TOKENS):
        argv = [
            "run", "--plugin", plugin, "--model", base, "--dataset", rows, "--lr", "1e-3",
            "--train_iters", 4, "--global_batch_size", 4, "--save", tmp_path / save,
            "--save_interval", 2, "--add_version", "false", "--num_workers", 0,
            "--new_special_tokens", *tokens, *more,
        ]  # fmt: skip
        return mcore(*argv) if ranks == 1 else mcore.ranks(ranks, *argv)

    return run


def opened(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_trained_exported_resumed(start, mcore, model, tmp_path):
    ran = start()
    assert ran.code == 0, ran.err
    checkpoint = tmp_path / "run/checkpoint-4"
    trained, tokenizer = opened(checkpoint)
    rows = load_file(model / "model.safetensors")[EMBEDDING].shape[0]
    assert len(tokenizer) == trained.config.vocab_size == rows + 2
    assert tokenizer("<calc>1<out>")["input_ids"] == [
        rows,
        tokenizer("1")["input_ids"][0],
        rows + 1,
    ]
    assert set(TOKENS) <= set(tokenizer.all_special_tokens)
    assert tokenizer.chat_template
    new = trained.get_input_embeddings().weight[rows:]
    assert trained.get_output_embeddings().weight is trained.get_input_embeddings().weight
    assert (new[0] - new[1]).abs().max() > 1e-5  # they start alike, and are told apart
    again = start("--load", tmp_path / "run/checkpoint-2", save="again")
    assert again.code == 0, again.err
    assert losses(tmp_path / "again") == {
        k: v for k, v in losses(tmp_path / "run").items() if k > 2
    }
    out = tmp_path / "out"
    ran = mcore("export", "--to_hf", "--load", checkpoint, "--model", model, "--save", out)
    assert ran.code == 0, ran.err
    mine, expected = (load_file(f / "model.safetensors") for f in (out, checkpoint))
    assert all(torch.equal(mine[name], weight) for name, weight in expected.items())
    other, tokenizer = opened(out)
    assert len(tokenizer) == other.config.vocab_size == rows + 2


def test_an_export_adds_them_as_the_mean(mcore, untied, tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text("\n".join(TOKENS))
    ran = mcore(
        "export", "--to_hf", "--model", untied, "--save", tmp_path / "out",
        "--new_special_tokens", file,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    mine, base = (load_file(f / "model.safetensors") for f in (tmp_path / "out", untied))
    for name in (EMBEDDING, HEAD):
        rows = len(base[name])
        assert torch.equal(mine[name][:rows], base[name])
        mean = base[name].double().mean(0).float().expand(2, -1)
        torch.testing.assert_close(mine[name][rows:], mean, rtol=1e-6, atol=1e-8)


def test_mistakes(start, data, untied, tmp_path):
    ran = start(tokens=[tmp_path / "none.txt"])
    assert ran.code == 2
    assert "error[MC433]: --new_special_tokens " in ran.err
    ran = start("--tuner_type", "lora", base=untied)
    assert ran.code == 2
    assert "error[MC434]: --new_special_tokens adds rows to the embedding" in ran.err
    assert "fix: --modules_to_save embed_tokens lm_head with LoRA" in ran.err


@pytest.mark.parity
def test_adapters(start, mcore, untied, tmp_path):
    """PEFT's adapter holds both weights whole; the merged model and an export say the same."""
    from peft import PeftModel

    lora = ["--tuner_type", "lora", "--modules_to_save", "embed_tokens", "lm_head"]
    ran = start(*lora, base=untied)
    assert ran.code == 0, ran.err
    checkpoint = tmp_path / "run/checkpoint-4"
    ran = mcore("export", "--to_hf", "--load", tmp_path / "run", "--save", tmp_path / "out")
    assert ran.code == 0, ran.err
    merged, tokenizer = opened(tmp_path / "run/checkpoint-4-merged")
    exported, _ = opened(tmp_path / "out")
    base, _ = opened(untied)
    base.resize_token_embeddings(len(tokenizer))
    adapted = PeftModel.from_pretrained(base, checkpoint).eval()
    ids = torch.tensor([tokenizer("<calc>12 + 3 = ?<out>15")["input_ids"]])
    with torch.no_grad():
        logits = [m(ids).logits for m in (merged, exported, adapted)]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-6)
    tied = start(*lora)
    assert tied.code == 2
    assert "embedding and output layer are one weight in this model" in tied.err


@pytest.mark.parity
@pytest.mark.parametrize(
    "layout",
    [
        ["--tensor_model_parallel_size", 2, "--sequence_parallel"],
        ["--pipeline_model_parallel_size", 2],
        ["--padded_vocab_size", 128],
    ],
    ids=["tp2-sp", "pp2", "padded"],
)
@pytest.mark.parametrize("tie", [True, False])
def test_layouts(start, model, untied, tmp_path, layout, tie):
    base = model if tie else untied
    for name, more, ranks in (("one", [], 1), ("two", layout, 1 if "padded" in layout[0] else 2)):
        ran = start(*more, base=base, ranks=ranks, save=name)
        assert ran.code == 0, ran.err
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, rel=1e-5)
    mine, expected = (
        load_file(tmp_path / f"{name}/checkpoint-4/model.safetensors") for name in ("two", "one")
    )
    assert mine.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=2e-5)


@pytest.mark.parity
def test_a_reference_has_them_too(start, tmp_path):
    """Before the first step policy and reference are one model: the loss is log 2."""
    rows = tmp_path / "pairs.jsonl"
    pair = {"prompt": "<calc>1 + 1 = ?", "chosen": "<out>2", "rejected": "<out>3"}
    rows.write_text("".join(json.dumps(pair) + "\n" for _ in range(8)))
    ran = start(plugin="dpo", rows=rows)
    assert ran.code == 0, ran.err
    found = losses(tmp_path / "run")
    assert found[1] == pytest.approx(math.log(2), abs=1e-6)
    assert found[4] < found[1]
