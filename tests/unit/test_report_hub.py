"""The hub: what each sink is told, and that a broken sink never stops a run."""

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcore_core.component import Catalogue, Component
from mcore_core.config.kernel import kernel_config
from mcore_core.context import RunContext
from mcore_core.errors import UsageError, usage_error
from mcore_core.parallel.topology import Layout
from mcore_core.protocols import Reporter, StepResult
from mcore_core.report.external import reporter_problems
from mcore_core.report.hub import NullReporters, Reporters, build_reporters
from mcore_core.report.record import ModelFacts

GIB = 1024**3


class Memory:
    """A reporter that remembers."""

    built: "list[Memory]" = []  # noqa: RUF012

    def __init__(self, run: RunContext) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = False
        Memory.built.append(self)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed = True


class Offline(Memory):
    """A reporter without a network."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError(f"no route to host at step {step}")


class Unconfigured(Memory):
    def __init__(self, run: RunContext) -> None:
        raise usage_error("MC999", "no key", "fix: give one")


class Broken(Memory):
    """A reporter that cannot be opened."""

    def __init__(self, run: RunContext) -> None:
        raise RuntimeError("the socket is taken")


class Elsewhere(Memory):
    """A reporter that had to change its plan, and says where the run is to be seen."""

    notes = ("no key; this run is recorded offline",)
    where = "tracker sync here"


def catalogue() -> Catalogue[type[Reporter]]:
    found: Catalogue[type[Reporter]] = Catalogue("reporter")
    for name in ("Memory", "Offline", "Unconfigured", "Broken", "Elsewhere"):
        found.add("test", Component(name.lower(), f"{__name__}:{name}"))
    found.add("test", Component("wandb", "not_installed_here:Wandb"))
    return found


def make_run(folder: Path, *, iters: int = 4, rank: int = 0, **options: object) -> RunContext:
    defaults: dict[str, object] = {
        "micro_batch_size": 2,
        "global_batch_size": 16,
        "log_interval": 2,
    }
    return RunContext(
        config=kernel_config(**{**defaults, **options}),
        output_dir=folder,
        layout=Layout(world=4, tp=2),
        rank=rank,
        world_size=4,
        train_iters=iters,
        steps_per_epoch=8.0,
        data={"rows": 1200, "packs": 32, "dropped": {"too long": 3, "malformed": 1}},
        environment={"device": "cpu"},
    )


def result(loss: float, metrics: Mapping[str, float] | None = None) -> StepResult:
    return StepResult(
        loss=loss, grad_norm=1.5, lr=1e-5, tokens=100, seconds=0.5, metrics=metrics or {}
    )


def train(hub: Reporters, run: RunContext, steps: range) -> list[Mapping[str, float] | None]:
    logged = []
    for step in steps:
        run.step = step
        logged.append(hub.step(run, result(float(step), {"accuracy": 0.5}), {"entropy": 1.0}))
    return logged


def test_a_whole_run(tmp_path: Path) -> None:
    stream, now, run = io.StringIO(), [0.0], make_run(tmp_path)
    hub = Reporters(
        run, ["memory"], catalogue(), memory=lambda: GIB, stream=stream, clock=lambda: now[0]
    )
    model = ModelFacts(
        name="models/small",
        family="llama",
        parameters=134515008,
        trainable=4884480,
        precision="bf16",
    )
    hub.begin(run, model)
    logged = train(hub, run, range(1, 5))
    hub.evaluation(4, {"loss": 1.25})
    saved = tmp_path / "checkpoint-4"
    saved.mkdir()
    (saved / "config.json").write_text("{}")
    (saved / "model.safetensors").write_text("")
    hub.checkpoint(4, saved, 0.25)
    hub.warn_once("a", "look")
    hub.warn_once("a", "look")
    now[0] = 61.0
    hub.end()
    hub.end()
    assert stream.getvalue().splitlines() == [
        "mcore run",
        "  model       models/small (llama), 135M parameters, 4.88M trainable (3.6%)",
        "  precision   bf16",
        "  data        1,200 rows, 32 packs",
        "              dropped 4 rows: 3 too long, 1 malformed",
        "  batch       16 = 2 a micro-batch x 2 data-parallel x 4 accumulated",
        "  steps       4 (0.5 epochs)",
        "  layout      4 ranks: tp2+dp2, cpu",
        f"  output      {tmp_path}",
        "step 2/4  loss 1.5000  lr 1.00e-05  grad_norm 1.50  tokens/s 200  mem 1.0 GiB"
        "  eta 0:00:01  accuracy 0.5000  entropy 1.0000",
        "step 4/4  loss 3.5000  lr 1.00e-05  grad_norm 1.50  tokens/s 200  mem 1.0 GiB"
        "  eta 0:00:00  accuracy 0.5000  entropy 1.0000",
        "eval at step 4  loss 1.2500",
        f"saved {saved} at step 4 in 0.2 s",
        "warning: look",
        "done: 4 steps in 0:01:01, 400 tokens",
        f"  checkpoint  {saved}",
        f"  report      {tmp_path}/report.html",
        f"  metrics     {tmp_path}/metrics.jsonl",
        f"  model       {saved} (Hugging Face safetensors)",
        f'  load it     AutoModelForCausalLM.from_pretrained("{saved}")',
        f"  serve it    vllm serve {saved}",
    ]
    means = {
        "loss": 3.5,
        "lr": 1e-5,
        "grad_norm": 1.5,
        "tokens_per_second": 200.0,
        "epoch": 0.5,
        "memory_gib": 1.0,
        "accuracy": 0.5,
        "entropy": 1.0,
    }
    assert logged[0] is None
    assert logged[3] == means
    sink = Memory.built[-1]
    assert [step for step, _ in sink.logged] == [2, 4, 4]
    assert sink.logged[1:] == [(4, means), (4, {"eval/loss": 1.25})]
    assert sink.closed
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "step": 1,
        "epoch": 0.125,
        "loss": 1.0,
        "lr": 1e-5,
        "grad_norm": 1.5,
        "tokens": 100,
        "tokens_per_second": 200.0,
        "seconds": 0.5,
        "memory_gib": 1.0,
        "accuracy": 0.5,
        "entropy": 1.0,
    }
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 4]
    assert lines[4] == {"step": 4, "epoch": 0.5, "eval/loss": 1.25}


def test_the_last_step_is_logged_whatever_the_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path, iters=3)
    hub = Reporters(run, [], catalogue(), stream=io.StringIO())
    hub.begin(run)
    assert [m and m["loss"] for m in train(hub, run, range(1, 4))] == [None, 1.5, 3.0]


def test_a_resumed_run_repeats_no_step(tmp_path: Path) -> None:
    first = make_run(tmp_path)
    hub = Reporters(first, [], catalogue(), stream=io.StringIO())
    hub.begin(first)
    train(hub, first, range(1, 4))
    stream, run = io.StringIO(), make_run(tmp_path)
    run.step = 2
    hub = Reporters(run, [], catalogue(), stream=stream)
    hub.begin(run)
    assert "  steps       4 (0.5 epochs), resumed after step 2\n" in stream.getvalue()
    train(hub, run, range(3, 5))
    hub.end()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(x)["step"] for x in lines] == [1, 2, 3, 4]


def test_a_reporter_without_network_warns_once_a_minute(tmp_path: Path) -> None:
    stream, now, run = io.StringIO(), [0.0], make_run(tmp_path, log_interval=1, iters=9)
    hub = Reporters(run, ["offline", "memory"], catalogue(), stream=stream, clock=lambda: now[0])
    hub.begin(run)
    train(hub, run, range(1, 4))
    now[0] = 59.9
    train(hub, run, range(4, 5))
    now[0] = 60.0
    train(hub, run, range(5, 7))
    warnings = [x for x in stream.getvalue().splitlines() if x.startswith("warning")]
    assert warnings == [
        "warning: offline: ConnectionError: no route to host at step 1; training goes on",
        "warning: offline: ConnectionError: no route to host at step 5; training goes on",
    ]
    assert [step for step, _ in Memory.built[-1].logged] == [1, 2, 3, 4, 5, 6]


def test_an_unwritable_folder_warns_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    stream, run = io.StringIO(), make_run(tmp_path / "file" / "run")
    hub = Reporters(run, ["memory"], catalogue(), stream=stream)
    hub.begin(run)
    train(hub, run, range(1, 5))
    hub.end()
    text = stream.getvalue()
    for sink in ("metrics.jsonl", "tensorboard", "report.html"):
        assert text.count(f"warning: {sink}: NotADirectoryError: ") == 1
    assert "step 4/4  loss 3.5000" in text
    assert Memory.built[-1].logged[-1][0] == 4


def test_a_console_that_is_gone_costs_nothing(tmp_path: Path) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    run = make_run(tmp_path)
    hub = Reporters(run, ["offline"], catalogue(), stream=Gone())
    hub.begin(run)
    train(hub, run, range(1, 5))
    hub.end()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert [w.step for w in hub.record.warnings] == [2]


def test_memory_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    def broken() -> int:
        raise RuntimeError("no counter")

    stream, run = io.StringIO(), make_run(tmp_path)
    hub = Reporters(run, [], catalogue(), memory=broken, stream=stream)
    hub.begin(run)
    train(hub, run, range(1, 5))
    text = stream.getvalue()
    assert text.count("warning: memory cannot be read and is left out: no counter") == 1
    assert "tokens/s 200  eta" in text


def test_a_failure_says_how_to_continue(tmp_path: Path) -> None:
    stream, run = io.StringIO(), make_run(tmp_path, iters=9)
    hub = Reporters(run, [], catalogue(), stream=stream, clock=lambda: 0.0)
    hub.begin(run)
    train(hub, run, range(1, 4))
    (tmp_path / "checkpoint-2").mkdir()
    hub.checkpoint(2, tmp_path / "checkpoint-2", 1.0)
    hub.end(RuntimeError("rank 3 is gone"))
    assert stream.getvalue().splitlines()[-5:] == [
        "failed at step 3 of 9 after 0:00:00",
        f"  checkpoint  {tmp_path}/checkpoint-2",
        f"  report      {tmp_path}/report.html",
        f"  metrics     {tmp_path}/metrics.jsonl",
        f"  continue    mcore run {tmp_path}/run.yaml --load {tmp_path}",
    ]
    assert "RuntimeError: rank 3 is gone" in (tmp_path / "report.html").read_text()


def test_a_run_that_was_asked_to_stop(tmp_path: Path) -> None:
    stream, run = io.StringIO(), make_run(tmp_path, iters=9)
    hub = Reporters(run, [], catalogue(), stream=stream, clock=lambda: 0.0)
    hub.begin(run)
    train(hub, run, range(1, 4))
    hub.end()
    assert "\nstopped at step 3 of 9 after 0:00:00\n" in stream.getvalue()


def test_an_end_without_a_begin_does_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    Reporters(make_run(tmp_path), [], catalogue(), stream=stream).end(RuntimeError("early"))
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_reporters_are_reported_together(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Reporters(make_run(tmp_path), ["ofline", "wandb", "tensorboard", "none"], catalogue())
    assert str(caught.value).splitlines() == [
        "error[MC202]: no reporter named 'ofline' (from --report_to)",
        "  available: broken, elsewhere, memory, offline, unconfigured, wandb",
        "  did you mean: offline?",
        "error[MC203]: the reporter 'wandb' cannot be imported (from --report_to)",
        "  ModuleNotFoundError: No module named 'not_installed_here'",
        "  fix: pip install 'mcore-core[wandb]', or leave wandb out of --report_to",
    ]
    problems = list(reporter_problems(["ofline", "wandb", "console"], catalogue()))
    assert [p.code for p in problems] == ["MC202"]


def test_a_mistake_found_while_opening_a_reporter_stops_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hub = Reporters(run, ["unconfigured"], catalogue(), stream=io.StringIO())
    with pytest.raises(UsageError, match="no key"):
        hub.begin(run)


def test_other_ranks_report_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, rank=1)
    hub = build_reporters(run, ["memory"], catalogue())
    assert isinstance(hub, NullReporters)
    hub.begin(run)
    assert hub.step(run, result(1.0)) is None
    hub.evaluation(1, {"loss": 1.0})
    hub.checkpoint(1, tmp_path, 1.0)
    hub.warn_once("a", "b")
    hub.end(RuntimeError())
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_null_object_has_every_method() -> None:
    public = {n for n in vars(NullReporters) if not n.startswith("_")}
    assert public == {n for n in vars(Reporters) if not n.startswith("_")} - {"record"}


def test_nothing_here_imports_torch_or_tensorflow() -> None:
    code = """
