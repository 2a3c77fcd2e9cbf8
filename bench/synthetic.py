"""Models with seeded weights and texts of made-up words: the same on every machine, no network."""

import json
import random
import zlib
from pathlib import Path
from typing import Any

QWEN3_06B: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TINY: dict[str, Any] = SMALL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def write_model(folder: Path, shape: dict[str, Any], *, dtype: str = "float32") -> Path:
    """Write a qwen3 model whose weights depend on their names alone, with a tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    if (folder / "config.json").exists():
        return folder
    logging.disable_progress_bar()
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**shape))
    model = model.to(getattr(torch, dtype)).to_empty(device="cpu")
    for name, weight in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        with torch.no_grad():
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                values = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                weight.copy_(values * 0.02)
    model.tie_weights()
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, shape["vocab_size"])
    model.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of words w2, w3, ...; 0 is padding, 1 the end of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"
    )
    wrapped.save_pretrained(folder)


def write_texts(file: Path, *, rows: int, tokens: int, vocabulary: int, seed: int = 0) -> Path:
    """Write texts of `tokens` tokens each, their end included; some words are frequent."""
    rng = random.Random(seed)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            words = (f"w{2 + int((vocabulary - 2) * rng.random() ** 4)}" for _ in range(tokens - 1))
            out.write(json.dumps({"text": " ".join(words)}) + "\n")
    return file
