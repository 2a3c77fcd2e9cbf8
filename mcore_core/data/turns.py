"""Where an assistant's turn stands in a rendered conversation, by comparing prefixes.

For the assistant turn i, `before` is the rendering of the messages before it with the generation
prompt (what the model is given at inference) and `after` that of the messages up to it. Both must
be prefixes of the whole rendering; the text between them is what the model has to write. In turns
before the last a template may leave out markup that it writes while a turn is the last one (Qwen3:
an empty think block): then what remains of `after` must stand where the whole rendering departs
from `before`. Where more than markup is left out (Qwen3: earlier thinking), or anything else
differs, it is an error that shows where the renderings part.
"""

import re
from typing import Protocol

from mcore_core.data.loss_scale import Span
from mcore_core.data.rows import Conversation
from mcore_core.errors import UsageError, usage_error

MARKUP = re.compile(r"<[^<>\n]*>|\s+")


class Render(Protocol):
    """Renders the first messages of a conversation."""

    def __call__(self, conversation: Conversation, stop: int, *, prompt: bool = False) -> str:
        """Return the text of messages [0, stop), with the start of an answer if `prompt`."""


def turn_span(render: Render, conversation: Conversation, text: str, i: int) -> Span:
    """Return where the assistant turn `i` stands in the whole rendering.

    Raises:
        UsageError: It is ambiguous.
    """
    before = render(conversation, i, prompt=True)
    after = text if i + 1 == len(conversation.messages) else render(conversation, i + 1)
    if text.startswith(before) and text.startswith(after) and len(before) <= len(after):
        return len(before), len(after)
    start = common(before, text)
    opened = before.rfind("<", 0, start)
    if ">" not in before[opened:start]:  # they part within a tag: <think> and <tool_call>
        start = max(opened, 0)
    last = all(m["role"] != "assistant" for m in conversation.messages[i + 1 :])
    if not last and start >= len(render(conversation, i)):
        at = start
        while text[:start] == after[:start] and at < len(after):
            if text.startswith(after[at:], start):
                return start, start + len(after) - at
            markup = MARKUP.match(after, at)
            if markup is None:
                break
            at = markup.end()
    shown = after if text.startswith(before) else before
    at = common(shown, text)
    raise ambiguous(
        f"message {i} (assistant) is not rendered alone as within the whole conversation",
        f"alone:  ...{shown[max(0, at - 40) : at + 50]!r}",
        f"within: ...{text[max(0, at - 40) : at + 50]!r}",
    )


def ambiguous(*evidence: str) -> UsageError:
    """Return the error of a template that cannot be masked."""
    return usage_error(
        "MC412",
        "the chat template cannot be masked: which tokens the assistant writes is ambiguous",
        *evidence,
        "fix: mark the assistant's turns with {% generation %} in a --chat_template FILE, or "
        "--loss_scale last_round to train only the last answer, or --loss_scale all",
    )


def common(a: str, b: str) -> int:
    """Return how many characters at their beginnings are equal."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
