"""From an architecture and the options of a run to megatron modules: the one builder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.hybrid import hybrid_block
from megatron.core.transformer.enums import AttnBackend

from mcore_core.config.distributed import DistributedConfig
from mcore_core.config.fp8 import FP8Config
from mcore_core.config.model import ModelConfig
from mcore_core.config.mtp import MTPConfig
from mcore_core.config.precision import PrecisionConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.tuner import TunerConfig
from mcore_core.model.config import SUBLAYERS, DecoderConfig
from mcore_core.model.decoder import Decoder
from mcore_core.model.moe.fields import expert_fields
from mcore_core.model.norm import Norm
from mcore_core.model.rope import Rope
from mcore_core.model.specs import stack_spec

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.model.architecture import Architecture
    from mcore_core.parallel.topology import Layout

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "quick_gelu": quick_gelu,
    "gpt_oss": quick_gelu,  # x sigmoid(1.702 x), and one is added to the linear half
}
"""HF's `hidden_act` -> function."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """Everything that decides what is built; the same on every rank."""

    architecture: "Architecture"
    layout: "Layout"
    stage_layers: Sequence[int]
    """HF layers of each pipeline chunk, in model order."""
    dtype: torch.dtype
    transformer_engine: bool
    max_length: int | None = None
    """Longest sequence of the run; fixes rope types that depend on it."""
    padded_vocab: int | None = None
    """None: the vocabulary, rounded up to a multiple of the tensor-parallel size."""
    dispatcher: Any = None
    """The class that takes tokens to experts; None: all-to-all."""
    row_multiple: int = 1
    """What packed rows are padded to beyond what the layout needs (FP8 kernels want 16 tokens)."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all tensor-parallel ranks."""
        tp = self.layout.tp
        return self.padded_vocab or math.ceil(self.architecture.vocab_size / tp) * tp

    @property
    def pattern(self) -> str:
        """The hybrid pattern with | between pipeline chunks."""
        shape = self.architecture
        layers = iter(range(shape.num_layers))
        decoder = "|".join(
            "".join(layer_pattern(shape, next(layers)) for _ in range(count))
            for count in self.stage_layers
        )
        return decoder + ("/" + layer_pattern(shape, shape.mtp_kind)) * shape.mtp_layers


def layer_pattern(shape: "Architecture", layer: int) -> str:
    """Return the two positions of a HF layer in the hybrid pattern: its attention and its MLP."""
    attention = "+" if shape.mla is not None else "*"
    if shape.linear_attention is not None and layer in shape.linear_attention.layers:
        attention = "G"
    experts = shape.moe is not None and layer in shape.moe.layers
    return attention + ("E" if experts else "-")


def decoder_config(
    plan: ModelPlan, config: "RunConfig", *, on_cpu: bool, initialize: bool = True
) -> DecoderConfig:
    """Return the TransformerConfig of this run; `initialize` draws random weights."""
    shape, layout = plan.architecture, plan.layout
    train, distributed = config[TrainConfig], config[DistributedConfig]
    precision = config[PrecisionConfig]
    fused = not on_cpu
    values: dict[str, Any] = {
        "num_layers": shape.num_layers * SUBLAYERS,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "layernorm_epsilon": shape.norm_epsilon,
        "layernorm_zero_centered_gamma": shape.zero_centered_gamma,
        "normalization": shape.normalization,
        "gated_linear_unit": shape.gated,
        "activation_func": ACTIVATIONS[shape.activation],
        "activation_func_clamp_value": shape.activation_clamp,
        "glu_linear_offset": _offset(shape, config),
        # each module is told about its own biases; megatron's experts refuse the common switch
        "add_bias_linear": shape.moe is None and (shape.mlp_bias or shape.attention_output_bias),
        "add_qkv_bias": shape.add_qkv_bias,
        # megatron sums the gradients of norms so named over tensor-parallel ranks, which is right
        # for norms over each head only
        "qk_layernorm": shape.qk_layernorm and shape.qk_norm_width == "head" and not shape.mla,
        "attention_output_gate": shape.attention_output_gate,
        "softmax_type": shape.softmax_type,
        "attention_dropout": shape.attention_dropout,
        "hidden_dropout": shape.hidden_dropout,
        "init_method_std": shape.initializer_range,
        "attention_softmax_in_fp32": precision.attention_softmax_in_fp32,
        # layouts
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "context_parallel_size": layout.cp,
        # a dense model's ranks of another's experts hold the same of it, as data-parallel ones do
        "expert_model_parallel_size": layout.ep if shape.moe else 1,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sp,
        "pipeline_dtype": plan.dtype,
        "params_dtype": plan.dtype,
        "bf16": plan.dtype is torch.bfloat16,
        "fp16": plan.dtype is torch.float16,
        # packed rows of unequal length over pipeline stages
        "variable_seq_lengths": layout.pp > 1,
        **expert_fields(shape, config, _dispatcher(plan)),
        "mtp_num_layers": shape.mtp_layers or None,
        "mtp_loss_scaling_factor": config[MTPConfig].mtp_loss_scaling_factor,
        **_linear_attention(shape),
        # the interleaved schedule is silently wrong over gloo with megatron's own flags
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
        "microbatch_group_size_per_vp_stage": (
            distributed.microbatch_group_size_per_virtual_pipeline_stage
        ),
        "deallocate_pipeline_outputs": True,
        "tp_comm_overlap": distributed.tp_comm_overlap,
        # kernels
        "transformer_impl": "transformer_engine" if plan.transformer_engine else "local",
        "attention_backend": _backend(train.attention_backend),
        "attention_kernel": train.attention_backend,
        "use_cpu_initialization": train.use_cpu_initialization or on_cpu,
        "gradient_accumulation_fusion": (
            plan.transformer_engine and not train.no_gradient_accumulation_fusion
        ),
        "bias_dropout_fusion": fused and not train.no_bias_dropout_fusion,
        "bias_activation_fusion": (
            fused
            and shape.activation in ("silu", "swish")
            and shape.gated
            and not train.no_bias_swiglu_fusion
            and shape.activation_clamp is None
            and not _offset(shape, config)
        ),
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,  # ours reads positions from the row
        "persist_layer_norm": False,
        "perform_initialization": initialize,
        "calculate_per_token_loss": True,  # losses are sums; the kernel divides
        "deterministic_mode": train.deterministic_mode,
        "architecture": shape,
        "rope": _rope(plan, train),
        "window_rope": _window_rope(plan, train),
        # an adapter takes what its layer takes: after the norm
        "separate_norms": config[TunerConfig].tuner_type == "lora",
        **_recompute(train),
        **_fp8(config[FP8Config]),
        **(train.megatron_extra_kwargs or {}),
    }
    return DecoderConfig(**{k: v for k, v in values.items() if v is not None or k == "rope"})


