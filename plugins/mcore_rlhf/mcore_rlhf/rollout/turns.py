"""Conversations of several turns, tokens in and tokens out.

What the model wrote is never tokenized again. What a tool or an environment answers is rendered by
the chat template behind a stand-in for the model's turn, and only the text after it is tokenized.
"""

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from mcore_core.data.rows import Conversation
from mcore_core.data.template import Template
from mcore_core.errors import usage_error
from mcore_core.failure import RunFailure
from mcore_core.protocols import Turn

MARK = "\u2042mcore\u2042"
"""Stands for the model's turn; no template changes it."""

type Messages = Sequence[Mapping[str, Any]]


class Continuation:
    """Turns the messages after a turn of the model into the tokens that follow its own."""

    def __init__(self, template: Template) -> None:
        self._template = template

    def __call__(
        self, messages: Messages, tools: Sequence[Any] | None, last: int | None
    ) -> list[int]:
        """Return the token ids.

        Args:
            messages: What was answered; their roles are user or tool.
            tools: The row's tools, which some templates write.
            last: The token that the model ended with; None where it wrote none.

        Raises:
            UsageError: The template does not render the conversation turn by turn.
        """
        stand_in = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": MARK},
            *(dict(message) for message in messages),
        ]
        text = self._template.render_prompt(
            Conversation(messages=tuple(stand_in), tools=None if tools is None else tuple(tools))
        )
        if text.count(MARK) != 1:
            raise usage_error(
                "MC347",
                "the chat template does not keep the model's turn as it was written",
                f"it renders {text[-200:]!r}",
                "fix: --chat_template FILE with a template that renders each turn by itself",
            )
        rest = text.partition(MARK)[2]
        tokenizer = self._template.tokenizer
        ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"]
        if last is not None and ids and ids[0] == last:
            ids = ids[1:]  # the model has written its end-of-turn token itself
        return ids


def respond(
    scheduler: Callable[[Turn], Any], turns: Sequence[Turn], timeout: float
) -> list[list[dict[str, Any]] | None]:
    """Ask a scheduler about every turn, all at once; None ends a conversation.

    Raises:
        RunFailure: It raised, gave no answer in `timeout` seconds, or something else than messages.
    """

    async def ask(turn: Turn) -> Any:  # noqa: ANN401
        if inspect.iscoroutinefunction(scheduler) or inspect.iscoroutinefunction(
            getattr(scheduler, "__call__", None)  # noqa: B004 - its kind matters, not its presence
        ):
            answer: Awaitable[Any] = scheduler(turn)
        else:
            answer = asyncio.to_thread(scheduler, turn)
        try:
            return _messages(await asyncio.wait_for(answer, timeout))
        except TimeoutError as error:
            why = str(error) or f"no answer in {timeout:g} s"
            raise _failed(turn, f"TimeoutError: {why}") from error
        except Exception as error:
            raise _failed(turn, f"{type(error).__name__}: {error}") from error

    async def ask_all() -> list[list[dict[str, Any]] | None]:
        return list(await asyncio.gather(*(ask(turn) for turn in turns)))

    return asyncio.run(ask_all())


def _messages(answer: Any) -> list[dict[str, Any]] | None:  # noqa: ANN401
    """Return the messages as dicts, None where there are none; raises TypeError."""
    if not answer:
        return None
    if isinstance(answer, str | Mapping):
        raise TypeError(f"it returned {answer!r:.100}, and not a list of messages")
    messages = [dict(message) for message in answer]
    for message in messages:
        if "role" not in message or "content" not in message:
            raise TypeError(f"a message without role or content: {message!r:.100}")
    return messages


def _failed(turn: Turn, why: str) -> RunFailure:
    row = json.dumps(turn.row, default=str, ensure_ascii=False)
    return RunFailure(
        "MC848",
        f"the multi-turn scheduler failed after turn {turn.number} of a conversation",
        why,
        f"row: {row if len(row) <= 200 else row[:200] + ' ...'}",
        "fix: correct the scheduler; it returns a list of messages, or None at the end",
    )
