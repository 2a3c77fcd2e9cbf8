"""A bare megatron-core training loop: what `mcore run` is compared with.

Nothing but forward_backward_func, DDP, the optimizer, and stock cross entropy over whole logits.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from torch import Tensor


class Row(NamedTuple):
    """One micro-batch: a packed row, on the device."""

    tokens_1T: Tensor
    targets_1T: Tensor
    weights_T: Tensor
    packed: Any


class BareLoop:
    """Takes steps of one model on one rank."""

    def __init__(self, module: Any, config: Any, *, lr: float, distributed: bool) -> None:  # noqa: ANN401
        half = config.params_dtype is not torch.float32
        if torch.cuda.is_available():
            module.cuda()
        wrapped = Float16Module(config, module) if half else module
        options = DistributedDataParallelConfig(
            grad_reduce_in_fp32=half, use_distributed_optimizer=distributed
        )
        self.model = DistributedDataParallel(config, options, wrapped)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=lr,
                weight_decay=0.1,
                adam_beta2=0.95,
                clip_grad=1.0,
                params_dtype=config.params_dtype,
                bf16=config.params_dtype is torch.bfloat16,
                use_distributed_optimizer=distributed,
            ),
            [self.model],
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self.run = get_forward_backward_func()

    def step(self, rows: list[Row]) -> float:
        """Take one step over some micro-batches; return the mean loss of a token."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums: list[Tensor] = self.run(
            forward_step_func=_forward,
            data_iterator=iter(rows),
            model=self.model,
            num_microbatches=len(rows),
            seq_length=rows[0].tokens_1T.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        total, count = torch.stack([s["loss"] for s in sums]).sum(0).tolist()  # type: ignore[call-overload]
        return float(total / count)


def _forward(rows: Any, model: Any) -> tuple[Tensor, Any]:  # noqa: ANN401
    row = next(rows)
    losses = model(
        input_ids=row.tokens_1T,
        position_ids=None,
        attention_mask=None,
        labels=row.targets_1T,
        packed_seq_params=row.packed,
    )
    return losses, partial(_loss, row.weights_T)


def _loss(weights_T: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (losses.float().view(-1) * weights_T).sum()
    count = weights_T.sum()
    seen = torch.stack((total.detach(), count))
    return total, count.int(), {"loss": seen}


def hybrid_model(plan: Any, config: Any) -> Any:  # noqa: ANN401
    """Return megatron's own HybridModel with the layers that a run of mcore has."""
    from mcore_core.model.specs import stack_spec

    return HybridModel(
        config,
        stack_spec(config, transformer_engine=plan.transformer_engine),
        vocab_size=plan.padded_vocab_size,
        max_sequence_length=plan.architecture.max_position_embeddings,
        hybrid_layer_pattern=plan.pattern,
        share_embeddings_and_output_weights=plan.architecture.tie_word_embeddings,
        position_embedding_type="none",
    )


def gpt_model(shape: dict[str, Any]) -> tuple[Any, Any]:
    """Return megatron's GPTModel with Transformer Engine's layers and its config, in bfloat16."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        kv_channels=shape["head_dim"],
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        apply_rope_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=find_spec("fused_weight_gradient_mlp_cuda") is not None,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        calculate_per_token_loss=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        vocab_size=shape["vocab_size"],
        max_sequence_length=shape["max_position_embeddings"],
        parallel_output=True,
        share_embeddings_and_output_weights=shape["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=1_000_000,
    )
    return model, config
