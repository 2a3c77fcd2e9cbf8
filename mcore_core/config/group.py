"""One group of options: a frozen pydantic model with a title and documented fields."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

type Named = Literal["model", "checkpoint", "adapter"]
"""What an option may name: a model's folder or hub id, what a run saved, a PEFT adapter."""


class ConfigGroup(BaseModel):
    """Base class of option groups. Field names are flat flags: `beta` is `--beta`.

    The docstring under a field is its help text. Groups that share a title share a help section.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        defer_build=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    title: ClassVar[str] = ""
    training: ClassVar[bool] = False
    """Where true, the options say nothing about an export, which refuses them as flags."""
    sparse: ClassVar[bool] = False
    """Where true, an option that nobody gave means "as the checkpoint says", whatever its default:
    it is left out of a dumped config, so that loading the dump does not turn it into a demand."""


def also(*aliases: str) -> dict[str, Any]:
    """Return `json_schema_extra` for other spellings of an option."""
    return {"aliases": list(aliases)}


def names(kind: Named, *aliases: str) -> dict[str, Any]:
    """Return `json_schema_extra` for an option that names files of a kind.

    A name that is none is found before torch is imported. `aliases` are other spellings.
    """
    return {"names": kind, **also(*aliases)}


def secret() -> dict[str, Any]:
    """Return `json_schema_extra` for an option that is never written to a file."""
    return {"secret": True}
