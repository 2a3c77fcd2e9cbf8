"""adapter_config.json, as PEFT reads it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.checkpoint.folders import ADAPTER

if TYPE_CHECKING:
    from mcore_sft.tuners.lora.spec import LoraSpec
    from mcore_sft.tuners.lora.split import Projection

_REMAPPED = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "gate"}
"""Names that PEFT, in a model with experts, takes for those of the stacked experts."""


def describe(
    spec: "LoraSpec",
    chosen: "Sequence[Projection]",
    every: "Sequence[Projection]",
    *,
    base: str,
    saved: Sequence[str],
    task: str = "CAUSAL_LM",
) -> dict[str, Any]:
    """Return the config of an adapter.

    Args:
        spec: Rank, scale and extent.
        chosen: The projections that have one.
        every: All that the model has.
        base: The model that it belongs to.
        saved: Modules that train in full.
        task: PEFT's name of what the model's head does.
    """
    experts = any(p.experts for p in every)

    def by_parameter(p: "Projection") -> bool:
        return p.kind in ("experts", "router") or (experts and p.leaf in _REMAPPED)

    parameters = _shortest(
        [p.tensor for p in chosen if by_parameter(p)],
        [p.tensor for p in every],
        lambda name: ".".join(name.split(".")[-2 if ".experts." in name else -3 :]),
    )
    modules = _shortest(
        [p.name for p in chosen if not by_parameter(p)],
        [p.name for p in every],
        lambda name: name.rpartition(".")[2],
    )
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        # PEFT cannot drop inputs of what it reaches by parameter, and refuses to try
        "lora_dropout": 0.0 if parameters else spec.dropout,
        "use_rslora": spec.rslora,
        "bias": "all" if spec.biases else "none",
        "target_modules": modules,
        "target_parameters": parameters or None,
        "modules_to_save": list(saved) or None,
        "rank_pattern": dict(spec.ranks),
        "alpha_pattern": dict(spec.alphas),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def write(folder: Path, config: dict[str, Any]) -> None:
    """Write adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / ADAPTER).write_text(text, encoding="utf-8")


def _shortest(
    chosen: Sequence[str], every: Sequence[str], ending: Callable[[str], str]
) -> list[str]:
    """Return the names, by their ending where all names with that ending are chosen."""
    mine, found = set(chosen), dict[str, None]()
    for name in chosen:
        short = ending(name)
        same = {n for n in every if n == short or n.endswith("." + short)}
        found[short if same <= mine else name] = None
    return sorted(found)
