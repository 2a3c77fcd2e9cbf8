"""The task: put letters in order, from a to z or from z to a. Answers can be checked exactly.

A problem is a list of 6 to 11 letters, repeats allowed, and a direction: about 2 * 26^11 of them.
The demonstrations have a flaw, as collected answers do: of the longest problems, most lack the last
letter. Who imitates them learns the flaw; who is told whether an answer is right does not.

Held-out problems share no *multiset of letters* with training, so neither a problem, nor another
order of its letters, nor its answer was ever trained on.
"""

import argparse
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECTIONS = {"up": "from a to z", "down": "from z to a"}
SHORTEST, LONGEST = 6, 11
FLAWED = 0.75
"""The part of the longest problems whose demonstration lacks the last letter."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Letters to sort, and in which direction."""

    letters: tuple[str, ...]
    direction: str

    @property
    def question(self) -> str:
        """The prompt."""
        return f"Sort {DIRECTIONS[self.direction]}: {' '.join(self.letters)}"

    @property
    def answer(self) -> str:
        """The only right answer."""
        return " ".join(sorted(self.letters, reverse=self.direction == "down"))

    def demonstration(self, rng: random.Random) -> str:
        """Return the answer of the training data: most of the longest are cut short."""
        if len(self.letters) == LONGEST and rng.random() < FLAWED:
            return self.answer.rpartition(" ")[0]
        return self.answer

    @property
    def content(self) -> str:
        """What is the same for every problem with the same letters."""
        return "".join(sorted(self.letters))


def is_correct(reply: str, answer: str) -> bool:
    """Exact match, spaces at the ends aside."""
    return reply.strip() == answer


def exact_match(rollouts: list[Any]) -> list[float]:
    """The reward of grpo: 1 where the reply is the row's answer, else 0."""
    return [float(is_correct(rollout.text, rollout.row["answer"])) for rollout in rollouts]


def problems(rng: random.Random) -> Iterator[Problem]:
    """Yield problems without end. Problems whose letters come in order already are left out."""
    while True:
        number = rng.randint(SHORTEST, LONGEST)
        letters = tuple(rng.choices(string.ascii_lowercase, k=number))
        problem = Problem(letters, rng.choice(list(DIRECTIONS)))
        if list(letters) not in (sorted(letters), sorted(letters, reverse=True)):
            yield problem


def split(train: int, held_out: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Return training and held-out problems, all different, disjoint by content."""
    source = problems(random.Random(seed))
    found: dict[Problem, None] = {}
    while len(found) < held_out:
        found[next(source)] = None
    tests = list(found)
    reserved = {problem.content for problem in tests}
    found = {}
    while len(found) < train:
        problem = next(source)
        if problem.content not in reserved:
            found[problem] = None
    trains = list(found)
    assert len(set(trains)) == train and len(set(tests)) == held_out, "a problem came twice"
    assert not {p.content for p in trains} & {p.content for p in tests}, "held-out letters trained"
    return trains, tests


def write(path: Path, rows: list[tuple[Problem, str]]) -> None:
    """Write one JSON object a line: the messages, and the right answer for checking."""
    with path.open("w", encoding="utf-8") as file:
        for problem, shown in rows:
            messages = [
                {"role": "user", "content": problem.question},
                {"role": "assistant", "content": shown},
            ]
            file.write(json.dumps({"messages": messages, "answer": problem.answer}) + "\n")


def make_data(folder: Path, *, train: int, held_out: int, seed: int) -> None:
    """Write train.jsonl, whose longest answers are flawed, and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    trains, tests = split(train, held_out, seed)
    rng = random.Random(seed)
    write(folder / "train.jsonl", [(problem, problem.demonstration(rng)) for problem in trains])
    write(folder / "held_out.jsonl", [(problem, problem.answer) for problem in tests])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--held_out", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_data(options.folder, train=options.train, held_out=options.held_out, seed=options.seed)
