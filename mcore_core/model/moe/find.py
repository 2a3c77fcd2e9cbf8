"""The dispatcher that a run names, among those of the active plugins; torch-free until loaded."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_core.component import Catalogue
    from mcore_core.config.compose import RunConfig

OPTION = "moe_token_dispatcher_type"


def find_dispatcher(config: "RunConfig", known: "Catalogue[Any]") -> Any | None:  # noqa: ANN401
    """Return the class that takes tokens to experts; None without a plugin that has the option.

    Raises:
        UsageError: No plugin has a dispatcher of this name.
    """
    if OPTION not in config.names:
        return None
    return known.find(config.get(OPTION), f"--{OPTION}").load()
