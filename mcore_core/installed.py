"""Which packages provide which plugins, and what to say when a plugin is missing."""

from collections.abc import Iterable
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, entry_points, version

from mcore_core.errors import UsageError, did_you_mean, usage_error
from mcore_core.plugin import ENTRY_POINT_GROUP

FIRST_PARTY = {
    "sft": "mcore-sft",
    "pt": "mcore-sft",
    "dpo": "mcore-rlhf",
    "kto": "mcore-rlhf",
    "rm": "mcore-rlhf",
    "grpo": "mcore-rlhf",
    "gkd": "mcore-rlhf",
    "moe": "mcore-moe",
    "bridge": "mcore-hfbridge",
    "rewards": "mcore-rewards",
}
"""Where to find plugins that are not installed. Only used in messages."""


def installed() -> list[EntryPoint]:
    """Return the entry points of all plugins. Raises UsageError where two claim one name."""
    seen: dict[str, EntryPoint] = {}
    for ep in entry_points(group=ENTRY_POINT_GROUP):
        other = seen.setdefault(ep.name, ep)
        if other.value != ep.value:
            raise usage_error(
                "MC104",
                f"two installed packages provide the plugin {ep.name!r}",
                *(f"{_label(e.dist)}  ->  {e.value}" for e in (other, ep)),
                "fix: uninstall one of them",
            )
    return sorted(seen.values(), key=lambda ep: ep.name)


def packages() -> dict[str, tuple[str, str]]:
    """Return the distribution that provides each plugin, and its version; one look at all."""
    points = entry_points(group=ENTRY_POINT_GROUP)
    return {ep.name: (ep.dist.name, ep.dist.version) for ep in points if ep.dist is not None}


def origin(name: str) -> str:
    """Return the package of a plugin, for messages."""
    package = packages().get(name)
    return " ".join(package) if package else "not installed"


def not_found(name: str, needed_by: str | None, known: Iterable[str]) -> UsageError:
    """Return the error for a plugin that is not there, with how to get it."""
    by = f" (required by the plugin {needed_by!r})" if needed_by else ""
    here = "installed: " + (", ".join(known) or "none")
    package = FIRST_PARTY.get(name)
    if package is None:
        return usage_error(
            "MC102",
            f"no plugin named {name!r}{by}",
            here,
            did_you_mean(name, {*known, *FIRST_PARTY}),
            "fix: correct the name, or install the package that provides it",
        )
    try:
        has = version(package)
    except PackageNotFoundError:
        return usage_error(
            "MC103",
            f"plugin {name!r} is not installed{by}",
            here,
            f"fix: uv pip install {package}",
        )
    return usage_error(
        "MC110",
        f"plugin {name!r} belongs to {package}, whose installed version {has} does not have it "
        f"yet{by}",
        here,
        f"fix: use one of these, or a newer version: uv pip install -U {package}",
    )


def _label(dist: Distribution | None) -> str:
    return f"{dist.name} {dist.version}" if dist else "unknown package"
