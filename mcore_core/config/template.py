"""How a row becomes tokens, and which of them train."""

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from mcore_core.config.group import ConfigGroup

LOSS_SCALES = ("default", "last_round", "all")
"""`ignore_empty_think` by itself means default+ignore_empty_think."""


class TemplateConfig(ConfigGroup):
    """How a row becomes tokens, and which of them train."""

    title: ClassVar[str] = "Template"
    training: ClassVar[bool] = True

    system: str | None = None
    """System message for rows without one: the text, or the path of a .txt file."""
    max_length: int | None = Field(None, ge=1)
    """Longest sample, in tokens. none: the model's own limit."""
    truncation_strategy: Literal["delete", "left", "right", "split"] = "delete"
    """What to do with longer samples: drop them, cut the beginning (left) or the end (right), or
    make several of one (split; plain text only)."""
    use_chat_template: bool = True
    """Format conversations by the tokenizer's chat template; false: plain text."""
    chat_template: str | None = None
    """A jinja file to use instead of the tokenizer's chat template."""
    loss_scale: str = "default"
    """Tokens that train: every assistant turn (default), the last one (last_round), or all tokens
    (all). Add +ignore_empty_think to leave out empty <think> blocks."""
    enable_thinking: bool | None = None
    """Passed to the chat template, for models that can think or not. none: not passed."""

    @field_validator("loss_scale")
    @classmethod
    def _is_known(cls, value: str) -> str:
        scale = value.removesuffix("+ignore_empty_think")
        if scale not in (*LOSS_SCALES, "ignore_empty_think"):
            choices = ", ".join(LOSS_SCALES)
            raise ValueError(f"expected one of {choices}, with or without +ignore_empty_think")
        return value
