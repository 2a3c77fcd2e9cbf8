"""Finding, checking and activating plugins, and what is said when one is missing or broken."""

import json
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest

from mcore_core import Component, Plugin, hookimpl, installed, manager
from mcore_core.cli import plugins as command
from mcore_core.cli.prepare import Session, compose_request, open_session, read_request
from mcore_core.config.group import ConfigGroup
from mcore_core.config.kernel import KERNEL, KERNEL_GROUPS
from mcore_core.errors import UsageError
from mcore_core.manager import PluginManager, kind_of
from mcore_core.testing.contracts import PluginContract


class TestSFT(PluginContract):
    plugin: ClassVar[str] = "sft"


class TestBridge(PluginContract):
    plugin: ClassVar[str] = "bridge"


class DemoConfig(ConfigGroup):
    title: ClassVar[str] = "Demo"
    beta: float = 0.1
    """Strength of the demo."""


class Demo(Plugin):
    summary: ClassVar[str] = "a demo"
    defaults: ClassVar[dict[str, Any]] = {"max_length": 77, "beta": 0.5}
    refuses: ClassVar[dict[str, str]] = {"packing": "a demo is not packed"}

    @hookimpl
    def mcore_config_groups(self) -> Iterable[type[ConfigGroup]]:
        return [DemoConfig]

    @hookimpl
    def mcore_recipe(self, config: Any) -> Component[Any]:
        return Component("demo", "demo:Demo")

    @hookimpl
    def mcore_losses(self) -> Iterable[Component[Any]]:
        return [Component("cross_entropy", "demo:loss")]


def new(**plugins: Plugin) -> PluginManager:
    found = PluginManager()
    for name, plugin in plugins.items():
        found.add_plugin(name, plugin)
    return found


def error_of(function: Any, *args: Any) -> str:
    with pytest.raises(UsageError) as caught:
        function(*args)
    return str(caught.value)


def test_activate_puts_what_is_required_first_and_adds_support() -> None:
    class Base(Plugin):
        role = "support"

    class Needs(Plugin):
        requires = ("base",)

    found = new(needs=Needs(), base=Base(), other=Plugin())
    assert list(found.activate(["needs"])) == ["base", "needs"]
    assert list(found.activate([])) == ["base"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "sftt",
            "error[MC102]: no plugin named 'sftt'\n  installed: bridge, sft\n"
            "  did you mean: sft?\n"
            "  fix: correct the name, or install the package that provides it",
        ),
        (
            "dpo",
            "error[MC110]: plugin 'dpo' belongs to mcore-rlhf, whose installed version 0.1.0 does "
            "not have it yet\n  installed: bridge, sft\n"
            "  fix: use one of these, or a newer version: uv pip install -U mcore-rlhf",
        ),
    ],
)
def test_unknown_plugins(mcore_manager: PluginManager, name: str, text: str) -> None:
    if mcore_manager.names() == ["bridge", "sft"]:
        assert error_of(mcore_manager.activate, [name]) == text
    else:
        pytest.skip("other plugins are installed")


def test_a_known_plugin_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(installed.FIRST_PARTY, "ppo", "mcore-no-such-package")
    assert error_of(new(demo=Demo()).activate, ["ppo"]) == (
        "error[MC103]: plugin 'ppo' is not installed\n  installed: demo\n"
        "  fix: uv pip install mcore-no-such-package"
    )


def test_all_missing_plugins_are_reported_at_once() -> None:
    class Needs(Plugin):
        requires = ("gone",)

    text = error_of(new(needs=Needs()).activate, ["needs", "nothing"])
    assert "no plugin named 'gone' (required by the plugin 'needs')" in text
    assert "no plugin named 'nothing'" in text


def test_two_recipes() -> None:
    found = new(demo=Demo(), other=Demo())
    assert error_of(found.check_one_recipe, ["demo", "other"]) == (
        "error[MC108]: plugins 'demo' and 'other' each provide a recipe; a run has one\n"
        "  fix: name one of them, for example --plugin demo"
    )
    found.check_one_recipe(["demo"])


def test_a_name_that_two_plugins_use() -> None:
    catalogue = new(demo=Demo(), other=Demo()).catalogue("mcore_losses")
    assert error_of(catalogue.find, "cross_entropy", "--loss_type") == (
        "error[MC201]: loss 'cross_entropy' is ambiguous (from --loss_type)\n"
        "  demo:cross_entropy  ->  demo:loss\n"
        "  other:cross_entropy  ->  demo:loss\n"
        "  fix: write the qualified name, for example --loss_type demo:cross_entropy"
    )
    assert catalogue.find("other:cross_entropy", "--loss_type").target == "demo:loss"
    assert "no loss named 'focal' (from --loss_type)" in error_of(
        catalogue.find, "focal", "--loss_type"
    )


def test_keep_silences_inactive_plugins() -> None:
    found = new(demo=Demo(), other=Demo())
    found.keep(["demo"])
    assert [plugin for plugin, _ in found.catalogue("mcore_losses")] == ["demo"]
    assert found.hook.mcore_recipe(config=None).name == "demo"


def test_kinds() -> None:
    hooks = PluginManager().catalogue_hooks()
    assert [kind_of(h) for h in hooks] == [
        "dataset", "dispatcher", "loss", "model spec", "reporter", "reward", "rollout engine",
        "scheduler", "task", "tuner",
    ]  # fmt: skip


class _Old(Plugin):
    api = 99