import importlib, pkgutil, sys
import mcore_core.report as report
names = [m.name for m in pkgutil.iter_modules(report.__path__)]
for name in names:
    importlib.import_module(f"mcore_core.report.{name}")
print({"hub", "html", "tensorboard"} <= set(names), {"torch", "tensorflow"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True set()\n"


def test_a_loss_that_is_not_a_number_is_shown(tmp_path: Path) -> None:
    stream, run = io.StringIO(), make_run(tmp_path, iters=1)
    hub = Reporters(run, [], catalogue(), stream=stream)
    hub.begin(run)
    run.step = 1
    hub.step(run, result(math.nan))
    assert "step 1/1  loss nan  lr" in stream.getvalue()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["nonfinite"] == {"loss": "nan"}


def test_a_reporter_that_cannot_be_opened_is_left_out(tmp_path: Path) -> None:
    run, stream = make_run(tmp_path, iters=2), io.StringIO()
    hub = Reporters(run, ["broken", "memory"], catalogue(), stream=stream)
    hub.begin(run)
    for step in (1, 2):
        run.step = step
        hub.step(run, result(1.0))
    hub.end()
    text = stream.getvalue()
    assert text.count("warning: broken: RuntimeError: the socket is taken; training goes on") == 1
    assert [step for step, _ in Memory.built[-1].logged] == [2]
    assert Memory.built[-1].closed


def test_a_reporter_says_what_it_did_and_where(tmp_path: Path) -> None:
    run, stream = make_run(tmp_path, iters=2), io.StringIO()
    hub = Reporters(run, ["elsewhere"], catalogue(), stream=stream)
    hub.begin(run)
    assert "warning: elsewhere: no key; this run is recorded offline" in stream.getvalue()
    hub.end()
    assert [line.split() for line in stream.getvalue().splitlines() if "tracker" in line] == [
        ["elsewhere", "tracker", "sync", "here"]
    ]
