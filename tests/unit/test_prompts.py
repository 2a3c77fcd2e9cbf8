"""Rows as prompts: what the model is given to answer, and what rewards see of the row."""

import numpy as np
import pytest
from data_tools import chat, make_template
from mcore_rlhf.rollout.prompts import (
    PromptEncoder,
    conversation_of,
    prompt_of,
    recognize_prompt,
    row_of,
)

from mcore_core.data.rows import RowDropped, RowError

ASKED = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
TALK = chat("2 + 2?", "3")["messages"]
ROWS = {
    "prompt": {"prompt": "2 + 2?", "solution": "4"},
    "messages as prompt": {"prompt": [{"role": "user", "content": "2 + 2?"}], "solution": "4"},
    "completion": {"prompt": "2 + 2?", "completion": "4"},
    "messages": chat("2 + 2?", "4"),
    "two answers": {"messages": [*TALK, {"role": "assistant", "content": "4"}]},
    "query": {"query": "2 + 2?", "response": "4"},
    "instruction": {"instruction": "2 + 2?", "output": "4"},
}


def decoded(template, unit):
    return template.tokenizer.decode(unit["input_ids"].tolist())


@pytest.mark.parametrize("name", ROWS)
def test_answers_are_left_out_and_rows_go_along(name):
    template = make_template()
    unit = PromptEncoder(template)(ROWS[name])
    assert decoded(template, unit) == ASKED
    assert unit["length"] == len(unit["input_ids"]) and unit["input_ids"].dtype == np.int32
    assert row_of(unit) == ROWS[name]
    assert [dict(m) for m in conversation_of(unit).messages] == [
        {"role": "user", "content": "2 + 2?"}
    ]
    assert recognize_prompt(ROWS[name]) is not None


def test_earlier_turns_tools_and_the_system_message_stay():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {
        "messages": [
            *chat("a", "b")["messages"],
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d"},
        ],
        "tools": tools,
    }
    template = make_template(system="be brief")
    unit = PromptEncoder(template)(row)
    said = decoded(template, unit)
    assert "be brief" in said and "\nb<|im_end|>" in said and "\nd<" not in said
    kept = conversation_of(unit)
    assert [m["role"] for m in kept.messages] == ["system", "user", "assistant", "user"]
    assert list(kept.tools) == tools


def test_plain_text_and_the_first_token():
    template = make_template(bos=True)
    unit = PromptEncoder(template)({"text": "once"})
    assert decoded(template, unit) == "<s>once"
    unit = PromptEncoder(template)({"text": "<s>once"})
    assert decoded(template, unit) == "<s>once", "it is not put there twice"
    assert decoded(template, PromptEncoder(template)({"prompt": "x"})).count("<s>") == 0


def test_long_prompts():
    """truncation_strategy left keeps the end, right the beginning, delete drops the row."""
    row = {"prompt": "0123456789" * 5}
    whole = PromptEncoder(make_template())(row)["input_ids"]
    assert len(whole) > 40
    left = PromptEncoder(make_template(max_length=40, truncation_strategy="left"))(row)
    right = PromptEncoder(make_template(max_length=40, truncation_strategy="right"))(row)
    assert left["input_ids"].tolist() == whole[-40:].tolist() and left["length"] == 40
    assert right["input_ids"].tolist() == whole[:40].tolist() and right["length"] == 40
    with pytest.raises(RowDropped, match="max_length"):
        PromptEncoder(make_template(max_length=40))(row)
    exact = PromptEncoder(make_template(max_length=len(whole)))(row)
    assert exact["input_ids"].tolist() == whole.tolist()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "assistant", "content": "b"}]},
        {"text": ""},
    ],
)
def test_nothing_to_answer(row):
    with pytest.raises(RowError):
        PromptEncoder(make_template())(row)


def test_what_stands_behind_a_prompt_is_not_read():
    """Only prompt, system and tools are: a column of the dataset may have any name."""
    row = {"prompt": "q", "output": 7, "messages": "a note", "system": "s"}
    assert [m["content"] for m in prompt_of(row).messages] == ["s", "q"]
