"""Tokenizing: rows a second in one process, against `datasets.map` with the same tokenizer.

Three kinds of rows: conversations whose mask comes from the template's generation marks, the same
without marks (mcore finds the turns by comparing renderings; datasets.map gets ids only, no mask),
and plain text. Both write an Arrow file that they then use. In turns, in this process, tokenizers'
own threads off. The rows are source files of Python's standard library; the tokenizer is that of
MCORE_SMOLLM2 (a model folder) where it is set, else a BPE trained here on the same text.

Bound: 0.9 of datasets.map for each kind. The last line is one JSON document.
"""

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

BOUND = 0.9
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
KINDS = ("marked", "plain template", "text")


def main() -> None:
    """Measure; exit 1 where the bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_DATASETS_CACHE": f"{folder}/hf", "MCORE_CACHE": f"{folder}/mcore"}
        results = {k: measure(k, options, Path(folder)) for k in options.kinds}
    for kind, found in results.items():
        print(
            f"{kind:16} mcore {found['mcore']:8,.0f} rows/s  datasets.map {found['map']:8,.0f} "
            f"rows/s  ratio {found['ratio']:.2f}"
        )
    kept = all(found["ratio"] >= BOUND for found in results.values())
    print(f"bound {BOUND}: {'kept' if kept else 'NOT KEPT'}")
    print(json.dumps({"results": results, "kept": kept}))
    sys.exit(not kept)


def pieces(count: int) -> list[str]:
    """Return texts of 40 to 2,000 characters from the standard library's sources."""
    found: list[str] = []
    size = 40
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text, at = file.read_text(encoding="utf-8", errors="replace"), 0
        while at < len(text) and len(found) < count:
            found.append(text[at : at + size].strip() or "pass")
            at += size
            size = 40 + (size * 7 + 13) % 1960
    return [found[i % len(found)] for i in range(count)]


def tokenizer_of(texts: list[str]) -> Any:  # noqa: ANN401
    """Return the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder := os.environ.get("MCORE_SMOLLM2"):
        return AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts[:1000], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )


def measure(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return rows a second of both, medians over the turns."""
    import datasets
    from mcore_sft.config import SFTConfig
    from mcore_sft.recipe import SFTRecipe

    from mcore_core.config.kernel import kernel_config
    from mcore_core.config.template import TemplateConfig
    from mcore_core.data.encode import encode_rows
    from mcore_core.data.prepare import row_encoder, source_options
    from mcore_core.data.sources import open_all
    from mcore_core.data.template import Template

    datasets.disable_progress_bars()
    texts = pieces(2 * options.rows)
    tokenizer = tokenizer_of(texts)
    tokenizer.chat_template = MARKED if kind == "marked" else PLAIN
    rows: list[dict[str, Any]] = [{"text": text} for text in texts[: options.rows]]
    if kind != "text":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }
            for question, answer in zip(texts[::2], texts[1::2], strict=True)
        ]
    file = folder / f"{kind.split()[0]}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = kernel_config(SFTConfig, dataset=[str(file)])
    template = Template(tokenizer, config[TemplateConfig])
    recipe = SFTRecipe(config, template)
    plain = datasets.load_dataset("json", data_files=str(file), split="train")
    (source,) = open_all([str(file)], loaders={}, options=source_options(config, recipe))

    def mine(turn: int) -> int:
        path = folder / f"{kind.split()[0]}-{turn}.arrow"
        counts = encode_rows(source.rows, row_encoder(config, recipe), path=path, name=kind)
        return counts.tokens

    def with_map(turn: int) -> int:
        def encode(row: dict[str, Any]) -> dict[str, Any]:
            if kind == "text":
                ids = tokenizer(row["text"])["input_ids"]
                return {"input_ids": [[*one, tokenizer.eos_token_id] for one in ids]}
            mask = kind == "marked"
            out = tokenizer.apply_chat_template(
                row["messages"], return_dict=True, return_assistant_tokens_mask=mask
            )
            found = {"input_ids": out["input_ids"]}
            return found | ({"assistant_masks": out["assistant_masks"]} if mask else {})

        done = plain.map(
            encode,
            batched=kind == "text",
            remove_columns=plain.column_names,
            load_from_cache_file=False,
        )
        lengths = done.with_format("arrow")[:]["input_ids"].combine_chunks()
        return len(lengths.flatten())

    seconds: dict[str, list[float]] = {"mcore": [], "map": []}
    tokens: dict[str, int] = {}
    for turn in range(options.turns):
        for name, run in (("mcore", mine), ("map", with_map)):
            begin = time.perf_counter()
            tokens[name] = run(turn)
            seconds[name].append(time.perf_counter() - begin)
    assert tokens["mcore"] == tokens["map"], tokens
    speed = {name: options.rows / statistics.median(all_) for name, all_ in seconds.items()}
    return {**speed, "ratio": speed["mcore"] / speed["map"], "tokens": float(tokens["mcore"])}


if __name__ == "__main__":
    main()
