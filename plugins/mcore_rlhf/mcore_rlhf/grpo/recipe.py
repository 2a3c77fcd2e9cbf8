"""GRPO: generate, score, compare within groups, train. A unit is a prompt, then a completion.

N completions of a round, P tokens of a prompt, L of a completion.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from mcore_core.config.compose import RunConfig
from mcore_core.config.data import DataConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data.template import Template
from mcore_core.protocols import (
    FrozenModel,
    HeadOut,
    HeadSpec,
    LossOutput,
    Reduce,
    Rounds,
    Row,
    Split,
    StepRun,
    Unit,
)
from mcore_rlhf import components
from mcore_rlhf.grpo import loss as losses
from mcore_rlhf.grpo.assemble import Assembler
from mcore_rlhf.grpo.batch import GRPOBatch, collate
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.loss import Constants, Objective, policy_loss
from mcore_rlhf.grpo.prepared import Prepared, from_state, to_state
from mcore_rlhf.grpo.rewards import Rewards
from mcore_rlhf.grpo.sample import Sampled, Sampler
from mcore_rlhf.reference import REFERENCE, reference_model
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.generate import Generator
from mcore_rlhf.rollout.prompts import FORMATS_HELP, PromptEncoder, recognize_prompt


class GRPORecipe:
    """Rollouts, rewards, advantages and one of the losses of the family."""

    formats_help: ClassVar[str] = FORMATS_HELP
    columns_example: ClassVar[str] = "question=prompt"
    recognize = staticmethod(recognize_prompt)

    def __init__(self, config: RunConfig, template: Template) -> None:
        options, generation = config[GRPOConfig], config[GenerationConfig]
        train = config[TrainConfig]
        self.options, self.length = options, generation.max_completion_length
        self.generated_length = self.length
        self.objective = objective_of(options.loss_type)
        self.constants = constants_of(options)
        self.head = HeadSpec(temperature=generation.temperature, entropy=options.log_entropy)
        self.token_local = self.constants.token_local
        self.predicts_ahead = False
        self.frozen: dict[str, FrozenModel] = (
            {REFERENCE: replace(reference_model(config), moves=options.sync_ref_model)}
            if options.beta > 0
            else {}
        )
        self.engine = config[RolloutConfig].engine
        self.generated = options.generated(train.global_batch_size)
        self.eval_copies = options.num_generations_eval or options.num_generations
        self.rounds = Rounds(
            prompts=self.generated // options.num_generations,
            eval_prompts=max(1, train.global_batch_size // self.eval_copies),
            steps=options.steps_per_round(train.global_batch_size),
        )
        self._encode = PromptEncoder(template)
        self._config, self._template = config, template
        self._data_seed = config[DataConfig].data_seed
        self._parts: tuple[Generator, Sampler, Assembler] | None = None
        self._state: dict[str, Any] | None = None
        self._prepared: Prepared | None = None
        self._evaluations = 0
        self._synced = 0

    @property
    def parts(self) -> tuple[Generator, Sampler, Assembler]:
        """What generates, what scores and chooses, and what attaches; built when first needed."""
        if self._parts is None:
            generator = Generator(self._config, self._template)
            rewards = Rewards.of(self._config, device=_device)
            sampler = Sampler(self._config, self._template, generator, rewards)
            self._parts = (generator, sampler, Assembler(self._config, rewards.names))
            if self._state is not None:
                generator.load_state_dict(self._state)
                self._state = None
        return self._parts

    def encode(self, row: Row) -> Unit | None:
        """Tokenize a prompt; the row goes along for rewards."""
        return self._encode(row)

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit] | Split]:
        """Generate and score a round, then yield its optimizer steps."""
        if not run.training:
            yield self._evaluated(units, run)
            return
        generator, sampler, assembler = self.parts
        self._sync_reference(run)
        begin = time.perf_counter()
        generator.add(units, self.options.num_generations)
        sampled = sampler.round(run)
        sampled.logs["timers/rollout"] = time.perf_counter() - begin
        self._prepared = assembler(sampled, run, self._steps(sampled))
        if self.options.log_completions:
            run.show(sampled.table(self._prepared.units, self._template))
        yield from self._rest(run)

    def resume(self, run: StepRun) -> Iterator[Split]:
        """Yield the steps of a round that a checkpoint interrupted."""
        yield from self._rest(run)

    def _rest(self, run: StepRun) -> Iterator[Split]:
        prepared = self._prepared
        while prepared is not None and not prepared.done:
            run.log(prepared.logs)
            split = prepared.next(run)
            if prepared.done:
                self._prepared = None
            yield split

    def _steps(self, sampled: Sampled) -> tuple[int, int, np.random.Generator]:
        """Return how many steps a round has, how often, and what shuffles it."""
        steps = self.rounds.steps // self.options.num_iterations
        rng = np.random.default_rng([self._data_seed, 7, sampled.number])
        return steps, self.options.num_iterations, rng

    def _evaluated(self, units: list[Unit], run: StepRun) -> Split:
        _, sampler, assembler = self.parts
        self._evaluations += 1
        name = f"e{run.step}-{self._evaluations}"
        sampled = sampler.evaluation(units, self.eval_copies, run, name)
        prepared = assembler(sampled, run, (1, 1, np.random.default_rng(0)))
        run.log(prepared.logs)
        return prepared.next(run)

    def _sync_reference(self, run: StepRun) -> None:
        options = self.options
        due = (run.step - 1) // options.ref_model_sync_steps
        if options.sync_ref_model and due > self._synced:
            run.blend(REFERENCE, options.ref_model_mixup_alpha)
            self._synced = due

    def collate(self, units: list[Unit]) -> GRPOBatch:
        """Pack completions with their prompts."""
        return collate(units, divisor=self.objective.divisor, length=self.length)

    def loss(self, out: HeadOut, batch: GRPOBatch, reduce: Reduce, /) -> LossOutput:
        """Return this micro-batch's share of the loss."""
        return policy_loss(out, batch, reduce, self.objective, self.constants)

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds under way, and what is left of the one that trains."""
        prepared = self._prepared
        rest = None
        if prepared is not None and not prepared.done:
            rest = {
                "units": prepared.units,
                "steps": prepared.steps,
                "at": prepared.at,
                "logs": prepared.logs,
            }
        state = {
            "generator": self.parts[0].state_dict(),
            "prepared": rest,
            "synced": self._synced,
        }
        plain: dict[str, Any] = to_state(state)
        return plain

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        restored: Mapping[str, Any] = from_state(state)
        self._synced = int(restored["synced"])
        self._state = restored["generator"]
        if self._parts is not None:
            self._parts[0].load_state_dict(restored["generator"])
        rest = restored["prepared"]
        self._prepared = None if rest is None else Prepared(**rest)


def objective_of(name: str) -> Objective:
    """Return the loss that --loss_type names."""
    found = getattr(losses, name, None)
    if isinstance(found, Objective):
        return found
    made = components.load("mcore_losses", name, "--loss_type")
    assert isinstance(made, Objective), f"{name} is no mcore_rlhf.grpo.loss.Objective"
    return made


def constants_of(options: GRPOConfig) -> Constants:
    """Return the numbers of the loss; the KL is left out where it is in the reward."""
    return Constants(
        epsilon=options.epsilon,
        epsilon_high=options.epsilon if options.epsilon_high is None else options.epsilon_high,
        delta=options.delta,
        cispo_max_ratio=options.cispo_max_ratio,
        tau_pos=options.tau_pos,
        tau_neg=options.tau_neg,
        beta=0.0 if options.reward_kl else options.beta,
        level=options.importance_sampling_level,
        off_policy_sequence_mask_delta=options.off_policy_sequence_mask_delta,
    )


def _device() -> Any:  # noqa: ANN401
    import torch  # noqa: PLC0415

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
