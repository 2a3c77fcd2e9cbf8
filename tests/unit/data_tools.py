"""A tiny tokenizer, templates and configurations for the data tests."""

import json
from pathlib import Path
from typing import Any

from mcore_sft.config import SFTConfig

from mcore_core.config.compose import RunConfig
from mcore_core.config.data import DataConfig
from mcore_core.config.dataloader import DataLoaderConfig
from mcore_core.config.evaluation import EvaluationConfig
from mcore_core.config.template import TemplateConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.data.template import Template

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3: the last turn has a think block, perhaps an empty one; earlier turns lose theirs.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '' %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ answer }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def make_tokenizer(template: str | None = CHATML, *, bos: bool = False) -> Any:
    """One token a byte, and the special ones of ChatML; with `bos`, <s> is put before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    out = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    out.chat_template = template
    return out


def make_template(template: str | None = CHATML, *, bos: bool = False, **options: Any) -> Template:
    return Template(make_tokenizer(template, bos=bos), TemplateConfig(**options))


GROUPS = (DataConfig, DataLoaderConfig, EvaluationConfig, SFTConfig, TrainConfig, WeightsConfig)


def make_config(**options: Any) -> RunConfig:
    """The groups that the data reads, with the options each has."""
    left = dict(options)
    groups = [
        group(**{name: left.pop(name) for name in list(left) if name in group.model_fields})
        for group in (*GROUPS, TemplateConfig)
    ]
    assert not left, f"no group has {left}"
    return RunConfig(groups)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
