"""What is reported, where, and how often."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup


class LoggingConfig(ConfigGroup):
    """What is reported, where, and how often."""

    title: ClassVar[str] = "Logging"
    training: ClassVar[bool] = True

    report_to: list[str] = Field(default_factory=list)
    """Reporters beside the console, metrics.jsonl and TensorBoard, by name: wandb, swanlab or a
    plugin's."""
    log_params_norm: bool = False
    """Report the norm of all weights."""
    log_throughput: bool = False
    """Report the arithmetic done, in TFLOP/s for each device."""
    logging_level: Literal["debug", "info", "warning", "error"] | None = None
    """Least severe message of megatron-core, torch and datasets to print. none: error."""
    tensorboard_log_interval: int = Field(1, ge=1)
    """Optimizer steps between two points in TensorBoard."""
    tensorboard_queue_size: int = Field(50, ge=1)
    """Values that TensorBoard collects before writing them."""
    log_timers_to_tensorboard: bool = True
    """Write times of a step's phases to TensorBoard."""
    no_log_learning_rate_to_tensorboard: bool = False
    """Leave the learning rate out of TensorBoard."""
    log_validation_ppl_to_tensorboard: bool = True
    """Write perplexity beside the validation loss to TensorBoard."""
    log_memory_to_tensorboard: bool = True
    """Write device memory to TensorBoard."""
    wandb_project: str = "mcore"
    """Project of the run at Weights & Biases or SwanLab."""
    wandb_exp_name: str | None = None
    """Name of the run there. none: the run folder's name."""
    wandb_save_dir: str | None = None
    """Folder for their local files. none: the run folder."""
