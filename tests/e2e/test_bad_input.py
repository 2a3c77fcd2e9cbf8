"""Every mistake of a user is one clear message and exit code 2, most of them before torch loads."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import refused
from conftest import make_rows
from safetensors.torch import load_file, save_file

SHOUT = '''
from typing import ClassVar

from mcore_core import Plugin, hookimpl
from mcore_core.config.group import ConfigGroup


class ShoutConfig(ConfigGroup):
    """Shouting."""

    title: ClassVar[str] = "Shout"
    volume: int = 3
    """How loud."""


class ShoutPlugin(Plugin):
    """A plugin that is installed and not active."""

    summary: ClassVar[str] = "shouts"

    @hookimpl
    def mcore_config_groups(self):
        return [ShoutConfig]
'''

EARLY = {
    "misspelt option": (
        ["--micro_batch_sise", "2"],
        "error[MC301]: unknown option --micro_batch_sise\n"
        "  did you mean: --micro_batch_size, --global_batch_size?\n",
    ),
    "unknown option": (
        ["--flux_capacitor", "1"],
        "error[MC301]: unknown option --flux_capacitor\n  fix: `mcore args` lists the options\n",
    ),
    "two wrong values at once": (
        ["--lr", "fast", "--seed", "-1"],
        "error[MC302]: --seed: must be at least 0, got '-1'\n"
        "error[MC302]: --lr: expected a number, got 'fast'\n",
    ),
    "a learning rate that no number holds": (
        ["--lr", "1e38", "--min_lr", "1e9"],
        "error[MC302]: --lr: must be at most 1e+06, got '1e38'\n"
        "error[MC302]: --min_lr: must be at most 1e+06, got '1e9'\n",
    ),
    "an option of another plugin": (
        ["--volume", "5"],
        "error[MC304]: unknown option --volume\n"
        "  it belongs to the plugin 'shout', which is not active\n"
        "  fix: add it with --plugin shout, or leave the option out\n",
    ),
    "keys of a YAML file": (
        ["{tmp}/bad.yaml"],
        "error[MC301]: unknown option {tmp}/bad.yaml:2: micro_batch_sise\n"
        "  did you mean: micro_batch_size, global_batch_size?\n"
        "error[MC301]: unknown option {tmp}/bad.yaml:3: flux_capacitor\n"
        "  fix: `mcore args` lists the options\n",
    ),
    "a YAML file that is none": (
        ["{tmp}/broken.yaml"],
        "error[MC308]: {tmp}/broken.yaml:2: not valid YAML: while parsing a flow sequence, "
        "expected ',' or ']', but got '<stream end>'\n"
        "  fix: write 'option: value' with a space after the colon; quote text that has ': ' or "
        "'#'\n",
    ),
    "a batch that does not divide": (
        ["--global_batch_size", "7", "--micro_batch_size", "2"],
        "error[MC602]: global_batch_size 7 is not a multiple of micro_batch_size 2 x data-parallel "
        "size 1\n"
        "  2 x 1 = 2, and 7 / 2 = 3.50\n"
        "  data-parallel size: 1 rank / (tensor 1 x pipeline 1 x context 1) = 1\n"
        "  fix: --global_batch_size 6 or 8, or --micro_batch_size 1\n",
    ),
    "a batch that does not divide over ranks": (
        ["--global_batch_size", "9", "--nproc_per_node", "2"],
        "error[MC602]: global_batch_size 9 is not a multiple of micro_batch_size 1 x data-parallel "
        "size 2\n"
        "  1 x 2 = 2, and 9 / 2 = 4.50\n"
        "  data-parallel size: 2 ranks / (tensor 1 x pipeline 1 x context 1) = 2\n"
        "  fix: --global_batch_size 8 or 10\n",
    ),
    "a layout that does not divide the ranks": (
        ["--nproc_per_node", "3", "--tensor_model_parallel_size", "2"],
        "error[MC601]: 3 ranks cannot be divided by tensor 2 x pipeline 1 x context 1 = 2\n"
        "  3 / 2 = 1.50\n"
        "  layouts near it that fit 3 ranks: tensor 1 pipeline 1 context 1 (data 3); "
        "tensor 3 pipeline 1 context 1 (data 1); tensor 1 pipeline 1 context 3 (data 1)\n"
        "  fix: choose one of these, or start 2 or 4 ranks (--nproc_per_node)\n",
    ),
    "a layout that does not divide the heads": (
        ["--nproc_per_node", "8", "--tensor_model_parallel_size", "8"],
        "error[MC611]: the model has 4 attention heads, which tensor_model_parallel_size 8 does "
        "not divide\n"
        "  4 / 8 = 0.50\n"
        "  fix: --tensor_model_parallel_size 1 or 2 or 4\n",
    ),
    "a layout that does not divide the layers": (
        [
            "--nproc_per_node",
            "3",
            "--pipeline_model_parallel_size",
            "3",
            "--global_batch_size",
            "3",
        ],
        "error[MC612]: the model's layers do not fit the pipeline: 4 layers do not divide over 3 "
        "stages (4 / 3); [1, 2, 4] do\n"
        "  fix: change --pipeline_model_parallel_size, or say how to divide them with "
        "--decoder_first_pipeline_num_layers, --decoder_last_pipeline_num_layers or "
        "--pipeline_model_parallel_layout\n",
    ),
    "a port in use": (
        ["--nproc_per_node", "2", "--master_port", "{port}"],
        "error[MC621]: port {port} on 127.0.0.1 is in use (Address already in use)\n"
        "  another run, or another program, listens there\n"
        "  fix: --master_port with a free one, or leave it out for a run on one machine\n",
    ),
}
"""Name -> (what follows `run --plugin sft --model M --dataset D`, all that stderr says)."""

WHOLE = {
    "misspelt plugin": (
        ["run", "--plugin", "sfft"],
        "error[MC102]: no plugin named 'sfft'\n  installed: {plugins}\n  did you mean: sft?\n"
        "  fix: correct the name, or install the package that provides it\n",
    ),
    "unknown plugin": (
        ["run", "--plugin", "qqq"],
        "error[MC102]: no plugin named 'qqq'\n  installed: {plugins}\n"
        "  fix: correct the name, or install the package that provides it\n",
    ),
    "no model, no data": (
        ["run", "--plugin", "sft"],
        "error[MC322]: no model given\n"
        "  fix: --model FOLDER, or a hub id such as Qwen/Qwen3-0.6B\n"
        "error[MC322]: no training data given\n  fix: --dataset FILE.jsonl, or a hub id\n",
    ),
    "no such model": (
        ["run", "--plugin", "sft", "--model", "{tmp}/nothing", "--dataset", "{rows}"],
        "error[MC513]: --model {tmp}/nothing: there is no such folder\n"
        "  fix: give an existing folder, or a hub id such as Qwen/Qwen3-0.6B\n",
    ),
    "an unknown architecture": (
        ["run", "--plugin", "sft", "--model", "{tmp}/unknown", "--dataset", "{rows}"],
        "error[MC511]: the model's config.json has architecture 'Mamba9ForCausalLM' (model_type "
        "'mamba9'), which no family reads\n",
    ),
    "data, weights and the run folder at once": (
        ["run", "--plugin", "sft", "--model", "{tmp}/cut", "--dataset", "{tmp}/rows.jsonl",
         "{tmp}/empty.jsonl", "--save", "{rows}/run"],
        "error[MC401]: {tmp}/rows.jsonl: no such file or folder\n"
        "  fix: check the path; relative paths start at {cwd}\n"
        "error[MC402]: {tmp}/empty.jsonl: it has no rows\n"
        "  fix: check the file, or name another\n"
        "error[MC708]: --save {rows}/run: {rows} is a file, not a folder\n"
        "  fix: --save with another folder\n"
        "error[MC522]: {tmp}/cut/model.safetensors is truncated: it has 500 bytes, its header "
        "alone needs more\n  fix: copy or download the file again from where the model came from\n",
    ),
    "files that options name": (
        ["run", "--plugin", "sft", "--model", "{model}", "--dataset", "{rows}", "{tmp}/0.csv",
         "--adapters", "{tmp}/none", "--load", "{tmp}/none", "--system", "{tmp}/none.txt",
         "--chat_template", "{tmp}/none.jinja"],
        "note: tuner_type is lora: --adapters was given\n"
        "error[MC401]: {tmp}/0.csv: no such file or folder\n"
        "  fix: check the path; relative paths start at {cwd}\n"
        "error[MC413]: --system {tmp}/none.txt: No such file or directory\n"
        "  fix: give an existing .txt file, or the text itself\n"
        "error[MC413]: --chat_template {tmp}/none.jinja: No such file or directory\n"
        "  fix: name a jinja file\n"
        "error[MC550]: --adapters {tmp}/none: no adapter_config.json there\n"
        "  found: nothing\n"
        "  fix: give a folder that PEFT's save_pretrained wrote, or a checkpoint-N of a LoRA run\n"
        "error[MC701]: --load {tmp}/none: no such folder\n"
        "  fix: give the run folder of an earlier run (its --save) or one of its checkpoint-N\n",
    ),
    "models beside the policy": (
        ["run", "--plugin", "dpo", "--model", "{model}", "--dataset", "{rows}", "--tuner_type",
         "lora", "--adapter_load", "{tmp}/unknown", "--ref_model", "{tmp}/none", "--ref_adapters",
         "{tmp}/unknown"],
        "error[MC702]: --adapter_load {tmp}/unknown holds no complete checkpoint\n"
        "  found: config.json\n"
        "  fix: give a folder that holds checkpoint-N with training.json\n"
        "error[MC513]: --ref_model {tmp}/none: there is no such folder\n"
        "  fix: give an existing folder, or a hub id such as Qwen/Qwen3-0.6B\n"
        "error[MC550]: --ref_adapters {tmp}/unknown: no adapter_config.json there\n"
        "  found: config.json\n"
        "  fix: give a folder that PEFT's save_pretrained wrote, or a checkpoint-N of a LoRA run\n",
    ),
}  # fmt: skip
NOTE = "note: max_epochs is 1: neither train_iters nor max_epochs was given\n"


@pytest.fixture(scope="module")
def early(model, dataset, tmp_path_factory):
    """How each early case ended; names in braces are filled in."""
    tmp = tmp_path_factory.mktemp("early")
    (tmp / "bad.yaml").write_text("plugin: sft\nmicro_batch_sise: 2\nflux_capacitor: 1\n")
    (tmp / "broken.yaml").write_text("lr: [1\n")
    (tmp / "unknown").mkdir()
    shape = {"model_type": "mamba9", "architectures": ["Mamba9ForCausalLM"]}
    (tmp / "unknown" / "config.json").write_text(json.dumps(shape))
    shutil.copytree(model, tmp / "cut")
    os.truncate(tmp / "cut" / "model.safetensors", 500)
    (tmp / "empty.jsonl").touch()
    (tmp / "shout_plugin.py").write_text(SHOUT)
    info = tmp / "shout-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shout\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mcore.plugins]\nshout = shout_plugin:ShoutPlugin\n")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        names = {"tmp": tmp, "port": held.getsockname()[1], "rows": dataset}
        names |= {"model": model, "cwd": Path.cwd()}
        begin = ["run", "--plugin", "sft", "--model", str(model), "--dataset", str(dataset)]
        argvs = [begin + argv for argv, _ in EARLY.values()] + [a for a, _ in WHOLE.values()]
        filled = [[a.format(**names) for a in argv] for argv in argvs]
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("early.py")],
            input=json.dumps(filled),
            env={**os.environ, "PYTHONPATH": str(tmp)},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
    ends = json.loads(done.stdout)
    return dict(zip([*EARLY, *WHOLE], ends, strict=True)), names


@pytest.mark.parametrize("case", [*EARLY, *WHOLE])
def test_found_before_torch_is_imported(early, mcore_manager, case):
    ends, names = early
    end = ends[case]
    plugins = ", ".join(sorted([*mcore_manager.names(), "shout"]))
    expected = {**EARLY, **WHOLE}[case][1].format(**names, plugins=plugins)
    assert end["code"] == 2
    if case == "an unknown architecture":
        first, *notes = end["err"].removeprefix(NOTE).splitlines()
        assert first + "\n" == expected
        assert notes[0].startswith("  known: ")
        assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"} <= {
            name.strip(",") for name in notes[0].split()
        }
        assert notes[-1].startswith("  fix: use one of these, install a plugin with the family")
    else:
        assert end["err"].removeprefix(NOTE) == expected
    assert end["torch"] is False


def test_no_safetensors(start, model_copy):
    (model_copy / "model.safetensors").unlink()
    refused(start(model=model_copy), f"error[MC520]: {model_copy} ", "\n  fix: ")


def test_a_missing_shard(start, model_copy):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (model_copy / "model.safetensors").unlink()
    (model_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(
        start(model=model_copy),
        f"error[MC521]: {model_copy}/model-00001-of-00002.safetensors is missing\n"
        "  fix: copy or download the file again from where the model came from\n",
    )


def test_truncated_safetensors(start, model_copy):
    file = model_copy / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    refused(
        start(model=model_copy),
        f"error[MC522]: {file} is truncated: it has {size - 1000} bytes, its header says "
        f"{size}\n  fix: copy or download the file again from where the model came from\n",
    )


def test_a_tensor_is_missing(start, model_copy):
    file = model_copy / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file)
    refused(start(model=model_copy), "error[MC530]: ", "model.layers.1.mlp.up_proj.weight")


def test_a_tensor_has_another_shape(start, model_copy):
    file = model_copy / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.2.self_attn.q_proj.weight"
    weights[name] = weights[name][:, :40].contiguous()
    save_file(weights, file)
    refused(start(model=model_copy), "error[MC532]: ", name, "64, 40", "64, 48")


def test_a_tensor_nobody_claims(start, model_copy):
    file = model_copy / "model.safetensors"
    save_file({**load_file(file), "model.extra.weight": torch.zeros(3)}, file)
    refused(start(model=model_copy), "error[MC531]: ", "model.extra.weight")


def test_no_such_dataset(start, dataset):
    refused(
        start(dataset=dataset.with_name("rows.json1")),
        f"error[MC401]: {dataset.with_name('rows.json1')}: no such file or folder\n"
        "  did you mean: rows.jsonl?\n"
        "  fix: check the path; relative paths start at ",
    )


def test_an_empty_dataset(start, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    refused(
        start(dataset=tmp_path / "empty.jsonl"),
        f"error[MC402]: {tmp_path}/empty.jsonl: it has no rows\n"
        "  fix: check the file, or name another\n",
    )


def test_a_malformed_line(start, tmp_path):
    rows = make_rows(tmp_path / "rows.jsonl", 20).read_text().splitlines()
    rows[6] = rows[6][:-5]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    refused(
        start("--strict", "true", dataset=tmp_path / "rows.jsonl"),
        f"error[MC404]: {tmp_path}/rows.jsonl:7: not valid JSON",
        "\n  fix: correct the row, or --strict false to leave it out\n",
    )
    ran = start("--strict", "false", dataset=tmp_path / "rows.jsonl")
    assert ran.code == 0, ran.err
    assert "19 rows" in ran.out + ran.err


def test_no_usable_columns(start, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"frage": "1 + 1", "antwort": "2"}\n')
    refused(
        start(dataset=tmp_path / "rows.jsonl"),
        f"error[MC403]: {tmp_path}/rows.jsonl: no usable columns\n  found: frage, antwort\n"
        "  usable: ",
        "\n  fix: say what they mean, for example ",
    )


def test_all_rows_too_long(start, dataset):
    refused(
        start("--max_length", 8),
        f"error[MC410]: {dataset}: nothing is left to train on, all 160 rows were dropped\n",
        "\n  fix: raise --max_length, or --truncation_strategy right cuts them\n",
    )


def test_no_chat_template(start, model_copy):
    (model_copy / "chat_template.jinja").unlink()
    refused(
        start(model=model_copy),
        "error[MC411]: the tokenizer has no chat template, and the dataset's rows are "
        f"conversations\n  tokenizer: {model_copy}\n  fix: ",
    )
