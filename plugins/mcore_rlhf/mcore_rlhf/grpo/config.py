"""Options of group relative policy optimization."""

from typing import ClassVar, Literal

from pydantic import Field

from mcore_core.config.group import ConfigGroup, names

type Estimator = Literal["grpo", "rloo", "reinforce_plus_plus"]
type Scale = Literal["group", "batch", "none", "gdpo"]


class GRPOConfig(ConfigGroup):
    """Batches, rewards, advantages and the loss."""

    title: ClassVar[str] = "GRPO"

    loss_type: str = "grpo"
    """grpo, bnpo, dr_grpo, dapo (clipped; they differ in what they divide by), cispo, sapo, a
    plugin's loss, or ./FILE.py:OBJECT."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL divergence to the reference. 0: there is no reference."""

    num_generations: int = Field(8, ge=1)
    """Completions for each prompt."""
    num_generations_eval: int | None = Field(None, ge=1)
    """The same in evaluations. none: num_generations."""
    steps_per_generation: int | None = Field(None, ge=1)
    """Optimizer steps that share one round of generation, each with a part of it. none: 1."""
    generation_batch_size: int | None = Field(None, ge=1)
    """Completions of one round of generation. none: global_batch_size times
    steps_per_generation."""
    num_iterations: int = Field(1, ge=1)
    """How often the completions of a round are trained on."""

    reward_funcs: list[str] = Field([])
    """Rewards: accuracy, format, cosine, repetition, soft_overlong, reasoning_gym, those of
    plugins, and ./FILE.py:FUNCTION."""
    reward_weights: list[float] | None = None
    """What each reward is multiplied by, those of reward_model last. none: 1 each."""
    reward_model: list[str] = Field([], json_schema_extra=names("model"))
    """Folders or hub ids of sequence-classification models whose scores are rewards too."""
    reward_timeout: float = Field(120.0, gt=0)
    """Seconds after which a reward function that has not answered is left out of the batch; a
    multi-turn scheduler that has not answered by then ends the run."""

    advantage_estimator: Estimator = "grpo"
    """The baseline: the group's mean (grpo), the mean of the group's others (rloo), or the group's
    mean with a scale over the batch (reinforce_plus_plus)."""
    scale_rewards: Scale | None = None
    """What advantages are divided by: the standard deviation of the group or the batch, nothing, or
    each reward's own in its group (gdpo). none given: group for grpo, none for rloo, batch for
    reinforce_plus_plus."""
    kl_in_reward: bool | None = None
    """Take beta times the KL from the reward rather than adding it to the loss. none: false for
    grpo, true for rloo and reinforce_plus_plus."""

    epsilon: float = Field(0.2, ge=0, lt=1)
    """How far below 1 the importance ratio may fall before it is clipped."""
    epsilon_high: float | None = Field(None, ge=0)
    """How far above 1 it may rise. none: epsilon."""
    delta: float | None = Field(None, gt=0)
    """Upper bound of the ratio that is not clipped, for negative advantages; more than
    1 + epsilon_high."""
    cispo_max_ratio: float = Field(5.0, gt=0)
    """cispo: the largest importance ratio."""
    tau_pos: float = Field(1.0, gt=0)
    """sapo: temperature of the gate for positive advantages."""
    tau_neg: float = Field(1.05, gt=0)
    """sapo: the same for the others."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """What has an importance ratio: each token (GRPO), the sequence (GSPO), or each token with the
    sequence's value (GSPO-token)."""

    router_replay_mode: Literal["disabled", "R2", "R3"] = "disabled"
    """Models with experts: send each token in training to the experts that it went to in the pass
    that computed the old log-probabilities (R2), or in the rollout (R3, engine native)."""

    dynamic_sample: bool = False
    """Leave out prompts whose completions all have the same reward, and draw others."""
    max_resample_times: int = Field(3, ge=1)
    """With dynamic_sample: how often others are drawn."""
    overlong_filter: bool = False
    """Leave completions that were cut by their length out of the loss."""
    top_entropy_quantile: float = Field(1.0, gt=0, le=1)
    """Share of the optimizer step's tokens, those with the highest entropy, whose policy term is
    trained."""
    log_entropy: bool = False
    """Report the mean entropy of what was generated."""

    rollout_importance_sampling_mode: (
        Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] | None
    ) = None
    """How to correct for the difference between the engine's probabilities and those of training.
    none: not at all; with async_generate: token_truncate."""
    rollout_importance_sampling_threshold: float = Field(2.0, gt=0)
    """The largest correction."""
    log_rollout_offpolicy_metrics: bool = False
    """Report how far the engine's probabilities are from those of training."""
    off_policy_sequence_mask_delta: float | None = Field(None, ge=0)
    """Leave out completions with a negative advantage whose tokens have become less likely than
    when they were sampled, by more than this much on average, in nats."""

    sync_ref_model: bool = False
    """Move the reference towards the policy now and then."""
    ref_model_sync_steps: int = Field(512, ge=1)
    """With sync_ref_model: optimizer steps between two moves."""
    ref_model_mixup_alpha: float = Field(0.6, gt=0, le=1)
    """With sync_ref_model: the policy's share in the new reference."""

    log_completions: bool = False
    """Print some completions with their rewards, and write all to completions.jsonl."""

    @property
    def scale(self) -> Scale:
        """What advantages are divided by."""
        if self.scale_rewards is not None:
            return self.scale_rewards
        bound: dict[Estimator, Scale] = {
            "grpo": "group",
            "rloo": "none",
            "reinforce_plus_plus": "batch",
        }
        return bound[self.advantage_estimator]

    @property
    def reward_kl(self) -> bool:
        """Whether the KL is in the reward."""
        if self.kl_in_reward is None:
            return self.advantage_estimator != "grpo" and self.scale != "gdpo" and self.beta > 0
        return self.kl_in_reward

    def generated(self, global_batch_size: int) -> int:
        """Return the completions of one round of generation."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size
        return global_batch_size * (self.steps_per_generation or 1)

    def steps_per_round(self, global_batch_size: int) -> int:
        """Return the optimizer steps of one round, iterations included."""
        return self.generated(global_batch_size) // global_batch_size * self.num_iterations
