"""What is saved, when, and what is loaded."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup, also, names


class CheckpointConfig(ConfigGroup):
    """What is saved, when, and what is loaded."""

    title: ClassVar[str] = "Checkpoint"

    save: str | None = Field(None, json_schema_extra=also("output_dir"))
    """Run folder, for checkpoints, metrics and the report. none: mcore_output/MODEL."""
    save_strategy: Literal["steps", "epoch"] = "steps"
    """Save every save_interval steps, or at the end of each pass over the data."""
    save_interval: int = Field(500, ge=1, json_schema_extra=also("save_steps"))
    """Optimizer steps between checkpoints."""
    save_retain_interval: int | None = Field(None, ge=1)
    """Keep checkpoints at multiples of this many steps, and the newest; delete the others.
    none: keep all."""
    no_save_optim: bool = False
    """Leave the optimizer out of checkpoints: smaller, but training cannot resume exactly."""
    no_save_rng: bool = False
    """Leave random states out of checkpoints."""
    load: str | None = Field(None, json_schema_extra=names("checkpoint", "mcore_model"))
    """Resume from this run folder (its newest complete checkpoint) or from one checkpoint."""
    no_load_optim: bool = False
    """Start with a fresh optimizer when loading."""
    no_load_rng: bool = False
    """Start with fresh random states when loading."""
    finetune: bool = False
    """Load only the weights: start at step 0 with a fresh optimizer and data from the beginning."""
    ckpt_format: Literal["torch_dist"] = "torch_dist"
    """Format of the training state; torch_dist can be loaded in any parallel layout."""
    no_initialization: bool = True
    """Do not fill weights with random numbers that loading overwrites."""
    auto_detect_ckpt_format: bool = True
    """Recognize the format of a checkpoint when loading."""
    exit_on_missing_checkpoint: bool = True
    """Stop when load has no checkpoint; false: start from the beginning."""
    async_save: bool = False
    """Write checkpoints in the background while training goes on."""
    use_persistent_ckpt_worker: bool = False
    """On a GPU, keep one background process for async_save, not a new one for each checkpoint."""
    ckpt_fully_parallel_load: bool = False
    """Let each data-parallel rank read a part and exchange the parts, instead of reading all."""
    ckpt_assume_constant_structure: bool = False
    """Plan the saving once and reuse the plan: faster where nothing changes between checkpoints."""
