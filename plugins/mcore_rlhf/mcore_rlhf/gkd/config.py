"""Options of generalized knowledge distillation."""

from typing import ClassVar

from pydantic import Field

from mcore_core.config.group import ConfigGroup, names


class GKDConfig(ConfigGroup):
    """The teacher, what the student answers, and how the two are compared."""

    title: ClassVar[str] = "GKD"

    teacher_model: str | None = Field(None, json_schema_extra=names("model"))
    """The teacher: a folder or a hub id, as model. Required. It runs in the student's layout."""
    teacher_model_type: str | None = None
    """The family that reads the teacher. none: what its config.json says."""
    teacher_model_revision: str | None = None
    """Branch, tag or commit of a teacher on the hub."""
    offload_teacher_model: bool = False
    """Keep the teacher in host memory, but for the part of a step that needs it."""

    beta: float = Field(0.5, ge=0, le=1)
    """The divergence: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the
    generalized Jensen-Shannon divergence."""
    lmbda: float = Field(0.5, ge=0, le=1)
    """Share of the steps whose answers the student generates."""
    seq_kd: bool = False
    """In the other steps the teacher generates the answers, in place of the dataset's."""
    sft_alpha: float = Field(0.0, ge=0)
    """Adds this times the negative log-likelihood of the dataset's answers, in steps with them."""
