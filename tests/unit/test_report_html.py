"""report.html: complete, self-contained, and right about what its curves show."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mcore_core.config.group import ConfigGroup
from mcore_core.config.kernel import kernel_config
from mcore_core.context import RunContext
from mcore_core.errors import usage_error
from mcore_core.parallel.topology import Layout
from mcore_core.report.html import render, write_report
from mcore_core.report.options import option_groups, show
from mcore_core.report.plots import draw
from mcore_core.report.record import Failure, ModelFacts, RunRecord, RunWarning, SavedCheckpoint
from mcore_core.report.series import Panel, panels, smooth, thin, ticks, value_range

VOID = {"meta", "link", "rect", "line", "circle", "polyline", "br"}


class Page(HTMLParser):
    """Checks nesting and collects what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.polylines: dict[str, list[str]] = {}
        self.panel = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {k: v or "" for k, v in attrs}
        self.links += [values[k] for k in ("src", "href", "srcset", "data") if k in values]
        if tag == "svg":
            self.panel = values["aria-label"]
            self.polylines[self.panel] = []
        if tag == "polyline":
            self.polylines[self.panel].append(values["class"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


class Recipe(ConfigGroup):
    title: ClassVar[str] = "DPO"
    beta: float = 0.1


def make_run(folder: Path, **options: Any) -> RunContext:
    return RunContext(
        config=kernel_config(Recipe, **options),
        output_dir=folder,
        layout=Layout(world=2, tp=2),
        world_size=2,
        train_iters=20,
        steps_per_epoch=10.0,
        plugins={"sft": {"package": "mcore-sft", "version": "0.1.0"}},
        data={"train": {"rows": 320, "dropped": {"too long": 2}}, "content_hash": "sha256:abc"},
        environment={"torch": "2.11.0", "device": "cpu"},
        step=20,
    )


def write_metrics(folder: Path) -> None:
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, 21):
            line = {"step": step, "loss": 4 / step, "lr": 1e-5, "grad_norm": 1.0, "tokens": 1000}
            line |= {"tokens_per_second": 100.0, "memory_gib": 1.5, "rewards/<mean>": 0.1 * step}
            file.write(json.dumps(line) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "eval/loss": 4.1 / step}) + "\n")


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_metrics(tmp_path)
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "weights").write_bytes(b"0" * 2048)
    run = make_run(tmp_path, lr=3e-4, beta=0.5, hub_token="hf_abc", model="a/<b>")
    record = RunRecord(
        started=0.0,
        step=20,
        tokens=20000,
        seconds=65.0,
        model=ModelFacts(name="models/<Small>", family="llama", parameters=135_000_000),
        checkpoints=[
            SavedCheckpoint(10, tmp_path / "checkpoint-10", 1.0),
            SavedCheckpoint(20, tmp_path / "checkpoint-20", 2.0),
        ],
        warnings=[RunWarning(3, "rows < 4 & odd")],
    )
    path = write_report(run, record)
    assert path == tmp_path / "report.html"
    assert not list(tmp_path.glob(".*"))
    return path.read_text()


def text_of(page: str) -> str:
    body = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def test_it_is_one_well_formed_file(page: str) -> None:
    assert Page(page).links == ["data:,"]
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")


def test_every_metric_has_a_curve(page: str) -> None:
    assert Page(page).polylines == {
        "loss by step": ["raw", "line", "eval"],
        "learning rate by step": ["line"],
        "gradient norm by step": ["raw", "line"],
        "tokens per second by step": ["raw", "line"],
        "peak memory by step": ["line"],
        "rewards/<mean> by step": ["raw", "line"],
    }


def test_it_tells_the_run(page: str) -> None:
    text = text_of(page)
    for part in (
        "done &lt;Small&gt; started",
        "steps 20 / 20 epochs 2 time 0:01:05 tokens 20K ranks 2 parameters 135M",
        "Warnings step 3 rows &lt; 4 &amp; odd",
        "model models/&lt;Small&gt; (llama), 135M parameters",
        "data 320 rows dropped 2 rows: 2 too long",
        "content hash sha256:abc",
        "checkpoint-10 10 1.0 s removed checkpoint-20 20 2.0 s 2.0 KiB",
        "layout 2 ranks: tp2 torch 2.11.0 device cpu plugin sft mcore-sft 0.1.0",
    ):
        assert part in text


def test_options_of_the_user_stand_out_and_secrets_are_hidden(page: str) -> None:
    assert "hf_abc" not in page
    given = re.search(r'<table class="options given">(.*?)</table>', page, re.S)
    assert given
    names = re.findall(r"<th><code>(\w+)</code></th><td><code>([^<]*)</code>", given[1])
    assert set(names) == {
        ("lr", "0.0003"),
        ("beta", "0.5"),
        ("hub_token", "(hidden)"),
        ("model", "a/&lt;b&gt;"),
    }
    folded = page.split("</table>", 2)[2]
    assert '<tr class="set"><th><code>lr</code></th>' in folded
    assert "<tr><th><code>log_interval</code></th><td><code>5</code></td></tr>" in folded


