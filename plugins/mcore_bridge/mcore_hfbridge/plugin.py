"""The `bridge` plugin."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl
from mcore_core.model.family import Family
from mcore_core.protocols import Bridge

FAMILIES = {
    "llama": "Llama 2, 3 and 3.1, SmolLM2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3, dense",
}


class BridgePlugin(Plugin):
    """HF <-> megatron-core weights."""

    role: ClassVar[Literal["recipe", "support"]] = "support"
    summary: ClassVar[str] = "HF <-> megatron-core weights"

    @hookimpl
    def mcore_model_specs(self) -> Iterable[Component[Family]]:
        """Return the families, each under its model_type."""
        for name, summary in FAMILIES.items():
            yield Component(name, f"mcore_hfbridge.families.{name}:FAMILY", summary)

    @hookimpl
    def mcore_build_bridge(self) -> Component[Bridge]:
        """Return the bridge."""
        return Component("bridge", "mcore_hfbridge.bridge:HFBridge", "Hugging Face safetensors")
