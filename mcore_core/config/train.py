"""Options of every training run: batch sizes, length, recomputation, fusions, determinism."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup, also

type RecomputeModule = Literal[
    "core_attn", "mlp", "layernorm", "moe", "moe_act", "shared_experts", "mla_up_proj"
]


class TrainConfig(ConfigGroup):
    """Batch sizes, length, recomputation and determinism."""

    title: ClassVar[str] = "Training"

    micro_batch_size: int = Field(1, ge=1)
    """Samples in one forward pass on one data-parallel rank; with packing, packed rows."""
    global_batch_size: int = Field(16, ge=1)
    """Samples in one optimizer step over all ranks: a multiple of micro_batch_size times the
    data-parallel size. With packing, packed rows."""
    train_iters: int | None = Field(None, ge=1)
    """Optimizer steps to train for. Give this or max_epochs."""
    max_epochs: int | None = Field(None, ge=1, json_schema_extra=also("num_train_epochs"))
    """Passes over the training data. Without this and train_iters: 1 pass; streaming data needs
    one of the two."""
    seq_length: int | None = Field(None, ge=1)
    """Megatron's fixed row length. Rows here are as long as their samples: see max_length."""
    padding_free: bool = True
    """Put the samples of a micro-batch end to end in one row instead of padding each to the
    longest. False is for models that need an attention mask of their own."""
    mlp_padding_free: bool = False
    """Leave padding out of the MLPs only, where padding_free is false."""

    recompute_granularity: Literal["selective", "full", "none"] = "selective"
    """Activations to compute again in the backward pass instead of keeping them: chosen modules,
    whole layers, or nothing. Saves memory for time."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With granularity full: keep the input of each group of recompute_num_layers layers
    (uniform), or recompute only the first recompute_num_layers layers of a stage (block)."""
    recompute_num_layers: int | None = Field(None, ge=1)
    """Layers to recompute together (uniform) or in all on each pipeline stage (block)."""
    recompute_modules: list[RecomputeModule] = Field(["core_attn"])
    """With granularity selective: the modules whose activations are recomputed."""

    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention kernel: flash-attn, cuDNN through Transformer Engine (fused), plain matrix
    products (unfused) or mcore's own (local). auto takes the fastest one that works here."""
    cross_entropy_loss_fusion: bool = False
    """Compute the cross entropy in one fused kernel. Its gradient is in 16 bits when native."""
    cross_entropy_fusion_impl: Literal["native", "te"] = "native"
    """Whose fused cross entropy to use: megatron's (native) or Transformer Engine's (te)."""
    no_masked_softmax_fusion: bool = False
    """Do not fuse scaling, masking and softmax in unfused attention."""
    no_bias_dropout_fusion: bool | None = None
    """Do not fuse the addition of biases with dropout. none: fused where it is supported."""
    no_bias_swiglu_fusion: bool = False
    """Do not fuse SwiGLU with its bias."""
    no_rope_fusion: bool | None = None
    """Do not use the fused rotary embedding. none: fused where it is supported."""
    no_gradient_accumulation_fusion: bool = False
    """Do not add weight gradients into the float32 buffer inside the matrix product (needs Apex or
    Transformer Engine; without them it is off anyway)."""
    calculate_per_token_loss: bool | None = None
    """Divide the loss by the tokens of the global batch (true) or average over samples (false).
    none: as the recipe does."""

    new_special_tokens: list[str] = Field(default_factory=list)
    """Special tokens to add to the tokenizer and the model, or the path of a .txt file with one a
    line. They start as the mean of the embeddings there are."""

    deterministic_mode: bool = False
    """Use only kernels that give the same bits each time; slower on a GPU."""
    seed: int = Field(42, ge=0)
    """Seed of initialization and dropout. The data has its own: data_seed."""
    manual_gc: bool = False
    """Collect Python garbage at fixed steps, on all ranks at once, not at random moments."""
    manual_gc_interval: int = Field(0, ge=0)
    """Steps between collections with manual_gc; 0: only around evaluation and saving."""
    use_cpu_initialization: bool = False
    """Initialize weights on the CPU: the same values for every tensor-parallel size, but slow."""

    log_interval: int = Field(5, ge=1, json_schema_extra=also("logging_steps"))
    """Optimizer steps between two reports."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's event files. none: runs/ in the run folder."""
    add_version: bool = True
    """Write into a subfolder of save named by version and time, so that runs do not mix."""
    check_model: bool = True
    """Check before training that the model's files are complete."""
    megatron_extra_kwargs: dict[str, Any] | None = None
    """Further fields of megatron-core's TransformerConfig, as JSON; for experts."""

    attn_impl: str = "flash_attn"
    """Attention of vision towers."""
    vit_gradient_checkpointing: bool = True
    """Recompute activations of vision towers."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """How vision towers recompute activations, as JSON."""
