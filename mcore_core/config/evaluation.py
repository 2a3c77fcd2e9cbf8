"""When the model is evaluated, and on how much."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup, also


class EvaluationConfig(ConfigGroup):
    """When the model is evaluated, and on how much."""

    title: ClassVar[str] = "Evaluation"
    training: ClassVar[bool] = True

    eval_iters: int = Field(-1, ge=-1)
    """Global batches in one evaluation; -1: all validation data, 0: no evaluation."""
    eval_interval: int | None = Field(None, ge=1, json_schema_extra=also("eval_steps"))
    """Optimizer steps between evaluations. none: save_interval."""
