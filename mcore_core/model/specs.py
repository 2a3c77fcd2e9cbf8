"""Layer specs of the hybrid stack: plain torch (`local`) and Transformer Engine."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mcore_core.model.attention import CoreAttention
from mcore_core.model.latent_attention import LatentAttention, LatentSubmodules
from mcore_core.model.layer import Layer
from mcore_core.model.mtp import PredictionLayer
from mcore_core.model.norm import HeadNorm, Norm
from mcore_core.model.self_attention import FullNormAttention

if TYPE_CHECKING:
    from mcore_core.model.config import DecoderConfig

FUSED_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Our norms are saved under the keys of Transformer Engine's fused modules, so that a checkpoint
is the same whichever implementation wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Whose modules a layer is built of."""

    norm: Any
    column: Any
    row: Any
    core: Any
    fused_column: Any = None
    """A norm and the column-parallel layer after it in one; None where they are two modules."""


def stack_spec(config: "DecoderConfig", *, transformer_engine: bool) -> ModuleSpec:
    """Return the spec of the whole stack for this config."""
    backend = _engine(config) if transformer_engine else _local()
    shape = config.shape
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=_attention_layer(config, backend),
            mlp_layer=_mlp_layer(config, backend),
            mla_layer=_latent_layer(config, backend) if shape.mla else IdentityOp,
            gdn_layer=_linear_layer(config, backend) if shape.linear_attention else IdentityOp,
            moe_layer=_moe_layer(config, backend) if shape.moe else IdentityOp,
            mtp_block_spec=_prediction(backend) if shape.mtp_layers else None,
        ),
    )


def _local() -> Backend:
    return Backend(
        norm=Norm, column=ColumnParallelLinear, row=RowParallelLinear, core=CoreAttention
    )


def _engine(config: "DecoderConfig") -> Backend:
    from megatron.core.extensions.transformer_engine import (  # noqa: PLC0415  (only with TE)
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from mcore_core.model.engine_attention import EngineAttention, engine_can  # noqa: PLC0415

    return Backend(
        norm=TENorm,
        column=TEColumnParallelLinear,
        row=TERowParallelLinear,
        core=EngineAttention if engine_can(config) else CoreAttention,
        fused_column=None if config.separate_norms else TELayerNormColumnParallelLinear,
    )


def with_bias(linear: Any, bias: bool) -> Any:  # noqa: ANN401
    """Return a builder of a linear layer that has a bias, or has none, whatever it is told.

    Megatron has one switch for attention's output and the MLP; models have one for each.
    """

    def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return linear(*args, **(kwargs | {"bias": bias}))

    return build


def _layer(config: "DecoderConfig", backend: Backend, **submodules: Any) -> ModuleSpec:  # noqa: ANN401
    """Return a layer with the norms on its output that the model has."""
    shape, params = config.shape, {}
    if "self_attention" in submodules:
        submodules["self_attn_bda"] = get_bias_dropout_add
        params["post_attention_norm"] = backend.norm if shape.post_attention_norm else None
    else:
        submodules["mlp_bda"] = get_bias_dropout_add
        params["post_mlp_norm"] = backend.norm if shape.post_mlp_norm else None
    return ModuleSpec(
        module=Layer, params=params, submodules=TransformerLayerSubmodules(**submodules)
    )


def _attention_layer(config: "DecoderConfig", backend: Backend) -> ModuleSpec:
    shape = config.shape
    full = shape.qk_layernorm and shape.qk_norm_width == "full"
    qk_norm = backend.norm if config.qk_layernorm else IdentityOp
    fused = backend.fused_column
    attention = ModuleSpec(
        module=FullNormAttention if full else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=with_bias(fused or backend.column, shape.add_qkv_bias),
            core_attention=backend.core,
            linear_proj=with_bias(backend.row, shape.attention_output_bias),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    if fused:
        return _layer(config, backend, self_attention=attention)
    return _layer(
        config,
        backend,
        input_layernorm=backend.norm,
        self_attention=attention,
        sharded_state_dict_keys_map=FUSED_KEYS,
    )


def _mlp_layer(config: "DecoderConfig", backend: Backend) -> ModuleSpec:
    bias, fused = config.shape.mlp_bias, backend.fused_column
    mlp = partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(
            linear_fc1=with_bias(fused or backend.column, bias),
            linear_fc2=with_bias(backend.row, bias),
        ),
    )
    if fused:
        return _layer(config, backend, mlp=mlp)
    return _layer(
        config,
        backend,
        pre_mlp_layernorm=backend.norm,
        mlp=mlp,
        sharded_state_dict_keys_map=FUSED_KEYS,
    )


def _latent_layer(config: "DecoderConfig", backend: Backend) -> ModuleSpec:
    attention = ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=LatentSubmodules(
            column=backend.column,
            row=backend.row,
            norm=backend.norm,
            core_attention=CoreAttention,
        ),
    )
    return _layer(config, backend, input_layernorm=backend.norm, self_attention=attention)


def _linear_layer(config: "DecoderConfig", backend: Backend) -> ModuleSpec:
    from mcore_core.platform.cpu_gdn import patch_gated_delta_net  # noqa: PLC0415  (slow import)

    patch_gated_delta_net()
    from megatron.core.ssm.gated_delta_net import (  # noqa: PLC0415  (after the patch)
        GatedDeltaNetSubmodules,
    )

    from mcore_core.model.delta_net import DeltaNet  # noqa: PLC0415

    attention = ModuleSpec(
        module=DeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=backend.column, out_norm=HeadNorm, out_proj=backend.row
        ),
    )
    return _layer(config, backend, input_layernorm=backend.norm, self_attention=attention)


def _moe_layer(config: "DecoderConfig", backend: Backend) -> ModuleSpec:
    from megatron.core.transformer.moe.moe_layer import MoESubmodules  # noqa: PLC0415  (slow)
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP  # noqa: PLC0415

    from mcore_core.model.moe.experts import GroupedMLP  # noqa: PLC0415  (with experts only)
    from mcore_core.model.moe.layer import PackedMoELayer  # noqa: PLC0415
    from mcore_core.model.moe.router import Router  # noqa: PLC0415

    shared = partial(
        SharedExpertMLP,
        submodules=MLPSubmodules(
            linear_fc1=with_bias(backend.column, False), linear_fc2=with_bias(backend.row, False)
        ),
    )
    moe = partial(
        PackedMoELayer,
        submodules=MoESubmodules(experts=GroupedMLP, shared_experts=shared, router=Router),
    )
    return _layer(config, backend, pre_mlp_layernorm=backend.norm, mlp=moe)


def _prediction(backend: Backend) -> ModuleSpec:
    layer = ModuleSpec(
        module=PredictionLayer, params={"norm": backend.norm, "column": backend.column}
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )
