"""The quickstart: its task is honest, and a model learns it through `mcore run`."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture
def task(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import task

    yield task
    sys.modules.pop("task")


def test_the_answer_is_what_the_question_asks(task):
    up = task.Problem(("k", "d", "z", "a", "d"), "up")
    assert (up.question, up.answer) == ("Sort from a to z: k d z a d", "a d d k z")
    down = task.Problem(up.letters, "down")
    assert (down.question, down.answer) == ("Sort from z to a: k d z a d", "z k d d a")
    assert up.content == down.content == "addkz"


def test_only_the_exact_answer_is_right(task):
    assert task.is_correct(" a d k z\n", "a d k z")
    for wrong in ("", "a d k", "a d k z z", "adkz", "z k d a", "a d k z."):
        assert not task.is_correct(wrong, "a d k z")


def test_copying_the_question_never_answers_it(task):
    source = task.problems(random.Random(1))
    for problem in (next(source) for _ in range(2000)):
        letters = " ".join(problem.letters)
        assert problem.answer not in (letters, letters[::-1])


def test_held_out_letters_are_not_trained_on(task, tmp_path):
    task.make_data(tmp_path, train=12_000, held_out=400, seed=3)
    rows = {
        name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    assert {name: len(found) for name, found in rows.items()} == {"train": 12_000, "held_out": 400}
    questions = {row["messages"][0]["content"] for found in rows.values() for row in found}
    assert len(questions) == 12_400
    letters = {name: {"".join(sorted(r["answer"])) for r in found} for name, found in rows.items()}
    assert not letters["train"] & letters["held_out"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_learns_to_sort_and_then_what_demonstrations_do_not_show(tmp_path, seed):
    begin = time.monotonic()
    command = [sys.executable, str(SCRIPTS / "run.py"), "--folder", str(tmp_path)]
    command += ["--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    assert done.returncode == 0, done.stderr[-4000:]
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(
        r"quickstart: before (\d+\.\d)% sft (\d+\.\d)% grpo (\d+\.\d)% \(held-out exact match\)",
        last,
    )
    assert found is not None, last
    assert float(found[1]) < 5
    assert float(found[2]) >= 80
    assert float(found[3]) >= float(found[2]) + 10
    assert "\n$ mcore run --plugin sft --model " in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"data", "model", "sft", "grpo"}
    assert (tmp_path / "sft" / "report.html").is_file()
    assert seconds < 360, f"the quickstart took {seconds:.0f} s"
