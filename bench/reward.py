"""Rewards: completions a second through accuracy and format against TRL's, and slow judges at once.

    python bench/reward.py

A thousand completions of sums, a third of them right; both sides score the same texts and have
to agree wherever the definitions do. TRL's functions run in the main thread as its trainer calls
them. Then 256 completions through a coroutine reward that takes 100 ms for each: bound 1 s in all.
The last line is one JSON document.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

COUNT, SLOW, PAUSE, BOUND = 1000, 256, 0.1, 1.0


def completions(count: int) -> tuple[list[str], list[str]]:
    """Return texts and the solutions that they should have found."""
    rng = random.Random(0)
    texts, solutions = [], []
    for _ in range(count):
        a, b = rng.randint(1, 999), rng.randint(1, 999)
        said = a + b if rng.random() < 1 / 3 else a + b + rng.randint(1, 9)
        words = " ".join(rng.choice(("so", "then", "we", "add", "carry")) for _ in range(60))
        form = rng.choice(("\\boxed{%d}", "$%d$", "\\boxed{\\frac{%d}{1}}"))
        texts.append(f"<think>{words}</think>\n<answer>{form % said}</answer>")
        solutions.append(f"${a + b}$")
    return texts, solutions


def seconds(call: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Return the median time of a call, and what it gave."""
    taken, found = [], None
    for _ in range(times):
        begin = time.perf_counter()
        found = call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken), found


async def judge(rollouts: Sequence[Any], /) -> list[float]:
    """Score like a model behind HTTP: after a while."""
    await asyncio.sleep(PAUSE)
    return [1.0 for _ in rollouts]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=COUNT)
    options = parser.parse_args()
    from mcore_rewards.accuracy import Accuracy, _gold
    from mcore_rewards.form import think_answer
    from mcore_rlhf.grpo.rewards import Rewards
    from trl.rewards import accuracy_reward, think_format_reward

    from mcore_core.protocols import Rollout

    texts, solutions = completions(options.count)
    rollouts = [
        Rollout(row={"solution": s}, text=t, token_ids=(), finished=True, messages=[], step=1)
        for t, s in zip(texts, solutions, strict=True)
    ]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    ours = Rewards({"accuracy": Accuracy(), "format": think_answer}, 600.0)

    def mine() -> Any:  # noqa: ANN401
        _gold.cache_clear()
        return ours(rollouts).rewards_NF

    def theirs() -> Any:  # noqa: ANN401
        return list(zip(accuracy_reward(chats, solutions), think_format_reward(chats), strict=True))

    mine(), theirs()  # imports and caches of patterns
    took, rewards = seconds(mine)
    expected_s, expected = seconds(theirs)
    differing = sum(tuple(a) != tuple(b) for a, b in zip(rewards.tolist(), expected, strict=True))
    slow_s, judged = seconds(lambda: Rewards({"judge": judge}, 600.0)(rollouts[:SLOW]).rewards_NF)
    found = {
        "completions": options.count,
        "mcore_s": round(took, 3),
        "trl_s": round(expected_s, 3),
        "ratio": round(expected_s / took, 2),
        "right": sum(a == 1 for a, _ in expected),
        "differing": differing,
        "async_s": round(slow_s, 3),
        "async_completions": len(judged),
    }
    print(json.dumps(found))
    if slow_s > BOUND or differing:
        sys.exit(1)


if __name__ == "__main__":
    main()
