"""Find plugins with stevedore, check them, register them with pluggy, activate what a run names."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import Any

import pluggy
from stevedore.named import NamedExtensionManager

from mcore_core import hookspecs
from mcore_core.component import Catalogue, Component, in_file
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.installed import installed, not_found, origin
from mcore_core.plugin import ENTRY_POINT_GROUP, NAMESPACE, Plugin
from mcore_core.plugin_checks import check_api, check_hooks, check_plugin

_NOT_CATALOGUES = {"mcore_config_groups"}


class PluginManager(pluggy.PluginManager):
    """A pluggy manager that knows where each plugin came from.

    With MCORE_TRACE_HOOKS=1 in the environment each hook call is printed to stderr.
    """

    def __init__(self) -> None:
        super().__init__(NAMESPACE)
        self.add_hookspecs(hookspecs)
        self.broken: dict[str, UsageError] = {}
        """Installed plugins that could not be loaded; an error only when one is needed."""
        if os.environ.get("MCORE_TRACE_HOOKS"):
            self.add_hookcall_monitoring(_trace, lambda *_: None)

    def load_installed(self) -> None:
        """Load every installed plugin. Plugin modules do not import torch, so this is cheap."""
        entry_points = installed()
        # Seeding stevedore skips its disk cache, which can miss a reinstall within a minute.
        NamedExtensionManager.ENTRY_POINT_CACHE[ENTRY_POINT_GROUP] = entry_points
        found: NamedExtensionManager[Plugin] = NamedExtensionManager(
            ENTRY_POINT_GROUP,
            names=[ep.name for ep in entry_points],
            invoke_on_load=True,
            on_load_failure_callback=self._fail_to_load,
        )
        for extension in sorted(found, key=lambda e: e.name):
            assert extension.obj is not None
            try:
                self.add_plugin(extension.name, extension.obj)
            except UsageError as error:
                self.broken[extension.name] = error

    def add_plugin(self, name: str, plugin: Plugin) -> None:
        """Check a plugin and register it. Raises UsageError where it is not a valid plugin."""
        check_plugin(name, plugin)
        check_api(name, plugin)
        check_hooks(name, plugin, self)
        try:
            self.register(plugin, name=name)
        except pluggy.PluginValidationError as error:
            raise usage_error(
                "MC107",
                f"plugin {name!r} ({origin(name)}) has a hook with a wrong signature",
                *str(error).splitlines(),
                "fix: see docs/hooks.md for the arguments",
            ) from error

    def activate(self, names: Iterable[str]) -> dict[str, Plugin]:
        """Return the named plugins, what they require, and support plugins; required ones first."""
        active: dict[str, Plugin] = {}
        problems: list[UsageError] = []

        def visit(name: str, needed_by: str | None) -> None:
            if name in active:
                return
            plugin = self.get_plugin(name)
            if not isinstance(plugin, Plugin):
                problems.append(self.broken.get(name) or not_found(name, needed_by, self.names()))
                return
            for required in plugin.requires:
                visit(required, name)
            active[name] = plugin

        for name in dict.fromkeys([*names, *self.names(role="support")]):
            visit(name, None)
        if problems:
            raise UsageError([p for error in problems for p in error.problems])
        return active

    def names(self, role: str | None = None) -> list[str]:
        """Return the names of registered plugins, of one role or of all."""
        plugins = ((n, p) for n, p in self.list_name_plugin() if isinstance(p, Plugin))
        return sorted(n for n, p in plugins if role in (None, p.role))

    def recipes(self) -> list[str]:
        """Return the names of the plugins that provide a recipe."""
        return sorted(i.plugin_name for i in self.hook.mcore_recipe.get_hookimpls())

    def check_one_recipe(self, active: Iterable[str]) -> None:
        """Raise unless exactly one active plugin provides a recipe."""
        names = sorted(set(self.recipes()) & set(active))
        if len(names) == 1:
            return
        if names:
            raise usage_error(
                "MC108",
                f"plugins {' and '.join(map(repr, names))} each provide a recipe; a run has one",
                f"fix: name one of them, for example --plugin {names[0]}",
            )
        known = self.recipes()
        raise usage_error(
            "MC101",
            "no recipe plugin given: what should the run do?",
            "recipes: " + (", ".join(known) or "none installed"),
            f"fix: mcore run --plugin {'sft' if 'sft' in known else known[0]} ..."
            if known
            else "fix: uv pip install 'mcore-core[sft]'",
        )

    def keep(self, active: Iterable[str]) -> None:
        """Unregister every other plugin, so that hooks reach active ones only."""
        for name in set(self.names()) - set(active):
            self.unregister(name=name)

    def call_each(self, hook: str, **kwargs: object) -> Iterator[tuple[str, Any]]:
        """Call a collecting hook one plugin at a time, to know who returned what."""
        for impl in getattr(self.hook, hook).get_hookimpls():
            yield impl.plugin_name, impl.function(**kwargs)

    def catalogue_hooks(self) -> list[str]:
        """Return the hooks that list components."""
        specs = {n: h.spec for n, h in vars(self.hook).items() if not n.startswith("_")}
        plain = [n for n, s in specs.items() if not (s.argnames or s.opts["firstresult"])]
        return sorted(set(plain) - _NOT_CATALOGUES)

    def catalogue(self, hook: str) -> Catalogue[Any]:
        """Return what registered plugins list in a catalogue hook, such as "mcore_losses"."""
        found: Catalogue[Any] = Catalogue(kind_of(hook))
        for plugin, components in self.call_each(hook):
            for component in components:
                found.add(plugin, component)
        return found

    def losses(self, recipe: str, names: Iterable[str]) -> dict[str, Component[Any]]:
        """Return the losses that `--loss_type` names, of those that the recipe can use.

        Raises:
            UsageError: It holds a problem for each name that there is not.
        """
        usable: Catalogue[Any] = Catalogue("loss")
        for plugin, component in self.catalogue("mcore_losses"):
            if component.recipe in ("", recipe):
                usable.add(plugin, component)
        found: dict[str, Component[Any]] = {}
        problems: list[Problem] = []
        for name in names:
            try:
                found[name] = in_file(name, "--loss_type") or usable.find(name, "--loss_type")
            except UsageError as error:
                problems += error.problems
        if problems:
            raise UsageError(problems)
        return found

    def _fail_to_load(self, _: object, ep: EntryPoint, error: BaseException) -> None:
        self.broken[ep.name] = usage_error(
            "MC105",
            f"plugin {ep.name!r} ({origin(ep.name)}) cannot be imported",
            f"{type(error).__name__}: {error}",
            "fix: reinstall or uninstall it; MCORE_TRACEBACK=1 shows the traceback",
        )
        self.broken[ep.name].__cause__ = error


def kind_of(hook: str) -> str:
    """Return what one component of a catalogue hook is called: mcore_losses -> loss."""
    plural = hook.removeprefix("mcore_").replace("_", " ")
    return plural.removesuffix("es") if plural.endswith("sses") else plural.removesuffix("s")


def _trace(hook: str, impls: Iterable[pluggy.HookImpl], kwargs: Mapping[str, Any]) -> None:
    names = ", ".join(impl.plugin_name for impl in impls)
    sys.stderr.write(f"hook {hook}({', '.join(kwargs)}) -> {names or 'nobody'}\n")