class _Misspelt(Plugin):
    @hookimpl
    def mcore_step_ends(self) -> None: ...


class _WrongArgument(Plugin):
    @hookimpl
    def mcore_step_end(self, steps: int) -> None: ...


class _Default(Plugin):
    @hookimpl
    def mcore_step_end(self, step: int = 0) -> None: ...


class _Role(Plugin):
    role = "helper"  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("plugin", "text"),
    [
        (_Old(), "error[MC106]: plugin 'x' (not installed) needs plugin API 99; this mcore-core "
         "has 1 to 1\n  fix: uv pip install -U mcore-core"),
        (_Misspelt(), "error[MC107]: plugin 'x' (not installed) implements 'mcore_step_ends', "
         "which is not a hook\n  did you mean: mcore_step_end"),
        (_WrongArgument(), "error[MC107]: plugin 'x' (not installed) has a hook with a wrong "
         "signature\n"),
        (_Default(), "error[MC109]: plugin 'x': mcore_step_end gives step a default value\n"),
        (_Role(), "error[MC106]: plugin 'x' (not installed) has the role 'helper'\n"),
        (object(), "error[MC106]: plugin 'x' (not installed) is of type object, not a Plugin\n"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)  # fmt: skip
def test_plugins_that_do_not_fit(plugin: Any, text: str) -> None:
    assert error_of(PluginManager().add_plugin, "x", plugin).startswith(text)


def fake_entry_points(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [e for e in found if e.group == group and name in (None, e.name)]

    monkeypatch.setattr(installed, "entry_points", entry_points)


def test_a_broken_plugin_is_an_error_only_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    good = EntryPoint("sft", "mcore_sft.plugin:SFTPlugin", "mcore.plugins")
    bad = EntryPoint("bad", "mcore_no_such_module:Plugin", "mcore.plugins")
    fake_entry_points(monkeypatch, good, bad)
    found = PluginManager()
    found.load_installed()
    assert list(found.activate(["sft"])) == ["sft"]
    assert error_of(found.activate, ["bad"]) == (
        "error[MC105]: plugin 'bad' (not installed) cannot be imported\n"
        "  ModuleNotFoundError: No module named 'mcore_no_such_module'\n"
        "  fix: reinstall or uninstall it; MCORE_TRACEBACK=1 shows the traceback"
    )
    described = {p["name"]: p for p in command.describe_plugins(found)}
    assert described["bad"]["role"] is None
    assert described["bad"]["error"].startswith("error[MC105]")


def test_two_packages_with_one_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_entry_points(
        monkeypatch,
        EntryPoint("sft", "a:Plugin", "mcore.plugins"),
        EntryPoint("sft", "b:Plugin", "mcore.plugins"),
    )
    assert error_of(PluginManager().load_installed) == (
        "error[MC104]: two installed packages provide the plugin 'sft'\n"
        "  unknown package  ->  a:Plugin\n  unknown package  ->  b:Plugin\n"
        "  fix: uninstall one of them"
    )


def session_of(**plugins: Plugin) -> Session:
    return Session(new(**plugins), dict.fromkeys(KERNEL_GROUPS, KERNEL), [(DemoConfig, "demo")])


def test_a_recipe_changes_defaults_below_what_is_given() -> None:
    session = session_of(demo=Demo())
    request = read_request(session, ["--plugin", "demo", "--beta", "0.9"])
    config = compose_request(session, request)
    assert (config.get("max_length"), config.get("beta")) == (77, 0.9)
    assert not config.is_set("max_length")
    assert not config.changed("max_length")
    assert session.refusals == {"packing": ("demo", "a demo is not packed")}


def test_an_option_of_an_inactive_plugin() -> None:
    session = session_of(demo=Demo(), plain=Plugin())
    request = read_request(session, ["--plugin", "plain", "--beta", "0.9"])
    assert error_of(compose_request, session, request) == (
        "error[MC304]: unknown option --beta\n"
        "  it belongs to the plugin 'demo', which is not active\n"
        "  fix: add it with --plugin demo, or leave the option out"
    )


def test_a_default_for_an_option_that_does_not_exist() -> None:
    class Typo(Plugin):
        defaults: ClassVar[dict[str, Any]] = {"max_lenght": 1}

    session = session_of(typo=Typo())
    request = read_request(session, ["--plugin", "typo"])
    assert error_of(compose_request, session, request) == (
        "error[MC111]: plugin 'typo' sets a default for --max_lenght, which is no option\n"
        "  fix: report this to the plugin's author"
    )


def test_hook_calls_can_be_traced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MCORE_TRACE_HOOKS", "1")
    found = new(demo=Demo())
    found.hook.mcore_recipe(config=None)
    assert "hook mcore_recipe(config) -> demo\n" in capsys.readouterr().err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--json"]) == 0
    found = {p["name"]: p for p in json.loads(capsys.readouterr().out)}
    assert list(found["sft"])[:4] == ["name", "package", "version", "role"]
    assert (found["sft"]["package"], found["sft"]["role"]) == ("mcore-sft", "recipe")
    assert {"kind": "model spec", "name": "qwen3"}.items() <= next(
        c for c in found["bridge"]["components"] if c["name"] == "qwen3"
    ).items()


def test_the_installed_plugins_are_the_managers(mcore_manager: PluginManager) -> None:
    assert mcore_manager.names() == open_session().manager.names()
    assert manager.ENTRY_POINT_GROUP == "mcore.plugins"
