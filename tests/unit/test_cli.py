"""The command line: what is typed, what is imported, what a user is told, and exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mcore_core.cli import main as cli
from mcore_core.cli.arguments import parse
from mcore_core.cli.export import prepare as prepare_export
from mcore_core.cli.run import prepare, world_size
from mcore_core.config.kernel import KERNEL_GROUPS, kernel_config
from mcore_core.config.option import collect_options
from mcore_core.errors import UsageError
from mcore_core.manager import PluginManager

OPTIONS = collect_options(dict.fromkeys(KERNEL_GROUPS, "kernel"))
MANAGER = PluginManager()
MANAGER.load_installed()
RECIPES = MANAGER.recipes()
RUN = ["--plugin", "sft", "--model", "m", "--dataset", "d.jsonl"]
HEAVY = ("torch", "transformers", "megatron", "datasets", "numpy", "rich")
PROBE = """
import sys
from mcore_core.cli.main import main
code = main(sys.argv[1:])
heavy = sys.modules.keys() & set({heavy!r})
sys.stderr.write(f"{{code}} {{' '.join(sorted(heavy))}}\\n")
"""


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "SLURM_NTASKS", "MCORE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def probe(*argv: str, **env: str) -> tuple[str, str]:
    """Run a command; return its output, and its exit code with the heavy modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *argv],
        capture_output=True,
        text=True,
        env=os.environ | env,
        check=True,
    )
    return done.stdout, done.stderr


def run_main(capsys: pytest.CaptureFixture[str], argv: Sequence[str]) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("argv", "first"),
    [
        (["--help"], "usage: mcore <command> [options]"),
        (["run", "--plugin", "sft", "--help"], "usage: mcore run --plugin NAME "),
        (["run", "--help"], "usage: mcore run --plugin NAME "),
        (["export", "-h"], "usage: mcore export --to_hf "),
        (["args", "--plugin", "sft"], "Mcore-Bridge:"),
        (["plugins"], "bridge       support"),
        (["--version"], "mcore "),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_help_and_lists_import_nothing_heavy(argv: list[str], first: str) -> None:
    out, err = probe(*argv)
    assert out.startswith(first)
    assert err == "0 \n"


def test_top_level_help_imports_no_other_module_of_mcore() -> None:
    code = "import sys; from mcore_core.cli.main import main; main(['--help']); print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    loaded = [m for m in out.splitlines()[-1].split() if m.startswith("mcore_core")]
    assert sorted(loaded) == ["mcore_core", "mcore_core.cli", "mcore_core.cli.main"]


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal(columns: int) -> None:
    out, _ = probe("run", "--plugin", "sft", "--help", COLUMNS=str(columns))
    lines = out.partition("\n\n")[2].splitlines()
    long = [line for line in lines if len(line) > columns and len(line.split()) > 1]
    assert [line for line in long if line.startswith("  ")] == []
    assert "  --save_interval, --save_steps INT  (default: 500)" in lines
    assert "  --optimizer adam|sgd|muon|dist_muon  (default: adam)" in lines
    assert "  --calculate_per_token_loss [true|false]  (default: true)" in lines  # sft's default
    assert sum(line == "Training:" for line in lines) == 1


def typed(*argv: str) -> dict[str, Any]:
    found = parse(argv, OPTIONS)
    assert found.problems == []
    return found.values


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["--packing"], {"packing": "true"}),
        (["--packing", "--lr", "1"], {"packing": "true", "lr": "1"}),
        (["--packing", "false"], {"packing": "false"}),
        (["--packing=false"], {"packing": "false"}),
        (["--tensor-model-parallel-size", "2"], {"tensor_model_parallel_size": "2"}),
        (["--eval_iters", "-1"], {"eval_iters": "-1"}),
        (["--lr=1e-5"], {"lr": "1e-5"}),
        (["--system=--a=b"], {"system": "--a=b"}),
        (["--dataset", "a", "b", "--lr", "1"], {"dataset": ["a", "b"], "lr": "1"}),
        (["--dataset=a"], {"dataset": ["a"]}),
        (["--lr", "1", "--lr", "2"], {"lr": "2"}),
        (["--output_dir", "x"], {"output_dir": "x"}),
        (["--nonsense", "a", "b"], {"nonsense": "a"}),
    ],
    ids=str,
)
def test_parse(argv: list[str], values: dict[str, Any]) -> None:
    assert typed(*argv) == values


