"""`mcore bridge coverage`: every tensor of a folder, and the rule that claims it."""

import json

import pytest
from family_cases import CASES, save_tensors, tensors_of, write

from mcore_core.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    write(folder, CASES["qwen3_moe"])
    return folder


def test_text(folder, capsys):
    assert main(["bridge", "coverage", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("family qwen3_moe\n      1 of 1 tensors  model.embed_tokens.weight\n")
    expert = "model.layers.{l}.mlp.experts.{e}."
    assert (
        f"      8 of 8 tensors  {expert}gate_proj.weight + {expert}up_proj.weight\n"
        "                      -> decoder.layers.{l}.mlp.experts.{e}.linear_fc1.weight [40, 32], "
        "axis 0 over etp, 2 blocks, experts over ep\n"
    ) in out
    count = len(tensors_of(folder))
    assert out.endswith(
        f"{count} tensors are claimed by 17 rules, 0 are left out on purpose, 0 problems\n"
    )


def test_json(folder, capsys):
    assert main(["bridge", "coverage", "--json", "--model", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["family"], found["ignored"], found["problems"]) == ("qwen3_moe", {}, [])
    claimed = [name for rule in found["rules"] for name in rule["tensors"]]
    assert sorted(claimed) == sorted(tensors_of(folder))
    router = next(r for r in found["rules"] if r["mcore"].endswith("router.weight"))
    assert router == {
        "hf": ["model.layers.{l}.mlp.gate.weight"],
        "mcore": "decoder.layers.{l}.mlp.router.weight",
        "shape": [4, 32],
        "split": "whole on every rank",
        "tensors": ["model.layers.1.mlp.gate.weight"],
        "expected": 1,
    }


def test_problems(folder, tmp_path, capsys):
    tensors = tensors_of(folder)
    del tensors["model.norm.weight"]
    tensors["model.layers.9.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].clone()
    tensors["model.layers.0.rotary_emb.inv_freq"] = tensors["lm_head.weight"][0].clone()
    save_tensors(tensors, tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert main(["bridge", "coverage", "--model", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "      0 of 1 tensors  model.norm.weight\n" in out
    assert "            left out  model.layers.0.rotary_emb.inv_freq: rotary frequencies" in out
    assert out.endswith("17 rules, 1 are left out on purpose, 2 problems\n")
    assert f"error[MC530]: {tmp_path} lacks the tensor 'model.norm.weight'" in err
    assert "error[MC531]" in err
    assert "'model.layers.9.mlp.gate.weight' has no place in family 'qwen3_moe'" in err


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["coverge"], "error[MC001]: unknown action 'coverge' of mcore bridge\n  did you mean"),
        (["coverage"], "error[MC002]: mcore bridge coverage needs --model\n"),
        (["coverage", "--modell", "x"], "error[MC301]: unknown option --modell"),
        (["coverage", "--model", "/nowhere/at/all"], "error[MC513]: --model /nowhere/at/all"),
    ],
)
def test_mistakes(capsys, argv, text):
    assert main(["bridge", *argv]) == 2
    assert text in capsys.readouterr().err


def test_help(capsys):
    assert main(["bridge"]) == 0
    assert capsys.readouterr().out.startswith("usage: mcore bridge coverage --model DIR ")
