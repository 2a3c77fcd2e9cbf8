"""The `bridge` plugin."""

from collections.abc import Iterable
from typing import ClassVar, Literal

from mcore_core import Component, Plugin, hookimpl
from mcore_core.model.family import Family
from mcore_core.protocols import Bridge

FAMILIES = {
    "llama": "Llama 2, 3 and 3.1, SmolLM2",
    "mistral": "Mistral 7B and Nemo",
    "ministral": "Ministral",
    "mixtral": "Mixtral 8x7B and 8x22B",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3": "Qwen3, dense",
    "qwen3_moe": "Qwen3 with experts",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_text": "Qwen3.5, dense, text only",
    "qwen3_5_moe_text": "Qwen3.5 with experts, text only",
    "deepseek_v2": "DeepSeek-V2 and V2-Lite",
    "deepseek_v3": "DeepSeek-V3 and R1",
    "kimi_k2": "Kimi K2",
    "glm": "GLM-4-9B",
    "glm4": "GLM-4-0414",
    "glm4_moe": "GLM-4.5, 4.6",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "MiniMax-M2",
    "ernie4_5": "ERNIE 4.5, dense",
    "ernie4_5_moe": "ERNIE 4.5 with experts",
    "olmoe": "OLMoE",
    "internlm3": "InternLM3",
    "mimo": "MiMo-7B",
    "gemma": "Gemma 1",
    "gemma3_text": "Gemma 3, text only",
    "phi3": "Phi-3, Phi-4",
    "smollm3": "SmolLM3",
    "seed_oss": "Seed-OSS",
    "helium": "Helium",
    "cwm": "Code World Model",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM 2",
    "youtu": "Youtu-LLM",
    "dots1": "dots.llm1",
    "solar_open": "Solar Open",
    "exaone_moe": "K-EXAONE",
    "hy_v3": "Hunyuan 3",
}
"""Each family's model_type and whose models it reads."""


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
