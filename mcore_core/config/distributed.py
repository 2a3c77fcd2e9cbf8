"""How the model and the data are spread over processes, and how those are started."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class DistributedConfig(ConfigGroup):
    """How the model and the data are spread over processes, and how those are started."""

    title: ClassVar[str] = "Distributed"

    nproc_per_node: int | None = Field(None, ge=1)
    """Processes to start on this machine, one for each GPU. none: one process, or as an outer
    torchrun or Slurm has started them."""
    nnodes: int = Field(1, ge=1)
    """Machines that take part; the command is started on each with its node_rank."""
    node_rank: int = Field(0, ge=0)
    """Number of this machine, from 0."""
    master_addr: str | None = None
    """Address of machine 0. none: this machine."""
    master_port: int | None = Field(None, ge=1, le=65535)
    """Port on machine 0 where processes meet. none: a free one; with nnodes over 1, 29500."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. none: nccl with CUDA, gloo without."""
    ddp_timeout: int = Field(600, ge=1)
    """Seconds after which a communication that some rank never joined is an error."""
    distributed_timeout_minutes: int = Field(300000, ge=1)
    """Megatron's name for ddp_timeout, in minutes; given, it is converted."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Stages that the layers are divided into."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share the tokens of each sequence."""
    sequence_parallel: bool = False
    """Also divide the activations between the matrices along the tokens; saves memory with tensor
    parallelism."""
    use_distributed_optimizer: bool = True
    """Divide the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass already runs; needs
    use_distributed_optimizer and overlap_grad_reduce."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with matrix products; needs Transformer Engine."""

    decoder_first_pipeline_num_layers: int | None = Field(None, ge=1)
    """Layers on the first pipeline stage; the rest are divided evenly."""
    decoder_last_pipeline_num_layers: int | None = Field(None, ge=1)
    """Layers on the last pipeline stage; the rest are divided evenly."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when dividing layers over stages."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the head and loss as one layer when dividing layers over stages."""
    num_layers_per_virtual_pipeline_stage: int | None = Field(None, ge=1)
    """Layers in each chunk when a stage holds several chunks (interleaved pipeline)."""
    num_virtual_stages_per_pipeline_rank: int | None = Field(None, ge=1)
    """Chunks on each pipeline rank (interleaved pipeline): less idle time, more communication."""
    microbatch_group_size_per_virtual_pipeline_stage: int | None = Field(None, ge=1)
    """Micro-batches that a chunk handles before the next chunk runs. none: the pipeline size."""
    pipeline_model_parallel_layout: str | None = None
    """Explicit stages, with | between them: E embedding, t layer, L loss, t*3 for ttt. Example for
    two stages: Ett|ttL."""
