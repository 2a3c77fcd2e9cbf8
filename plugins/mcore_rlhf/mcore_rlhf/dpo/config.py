"""Options of direct preference optimization."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from mcore_core.config.group import ConfigGroup


class DPOConfig(ConfigGroup):
    """Direct preference optimization: which loss over pairs, and its constants."""

    title: ClassVar[str] = "DPO"

    loss_type: str = "sigmoid"
    """The loss over pairs: sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard,
    aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm, cpo, simpo, orpo, or
    ./FILE.py:FUNCTION. Several, added up, are joined by commas: sigmoid,sft."""
    loss_weights: list[float] | None = None
    """What each loss of loss_type is multiplied by. none: 1 each."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference; ipo's regularization, orpo's weight of the
    odds ratio."""
    label_smoothing: float = Field(0.0, ge=0, le=1)
    """Share of pairs whose answers are taken to be the wrong way round."""
    rpo_alpha: float | None = Field(None, ge=0)
    """Weight of the negative log-likelihood of the chosen answers, a mean over their tokens, that
    is added to the loss. none: nothing is added."""
    reference_free: bool = False
    """Use 0 for the log-probabilities of the reference, which is then not loaded."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Divergence between policy and reference that the loss implies. alpha_divergence has alpha
    1, where it is forward_kl."""
    simpo_gamma: float = 0.5
    """Margin of simpo between the mean log-probabilities, after beta."""
    cpo_alpha: float = Field(1.0, ge=0)
    """Weight of cpo's negative log-likelihood of the chosen answers."""

    @field_validator("loss_type", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:  # noqa: ANN401
        """Take a list, as YAML may have it, for the same names joined by commas."""
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return ",".join(value)
        return value

    @property
    def losses(self) -> tuple[str, ...]:
        """The names of the losses."""
        return tuple(name.strip() for name in self.loss_type.split(",") if name.strip())

    @property
    def weights(self) -> tuple[float, ...]:
        """What each loss is multiplied by."""
        return tuple(self.loss_weights or [1.0] * len(self.losses))
