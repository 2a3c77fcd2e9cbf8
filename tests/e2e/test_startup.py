"""Help appears at once and without torch; a first step follows soon. Limits as in bench/startup."""

import importlib.util
from pathlib import Path

import pytest

HEAVY = {"torch", "megatron", "transformers", "datasets", "numpy", "pyarrow", "tensorboard"}
SLACK = 2
"""The limits hold on a machine that does nothing else."""


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
    # another process may take the core: the limit holds if it ever does
    seconds = [startup.help_seconds(startup.HELP[name], 3) for _ in range(3)]
    assert min(seconds) < SLACK * startup.LIMITS[name]


def test_the_first_step_comes_soon(startup):
    assert startup.first_step_seconds(1) < SLACK * startup.LIMITS["first_step"]