def test_parse_finds_plugins_and_files_anywhere() -> None:
    found = parse(
        ["a.yaml", "--plugin", "sft,moe", "--dataset", "d", "b.yml", "--packing", "c.yaml",
         "--plugin=x", "--chat_template", "t.yaml"],
        OPTIONS,
    )  # fmt: skip
    assert found.plugins == ["sft", "moe", "x"]
    assert found.files == ["a.yaml", "b.yml", "c.yaml"]
    assert found.values == {"dataset": ["d"], "packing": "true", "chat_template": "t.yaml"}


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--lr"], "error[MC003]: --lr needs a value\n  fix: --lr VALUE, or --lr=VALUE"),
        (["--dataset", "--lr", "1"], "error[MC003]: --dataset needs a value\n"
         "  fix: --dataset VALUE, or --dataset=VALUE"),
        (["--dataset", "a", "--dataset", "b"], "error[MC004]: --dataset is given twice\n"
         "  fix: --dataset a b"),
        (["-lr"], "error[MC002]: unexpected argument '-lr'\n  did you mean: --lr?\n"
         "  fix: write options as --name value; files of options end in .yaml or .yml"),
        (["run.json"], "error[MC002]: unexpected argument 'run.json'\n"
         "  fix: write options as --name value; files of options end in .yaml or .yml"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)  # fmt: skip
def test_parse_problems(argv: list[str], text: str) -> None:
    assert [str(p) for p in parse(argv, OPTIONS).problems] == [text]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            ["trian"],
            "error[MC001]: unknown command 'trian'\n"
            "  fix: one of run, export, rollout, plan, bridge, plugins, args, doctor\n",
        ),
        (
            ["plugin"],
            "error[MC001]: unknown command 'plugin'\n  did you mean: plugins, plan?\n"
            "  fix: one of run, export, rollout, plan, bridge, plugins, args, doctor\n",
        ),
        (
            ["run", "--lr", "1"],
            "error[MC101]: no recipe plugin given: what should the run do?\n"
            f"  recipes: {', '.join(RECIPES)}\n  fix: mcore run --plugin sft ...\n",
        ),
        (
            ["run", *RUN, "--lrr", "1", "--packing", "maybe"],
            "error[MC301]: unknown option --lrr\n  did you mean: --lr?\n"
            "error[MC302]: --packing: expected true or false, got 'maybe'\n",
        ),
        (
            ["run", *RUN, "--lrr", "1", "--lr"],
            "error[MC003]: --lr needs a value\n  fix: --lr VALUE, or --lr=VALUE\n"
            "error[MC301]: unknown option --lrr\n  did you mean: --lr?\n",
        ),
        (
            ["run", *RUN, "--report_to", "wandbb"],
            "error[MC202]: no reporter named 'wandbb' (from --report_to)\n",
        ),
        (
            ["run", *RUN, "--vit_lr", "1", "--nproc_per_node", "3", "--fp16", "--bf16"],
            "error[MC320]: --fp16 and --bf16 exclude each other\n  fix: keep one of them\n"
            "error[MC311]: --vit_lr 1.0 cannot be honoured: vision towers: models here read text "
            "only, until multimodal models come\n  fix: leave the option out\n"
            "error[MC602]: global_batch_size 16 is not a multiple of micro_batch_size 1 x "
            "data-parallel size 3\n",
        ),
        (
            ["export", "--to_hf", "--to_mcore"],
            "error[MC323]: an export goes one way, --to_hf or --to_mcore: both are given\n"
            "  fix: --to_hf --load RUN --save DIR, or --to_mcore --model DIR --save DIR\n",
        ),
        (
            ["export", "--to_hf", "--save", "x", "--test_convert_dtype", "float16"],
            "error[MC323]: --to_hf needs --load or --model\n  fix: --load FOLDER\n"
            "error[MC321]: --test_convert_dtype does nothing without --test_convert_precision\n"
            "  fix: add --test_convert_precision, or leave out --test_convert_dtype\n",
        ),
        (
            ["export", "--to_hf", "--save", "x", "--adapters", "y", "--lr", "1e-3"],
            "error[MC321]: --lr says how to train, and an export does not\n  fix: leave it out\n"
            "error[MC323]: --adapters needs the model that the adapter was trained on\n"
            "  fix: --model FOLDER\n",
        ),
        (
            ["export", "--to_hf", "--model", ".", "--save", "x", "--merge_lora", "true"],
            "error[MC321]: --merge_lora does nothing without an adapter\n",
        ),
        (
            ["args", "--plugins", "sft"],
            "error[MC002]: unexpected argument '--plugins'\n"
            "  fix: mcore args takes --plugin NAME, --json\n",
        ),
        (
            ["doctor", "--verbose"],
            "error[MC002]: unexpected argument '--verbose'\n"
            "  fix: mcore doctor takes --json, --help, -h\n",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_exit_2(capsys: pytest.CaptureFixture[str], argv: list[str], text: str) -> None:
    code, out, err = run_main(capsys, argv)
    assert (code, out) == (2, "")
    assert err.startswith(text)
    assert "Traceback" not in err


def test_missing_files_are_reported_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("lr: 1\nlr: 2\n")
    code, _, err = run_main(capsys, ["run", "--plugin", "sft", "nope.yaml", str(bad)])
    assert code == 2
    assert err == (
        "error[MC309]: cannot read the options file 'nope.yaml': No such file or directory\n"
        "  fix: give the path of a YAML file of 'option: value' lines\n"
        f"error[MC307]: {bad}:2: 'lr' is already given on line 1\n"
        "  fix: keep one of the two lines\n"
    )


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCORE_TRACEBACK", "1")
    with pytest.raises(UsageError, match="MC001"):
        cli.main(["nonsense"])


def test_interrupt_is_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_command", interrupted)
    assert run_main(capsys, ["run"]) == (130, "", "")


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, argv: list[str]) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_command", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run"])


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"{sys.executable} -m mcore_core.cli.main args | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "Mcore-Bridge:\n0\n"
    assert done.stderr == ""