def test_a_failed_run_shows_the_error_and_how_far_it_got(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    try:
        raise RuntimeError("rank <3> is gone")
    except RuntimeError as error:
        failure = Failure.of(error)
    page = render(make_run(tmp_path), RunRecord(started=0.0, step=7, failure=failure))
    Page(page)
    text = text_of(page)
    assert "failed at step 7 of 20 after 0:00:00" in text
    assert "What went wrong RuntimeError: rank &lt;3&gt; is gone Traceback Traceback (most" in text


def test_a_users_mistake_has_no_traceback() -> None:
    failure = Failure.of(usage_error("MC801", "bad", "fix: good"))
    assert failure == Failure("error[MC801]: bad\n  fix: good", "")
    assert Failure.of(KeyboardInterrupt()) == Failure("interrupted from the keyboard", "")


def test_a_run_without_a_step_has_a_page_too(tmp_path: Path) -> None:
    page = render(make_run(tmp_path), RunRecord(started=0.0))
    Page(page)
    assert "No step was recorded. Run" in text_of(page)
    assert "None was saved. Options" in text_of(page)


def test_options_are_shown_as_typed() -> None:
    assert [show(v) for v in (None, True, 1e-5, "a b", "", "#x", ["a", 1], {"k": "v"})] == [
        "none",
        "true",
        "1e-05",
        "a b",
        '""',
        '"#x"',
        '["a", 1]',
        '{"k": "v"}',
    ]
    groups = option_groups(kernel_config(Recipe, beta=0.5))
    assert [(o.name, o.value, o.given) for o in groups["Recipe and plugins"]] == [
        ("beta", "0.5", True)
    ]
    assert "Training" in groups


def test_panels_pair_evaluations_with_training() -> None:
    found = panels(
        [
            {"step": 1, "loss": 2.0, "b": 1, "tokens": 9, "note": "x", "grad_norm": None},
            {"step": 1, "eval/loss": 3.0, "eval/only": 1.0},
        ]
    )
    assert [(p.name, p.train, p.evaluation) for p in found] == [
        ("loss", [(1, 2.0)], [(1, 3.0)]),
        ("b", [(1, 1.0)], []),
        ("only", [], [(1, 1.0)]),
    ]


def test_smoothing_has_no_startup_bias_and_averages() -> None:
    assert smooth([(1, 5.0), (2, 5.0), (3, 5.0)], span=10) == [
        (1, pytest.approx(5.0)),
        (2, pytest.approx(5.0)),
        (3, pytest.approx(5.0)),
    ]
    assert smooth([(1, 0.0), (2, 3.0)], span=2)[1] == (2, pytest.approx(2.0))
    assert smooth([(1, 0.0), (2, 3.0)], span=1) == [(1, 0.0), (2, 3.0)]


def test_thinning_keeps_ends_and_extremes() -> None:
    points = [(i, 0.0) for i in range(10000)]
    points[5000], points[7000] = (5000, 9.0), (7000, -9.0)
    kept = thin(points, 500)
    assert len(kept) <= 502
    assert {points[0], points[-1], points[5000], points[7000]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:500], 500) == points[:500]


def test_ranges_cut_spikes_only() -> None:
    calm = [1 + i / 1000 for i in range(1000)]
    low, high = value_range([*calm, 500.0])
    assert 0 < low < 1.1
    assert 2.0 <= high < 3.0
    assert value_range([0.0, 10.0]) == (0.0, pytest.approx(10.6))
    assert value_range([2.0, 2.0]) == (1.8, 2.2)
    assert value_range([0.0]) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (0.9, 3.2, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (1.0, 1.0, [1.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, want: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(want)


def test_values_that_are_not_finite_are_marked_and_told() -> None:
    train = [(i, 1.0 / i) for i in range(1, 30)] + [(30, math.nan), (31, math.inf)]
    picture = draw(Panel("loss", "loss", "", train, [], smooth=True), (1, 31))
    assert picture
    assert picture.warning == "2 not finite, first at step 30"
    assert picture.svg.count('class="lost"') == 2
    assert "nan" not in picture.svg
    assert draw(Panel("loss", "loss", "", [(1, math.nan)], [], smooth=True), (1, 2)) is None


def test_a_spike_is_cut_and_does_not_move_the_smoothed_line() -> None:
    train = [(i, 1.0 + (i % 2) / 10) for i in range(1, 201)]
    train[99] = (100, 1e6)
    picture = draw(Panel("grad_norm", "gradient norm", "", train, [], smooth=True), (1, 200))
    assert picture
    assert picture.note == "1 outside the picture"
    assert picture.last == "1.04"
    line = re.search(r'class="line" points="([^"]*)"', picture.svg)
    raw = re.search(r'class="raw" points="([^"]*)"', picture.svg)
    assert line
    assert raw
    assert min(float(p.split(",")[1]) for p in line[1].split()) > 10
    assert min(float(p.split(",")[1]) for p in raw[1].split()) == -204.0


def test_a_single_step_is_a_dot() -> None:
    picture = draw(Panel("loss", "loss", "", [(1, 2.0)], [], smooth=True), (1, 1))
    assert picture
    assert picture.svg.count('class="dot"') == 1
    assert "polyline" not in picture.svg
