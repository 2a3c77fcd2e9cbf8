"""`mcore doctor`: versions, devices, and how to get what is missing."""

import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from mcore_core.cli import doctor
from mcore_core.errors import usage_error
from mcore_core.manager import PluginManager

CPU = {"kind": "cpu", "name": "x86_64", "cores": 2}
GPU = {"kind": "cuda", "name": "H100", "memory_gib": 79.1}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pretended machine: which packages are missing, and its devices."""
    state: dict[str, Any] = {"missing": {"transformer-engine", "wandb"}, "devices": ([CPU], "")}

    def installed(name: str) -> str:
        if name in state["missing"]:
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(doctor, "version", installed)
    monkeypatch.setattr(doctor, "_devices", lambda: state["devices"])
    return state


def test_json(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == [
        "mcore", "python", "platform", "packages", "devices", "plugins", "problems",
    ]  # fmt: skip
    packages = {p["name"]: p for p in report["packages"]}
    assert packages["torch"]["version"] == "1.2.3"
    assert packages["wandb"]["version"] is None
    assert packages["wandb"]["install"] == "uv pip install 'mcore-core[wandb]'"
    assert report["devices"] == [CPU]
    assert report["problems"] == []


def test_text_on_a_cpu(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "no CUDA GPU: runs use the CPU, with gloo and mcore's own layers" in out
    assert "to get it: uv pip install 'mcore-core[wandb]'" in out
    assert "mcore-core[te]" not in out  # of no use without a GPU
    assert out.endswith("\nno problems found\n")


def test_text_on_a_gpu(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["devices"] = ([CPU, GPU], "")
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "  cuda   H100, 79.1 GiB\n" in out
    assert "to get it: uv pip install 'mcore-core[te]'" in out


def test_problems_exit_1(
    machine: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(manager: PluginManager) -> None:
        manager.broken["x"] = usage_error("MC105", "plugin 'x' (x 1) cannot be imported", "why")

    monkeypatch.setattr(PluginManager, "load_installed", load)
    machine["missing"] = {"transformers"}
    machine["devices"] = ([CPU], "torch cannot be imported: OSError: libcudart")
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.endswith(
        "\nproblems:\n"
        "  error[MC105]: plugin 'x' (x 1) cannot be imported\n"
        "    why\n"
        "  transformers is not installed; fix: uv pip install transformers\n"
        "  torch cannot be imported: OSError: libcudart\n"
    )


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    report = doctor.diagnose()
    found = {p["name"]: p["version"] for p in report["packages"]}
    assert found["torch"] == version("torch")
    assert found["megatron-core"] == version("megatron-core")
    assert report["devices"][0]["kind"] == "cpu"
    assert {p["name"] for p in report["plugins"]} >= {"sft", "bridge"}
