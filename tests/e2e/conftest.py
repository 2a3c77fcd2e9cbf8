"""A tiny model, its tokenizer and a dataset, made without network; a command runner."""

import json
import os
import random
import shutil

import pytest
from commands import STEPS, Commands

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder for the whole session, with the cache of tokenized data in it."""
    folder = tmp_path_factory.mktemp("e2e")
    previous = os.environ.get("MCORE_CACHE")
    os.environ["MCORE_CACHE"] = str(folder / "cache")
    yield folder
    os.environ.pop("MCORE_CACHE")
    if previous is not None:
        os.environ["MCORE_CACHE"] = previous


@pytest.fixture(scope="session")
def mcore(place):
    """Run a command in a fork."""
    return Commands(place / "logs")


def make_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    words = ["<pad>", "<|im_start|>", "<|im_end|>", *characters]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    return len(vocabulary)


def make_model(folder, **changes):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shape = {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    config = Qwen3Config(vocab_size=make_tokenizer(folder), **{**shape, **changes})
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(file, count, seed=0):
    rng = random.Random(seed)
    with file.open("w") as out:
        for _ in range(count):
            a, b = rng.randint(0, 99), rng.randint(0, 10 ** rng.randint(1, 6))
            talk = [("user", f"{a} + {b} = ?"), ("assistant", str(a + b))]
            messages = [{"role": role, "content": text} for role, text in talk]
            out.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="session")
def model(place, mcore):
    """A folder as `save_pretrained` writes it: qwen3, float32, tied embeddings."""
    return make_model(place / "model")


@pytest.fixture(scope="session")
def dataset(place):
    """160 conversations."""
    return make_rows(place / "rows.jsonl", 160)


@pytest.fixture
def model_copy(model, tmp_path):
    """A copy of the model to spoil."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(scope="session")
def sft(model, dataset):
    """The start of a small training command; options after it win... only where given once."""
    return [
        "run", "--plugin", "sft", "--model", model, "--dataset", dataset,
        "--num_workers", "0", "--lr", "1e-3", "--micro_batch_size", "2", "--global_batch_size", "8",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def plain(mcore, sft, place):
    """A run of six steps, saved at 3 and 6."""
    ran = mcore(*sft, *STEPS, "--save", place / "plain")
    assert ran.code == 0, ran.err
    return ran.folder()


@pytest.fixture
def start(mcore, model, dataset, tmp_path):
    """Run sft for two steps with another model or dataset."""

    def run(*more, model=model, dataset=dataset, **options):
        return mcore(
            "run", "--plugin", "sft", "--model", model, "--dataset", dataset, "--train_iters", 2,
            "--num_workers", 0, "--global_batch_size", 4, "--save", tmp_path / "run", *more,
            **options,
        )  # fmt: skip

    return run
