"""The number type of weights and activations."""

from typing import ClassVar, Literal

from mcore_core.config.group import ConfigGroup


class PrecisionConfig(ConfigGroup):
    """The number type of weights and activations."""

    title: ClassVar[str] = "Mixed Precision"

    torch_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of weights and activations. none: the checkpoint's own, which fp16 and bf16 override."""
    fp16: bool | None = None
    """Train in float16 with loss scaling and float32 main weights."""
    bf16: bool | None = None
    """Train in bfloat16 with float32 main weights."""
    apply_query_key_layer_scaling: bool | None = None
    """Divide attention scores by the layer's number, and multiply again within the softmax: against
    overflow of scores in 16 bits, which are never held here; true is refused."""
    attention_softmax_in_fp32: bool = True
    """Compute the softmax of attention in float32."""

    def dtype(self, checkpoint: str) -> str:
        """Return the type of the run: fp16 and bf16, then torch_dtype, then the checkpoint's."""
        if self.bf16:
            return "bfloat16"
        return "float16" if self.fp16 else self.torch_dtype or checkpoint