def test_prepare() -> None:
    prepared = prepare([*RUN, "--lr", "1e-4"])
    assert prepared.config.get("lr") == 1e-4
    assert prepared.config.get("calculate_per_token_loss") is True
    assert not prepared.config.is_set("calculate_per_token_loss")
    assert prepared.recipe.name == "sft"
    assert prepared.names == ("sft",)
    assert set(prepared.plugins) >= {"sft", "bridge", "moe"}
    assert prepared.argv == (*RUN, "--lr", "1e-4")
    assert prepared.notes == ("max_epochs is 1: neither train_iters nor max_epochs was given",)


def test_a_dump_repeats_the_run(tmp_path: Path) -> None:
    first = prepare([*RUN, "--lr", "1e-4", "--columns", '{"q": "query"}', "--report_to", "none"])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"plugin": list(first.names), **first.config.dump()}))
    second = prepare([str(path)])
    assert second.config == first.config
    assert second.names == first.names
    assert second.notes == ()


@pytest.mark.parametrize("text", ["plugin: sft", "plugin: [sft]", "plugin: 'sft,bridge'"])
def test_plugins_named_in_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\nmodel: m\ndataset: [d]\n")
    assert prepare([str(path)]).names[0] == "sft"


def test_plugins_on_the_command_line_replace_those_in_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("plugin: nonsense\nmodel: m\ndataset: d\n")
    assert prepare([str(path), "--plugin", "sft"]).names == ("sft",)


def test_prepare_export() -> None:
    prepared = prepare_export(["--to-hf", "--load", "a", "--save", "b"])
    assert prepared.config.get("to_hf") is True
    assert set(prepared.plugins) >= {"bridge", "moe"}
    assert "sft" not in prepared.plugins
    assert prepared.notes == ()


@pytest.mark.parametrize(
    ("environ", "values", "size"),
    [
        ({}, {}, 1),
        ({}, {"nproc_per_node": 2, "nnodes": 3}, 6),
        ({"WORLD_SIZE": "4"}, {"nproc_per_node": 2}, 4),
        ({"SLURM_NTASKS": "8"}, {}, 8),
        ({"SLURM_NTASKS": "1"}, {"nproc_per_node": 2}, 2),
    ],
)
def test_world_size(environ: dict[str, str], values: dict[str, Any], size: int) -> None:
    assert world_size(kernel_config(**values), environ) == size


def test_layout_is_checked_under_an_outer_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"MC601\]: 3 ranks cannot be divided by tensor 2"):
        prepare([*RUN, "--tensor_model_parallel_size", "2"])


def test_json_of_args_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_main(capsys, ["args", "--plugin", "sft", "--json"])
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), list)
