"""Rows of a dataset as prompts: what the model answers, and the row as rewards see it.

A row has `prompt` (text or messages), or any of the formats of supervised fine-tuning; answers that
stand at its end are left out.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mcore_core.data.prompt import encode_prompt
from mcore_core.data.rows import Conversation, RowError, conversation, recognize
from mcore_core.data.template import Template
from mcore_core.protocols import Row, Unit

FORMATS_HELP = "prompt | messages | conversations | query, response | instruction, output | text"


def recognize_prompt(columns: Iterable[str], /) -> str | None:
    """Return the format that these columns have."""
    have = set(columns)
    return "prompt" if "prompt" in have else recognize(have)


def prompt_of(row: Row, *, system: str | None = None) -> Conversation:
    """Return the messages before the answer.

    Raises:
        RowError: There are none.
    """
    if row.get("prompt") is not None:
        plain = {k: v for k, v in row.items() if k in ("prompt", "system", "tools")}
        read = conversation(plain | {"completion": "."}, system=system)
        messages = read.messages[:-1]
    else:
        read = conversation(row, system=system)
        if read.text is not None:
            return read
        messages = read.messages
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RowError("there is no message before the answer")
    return Conversation(messages=messages, tools=read.tools)


class PromptEncoder:
    """Encodes rows for recipes that generate. Picklable."""

    help: ClassVar[str] = FORMATS_HELP

    def __init__(self, template: Template) -> None:
        self._template = template

    def __call__(self, row: Row) -> Unit:
        """Return `input_ids` [P], `length`, and the whole `row` with its `messages`, as JSON."""
        prompt = prompt_of(row, system=self._template.system)
        ids = encode_prompt(self._template, prompt)
        kept = {"row": row, "messages": list(prompt.messages)}
        if prompt.tools:
            kept["tools"] = list(prompt.tools)
        return {
            "input_ids": ids,
            "length": len(ids),
            "row": json.dumps(kept, default=str, ensure_ascii=False),
        }


def row_of(unit: Mapping[str, Any]) -> Row:
    """Return the dataset's row of a prompt."""
    row: Row = json.loads(unit["row"])["row"]
    return row


def conversation_of(unit: Mapping[str, Any]) -> Conversation:
    """Return the messages of a prompt."""
    kept = json.loads(unit["row"])
    tools = kept.get("tools")
    return Conversation(
        messages=tuple(kept["messages"]), tools=None if tools is None else tuple(tools)
    )
