"""Which optimizer runs, in which precision, and where its state lives."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class OptimizerConfig(ConfigGroup):
    """The optimizer."""

    title: ClassVar[str] = "Training"
    training: ClassVar[bool] = True

    optimizer: Literal["adam", "sgd", "muon", "dist_muon"] = "adam"
    """adam is AdamW. muon orthogonalizes the updates of matrices and leaves the rest (embeddings,
    head, norms, biases, experts) to adam; dist_muon also spreads its state over data-parallel
    ranks. Both need emerging-optimizers."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer state in host memory and step there; for GPUs only."""
    optimizer_offload_fraction: float = Field(1.0, ge=0, le=1)
    """Part of the optimizer state that optimizer_cpu_offload moves, 0 to 1."""
    use_precision_aware_optimizer: bool = False
    """Keep gradients and optimizer state in the types below; needs Transformer Engine."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the main gradients, with use_precision_aware_optimizer."""
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    """Type of the main weights, with use_precision_aware_optimizer."""
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Type of Adam's first moment, with use_precision_aware_optimizer."""
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = "fp32"
    """Type of Adam's second moment, with use_precision_aware_optimizer."""
    apply_wd_to_qk_layernorm: bool = False
    """Decay the weights of the norms on queries and keys too."""
    vit_lr: float | None = Field(None, ge=0)
    """Learning rate of vision towers."""
    aligner_lr: float | None = Field(None, ge=0)
    """Learning rate of the projector between a vision tower and the language model."""
