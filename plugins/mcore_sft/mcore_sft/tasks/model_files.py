"""The files by which sentence-transformers opens a model: last token, length 1."""

import json
from typing import Any


def sentence_transformer(size: int, max_length: int | None) -> dict[str, str]:
    """Return path -> content.

    Args:
        size: Numbers of an embedding.
        max_length: Tokens that are read of a text; None: no limit.
    """
    steps = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(steps)
    ]
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling: dict[str, Any] = {
        "word_embedding_dimension": size,
        **{f"pooling_mode_{mode}": False for mode in (*modes, "weightedmean_tokens")},
        "pooling_mode_lasttoken": True,
        "include_prompt": True,
    }
    reading = {"max_seq_length": max_length, "do_lower_case": False}
    whole: dict[str, Any] = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": reading,
        "config_sentence_transformers.json": whole,
    }
    return {path: json.dumps(content, indent=2) + "\n" for path, content in files.items()}
