"""`mcore args`: one entry for each option, with the keys that scripts rely on."""

import json
from typing import Any

import pytest

from mcore_core.cli.args import main

KEYS = ["name", "group", "plugin", "type", "choices", "default", "aliases", "help"]


def entries(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, dict[str, Any]]:
    assert main(["--json", *argv]) == 0
    return {e["name"]: e for e in json.loads(capsys.readouterr().out)}


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys)
    assert all(list(e) == KEYS for e in found.values())
    assert found["save_interval"] == {
        "name": "save_interval",
        "group": "Checkpoint",
        "plugin": "kernel",
        "type": "int",
        "choices": [],
        "default": 500,
        "aliases": ["save_steps"],
        "help": "Optimizer steps between checkpoints.",
    }
    assert found["optimizer"]["type"] == "choice"
    assert found["optimizer"]["choices"] == ["adam", "sgd", "muon", "dist_muon"]
    assert found["dataset"]["type"] == "list[str]"
    assert found["columns"]["type"] == "json"
    assert found["bf16"] | {"help": ""} == {
        "name": "bf16",
        "group": "Mixed Precision",
        "plugin": "kernel",
        "type": "bool",
        "choices": [],
        "default": None,
        "aliases": [],
        "help": "",
    }


def test_with_a_plugin_its_defaults_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert entries(capsys)["calculate_per_token_loss"]["default"] is None
    found = entries(capsys, "--plugin", "sft")
    assert found["calculate_per_token_loss"]["default"] is True
    assert "to_hf" not in found  # of mcore export


def test_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    out = capsys.readouterr().out
    assert (
        "  --eval_interval, --eval_steps INT  (default: none)\n"
        "      Optimizer steps between evaluations. none: save_interval.\n"
    ) in out
    assert (
        "  --position_embedding_type learned_absolute|rope|mrope|relative|none\n"
        "      (default: rope)\n"
    ) in out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: mcore args [--plugin NAME ...] [--json]\n")