def _dispatcher(plan: ModelPlan) -> Any:  # noqa: ANN401
    if plan.dispatcher is not None or plan.architecture.moe is None:
        return plan.dispatcher
    from mcore_core.model.moe.dispatchers import AllToAll  # noqa: PLC0415  (with experts only)

    return AllToAll


def _offset(shape: "Architecture", config: "RunConfig") -> float:
    """Return what is added to the linear half of a gated MLP."""
    if shape.activation == "gpt_oss" and not config.is_set("glu_linear_offset"):
        return 1.0
    return config[ModelConfig].glu_linear_offset


def _rope(plan: ModelPlan, train: TrainConfig) -> Rope | None:
    if plan.architecture.position_embedding_type != "rope":
        return None
    return Rope(
        plan.architecture, max_length=plan.max_length, fused=not (train.no_rope_fusion or False)
    )


def _window_rope(plan: ModelPlan, train: TrainConfig) -> Rope | None:
    """Return the table of windowed layers with a base of their own, which no scaling touches."""
    shape = plan.architecture
    if shape.window_rotary_base is None:
        return None
    changed = replace(shape, rotary_base=shape.window_rotary_base, rope_scaling=None)
    return _rope(replace(plan, architecture=changed), train)


def _linear_attention(shape: "Architecture") -> dict[str, Any]:
    linear = shape.linear_attention
    if linear is None:
        return {}
    return {
        "linear_conv_kernel_dim": linear.conv_kernel,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
    }


def _backend(name: str) -> AttnBackend:
    return AttnBackend.__members__.get(name, AttnBackend.auto)


def _fp8(options: FP8Config) -> dict[str, Any]:
    if options.fp8_format is None:
        return {}
    return {
        "fp8": options.fp8_format,
        "fp8_recipe": options.fp8_recipe,
        "fp8_amax_history_len": options.fp8_amax_history_len,
        "fp8_amax_compute_algo": options.fp8_amax_compute_algo,
        "fp8_param": options.fp8_param_gather,
    }


def _recompute(train: TrainConfig) -> dict[str, Any]:
    """Translate recomputation; numbers of layers are HF layers, megatron counts positions."""
    match train.recompute_granularity:
        case "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": train.recompute_method or "uniform",
                "recompute_num_layers": (train.recompute_num_layers or 1) * SUBLAYERS,
            }
        case "selective":
            return {
                "recompute_granularity": "selective",
                "recompute_modules": list(train.recompute_modules),
            }
        case _:
            return {}


def build_chunks(plan: ModelPlan, config: DecoderConfig) -> list[Decoder]:
    """Return this pipeline rank's chunks, initialized at random. Needs megatron's groups."""
    # HybridStack takes its final norm from the module, not from its spec
    hybrid_block.TENorm = TENorm if plan.transformer_engine else Norm
    spec = stack_spec(config, transformer_engine=plan.transformer_engine)
    pp, rank = plan.layout.pp, parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for virtual in range(plan.layout.vpp or 1):
        index = virtual * pp + rank
        chunk = Decoder(
            config,
            spec,
            vocab_size=plan.padded_vocab_size,
            max_sequence_length=plan.architecture.max_position_embeddings,
            hybrid_layer_pattern=plan.pattern,
            pre_process=index == 0,
            post_process=index == plan.layout.stages - 1,
            share_embeddings_and_output_weights=plan.architecture.ties_head,
            position_embedding_type="none",
            vp_stage=virtual if plan.layout.vpp else None,
        )
        chunk.first_layer = sum(plan.stage_layers[:index])
        chunks.append(chunk)
    return chunks
