"""Completions in the console, in their file and in the report."""

import io
import json
import math

import pytest

from mcore_core.report import completions, jsonl


def row(reward, text="text", **more):
    known = None if reward is None or math.isnan(reward) else reward
    rewards = {"accuracy": known, "format": None}
    return {
        "prompt": "what?",
        "completion": text,
        "reward": reward,
        "rewards": rewards,
        "finished": True,
        **more,
    }


def shown(rows):
    stream = io.StringIO()
    completions.show(stream, 7, rows)
    return stream.getvalue()


def test_the_console_has_the_best_the_worst_and_one_between():
    rows = [row(float(i), f"said {i}") for i in (3, 1, 4, 0, 2)]
    text = shown(rows)
    assert "completions for step 7" in text
    found = [f"said {i}" for i in range(5) if f"said {i}" in text]
    assert found == ["said 0", "said 2", "said 4"]
    assert text.index("said 4") < text.index("said 2") < text.index("said 0")
    assert "accuracy 4.000" in text and "format -" in text


def test_what_a_model_writes_is_text_and_nothing_else():
    """Markup, long texts, nothing at all, and what was cut."""
    text = shown(
        [row(1.0, "[bold]x[/bold] [/]"), row(0.5, "y" * 500, finished=False), row(0.0, "")]
    )
    assert "[bold]x[/bold] [/]" in text
    assert text.count("y") < 200
    assert "[cut]" in text and "(blank)" in text


def test_what_nothing_could_score_comes_last():
    rows = [row(math.nan, "none"), row(-2.0, "low"), row(1.0, "high"), row(None, "also none")]
    assert [r["completion"] for r in completions.picked(rows, 4)][:2] == ["high", "low"]
    assert "nan" not in shown(rows[:3])


def test_the_report_follows_a_prompt_over_the_run(tmp_path):
    path = tmp_path / completions.FILE_NAME
    file = jsonl.LaterFile(path)
    for step in range(1, 31):
        completions.write(file, step, [row(step + i / 10, f"s{step}.{i}") for i in range(6)])
    completions.write(file, 31, [row(math.nan, "unscored", finished=False)])
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 181 and lines[-1]["reward"] is None
    found = completions.samples(path)
    steps = sorted({s.step for s in found})
    assert len(steps) == completions.IN_REPORT and steps[0] == 1 and steps[-1] == 31
    first = [s for s in found if s.step == 1]
    assert [s.reward for s in first] == ["1.500", "1.300", "1.200", "1.000"]
    assert first[0].parts == ("accuracy 1.500", "format -")
    assert (found[-1].completion, found[-1].reward, found[-1].cut) == ("unscored", "-", True)
    assert completions.samples(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("number", [2, 3, 4])
def test_fewer_than_asked_are_all(number):
    assert len(completions.picked([row(1.0), row(2.0)], number)) == 2
