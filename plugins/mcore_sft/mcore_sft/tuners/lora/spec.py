"""What the adapters of a run are: from the options, or from a PEFT adapter's config."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.checkpoint.folders import ADAPTER, require_adapter
from mcore_core.config.tuner import LoraConfig
from mcore_core.errors import Problem, UsageError, usage_error

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig

WEIGHTS = "adapter_model.safetensors"
_OFF: Mapping[str, Any] = {
    "use_dora": False,
    "use_qalora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
    "megatron_config": None,
    "trainable_token_indices": None,
    "exclude_modules": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "target_parameters_expert_parallel": None,
}
"""Keys of adapter_config.json that change what an adapter computes, and the value without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Rank, scale and extent of all adapters."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    biases: bool
    """The model's biases train too."""
    targets: tuple[str, ...]
    regex: str | None
    parameters: tuple[str, ...] = ()
    """PEFT's target_parameters, where the adapter is PEFT's."""
    saved_modules: tuple[str, ...] = ()
    """Modules that train in full."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """PEFT's rank_pattern."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None
    """The PEFT adapter that it is from."""

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter of an HF module."""
        return int(_pattern(self.ranks, name, self.rank))

    def scale_of(self, name: str) -> float:
        """Return what the adapter's output is multiplied by."""
        alpha, rank = float(_pattern(self.alphas, name, self.alpha)), self.rank_of(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:  # noqa: ANN401
    """Return the value of the first pattern that matches a module's name or its end, as PEFT."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def from_options(config: "RunConfig") -> LoraSpec:
    """Return what the options ask for."""
    options = config[LoraConfig]
    return LoraSpec(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        rslora=options.use_rslora,
        biases=options.lora_bias == "all",
        targets=tuple(options.target_modules) if options.target_regex is None else (),
        regex=options.target_regex,
        saved_modules=tuple(options.modules_to_save),
    )


def from_peft(folder: Path, config: "RunConfig") -> LoraSpec:
    """Read a PEFT adapter's config. The dropout is the run's own.

    Raises:
        UsageError: The folder is no LoRA adapter, or of a kind that is not known here, or options
            were given that it contradicts.
    """
    found = read_config(folder)
    problems = [
        Problem(
            "MC552",
            f"{folder / ADAPTER}: {key} is {found[key]!r}, which adapters here do not have",
            ["fix: merge it into its model with PEFT (merge_and_unload) and train from there"],
        )
        for key, off in _OFF.items()
        if found.get(key, off) not in (off, None, [], {})
    ]
    if found.get("peft_type") != "LORA":
        problems.append(
            Problem(
                "MC552",
                f"{folder / ADAPTER}: peft_type is {found.get('peft_type')!r}, not LORA",
                ["fix: only LoRA adapters can be trained on"],
            )
        )
    if found.get("bias", "none") not in ("none", "all"):
        problems.append(
            Problem(
                "MC552",
                f"{folder / ADAPTER}: bias is {found['bias']!r}; it can be none or all here",
                ["fix: train with bias none"],
            )
        )
    modules = found.get("target_modules") or []
    spec = LoraSpec(
        rank=int(found.get("r", 8)),
        alpha=float(found.get("lora_alpha", 8)),
        dropout=config[LoraConfig].lora_dropout,
        rslora=bool(found.get("use_rslora")),
        biases=found.get("bias") == "all",
        targets=() if isinstance(modules, str) and modules != "all-linear" else _words(modules),
        regex=modules if isinstance(modules, str) and modules != "all-linear" else None,
        parameters=_words(found.get("target_parameters") or []),
        saved_modules=_words(found.get("modules_to_save") or []),
        ranks=found.get("rank_pattern") or {},
        alphas=found.get("alpha_pattern") or {},
        folder=folder,
    )
    problems += _contradictions(spec, config)
    if problems:
        raise UsageError(problems)
    return spec


def _words(value: Any) -> tuple[str, ...]:  # noqa: ANN401
    return (value,) if isinstance(value, str) else tuple(sorted(value))


def _contradictions(spec: LoraSpec, config: "RunConfig") -> list[Problem]:
    """Return a problem for each option that was given and says otherwise than the adapter."""
    theirs = {
        "lora_rank": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "lora_bias": "all" if spec.biases else "none",
        "modules_to_save": list(spec.saved_modules),
    }
    given = [n for n in theirs if config.is_set(n) and config.get(n) != theirs[n]]
    given += [n for n in ("target_modules", "target_regex") if config.changed(n)]
    return [
        Problem(
            "MC553",
            f"--{name} {config.get(name)}: the adapter in {spec.folder} decides this"
            + (f": {theirs[name]}" if name in theirs else ""),
            [f"fix: leave out --{name}"],
        )
        for name in given
    ]


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises UsageError where it is missing or not JSON."""
    path = require_adapter(folder)
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise usage_error(
            "MC551", f"{path} cannot be read: {error}", "fix: copy the adapter again"
        ) from error
    return found
