"""Megatron's TransformerConfig plus what our own layers read from it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from mcore_core.model.architecture import Architecture
    from mcore_core.model.rope import Rope

SUBLAYERS = 2
"""Positions of the hybrid pattern that one HF layer takes: attention, then MLP."""


@dataclass
class DecoderConfig(TransformerConfig):  # type: ignore[misc]
    """The configuration of one decoder. Its layer numbers count pattern positions, from 1."""

    architecture: "Architecture | None" = None
    attention_kernel: str = "auto"
    """auto and flash: the fused kernel where it can be used; unfused: one segment at a time."""
    rope: "Rope | None" = field(default=None, repr=False)
    window_rope: "Rope | None" = field(default=None, repr=False)
    """The rotary table of windowed layers where it differs."""
    separate_norms: bool = False
    """Norms are modules of their own, also where an engine can fuse them into the layer after."""
    dispatcher: Any = field(default=None, repr=False)
    """The class that takes tokens to experts."""
    balance: str = "none"
    """What keeps experts in use alike: one of the balancing losses, sinkhorn or none."""
    balance_coeff: float = 0.0
    aux_loss_scale: float = 1.0
    """What auxiliary losses of one micro-batch are multiplied by: one over the micro-batches of the
    global batch. Set for each step."""

    @property
    def shape(self) -> "Architecture":
        """The architecture, which every decoder has."""
        assert self.architecture is not None
        return self.architecture

    def hf_layer(self, layer_number: int) -> int:
        """Return the HF layer, from 0, of a pattern position, from 1."""
        return (layer_number - 1) // SUBLAYERS

    def replayed_layer(self, layer_number: int | None) -> int | None:
        """Return which of the decoder's layers with experts a position is; None for others."""
        moe = self.shape.moe
        if moe is None or layer_number is None:
            return None
        layer = self.hf_layer(layer_number)
        decoder = [n for n in moe.layers if n < self.shape.num_layers]
        return decoder.index(layer) if layer in decoder else None

    def window_of(self, layer: int) -> int | None:
        """Return how many earlier tokens a query of an HF layer sees; None for all."""
        shape = self.shape
        if shape.window_size is None or layer not in shape.window_layers:
            return None
        return shape.window_size - 1

    def rope_of(self, layer: int) -> "Rope | None":
        """Return the rotary table of an HF layer; None for a layer without positions."""
        if layer in self.shape.no_rope_layers:
            return None
        if self.window_rope is not None and self.window_of(layer) is not None:
            return self.window_rope
        return self.rope

    def __deepcopy__(self, memo: dict[int, Any]) -> "DecoderConfig":
        """Copy shallowly: callbacks and tables in it are shared."""
        copied: DecoderConfig = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied
