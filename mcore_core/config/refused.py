"""What this release cannot do on any machine: options that are refused when they are changed."""

from collections.abc import Callable, Mapping
from typing import Any

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem

type Refusal = tuple[Callable[[Any], bool], str]


def _any(value: Any) -> bool:  # noqa: ANN401
    return True


_VISION = "vision towers: models here read text only, until multimodal models come"
_HAS_NO_SCORES = "attention never holds scores in 16 bits and always computes softmax in float32"

REFUSED: Mapping[str, Refusal] = {
    "attn_impl": (_any, _VISION),
    "vit_gradient_checkpointing": (_any, _VISION),
    "gradient_checkpointing_kwargs": (_any, _VISION),
    "freeze_llm": (
        _any,
        "a model here is one; freeze_parameters freezes parts of it",
    ),
    "freeze_vit": (_any, _VISION),
    "freeze_aligner": (_any, _VISION),
    "vit_lr": (_any, _VISION),
    "aligner_lr": (_any, _VISION),
    "moe_apply_probs_on_input": (
        _any,
        "no model family here has it: experts' outputs are multiplied by the router's weights",
    ),
    "recompute_modules": (
        lambda value: bool({"moe_act", "mla_up_proj"} & set(value)),
        "moe_act and mla_up_proj are not recomputed by themselves; core_attn, mlp, layernorm, moe "
        "and shared_experts can be",
    ),
    "seq_length": (
        _any,
        "rows are as long as their samples; max_length and packing_length bound it",
    ),
    "padding_free": (
        _any,
        "every model family here takes samples end to end in one row; padded rows come with models "
        "that need an attention mask of their own",
    ),
    "mlp_padding_free": (_any, "padding_free leaves out all padding, not only that in the MLPs"),
    "position_embedding_type": (
        lambda value: value not in {"rope", "none"},
        "attention here knows rotary positions (rope) and none",
    ),
    "qk_l2_norm": (
        _any,
        "no model family here has it; for norms on queries and keys: qk_layernorm",
    ),
    "apply_query_key_layer_scaling": (lambda value: value is True, _HAS_NO_SCORES),
    "attention_softmax_in_fp32": (_any, _HAS_NO_SCORES),
    "no_masked_softmax_fusion": (_any, "attention here has no separate masked softmax to fuse"),
    "cross_entropy_loss_fusion": (
        _any,
        "the head computes log-probabilities chunk by chunk and never holds the logits, which is "
        "what a fused cross entropy would save",
    ),
    "dataloader_type": (
        lambda value: value == "external",
        "external is for code that calls megatron with a loader of its own; "
        "a plugin's mcore_datasets hook brings data in",
    ),
    "no_data_sharding": (
        _any,
        "there are no shards: every batch is drawn from the whole data, whatever the layout",
    ),
    "check_model": (_any, "the model's files are always checked; that reads their headers only"),
    "offload_bridge": (
        _any,
        "there is nothing to move: weights are converted one bucket at a time",
    ),
    "auto_detect_ckpt_format": (_any, "there is one format, torch_dist"),
    "use_hf": (_any, "models come from a folder or from Hugging Face; no other hub is built in"),
}
"""Option -> (which values, why). Only values other than the default are asked about."""


def check_refused(config: RunConfig, by_recipe: Mapping[str, tuple[str, str]]) -> list[Problem]:
    """Return a problem for each changed option that this release or the recipe cannot honour.

    Args:
        config: the composed options.
        by_recipe: option -> (plugin, reason), from the active plugins' `refuses`.
    """
    problems = []
    for name in config.names:
        if not config.changed(name):
            continue
        value = config.get(name)
        fix = "fix: leave the option out"
        what = f"--{name} {as_typed(value)}"
        if name in by_recipe:
            plugin, reason = by_recipe[name]
            message = f"{what}: the plugin {plugin!r} cannot use it: {reason}"
            problems.append(Problem("MC310", message, [fix]))
        elif name in REFUSED and REFUSED[name][0](value):
            message = f"{what} cannot be honoured: {REFUSED[name][1]}"
            problems.append(Problem("MC311", message, [fix]))
    return problems
