"""The adapter that both sides of a comparison start from, so that a seed is the same on both."""

import contextlib
import io
from pathlib import Path
from typing import Any

RANK, ALPHA = 8, 32


def lora_config() -> Any:  # noqa: ANN401
    """Return PEFT's configuration: what mcore has by default, without dropout.

    TRL's DPOTrainer takes dropout out of the policy; mcore trains with it.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )  # fmt: skip


def write_adapter(model: str, folder: Path, seed: int) -> None:
    """Write a new adapter, A drawn from the seed and B zero."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):
        base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    torch.manual_seed(seed)
    get_peft_model(base, lora_config()).save_pretrained(str(folder))


def load_adapter(policy: Any, folder: str) -> None:  # noqa: ANN401
    """Give a PEFT model the weights of an adapter."""
    from peft import load_peft_weights, set_peft_model_state_dict

    found = set_peft_model_state_dict(policy, load_peft_weights(folder, device="cpu"))
    assert not found.unexpected_keys, found.unexpected_keys
