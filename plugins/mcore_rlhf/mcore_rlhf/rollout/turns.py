"""Conversations of several turns, tokens in and tokens out.

What the model wrote is never tokenized again. What a tool or an environment answers is rendered by
the chat template behind a stand-in for the model's turn, and only the text after it is tokenized.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from mcore_core.data.rows import Conversation
from mcore_core.data.template import Template
from mcore_core.errors import usage_error
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
        Exception: What the scheduler raised.
    """

    async def ask(turn: Turn) -> Any:  # noqa: ANN401
        if inspect.iscoroutinefunction(scheduler) or inspect.iscoroutinefunction(
            getattr(scheduler, "__call__", None)  # noqa: B004 - its kind matters, not its presence
        ):
            answer: Awaitable[Any] = scheduler(turn)
        else:
            answer = asyncio.to_thread(scheduler, turn)
        return await asyncio.wait_for(answer, timeout)

    async def ask_all() -> list[Any]:
        return list(await asyncio.gather(*(ask(turn) for turn in turns)))

    answers = asyncio.run(ask_all())
    return [[dict(m) for m in messages] if messages else None for messages in answers]
