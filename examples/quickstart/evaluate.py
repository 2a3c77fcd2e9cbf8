"""Held-out exact match of a model folder, with plain transformers: nothing of mcore is imported."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from task import is_correct
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 125
MAX_NEW_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Answer:
    """One problem and what the model replied."""

    question: str
    answer: str
    reply: str

    @property
    def correct(self) -> bool:
        """Whether the reply is the answer."""
        return is_correct(self.reply, self.answer)


def evaluate(model_folder: Path, rows_file: Path) -> list[Answer]:
    """Let the model answer every row, greedily, in batches."""
    loaded = {name.split(".")[0] for name in sys.modules} & {"mcore_core", "megatron"}
    assert not loaded, f"not plain transformers: {loaded} imported"
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    answers = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        prompts = [
            tokenizer.apply_chat_template(
                row["messages"][:-1], tokenize=False, add_generation_prompt=True
            )
            for row in batch
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        prompt_length = inputs["input_ids"].shape[1]
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        replies = tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
        answers += [
            Answer(row["messages"][-2]["content"], row["answer"], reply)
            for row, reply in zip(batch, replies, strict=True)
        ]
    return answers


def accuracy(answers: list[Answer]) -> float:
    """Return the part of right answers."""
    return sum(answer.correct for answer in answers) / len(answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    options = parser.parse_args()
    print(f"exact match {accuracy(evaluate(options.model, options.rows)):.1%}")
