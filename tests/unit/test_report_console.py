"""The exact texts of the console, on a terminal and elsewhere."""

import io
import math
from pathlib import Path

import pytest

from mcore_core.protocols import StepResult
from mcore_core.report.console import ConsoleReport
from mcore_core.report.format import count, duration, gib, metric, short_count, size
from mcore_core.report.meters import Interval, Means, TimeLeft

GIB = 1024**3


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def means(**metrics: float) -> Means:
    return Means(loss=2.10341, grad_norm=1.234, lr=1e-5, tokens_per_second=1234.4, metrics=metrics)


def result(loss: float, *, tokens: int = 100, seconds: float = 0.5, lr: float = 1e-5) -> StepResult:
    return StepResult(
        loss=loss, grad_norm=2 * loss, lr=lr, tokens=tokens, seconds=seconds, metrics={}
    )


def test_plain_lines_are_exact() -> None:
    stream = io.StringIO()
    console = ConsoleReport(stream, total=200)
    console.summary("mcore run", [("data", "12 rows"), ("", "dropped 1 row: 1 too long")])
    console.advance(1, 3.0, 192.0)
    console.log(5, means(), int(1.2 * GIB), 192.0)
    console.log(10, means(reward=0.5), None, math.nan)
    console.evaluation(10, {"eval/loss": 1.87321, "eval/mean_token_accuracy": 0.61})
    console.checkpoint(10, Path("out/checkpoint-10"), 3.21)
    console.warning("the disk is nearly full")
    console.close()
    assert stream.getvalue().splitlines() == [
        "mcore run",
        "  data        12 rows",
        "              dropped 1 row: 1 too long",
        "step 5/200  loss 2.1034  lr 1.00e-05  grad_norm 1.23  tokens/s 1234  mem 1.2 GiB"
        "  eta 0:03:12",
        "step 10/200  loss 2.1034  lr 1.00e-05  grad_norm 1.23  tokens/s 1234  eta ?"
        "  reward 0.5000",
        "eval at step 10  loss 1.8732  mean_token_accuracy 0.6100",
        "saved out/checkpoint-10 at step 10 in 3.2 s",
        "warning: the disk is nearly full",
    ]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    console = ConsoleReport(stream, total=200)
    console.advance(1, 3.0, 1.0)
    console.warning("x")
    assert stream.getvalue() == "warning: x\n"


def test_a_terminal_gets_a_bar_in_colour() -> None:
    stream = Terminal()
    console = ConsoleReport(stream, total=200)
    console.advance(50, 2.5, 192.0)
    console.close()
    text = stream.getvalue()
    assert "step 50/200" in text
    assert " 25%" in text
    assert "loss 2.5000" in text
    assert "0:03:12" in text
    assert "\x1b[35m" in text


def test_no_color_leaves_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    console = ConsoleReport(stream, total=200)
    console.checkpoint(10, Path("out/checkpoint-10"), 3.21)
    console.warning("x")
    assert stream.getvalue() == "saved out/checkpoint-10 at step 10 in 3.2 s\nwarning: x\n"


def test_lines_on_a_terminal_break_between_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    console = ConsoleReport(stream, total=200)
    console.log(5, means(mean_token_accuracy=0.5), int(1.2 * GIB), 192.0)
    plain = stream.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").replace("\u00a0", " ")
    assert [line.rstrip() for line in plain.splitlines()] == [
        "step 5/200  loss 2.1034  lr 1.00e-05  grad_norm 1.23  tokens/s 1234  mem 1.2 GiB",
        "  mean_token_accuracy 0.5000",
    ]


def test_square_brackets_are_text() -> None:
    stream = Terminal()
    ConsoleReport(stream, total=1).warning("[red]rows[/red] [3]")
    assert "[red]rows[/red] [3]" in stream.getvalue()


def test_means_are_over_the_steps_since_the_last_line() -> None:
    interval = Interval()
    interval.add(result(1.0, lr=1e-5), {"a": 1.0})
    interval.add(result(3.0, tokens=300, seconds=1.5, lr=2e-5), {"a": 2.0, "b": 7.0})
    first = interval.take()
    assert first == Means(2.0, 4.0, 2e-5, 200.0, {"a": 1.5, "b": 7.0}, 2)
    interval.add(result(math.nan), {})
    second = interval.take()
    assert math.isnan(second.loss)
    assert second.metrics == {}


def test_time_left_forgets_the_first_step() -> None:
    left = TimeLeft(window=3)
    assert math.isnan(left.estimate(10))
    left.add(60.0)
    assert left.estimate(2) == 120.0
    left.add(1.0)
    assert left.estimate(10) == 10.0
    for seconds in (2.0, 3.0, 4.0):
        left.add(seconds)
    assert left.estimate(10) == 30.0
    assert left.estimate(-1) == 0.0


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (count(1234567), "1,234,567"),
        (short_count(999), "999"),
        (short_count(1234), "1.23K"),
        (short_count(134515008), "135M"),
        (short_count(999_900_000), "1000M"),
        (short_count(7.62e9), "7.62B"),
        (gib(1.25 * GIB), "1.2 GiB"),
        (size(812), "812 B"),
        (size(3.4 * 1024**2), "3.4 MiB"),
        (size(5 * 1024**4), "5.0 TiB"),
        (duration(192.4), "0:03:12"),
        (duration(3661), "1:01:01"),
        (duration(90000), "1d 01:00:00"),
        (duration(math.inf), "?"),
        (metric("loss", 2.10341), "2.1034"),
        (metric("loss", 1e-7), "1.00e-07"),
        (metric("loss", math.nan), "nan"),
        (metric("loss", 0.0), "0.0000"),
        (metric("lr", 3e-4), "3.00e-04"),
        (metric("grad_norm", 12.345), "12.35"),
        (metric("grad_norm", 1e6), "1.00e+06"),
    ],
)
def test_numbers(got: str, want: str) -> None:
    assert got == want
