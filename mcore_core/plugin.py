"""What a plugin is: a class with metadata and hook implementations."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pluggy

NAMESPACE = "mcore"
ENTRY_POINT_GROUP = "mcore.plugins"
PLUGIN_API = 1
"""Raised when a hook or protocol changes incompatibly. Additions do not raise it."""
OLDEST_PLUGIN_API = 1

hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


class Plugin:
    """Base class of all plugins. Subclasses add methods marked with `@hookimpl`.

    Importing the module that defines a plugin must not import torch: `mcore plugins` and
    `mcore run --help` import it. The contract tests check this.
    """

    api: ClassVar[int] = PLUGIN_API
    role: ClassVar[Literal["recipe", "support"]] = "recipe"
    """A recipe is active when named in --plugin; support is active whenever it is installed."""
    summary: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    """Names of plugins that are activated together with this one."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of other groups' options that are different while this plugin is active."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Options that this plugin cannot use -> why. Changing one from its default is an error."""
