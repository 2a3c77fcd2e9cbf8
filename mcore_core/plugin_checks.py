"""Whether an object that a package offers as a plugin is one, and fits this kernel."""

import inspect

import pluggy

from mcore_core.errors import did_you_mean, usage_error
from mcore_core.installed import origin
from mcore_core.plugin import OLDEST_PLUGIN_API, PLUGIN_API, Plugin


def check_plugin(name: str, plugin: object) -> None:
    """Raise unless the object is a plugin with a known role."""
    if not isinstance(plugin, Plugin):
        raise usage_error(
            "MC106",
            f"plugin {name!r} ({origin(name)}) is of type {type(plugin).__name__}, not a Plugin",
            "fix: let the entry point name a subclass of mcore_core.Plugin",
        )
    if plugin.role not in ("recipe", "support"):
        raise usage_error(
            "MC106",
            f"plugin {name!r} ({origin(name)}) has the role {plugin.role!r}",
            "fix: role is 'recipe' (acts when named) or 'support' (acts when installed)",
        )


def check_api(name: str, plugin: Plugin) -> None:
    """Raise unless this kernel has the hooks that the plugin was written for."""
    if OLDEST_PLUGIN_API <= plugin.api <= PLUGIN_API:
        return
    newer = plugin.api > PLUGIN_API
    raise usage_error(
        "MC106",
        f"plugin {name!r} ({origin(name)}) needs plugin API {plugin.api}; "
        f"this mcore-core has {OLDEST_PLUGIN_API} to {PLUGIN_API}",
        f"fix: uv pip install -U {'mcore-core' if newer else origin(name).partition(' ')[0]}",
    )


def check_hooks(name: str, plugin: Plugin, manager: pluggy.PluginManager) -> None:
    """Raise where the plugin implements what is not a hook, or gives a hook argument a default."""
    known = {n for n in vars(manager.hook) if not n.startswith("_")}
    for attribute in dir(plugin):
        opts = manager.parse_hookimpl_opts(plugin, attribute)
        if opts is None:
            continue
        hook = opts.get("specname") or attribute
        if hook not in known and not opts.get("optionalhook"):
            raise usage_error(
                "MC107",
                f"plugin {name!r} ({origin(name)}) implements {hook!r}, which is not a hook",
                did_you_mean(hook, known),
                "fix: see docs/hooks.md for the names",
            )
        defaults = [
            p.name
            for p in inspect.signature(getattr(plugin, attribute)).parameters.values()
            if p.default is not p.empty
        ]
        if defaults:
            raise usage_error(
                "MC109",
                f"plugin {name!r}: {hook} gives {', '.join(defaults)} a default value",
                "hook arguments are required or left out; a default can hide a missing one",
                "fix: remove the default",
            )
