"""Options that several methods of preference and reinforcement learning share."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup, names


class RLHFConfig(ConfigGroup):
    """Which method a run uses."""

    title: ClassVar[str] = "RLHF"

    rlhf_type: Literal["dpo", "kto", "grpo", "gkd", "rm"] | None = None
    """The method, for option files of other systems: it must be the plugin's name."""


class ReferenceConfig(ConfigGroup):
    """The model that the policy is compared with. By default it is the policy as it started."""

    title: ClassVar[str] = "Reference model"

    ref_model: str | None = Field(None, json_schema_extra=names("model"))
    """The reference: a folder or a hub id, as model. none: model itself; with LoRA that is the
    policy with its adapters off, and takes no memory."""
    ref_load: str | None = Field(None, json_schema_extra=names("checkpoint", "mcore_ref_model"))
    """Take the reference's weights from a checkpoint of a run here, as load."""
    ref_adapters: list[str] = Field([], json_schema_extra=names("adapter"))
    """Folders of LoRA adapters (PEFT) to add to the reference's weights."""
    ref_adapter_load: str | None = Field(
        None, json_schema_extra=names("checkpoint", "mcore_ref_adapter")
    )
    """Take the reference's adapters from a checkpoint of a LoRA run here."""
