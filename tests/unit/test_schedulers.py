"""What a multi-turn scheduler answers, and what becomes of one that fails."""

import asyncio
import time

import pytest
from mcore_rlhf.rollout.turns import respond

from mcore_core.failure import RunFailure
from mcore_core.protocols import Turn


def turns(*numbers):
    return [Turn(row={"n": n}, messages=[], text="", number=1, finished=True) for n in numbers]


def tool(text):
    return [{"role": "tool", "content": text}]


@pytest.mark.parametrize("kind", ["plain", "coroutine", "object"])
def test_every_turn_is_asked_at_once(kind):
    def plain(turn):
        time.sleep(0.05)
        return tool(str(turn.row["n"])) if turn.row["n"] else None

    async def coroutine(turn):
        await asyncio.sleep(0.05)
        return tool(str(turn.row["n"])) if turn.row["n"] else []

    class Object:
        async def __call__(self, turn):
            return await coroutine(turn)

    scheduler = {"plain": plain, "coroutine": coroutine, "object": Object()}[kind]
    begin = time.perf_counter()
    found = respond(scheduler, turns(0, 1, 2, 3), 5)
    assert found == [None, tool("1"), tool("2"), tool("3")]
    assert time.perf_counter() - begin < (0.18 if kind != "plain" else 1)


def raises(turn):
    raise KeyError("answer")


async def hangs(turn):
    await asyncio.sleep(5)


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (raises, "KeyError: 'answer'"),
        (hangs, "TimeoutError: no answer in 0.05 s"),
        (lambda turn: "well", "TypeError: it returned 'well', and not a list of messages"),
        (lambda turn: {"role": "tool"}, "TypeError: it returned {'role': 'tool'}, and not"),
        (lambda turn: [{"role": "tool"}], "TypeError: a message without role or content"),
        (lambda turn: ["text"], "ValueError"),
    ],
)
def test_a_failure_names_the_row(scheduler, why):
    with pytest.raises(RunFailure) as failure:
        respond(scheduler, turns(7), 0.05)
    text = str(failure.value)
    assert "MC848" in text and why in text and 'row: {"n": 7}' in text
