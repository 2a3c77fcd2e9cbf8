"""Recognize rows that hold preferences, and read them as conversations.

| columns | a pair of answers |
|---|---|
| `messages`, `rejected_messages` | two conversations |
| `messages`, `rejected_response` | a conversation, and another text for its last answer |
| `query`, `response`, `rejected_response` | a question and two answers |
| `prompt`, `chosen`, `rejected` | texts, or lists of messages (both forms of TRL) |
| `chosen`, `rejected` | two conversations (TRL, the prompt not apart) |

| columns | an answer that is good or bad |
|---|---|
| `prompt`, `completion`, `label` | texts, or lists of messages; the label is true or false |
| `messages`, `label` | a conversation |
| `query`, `response`, `label` | texts |

`system` and `tools` may stand beside any of them; `margin` beside a pair.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from mcore_core.data.rows import Conversation, Message, RowError, conversation
from mcore_core.protocols import Row

type Formats = Mapping[str, tuple[str, ...]]

PAIR_FORMATS: Formats = {
    "messages/rejected_messages": ("messages", "rejected_messages"),
    "messages/rejected_response": ("messages", "rejected_response"),
    "query/response": ("query", "response", "rejected_response"),
    "prompt/chosen": ("prompt", "chosen", "rejected"),
    "chosen": ("chosen", "rejected"),
}
PAIR_HELP = (
    "messages, rejected_messages | messages, rejected_response | query, response, "
    "rejected_response | prompt, chosen, rejected | chosen, rejected"
)
PAIR_COLUMNS = '{"question": "prompt", "better": "chosen", "worse": "rejected"}'
LABEL_FORMATS: Formats = {
    "prompt/completion": ("prompt", "completion", "label"),
    "messages": ("messages", "label"),
    "query/response": ("query", "response", "label"),
}
LABEL_HELP = "prompt, completion, label | messages, label | query, response, label"
LABEL_COLUMNS = '{"question": "prompt", "answer": "completion", "good": "label"}'
EXTRA = frozenset({"system", "tools"})
PAIR_FIELDS = frozenset({c for cs in PAIR_FORMATS.values() for c in cs} | EXTRA | {"margin"})
LABEL_FIELDS = frozenset({c for cs in LABEL_FORMATS.values() for c in cs} | EXTRA)
REJECTED = frozenset({"rejected", "rejected_messages", "rejected_response"})


def first_format(formats: Formats, columns: Iterable[str]) -> str | None:
    """Return the name of the first format whose columns are all there."""
    have = set(columns)
    return next((name for name, needed in formats.items() if have.issuperset(needed)), None)


def recognize_pair(columns: Iterable[str], /) -> str | None:
    """Return the format of rows with two answers, or None."""
    return first_format(PAIR_FORMATS, columns)


def recognize_label(columns: Iterable[str], /) -> str | None:
    """Return the format of rows with a label, or None."""
    return first_format(LABEL_FORMATS, columns)


def _present(row: Row) -> set[str]:
    return {key for key, value in row.items() if value is not None and value not in ("", [])}


def pair(row: Row, *, system: str | None = None) -> tuple[Conversation, Conversation]:
    """Return the conversations that end with the chosen and with the rejected answer.

    Args:
        row: Columns already renamed.
        system: Used where the row has no system message of its own.

    Raises:
        RowError: An answer is missing, both are the same, or they answer different prompts.
    """
    have = _present(row)
    if not have & REJECTED:
        raise RowError(f"there is no rejected answer (it has: {', '.join(sorted(have)) or 'none'})")
    shared = {key: row[key] for key in EXTRA & have}
    match recognize_pair(have):
        case "messages/rejected_messages":
            sides = [{"messages": row[key]} for key in ("messages", "rejected_messages")]
        case "messages/rejected_response":
            return _replaced(row, shared, system)
        case "query/response":
            keys = ("response", "rejected_response")
            sides = [{"query": row["query"], "response": row[key]} for key in keys]
        case "prompt/chosen":
            keys = ("chosen", "rejected")
            sides = [{"prompt": row["prompt"], "completion": row[key]} for key in keys]
        case "chosen":
            if not all(isinstance(row[key], list) for key in ("chosen", "rejected")):
                raise RowError("'chosen' and 'rejected' are texts without a 'prompt'")
            sides = [{"messages": row[key]} for key in ("chosen", "rejected")]
        case _:
            raise RowError(f"there is no chosen answer (it has: {', '.join(sorted(have))})")
    chosen, rejected = (conversation(side | shared, system=system) for side in sides)
    for side, name in ((chosen, "chosen"), (rejected, "rejected")):
        if side.messages[-1]["role"] != "assistant":
            raise RowError(f"the {name} conversation does not end with an assistant's message")
    _check_prompt(chosen.messages, rejected.messages)
    return chosen, rejected


def _replaced(
    row: Row, shared: Mapping[str, Any], system: str | None
) -> tuple[Conversation, Conversation]:
    text = row["rejected_response"]
    if not isinstance(text, str):
        raise RowError(f"'rejected_response' must be a string, found {type(text).__name__}")
    chosen = conversation({"messages": row["messages"], **shared}, system=system)
    if chosen.messages[-1]["role"] != "assistant":
        raise RowError("'messages' does not end with an assistant's message to be replaced")
    last = {"role": "assistant", "content": text}
    rejected = replace(chosen, messages=(*chosen.messages[:-1], last))
    _check_prompt(chosen.messages, rejected.messages)
    return chosen, rejected


def _check_prompt(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> None:
    """Both must begin alike, up to the first message that the model writes."""
    if chosen == rejected:
        raise RowError("the chosen and the rejected answer are the same")
    if _before_answer(chosen) != _before_answer(rejected):
        raise RowError("the chosen and the rejected answer have different prompts")


def _before_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return messages[:first]


def margin(row: Row) -> float:
    """Return by how much the chosen answer is better; 0 where the row does not say.

    Raises:
        RowError: It is no finite number.
    """
    value = row.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"'margin' must be a finite number, found {value!r}")
    return float(value)


def labelled(row: Row, *, system: str | None = None) -> tuple[Conversation, bool]:
    """Return a conversation and whether its last answer is good.

    Raises:
        RowError: There is no answer, or the label is not true or false.
    """
    have = _present(row)
    value = row.get("label")
    if not isinstance(value, bool) and value not in (0, 1):
        raise RowError(f"'label' must be true or false, found {value!r}")
    name = recognize_label(have)
    if name is None:
        raise RowError(f"no usable columns (it has: {', '.join(sorted(have))})")
    keys = {*LABEL_FORMATS[name], *EXTRA} - {"label"}
    talk = conversation({key: row[key] for key in keys & have}, system=system)
    if talk.messages[-1]["role"] != "assistant":
        raise RowError("the conversation does not end with an assistant's message")
    return talk, bool(value)
