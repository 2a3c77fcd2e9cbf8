"""The experts of an HF config, in the keys that families use for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mcore_core.model.shapes import LinearAttentionShape, MLAShape, MoEShape

if TYPE_CHECKING:
    from mcore_core.model.hf_config import ConfigReader
    from mcore_core.model.hf_rope import RopeShape


def softmax_experts(
    reader: "ConfigReader",
    layers: Sequence[int],
    *,
    normalized: bool | None = None,
    **own: Any,  # noqa: ANN401
) -> MoEShape:
    """Return experts chosen by softmax.

    Args:
        reader: The config.
        layers: HF layers that have them.
        normalized: Weights of the chosen ones sum to one; None: as norm_topk_prob says.
        own: The family's own values of MoEShape's fields.
    """
    if normalized is None:
        normalized = reader.flag("norm_topk_prob")
    values = _common(reader, own) | {"layers": tuple(layers), "pre_softmax": not normalized}
    return MoEShape(**(values | own))


def sigmoid_experts(reader: "ConfigReader", layers: Sequence[int], **own: Any) -> MoEShape:  # noqa: ANN401
    """Return DeepSeek-V3's experts: sigmoid scores, a bias for the choice, groups."""
    values = _common(reader, own) | {"layers": tuple(layers)}
    values["scaling_factor"] = reader.number("routed_scaling_factor", 1.0)
    topk = values["topk"]
    if not reader.flag("norm_topk_prob", default=True) or topk == 1:
        key = "norm_topk_prob" if topk != 1 else "num_experts_per_tok"
        why = "weights of the chosen experts are always normalized here, and only if several"
        reader.refuse(key, why, "use another model")
    values |= {"score_function": "sigmoid", "expert_bias": True} | own
    return MoEShape(**(values | expert_groups(reader, values["num_experts"], topk)))


def expert_groups(reader: "ConfigReader", experts: int, topk: int) -> dict[str, int]:
    """Return the fields of MoEShape that limit a token to some groups of experts, if any do."""
    groups, chosen = reader.size("n_group", 1), reader.size("topk_group", 1)
    if groups == 1 or chosen >= groups:
        return {}
    if experts % groups:
        reader.refuse(
            "n_group", f"{experts} experts do not divide into as many groups", "correct it"
        )
    elif topk > chosen * (experts // groups):
        why = f"in as many groups of {experts // groups} experts a token does not find its {topk}"
        reader.refuse("topk_group", why, "correct it")
    return {"num_groups": groups, "group_topk": chosen}


def _common(reader: "ConfigReader", own: dict[str, Any]) -> dict[str, Any]:
    reader.only("router_jitter_noise", 0.0, "noise on the router is not built in")
    out: dict[str, Any] = {}
    if "num_experts" not in own:
        # transformers 5 writes num_local_experts, published configs mostly have num_experts
        local = "num_local_experts" in reader.config
        out["num_experts"] = reader.size("num_local_experts" if local else "num_experts")
    if "topk" not in own:
        out["topk"] = reader.size("num_experts_per_tok")
    if "ffn_hidden_size" not in own:
        out["ffn_hidden_size"] = reader.size("moe_intermediate_size")
    reader.get("output_router_logits")  # the option for the auxiliary loss decides
    out["aux_loss_coeff"] = 0.0 if "aux_loss_coeff" in own else _coefficient(reader)
    return out


def _coefficient(reader: "ConfigReader") -> float:
    """Return the checkpoint's coefficient: transformers adds the loss only when told to."""
    coefficient = reader.number("router_aux_loss_coef", 0.0)
    return coefficient if reader.flag("output_router_logits") else 0.0


def qwen_sparse_layers(reader: "ConfigReader") -> tuple[int, ...]:
    """Return the layers with experts, as decoder_sparse_step and mlp_only_layers say."""
    layers = reader.size("num_hidden_layers")
    step = reader.size("decoder_sparse_step", 1)
    dense = reader.get("mlp_only_layers") or ()
    return tuple(i for i in range(layers) if i not in dense and (i + 1) % step == 0)


def after_dense(reader: "ConfigReader", default: int) -> tuple[int, ...]:
    """Return the layers with experts: all but the first ones."""
    first = reader.count("first_k_dense_replace", default)
    return tuple(range(first, reader.size("num_hidden_layers")))


def latent_attention(
    reader: "ConfigReader", rope: "RopeShape", *, q_lora_rank: int | None
) -> dict[str, Any]:
    """Return the fields of Architecture that say latent attention, with its rope.

    Args:
        reader: The config.
        rope: Its rope.
        q_lora_rank: Default of the key where it is absent.
    """
    given = reader.config.get("q_lora_rank", q_lora_rank)
    shape = MLAShape(
        q_lora_rank=None if given is None else reader.size("q_lora_rank", q_lora_rank),
        kv_lora_rank=reader.size("kv_lora_rank", 512),
        qk_nope_head_dim=reader.size("qk_nope_head_dim", 128),
        qk_rope_head_dim=reader.size("qk_rope_head_dim", 64),
        v_head_dim=reader.size("v_head_dim", 128),
    )
    heads = reader.size("num_attention_heads")
    if reader.size("num_key_value_heads", heads) != heads:
        why = "latent attention has as many key heads as query heads"
        reader.refuse("num_key_value_heads", why, "use another model")
    reader.only("attention_bias", False, "latent attention has no biases here")
    norms = "the norms of latent attention use 1e-6 in transformers whatever this key says"
    reader.only("rms_norm_eps", 1e-6, norms)
    size = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    reader.get("head_dim")  # transformers: qk_rope_head_dim, whatever it says
    return {
        "mla": shape,
        "num_query_groups": heads,
        "kv_channels": size,
        "rotary_base": rope.base,
        "rope_scaling": rope.scaling,
        "softmax_scale": rope.softmax_scale(size),
        "rotary_interleaved": reader.flag("rope_interleave", default=True),
    }


def delta_net_shape(reader: "ConfigReader") -> LinearAttentionShape:
    """Return Qwen's gated delta nets: in three layers of four unless layer_types says others."""
    layers, every = reader.size("num_hidden_layers"), reader.size("full_attention_interval", 4)
    linear, full = "linear_attention", "full_attention"
    usual = [linear if (i + 1) % every else full for i in range(layers)]
    kinds = reader.layer_kinds(layers, usual, (full, linear))
    return LinearAttentionShape(
        layers=tuple(i for i, kind in enumerate(kinds) if kind == linear),
        key_head_dim=reader.size("linear_key_head_dim", 128),
        value_head_dim=reader.size("linear_value_head_dim", 128),
        num_key_heads=reader.size("linear_num_key_heads", 16),
        num_value_heads=reader.size("linear_num_value_heads", 32),
        conv_kernel=reader.size("linear_conv_kernel_dim", 4),
    )


def sparse_layers(reader: "ConfigReader", *, first_dense: int) -> tuple[int, ...]:
    """Return the layers with experts as mlp_layer_types says; by default all but the first ones."""
    layers = reader.size("num_hidden_layers")
    kinds = reader.get("mlp_layer_types")
    if kinds is None:
        kinds = ["dense" if i < first_dense else "sparse" for i in range(layers)]
    if len(kinds) != layers or set(kinds) - {"dense", "sparse"}:
        why = f"it must say dense or sparse of each of {layers} layers"
        reader.refuse("mlp_layer_types", why, "correct it")
    return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
