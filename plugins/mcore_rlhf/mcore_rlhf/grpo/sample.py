"""Get a round of scored completions: generate, reward, and with dynamic_sample draw again.

N completions, G of each prompt and side by side; F reward functions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcore_core.config.compose import RunConfig
from mcore_core.data.template import Template
from mcore_core.protocols import Rollout, StepRun, Unit
from mcore_rlhf.grpo.advantages import gdpo_advantages, group_std, weighted
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.rewards import Rewards, Scored, check_scored
from mcore_rlhf.rollout.generate import Generator
from mcore_rlhf.rollout.prompts import conversation_of, row_of
from mcore_rlhf.rollout.trajectory import Trajectory

type Floats = NDArray[np.float64]


@dataclass(slots=True)
class Sampled:
    """Completions of a round on every rank, with their rewards."""

    units: list[Unit]
    """The prompts."""
    copies: int
    trajectories: list[Trajectory]
    rewards_NF: Floats
    names: tuple[str, ...]
    number: int = 0
    """Of the round, from 0."""
    logs: dict[str, float] = field(default_factory=dict)

    def prompt(self, index: int) -> Unit:
        """Return the prompt of a completion."""
        return self.units[index // self.copies]

    def keep(self, groups: Sequence[int]) -> "Sampled":
        """Return the same with some of the prompts."""
        g = self.copies
        rows = [i for group in groups for i in range(group * g, group * g + g)]
        return Sampled(
            [self.units[group] for group in groups],
            g,
            [self.trajectories[i] for i in rows],
            self.rewards_NF[rows],
            self.names,
            self.number,
            self.logs,
        )

    def join(self, other: "Sampled") -> "Sampled":
        """Return both."""
        return Sampled(
            self.units + other.units,
            self.copies,
            self.trajectories + other.trajectories,
            np.concatenate((self.rewards_NF, other.rewards_NF)),
            self.names,
            self.number,
            self.logs,
        )

    def table(self, trained: Sequence[Unit], template: Template) -> list[dict[str, Any]]:
        """Return the completions as the report shows them."""
        rows = []
        for i, (trajectory, unit) in enumerate(zip(self.trajectories, trained, strict=True)):
            scores = self.rewards_NF[i].tolist()
            rows.append(
                {
                    "prompt": _decode(template, self.prompt(i)["input_ids"]),
                    "completion": _decode(template, np.asarray(trajectory.token_ids)),
                    "reward": float(unit["reward"]),
                    "rewards": {
                        name: None if np.isnan(score) else score
                        for name, score in zip(self.names, scores, strict=True)
                    },
                    "advantage": float(unit["advantage"]),
                    "finished": trajectory.finished,
                    "tokens": len(trajectory.token_ids),
                }
            )
        return rows


class Sampler:
    """Makes rounds of `Sampled`."""

    def __init__(
        self, config: RunConfig, template: Template, generator: Generator, rewards: Rewards
    ) -> None:
        self.options, self.rewards = config[GRPOConfig], rewards
        self._template, self._generator = template, generator
        given = self.options.reward_weights
        self.weights_F = np.array(given or [1.0] * len(rewards.names), np.float64)

    def round(self, run: StepRun) -> Sampled:
        """Return the next round of training; collective."""
        found = self._one(run)
        if self.options.dynamic_sample:
            found = self._dynamic(found, run)
        found.number = int(run.step)
        return found

    def evaluation(self, units: list[Unit], copies: int, run: StepRun, name: str) -> Sampled:
        """Return the completions of some prompts of an evaluation; collective."""
        trajectories = self._generator.evaluate(units, copies, run, name)
        return self._scored(units, copies, trajectories, run)

    def _one(self, run: StepRun) -> Sampled:
        copies = self.options.num_generations
        units, trajectories = self._generator.next(run, copies)
        return self._scored(units, copies, trajectories, run)

    def _dynamic(self, found: Sampled, run: StepRun) -> Sampled:
        """Replace prompts whose completions all have the same reward (DAPO, arXiv 2503.14476)."""
        wanted = len(found.units)
        useful, useless = self._sorted(found)
        times = 0
        while len(useful.units) < wanted and times < self.options.max_resample_times:
            times += 1
            more, rest = self._sorted(self._one(run))
            useful, useless = useful.join(more), useless.join(rest)
        missing = wanted - len(useful.units)
        if missing > 0:
            run.warn(
                "dynamic_sample",
                f"dynamic_sample: after {times} more rounds {missing} of {wanted} prompts still "
                "have equal rewards for all completions; they are trained on as they are",
            )
            useful = useful.join(useless.keep(range(missing)))
        kept = useful.keep(range(wanted))
        kept.logs = found.logs | {"dynamic_sample/rounds": float(times)}
        return kept

    def _sorted(self, found: Sampled) -> tuple[Sampled, Sampled]:
        spread = group_std(weighted(found.rewards_NF, self.weights_F), found.copies)
        if self.options.scale == "gdpo":
            moved = gdpo_advantages(found.rewards_NF, self.weights_F, found.copies)
            spread = np.abs(moved).reshape(-1, found.copies).max(1)
        groups = range(len(found.units))
        return (
            found.keep([g for g in groups if spread[g] > 0]),
            found.keep([g for g in groups if not spread[g] > 0]),
        )

    def _scored(
        self, units: list[Unit], copies: int, trajectories: list[Trajectory], run: StepRun
    ) -> Sampled:
        """Score this rank's share of the completions, and get that of the others."""
        begin = time.perf_counter()
        rank, size = run.dp
        number = len(trajectories)
        mine = range(rank * number // size, (rank + 1) * number // size)
        rollouts = [self._rollout(units[i // copies], trajectories[i], run) for i in mine]

        def score() -> Scored:
            scored = self.rewards(rollouts)
            check_scored(scored, rollouts)
            return scored

        scored = run.once(score)
        parts = run.gather((scored.rewards_NF, scored.problems))
        for problems in parts:
            for text in problems[1]:
                run.warn(text.partition(" of ")[0] + text.rpartition(":")[2], text)
        rewards_NF = np.concatenate([part[0] for part in parts])
        logs = {"timers/rewards": time.perf_counter() - begin}
        return Sampled(units, copies, trajectories, rewards_NF, self.rewards.names, logs=logs)

    def _rollout(self, unit: Unit, trajectory: Trajectory, run: StepRun) -> Rollout:
        return Rollout(
            row=row_of(unit),
            text=trajectory.text,
            token_ids=tuple(trajectory.token_ids),
            finished=trajectory.finished,
            messages=[*conversation_of(unit).messages, *trajectory.messages],
            step=run.step,
        )


def _decode(template: Template, ids: NDArray[Any]) -> str:
    text = template.tokenizer.decode(
        ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)
