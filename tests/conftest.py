"""Every test but those marked gpu runs on the CPU platform, in one thread."""

import os
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parents[1] / "plugins"


def check_installed():
    """An editable install keeps the entry points of the day it was made: say so, once."""
    installed = {e.name: e.value for e in entry_points(group="mcore.plugins")}
    stale = []
    for file in sorted(PLUGINS.glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        wanted = project.get("entry-points", {}).get("mcore.plugins", {})
        if any(installed.get(name) != value for name, value in wanted.items()):
            stale.append(f"-e plugins/{file.parent.name}")
    if stale:
        command = f"uv pip install --no-deps {' '.join(stale)}"
        raise pytest.UsageError(f"plugins are not installed as they stand here; run: {command}")


def pytest_configure(config):
    check_installed()
    # forked ranks inherit a pool of OpenMP threads as a deadlock
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = config.getoption("markexpr", default="") or ""
    if "gpu" not in wanted or "not gpu" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from hypothesis import settings

    # a machine that also does something else is not a failure
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
