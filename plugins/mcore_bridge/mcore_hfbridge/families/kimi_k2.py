"""kimi_k2: Kimi K2, a DeepSeek-V3 under a model_type of its own."""

from dataclasses import replace

from mcore_hfbridge.families import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, name="kimi_k2")
