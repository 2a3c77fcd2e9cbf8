"""Layer specs of the hybrid stack: plain torch (`local`) and Transformer Engine."""

from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from mcore_core.model.attention import CoreAttention
from mcore_core.model.norm import Norm

if TYPE_CHECKING:
    from mcore_core.model.config import DecoderConfig

FUSED_KEYS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Our norms are saved under the keys of Transformer Engine's fused modules, so that a checkpoint
is the same whichever implementation wrote it."""


def stack_spec(config: "DecoderConfig", *, transformer_engine: bool) -> ModuleSpec:
    """Return the spec of the whole stack for this config."""
    if transformer_engine:
        return _engine_spec(config)
    return _local_spec(config)


def with_bias(linear: Any, bias: bool) -> Any:  # noqa: ANN401
    """Return a builder of a linear layer that has a bias, or has none, whatever it is told.

    Megatron has one switch for attention's output and the MLP; models have one for each.
    """

    def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return linear(*args, **(kwargs | {"bias": bias}))

    return build


def _attention(config: "DecoderConfig", *, norm: Any, qkv: Any, core: Any, proj: Any) -> ModuleSpec:  # noqa: ANN401
    shape = config.architecture
    assert shape is not None
    qk_norm = norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=with_bias(qkv, shape.add_qkv_bias),
            core_attention=core,
            linear_proj=with_bias(proj, shape.attention_output_bias),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def _mlp(config: "DecoderConfig", fc1: Any, fc2: Any) -> Any:  # noqa: ANN401
    assert config.architecture is not None
    bias = config.architecture.mlp_bias
    return partial(
        MLP.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=with_bias(fc1, bias), linear_fc2=with_bias(fc2, bias)),
    )


def _local_spec(config: "DecoderConfig") -> ModuleSpec:
    attention = _attention(
        config, norm=Norm, qkv=ColumnParallelLinear, core=CoreAttention, proj=RowParallelLinear
    )
    mlp = _mlp(config, ColumnParallelLinear, RowParallelLinear)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=Norm,
                    self_attention=attention,
                    self_attn_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map=FUSED_KEYS,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=Norm,
                    mlp=mlp,
                    mlp_bda=get_bias_dropout_add,
                    sharded_state_dict_keys_map=FUSED_KEYS,
                ),
            ),
        ),
    )


def _engine_spec(config: "DecoderConfig") -> ModuleSpec:
    from megatron.core.extensions.transformer_engine import (  # noqa: PLC0415  (only with TE)
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    from mcore_core.model.engine_attention import EngineAttention, engine_can  # noqa: PLC0415

    attention = _attention(
        config,
        norm=TENorm,
        qkv=TELayerNormColumnParallelLinear,
        core=EngineAttention if engine_can(config) else CoreAttention,
        proj=TERowParallelLinear,
    )
    mlp = _mlp(config, TELayerNormColumnParallelLinear, TERowParallelLinear)
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    self_attention=attention, self_attn_bda=get_bias_dropout_add
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(mlp=mlp, mlp_bda=get_bias_dropout_add),
            ),
        ),
    )
