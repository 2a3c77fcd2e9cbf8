"""Help appears at once and without torch; a first step follows soon. Limits as in bench/startup."""

import importlib.util
import resource
from pathlib import Path

import pytest

HEAVY = {"torch", "megatron", "transformers", "datasets", "numpy", "pyarrow", "tensorboard"}
SLACK = 2
"""The limits hold on a machine that does nothing else."""


def busy_in_children():
    """Seconds of CPU: another process, another test for one, may take the core meanwhile."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def startup():
    file = Path(__file__).parents[2] / "bench" / "startup.py"
    spec = importlib.util.spec_from_file_location("bench_startup", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["run", "--plugin", "sft", "--help"],
        ["args", "--json"],
        ["plugins", "--json"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(startup, argv):
    assert not startup.imported(argv) & HEAVY


def test_help_imports_the_least(startup):
    assert not startup.imported(["--help"]) & {"pydantic", "pluggy", "stevedore", "yaml", "rich"}


@pytest.mark.parametrize("name", ["help", "run_help"])
def test_help_is_quick(startup, name):
    seconds = startup.help_seconds(startup.HELP[name], 3, busy_in_children)
    assert seconds < SLACK * startup.LIMITS[name]


def test_a_run_imports_no_more_than_it_needs(startup, sft, tmp_path, monkeypatch):
    """Dynamo, and pandas behind wandb and pyarrow, would take two seconds of every run."""
    monkeypatch.setenv("MCORE_CACHE", str(tmp_path / "cache"))
    argv = [*map(str, sft), "--train_iters", "2", "--save", str(tmp_path / "run")]
    found = startup.imported(argv)
    assert found >= {"torch", "megatron.core.timers", "transformers"}
    assert not found & {"torch._dynamo", "pandas", "wandb", "datasets"}


def test_the_first_step_comes_soon(startup):
    before = busy_in_children()
    assert startup.first_step_seconds(1, warm=0) > 0
    assert busy_in_children() - before < SLACK * startup.LIMITS["first_step"]
