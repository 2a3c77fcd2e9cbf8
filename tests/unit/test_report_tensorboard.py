"""What lands in TensorBoard's event files, by option."""

from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from mcore_core.config.logging import LoggingConfig
from mcore_core.report.tensorboard import TensorBoardReport

LINE = {
    "step": 1,
    "epoch": 0.5,
    "loss": 2.5,
    "lr": 0.25,
    "grad_norm": 1.5,
    "tokens": 100,
    "tokens_per_second": 200.0,
    "seconds": 0.5,
    "memory_gib": 1.0,
    "rewards/mean": 0.125,
}


def events(folder: Path) -> list[Any]:
    (path,) = folder.iterdir()
    return list(LegacyEventFileLoader(str(path)).Load())


def written(folder: Path, **options: Any) -> dict[tuple[int, str], float]:
    board = TensorBoardReport(folder, LoggingConfig(**options))
    for step in (1, 2, 3, 4):
        board.step({**LINE, "step": step})
    board.evaluation({"step": 4, "epoch": 2.0, "eval/loss": 2.0, "eval/perplexity": 7.389056})
    board.close()
    return {(e.step, v.tag): v.simple_value for e in events(folder) for v in e.summary.value}


def test_every_value_has_its_tag(tmp_path: Path) -> None:
    values = written(tmp_path / "runs")
    assert {tag: v for (step, tag), v in values.items() if step == 1} == {
        "train/epoch": 0.5,
        "train/loss": 2.5,
        "train/lr": 0.25,
        "train/grad_norm": 1.5,
        "train/tokens": 100.0,
        "train/tokens_per_second": 200.0,
        "timers/seconds": 0.5,
        "memory/peak_gib": 1.0,
        "rewards/mean": 0.125,
    }
    assert values[4, "eval/loss"] == 2.0
    assert values[4, "eval/perplexity"] == pytest.approx(7.389056)


@pytest.mark.parametrize(
    ("option", "value", "tag"),
    [
        ("no_log_learning_rate_to_tensorboard", True, "train/lr"),
        ("log_timers_to_tensorboard", False, "timers/seconds"),
        ("log_memory_to_tensorboard", False, "memory/peak_gib"),
        ("log_validation_ppl_to_tensorboard", False, "eval/perplexity"),
    ],
)
def test_each_switch_removes_its_tag(tmp_path: Path, option: str, value: bool, tag: str) -> None:
    every = {t for _, t in written(tmp_path / "all")}
    assert every - {t for _, t in written(tmp_path / "less", **{option: value})} == {tag}


def test_the_interval_thins_steps_but_not_evaluations(tmp_path: Path) -> None:
    values = written(tmp_path / "runs", tensorboard_log_interval=3, tensorboard_queue_size=1)
    assert {step for step, tag in values if tag == "train/loss"} == {3}
    assert (4, "eval/loss") in values


def test_a_resume_tells_tensorboard_to_forget_later_steps(tmp_path: Path) -> None:
    board = TensorBoardReport(tmp_path, LoggingConfig(), resumed_step=7)
    board.close()
    starts = [e.step for e in events(tmp_path) if e.session_log.status == 1]
    assert starts == [8]
