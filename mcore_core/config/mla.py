"""Multi-head latent attention: overrides of what the checkpoint's config.json says."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class MLAConfig(ConfigGroup):
    """Multi-head latent attention (DeepSeek). What is not given is read from the checkpoint."""

    title: ClassVar[str] = "MLA"
    sparse: ClassVar[bool] = True

    multi_latent_attention: bool | None = None
    """Whether the model has latent attention. none: as the checkpoint says."""
    q_lora_rank: int | None = Field(None, ge=1)
    """Rank of the query's down-projection."""
    kv_lora_rank: int | None = Field(None, ge=1)
    """Rank of the down-projection of keys and values."""
    qk_head_dim: int | None = Field(None, ge=1)
    """Size of the part of each query and key head that has no positions."""
    qk_pos_emb_head_dim: int | None = Field(None, ge=1)
    """Size of the part that has."""
    v_head_dim: int | None = Field(None, ge=1)
    """Size of each value head."""
