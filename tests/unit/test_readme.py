"""The documentation's commands parse, its examples run, its links and files exist."""

import importlib
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "examples" / "quickstart" / "README.md",
]
BLOCK = re.compile(r"^```([a-z ]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands():
    """Every `mcore` command of the pages, one line each."""
    for page in PAGES:
        for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind.strip():
                continue
            for line in text.replace("\\\n", " ").splitlines():
                if line.startswith("mcore "):
                    yield pytest.param(line, id=f"{page.name}: {' '.join(line.split()[:60])[:70]}")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Import a block of CONTRIBUTING.md from a file: option groups read their own source."""

    def load(name):
        text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
        (code,) = [code for kind, code in BLOCK.findall(text) if kind == f"python {name}"]
        (tmp_path / f"contributing_{name}.py").write_text(code, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(f"contributing_{name}")

    return load


@pytest.mark.parametrize("line", list(commands()))
def test_commands_are_accepted(line, monkeypatch):
    """Every option exists, has a possible value and fits the others."""
    from mcore_core.cli import export, plan, run

    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    program, command, *arguments = shlex.split(line)
    assert program == "mcore"
    if command == "plan":
        _, config = plan.read([a for a in arguments if a != "--json"])
        assert config.get("model")
        return
    if command == "rollout":
        from mcore_rlhf.rollout.vllm import serve

        assert serve.parse(arguments)[0].model
        return
    prepared = {"run": run.prepare, "export": export.prepare}[command](arguments)
    assert prepared.config.get("model")


def test_there_are_commands():
    assert len(list(commands())) >= 6


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_make_targets_exist():
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    assert targets >= {"setup", "quickstart", "test", "parity", "slow", "test-gpu", "lint"}
    assert targets >= {"format", "docs", "bench", "lock", "clean", "help"}
    for page in PAGES:
        named = re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8"))
        assert set(named) <= targets, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page):
    folders = "mcore_core|plugins|docs|examples|tests|bench"
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"`((?:{folders})/[\w/.]*)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_every_decision_is_listed():
    folder = ROOT / "docs" / "adr"
    numbered = sorted(p.name for p in folder.glob("0*.md"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((0\d{3}-[\w-]+\.md)\)", text) == numbered
    for name in numbered:
        title = (folder / name).read_text(encoding="utf-8").splitlines()[0]
        assert title.startswith(f"# {int(name[:4])}. ")
        assert title.split(". ", 1)[1] in text.replace("`", ""), (
            f"{name} has another title in the list"
        )


def test_the_license_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == "Apache-2.0"
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_loss_example(example):
    import math

    import torch

    from mcore_core.protocols import HeadOut

    focal = example("loss").focal
    batch = SimpleNamespace(weights_T=torch.tensor([1.0, 0.0, 2.0]))
    out = focal(HeadOut(logps_T=torch.tensor([0.5, 0.1, 0.25]).log()), batch, None)
    expected = -math.log(0.5) * 0.5**2 - 2 * math.log(0.25) * 0.75**2
    assert out.total.item() == pytest.approx(expected, rel=1e-6)
    assert out.count.item() == 3.0


def test_the_plugin_example(example):
    from mcore_core.manager import PluginManager

    manager = PluginManager()
    manager.add_plugin("mine", example("plugin").Mine())
    component = manager.hook.mcore_recipe(config=None)
    assert (component.name, component.target) == ("mine", "mcore_mine.recipe:FocalRecipe")


def test_the_reward_example(example):
    exact = example("reward").exact
    replies = [("a b ", {"answer": "a b"}), ("a", {"answer": "a b"}), ("a", {})]
    assert exact([SimpleNamespace(text=t, row=row) for t, row in replies]) == [1.0, 0.0, None]


def test_the_model_example_claims_every_tensor(example):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    family = example("model").FAMILY
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for rule in family.rules(family.architecture(config.to_dict())):
        for _, names, _ in rule.expand():
            found |= dict(zip(names, rule.shapes, strict=True))
    assert found == wanted


def test_the_option_example(example):
    from mcore_core.config.option import collect_options

    group = example("option").MineConfig
    (option,) = collect_options({group: "mine"}).values()
    assert (option.name, option.type_name, group().focus) == ("focus", "float", 2.0)
    assert option.field.description == "How much less tokens count that the model is sure of."
