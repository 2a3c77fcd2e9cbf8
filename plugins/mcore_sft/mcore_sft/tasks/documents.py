"""Read rows of texts to be labelled, or of a query with documents.

| columns | what they hold |
|---|---|
| `text`, `label` | a plain text |
| `messages` (or `conversations`), `label` | a conversation |
| `query`, `label`; `query`, `response`, `label` | a question, perhaps with an answer |

| columns | query, positive documents, negative ones |
|---|---|
| `query`, `positive`, `negative` | each a text; the documents may be lists of texts |
| `anchor`, `positive`, `negative`; `sentence1`, `sentence2` | the names of sentence-transformers |
| `query`, `response`, `rejected_response` | those of ms-swift |
| `messages`, `positive_messages`, `negative_messages` | conversations: the documents are lists |

The negatives may be missing. `label` (or `score`) says how alike the pair is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mcore_core.data.rows import Conversation, RowError, conversation
from mcore_core.protocols import Row

TEXT_FORMATS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "query": ("query",),
}
TEXT_HELP = "text, label | messages, label | query, label | query, response, label"
TEXT_COLUMNS = '{"review": "text", "stars": "label"}'
LABELS = frozenset({"label", "labels", "score"})
TEXT_FIELDS = frozenset({*TEXT_FORMATS, "response", "system", "tools"} | LABELS)

PAIR_FORMATS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "messages": ("messages", "positive_messages", ("negative_messages",)),
    "query/positive": ("query", "positive", ("negative", "negatives")),
    "anchor": ("anchor", "positive", ("negative", "negatives")),
    "sentence1": ("sentence1", "sentence2", ()),
    "query/response": ("query", "response", ("rejected_response",)),
}
"""Format -> the columns of the query, its positive documents and its negative ones."""
PAIR_HELP = (
    "query, positive, negative | anchor, positive, negative | sentence1, sentence2, label | "
    "query, response, rejected_response | messages, positive_messages, negative_messages"
)
PAIR_COLUMNS = '{"question": "query", "right": "positive", "wrong": "negative"}'
PAIR_FIELDS = frozenset(
    {c for q, p, ns in PAIR_FORMATS.values() for c in (q, p, *ns)} | {"system"} | LABELS
)


@dataclass(frozen=True, slots=True)
class Text:
    """A text, and what is said beside it."""

    text: str
    system: str | None = None

    @property
    def joined(self) -> str:
        """Both, the instruction first."""
        return self.text if self.system is None else f"{self.system} {self.text}"


@dataclass(frozen=True, slots=True)
class Documents:
    """A query, and documents that suit it and that do not."""

    query: Text
    positives: tuple[Text, ...]
    negatives: tuple[Text, ...]


def recognize_text(columns: Iterable[str], /) -> str | None:
    """Return the format of rows with a labelled text, or None."""
    have = set(columns)
    if not have & {"label", "labels"}:
        return None
    return next((name for name, needed in TEXT_FORMATS.items() if have.issuperset(needed)), None)


def recognize_pair(columns: Iterable[str], /) -> str | None:
    """Return the format of rows with a query and documents, or None."""
    have = set(columns)
    return next((n for n, (q, p, _) in PAIR_FORMATS.items() if {q, p} <= have), None)


def _present(row: Row) -> set[str]:
    return {key for key, value in row.items() if value is not None and value not in ("", [])}


def labelled_text(row: Row, *, system: str | None = None) -> Conversation:
    """Return the text or conversation of a row.

    Args:
        row: Columns already renamed.
        system: Used where a conversation has no system message of its own.

    Raises:
        RowError: There is none, or a value is of the wrong kind.
    """
    have = _present(row)
    name = recognize_text(have | {"label"})
    if name is None:
        raise RowError(f"there is no text (it has: {', '.join(sorted(have)) or 'none'})")
    shared = {key: row[key] for key in {"system", "tools"} & have}
    if name == "query":
        messages = [{"role": "user", "content": _string(row["query"], "query")}]
        if "response" in have:
            text = _string(row["response"], "response")
            messages.append({"role": "assistant", "content": text})
        return conversation({"messages": messages, **shared}, system=system)
    return conversation({name: row[name], **shared}, system=system)


def documents(row: Row) -> Documents:
    """Return the query and the documents of a row.

    Raises:
        RowError: The query or its positive is missing, or a value is of the wrong kind.
    """
    have = _present(row)
    name = recognize_pair(have)
    if name is None:
        raise RowError(
            "there is no query with a positive document (it has: "
            f"{', '.join(sorted(have)) or 'none'})"
        )
    query, positive, negatives = PAIR_FORMATS[name]
    system = _string(row["system"], "system") if row.get("system") else None
    (asked,) = _texts(row[query], query, one=True)
    return Documents(
        query=asked if asked.system is not None else Text(asked.text, system),
        positives=tuple(_texts(row[positive], positive)),
        negatives=tuple(t for c in negatives if c in have for t in _texts(row[c], c)),
    )


def _texts(value: Any, column: str, *, one: bool = False) -> list[Text]:  # noqa: ANN401
    """Return the texts of a column: a string, a list of strings, messages, or a list of those."""
    if isinstance(value, str):
        return [Text(_string(value, column))]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) and not one:
            return [Text(_string(item, column)) for item in value]
        if all(isinstance(item, dict) for item in value):
            return [_from_messages(value)]
        if all(isinstance(item, list) for item in value) and not one:
            return [_from_messages(item) for item in value]
    many = "" if one else ", a list of texts or a list of conversations"
    raise RowError(f"{column!r} must be a text or a conversation{many}, found {value!r:.60}")


def _from_messages(messages: Sequence[Any]) -> Text:
    found = conversation({"messages": list(messages)}).messages
    system = " ".join(m["content"] for m in found if m["role"] in ("system", "developer"))
    rest = [m["content"] for m in found if m["role"] not in ("system", "developer")]
    if not any(rest):
        raise RowError("a conversation has no text beside its system message")
    return Text("\n".join(rest), system or None)


def _string(value: Any, column: str) -> str:  # noqa: ANN401
    if not isinstance(value, str) or not value:
        raise RowError(f"{column!r} must be a text, found {value!r:.60}")
    return value


def similarity(row: Row) -> Any:  # noqa: ANN401
    """Return the label of a pair as the row has it. Raises RowError where it has none."""
    value = next(
        (row[key] for key in ("label", "score", "labels") if row.get(key) is not None), None
    )
    if value is None:
        raise RowError("there is no 'label'")
    return value
