"""`mcore plugins`: list installed plugins and what they provide."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from mcore_core.cli.prepare import known_flags
from mcore_core.installed import packages
from mcore_core.manager import PluginManager, kind_of
from mcore_core.plugin import Plugin

USAGE = "usage: mcore plugins [--json]\n\nList installed plugins and what they provide.\n"


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    given = known_flags(argv, "plugins", ("--json", "--help", "-h"))
    if given & {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return 0
    manager = PluginManager()
    manager.load_installed()
    found = describe_plugins(manager)
    if "--json" in given:
        json.dump(found, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return 0
    for plugin in found:
        sys.stdout.write(_render(plugin))
    if not found:
        sys.stdout.write("no plugins are installed: uv pip install 'mcore-core[sft]'\n")
    for error in manager.broken.values():
        sys.stderr.write(f"{error}\n")
    return 0


def describe_plugins(manager: PluginManager) -> list[dict[str, Any]]:
    """Return every installed plugin, broken ones too, as JSON has it."""
    components: dict[str, list[dict[str, str]]] = {}
    for hook in manager.catalogue_hooks():
        for owner, component in manager.catalogue(hook):
            part = {"kind": kind_of(hook), "name": component.name, "summary": component.summary}
            components.setdefault(owner, []).append(part)
    known, found = packages(), []
    for name in sorted({*manager.names(), *manager.broken}):
        plugin = manager.get_plugin(name)
        package, version = known.get(name) or ("", "")
        described: dict[str, Any] = {
            "name": name,
            "package": package or None,
            "version": version or None,
            "role": plugin.role if isinstance(plugin, Plugin) else None,
            "summary": plugin.summary if isinstance(plugin, Plugin) else "",
            "components": components.get(name, []),
        }
        if name in manager.broken:
            described["error"] = str(manager.broken[name])
        found.append(described)
    return found


def _render(plugin: dict[str, Any]) -> str:
    role = plugin["role"] or "broken"
    lines = [f"{plugin['name']:12} {role:8} {plugin['package']} {plugin['version']}"]
    if plugin["summary"]:
        lines.append(f"    {plugin['summary']}")
    kinds: dict[str, list[str]] = {}
    for component in plugin["components"]:
        kinds.setdefault(component["kind"], []).append(component["name"])
    lines += [f"    {kind}: {', '.join(names)}" for kind, names in kinds.items()]
    return "\n".join(lines) + "\n"
