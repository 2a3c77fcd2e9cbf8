"""Which parameters train: all, all but some, or adapters."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup, names


class TunerConfig(ConfigGroup):
    """Which parameters train."""

    title: ClassVar[str] = "Tuner"

    tuner_type: str = "full"
    """full trains the model's own weights; lora trains adapters beside them."""
    freeze_llm: bool = False
    """Freeze the language model of a model with several parts."""
    freeze_vit: bool = True
    """Freeze the vision tower."""
    freeze_aligner: bool = True
    """Freeze what joins vision tower and language model."""


class FullTunerConfig(ConfigGroup):
    """What stays frozen with tuner_type full."""

    title: ClassVar[str] = "Tuner: Full-parameter Training"

    freeze_parameters: list[str] = Field(default_factory=list)
    """Freeze the parameters whose Hugging Face names start with one of these, such as
    model.embed_tokens or model.layers.0."""
    freeze_parameters_regex: str | None = None
    """Freeze the parameters in whose Hugging Face names this regular expression is found."""
    freeze_parameters_ratio: float = Field(0.0, ge=0, le=1)
    """Freeze this part of all parameters, from the embedding upwards."""
    trainable_parameters: list[str] = Field(default_factory=list)
    """Train these after all: starts of names, as in freeze_parameters."""
    trainable_parameters_regex: str | None = None
    """Train these after all: a regular expression, as in freeze_parameters_regex."""


class LoraConfig(ConfigGroup):
    """Adapters, which train with tuner_type lora."""

    title: ClassVar[str] = "Tuner: LoRA Training"

    adapter_load: str | None = Field(None, json_schema_extra=names("checkpoint", "mcore_adapter"))
    """Start from the adapter of a checkpoint of an earlier run (checkpoint-N, or its run folder);
    step, data and optimizer start anew."""
    target_modules: list[str] = Field(default_factory=lambda: ["all-linear"])
    """Modules that get an adapter, by their Hugging Face names (q_proj) or megatron-core's
    (linear_qkv); all-linear: every linear layer but the output layer; all-router: routers."""
    target_regex: str | None = None
    """Modules that get an adapter, in place of target_modules: a regular expression that matches
    the whole Hugging Face name, such as .*layers[.][0-3][.].*q_proj."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that train in full beside the adapters and are saved with them, such as lm_head."""
    lora_rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    lora_alpha: int = Field(32, ge=1)
    """An adapter's output is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Probability of dropping each input of an adapter."""
    lora_bias: Literal["none", "all"] = "none"
    """all: the model's biases train too."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(lora_rank) instead."""
