"""Recognize what a dataset row holds and turn it into one conversation, or plain text.

| columns | becomes |
|---|---|
| `messages`, or `conversations` | as they are; sharegpt's `from`, `value` are role and content |
| `prompt`, `completion` | strings: a user and an assistant message; lists: messages, joined |
| `query`, `response` | a user and an assistant message |
| `instruction`, `input`, `output` | the user's message is the instruction, a newline, the input |
| `text` | plain text: no template, every token but the first trains |

`system` and `tools` may stand beside any of them but `text`. A message may carry `"loss": false`
(an assistant turn that does not train) or `"loss": true` (one that does, also under last_round).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mcore_core.protocols import Row

type Message = dict[str, Any]

FORMATS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt/completion": ("prompt", "completion"),
    "query/response": ("query", "response"),
    "instruction/output": ("instruction", "output"),
    "text": ("text",),
}
"""Format -> the columns that it needs. The first whose columns are there is taken."""
FIELDS = frozenset({c for cs in FORMATS.values() for c in cs} | {"input", "system", "tools"})
"""Every column that a conversation is read from."""
FORMATS_HELP = (
    "messages | conversations | prompt, completion | query, response | instruction, input, output "
    "| text"
)
ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class RowError(Exception):
    """A malformed row. `where` says which one, as file:line, where that is known."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason, where)
        self.reason = reason
        self.where = where

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


class RowDropped(Exception):
    """A well-formed row that is left out; the reason is counted and reported."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Conversation:
    """One sample: messages, or plain text (then `messages` is empty)."""

    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] | None = None
    text: str | None = None


class Recognizer(Protocol):
    """Says which format rows with these columns have; None for none."""

    def __call__(self, columns: Iterable[str], /) -> str | None:
        """Return the name of the format."""


def recognize(columns: Iterable[str], /) -> str | None:
    """Return the name of the format that these columns have, or None."""
    have = set(columns)
    return next((name for name, needed in FORMATS.items() if have.issuperset(needed)), None)


def rename(row: Row, columns: Mapping[str, str] | None) -> Row:
    """Apply `--columns`: column name -> field name."""
    if not columns:
        return row
    renamed = {columns.get(key, key): value for key, value in row.items() if key not in columns}
    return renamed | {field: row[column] for column, field in columns.items() if column in row}


def conversation(row: Row, *, system: str | None = None) -> Conversation:
    """Read one row.

    Args:
        row: Columns already renamed.
        system: Used where the row has no system message of its own.

    Raises:
        RowError: The row has none of the formats, or a value of the wrong kind.
    """
    present = {key for key, value in row.items() if value is not None}
    name = recognize(present)
    match name:
        case None:
            raise RowError(f"no usable columns (it has: {', '.join(sorted(present)) or 'none'})")
        case "text":
            if not row["text"]:
                raise RowError("'text' is empty")
            return Conversation(text=_string(row, "text"))
        case "messages" | "conversations":
            messages = _messages(row[name], name)
        case "prompt/completion":
            messages = [*_side(row, "prompt", "user"), *_side(row, "completion", "assistant")]
        case "query/response":
            messages = [*_side(row, "query", "user"), *_side(row, "response", "assistant")]
        case _:
            asked = _string(row, "instruction")
            if row.get("input"):
                asked += "\n" + _string(row, "input")
            messages = [{"role": "user", "content": asked}, *_side(row, "output", "assistant")]
    own = _string(row, "system") if row.get("system") else system
    if own and not any(m["role"] in ("system", "developer") for m in messages):
        messages.insert(0, {"role": "system", "content": own})
    return Conversation(messages=tuple(messages), tools=_tools(row.get("tools")))


def _string(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(f"{column!r} must be a string, found {_kind(value)}")
    return value


def _side(row: Row, column: str, role: str) -> list[Message]:
    value = row[column]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list):
        return _messages(value, column)
    raise RowError(f"{column!r} must be a string or a list of messages, found {_kind(value)}")


def _messages(value: Any, column: str) -> list[Message]:  # noqa: ANN401
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"{column!r} is a string that is not JSON") from error
    if not isinstance(value, list):
        raise RowError(f"{column!r} must be a list of messages, found {_kind(value)}")
    if not value:
        raise RowError(f"{column!r} is empty")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:  # noqa: ANN401
    if not isinstance(item, dict):
        raise RowError(f"{where} must be an object with role and content, found {_kind(item)}")
    message = {key: value for key, value in item.items() if value is not None}
    role = message.pop("from", None) or message.pop("role", None)
    content = message.pop("value", None) if "value" in message else message.pop("content", None)
    if role not in ROLES:
        raise RowError(f"{where} has the role {role!r}, not one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = _joined(content, where)
    if content is None and not message.get("tool_calls"):
        raise RowError(f"{where} has no content")
    if content is not None and not isinstance(content, str):
        raise RowError(f"the content of {where} must be a string, found {_kind(content)}")
    if not isinstance(message.get("loss", True), bool):
        raise RowError(f"'loss' of {where} must be true or false, found {message['loss']!r}")
    return {"role": ROLES[role], "content": content or ""} | message


def _joined(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"the content of {where} has a part of type {kind!r}; only text is read")
        texts.append(part["text"])
    return "".join(texts)


def _tools(value: Any) -> tuple[Any, ...] | None:  # noqa: ANN401
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError("'tools' is a string that is not JSON") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f"'tools' must be a list, found {_kind(value)}")
    return tuple(value)


def _kind(value: Any) -> str:  # noqa: ANN401
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string"}
    name = type(value).__name__
    return names.get(name, f"{value!r} ({name})" if isinstance(value, (int, float)) else name)
