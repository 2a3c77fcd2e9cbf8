"""Where the model's weights come from and how they are written for others."""

import re
from typing import ClassVar

from pydantic import Field, field_validator

from mcore_core.config.group import ConfigGroup, names, secret

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{i}B": (1024 if i else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for i in ("", "I")
}


def parse_size(text: str) -> int:
    """Return a size such as 5GB, 500MB or 2GiB in bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError("expected a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


class WeightsConfig(ConfigGroup):
    """Where the model's weights come from and how they are written for others."""

    title: ClassVar[str] = "Mcore-Bridge"

    model: str | None = None
    """The model: a folder with config.json and safetensors, or a hub id such as
    HuggingFaceTB/SmolLM2-135M."""
    model_type: str | None = None
    """Model family to use, where config.json's model_type is not the right one."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model."""
    adapters: list[str] = Field(default_factory=list, json_schema_extra=names("adapter"))
    """A LoRA adapter in PEFT's format, to train on (tuner_type is then lora, with the adapter's
    rank and targets) or to export: a folder with adapter_config.json."""
    merge_lora: bool | None = None
    """Write the model with the adapter merged into its weights, out of place. While training, into
    checkpoint-N-merged beside each checkpoint. none: as save_safetensors; in an export, yes."""
    use_hf: bool = True
    """Look hub ids up at Hugging Face."""
    hub_token: str | None = Field(None, repr=False, json_schema_extra=secret())
    """Access token for private hub models; never written to files. none: HF_TOKEN."""
    load_safetensors: bool | None = None
    """Take the weights from model's safetensors. none: yes, unless load has a checkpoint."""
    save_safetensors: bool = True
    """Write each checkpoint also as safetensors that transformers opens."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file, as 5GB or 500MB."""
    offload_bridge: bool = False
    """Keep tensors that are being converted in host memory, to save device memory."""

    @field_validator("max_shard_size")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        parse_size(value)
        return value

    @property
    def max_shard_bytes(self) -> int:
        """Return max_shard_size in bytes."""
        return parse_size(self.max_shard_size)
