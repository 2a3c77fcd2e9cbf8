"""From scored completions to units that the loss can train: advantages, scores, corrections.

Everything that spans the round or the global batch of a step is computed here, from the same
numbers on every rank. N completions, P tokens of a prompt, L of a completion.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcore_core.config.compose import RunConfig
from mcore_core.errors import usage_error
from mcore_core.protocols import StepRun, Unit
from mcore_rlhf.grpo import advantages as adv
from mcore_rlhf.grpo import correction
from mcore_rlhf.grpo.config import GRPOConfig
from mcore_rlhf.grpo.entropy import keep_highest
from mcore_rlhf.grpo.logs import describe
from mcore_rlhf.grpo.prepared import Prepared, cells_of, divide
from mcore_rlhf.grpo.sample import Sampled
from mcore_rlhf.reference import REFERENCE
from mcore_rlhf.rollout.config import RolloutConfig
from mcore_rlhf.rollout.trajectory import Trajectory

type Floats = NDArray[np.float32]


class Assembler:
    """Makes `Prepared` rounds."""

    def __init__(self, config: RunConfig, names: Sequence[str]) -> None:
        options = config[GRPOConfig]
        self.options, self.names = options, tuple(names)
        self.weights_F = np.array(options.reward_weights or [1.0] * len(names), np.float64)
        mode = options.rollout_importance_sampling_mode
        if mode is None and config[RolloutConfig].async_generate:
            mode = "token_truncate"
        self.mode = mode

    def __call__(
        self, sampled: Sampled, run: StepRun, steps: tuple[int, int, np.random.Generator]
    ) -> Prepared:
        """Return the round, ready to train; collective.

        Args:
            sampled: The completions of all ranks.
            run: The kernel.
            steps: Optimizer steps that share the round, how often each is taken, and a generator.
        """
        options = self.options
        begin = time.perf_counter()
        units = [_unit(sampled, i) for i in range(len(sampled.trajectories))]
        if run.training and options.router_replay_mode == "R3":
            for unit, trajectory in zip(units, sampled.trajectories, strict=True):
                unit["routing"] = recorded(trajectory, unit["length"])
        number, iterations, rng = steps
        each = divide(len(units), number, iterations, rng)
        rewards_N = adv.weighted(sampled.rewards_NF, self.weights_F)
        several = run.training and number * iterations > 1
        self._score(units, each[:number], run, several=several)
        advantages_N = self._advantages(units, rewards_N, sampled)
        for i, unit in enumerate(units):
            unit["advantage"] = float(advantages_N[i])
            unit["reward"] = float(rewards_N[i])
            if options.overlong_filter:
                unit["kept"] = sampled.trajectories[i].finished
        self._keep_some(units, each[:number], run)
        logs = describe(sampled, rewards_N, run.step) | sampled.logs
        logs |= self._correct(units)
        for numbers in each[:number] if options.top_entropy_quantile < 1 else ():
            keep_highest([units[i] for i in numbers], options.top_entropy_quantile)
        for unit in units:
            unit.pop("entropy", None)
            unit.pop("versions", None)
            if not several:
                unit.pop("old", None)
        logs["timers/score"] = time.perf_counter() - begin
        return Prepared(units, each, logs)

    def _score(
        self, units: list[Unit], each: list[list[int]], run: StepRun, *, several: bool
    ) -> None:
        """Attach old and reference log-probabilities, of the ranks that compute them, to all."""
        options = self.options
        corrects = self.mode is not None or options.log_rollout_offpolicy_metrics
        entropy = options.top_entropy_quantile < 1
        old = several or corrects or options.reward_kl or entropy
        mine = [i for numbers in each for cell in cells_of(units, numbers, run) for i in cell]
        chosen = [units[i] for i in mine]
        found: dict[str, list[NDArray[Any]]] = {}
        if old and several and options.router_replay_mode == "R2":
            scored = run.score_with_routing("policy", chosen)
            names = ("old", "entropy", "routing")
            found |= {n: [s[i] for s in scored] for i, n in enumerate(names)}
        elif old and entropy:
            both = run.score_with_entropy("policy", chosen)
            found |= {"old": [a for a, _ in both], "entropy": [b for _, b in both]}
        elif old:
            found["old"] = run.score("policy", chosen)
        if options.beta > 0:
            # its own routers choose
            plain = [{k: v for k, v in unit.items() if k != "routing"} for unit in chosen]
            found[REFERENCE] = run.score(REFERENCE, plain)
        if not found:
            return
        for numbers, scores in run.gather((mine, found)):
            for name, values in scores.items():
                for i, value in zip(numbers, values, strict=True):
                    units[i][name] = value if name == "routing" else at_tokens(value)

    def _advantages(
        self, units: Sequence[Unit], rewards_N: NDArray[np.float64], sampled: Sampled
    ) -> NDArray[np.float64]:
        options = self.options
        if options.scale == "gdpo":
            return adv.gdpo_advantages(sampled.rewards_NF, self.weights_F, sampled.copies)
        if options.reward_kl:
            kl_N = np.array(
                [(u["old"] - u[REFERENCE])[u["trains"]].sum(dtype=np.float64) for u in units]
            )
            rewards_N = adv.with_kl(rewards_N, kl_N, options.beta)
        return adv.advantages(
            rewards_N,
            sampled.copies,
            estimator=options.advantage_estimator,
            scale=options.scale,
        )

    def _keep_some(self, units: list[Unit], each: list[list[int]], run: StepRun) -> None:
        """Where overlong_filter leaves nothing of a step, keep it, with no advantage."""
        for numbers in each:
            if not any(units[i]["kept"] for i in numbers):
                run.warn(
                    "overlong_filter",
                    f"step {run.step}: every completion was cut by its length, and overlong_filter "
                    "leaves none; see --max_completion_length",
                )
                for i in numbers:
                    units[i] |= {"kept": True, "advantage": 0.0}

    def _correct(self, units: list[Unit]) -> dict[str, float]:
        """Attach the importance correction; return the diagnostics that are asked for."""
        options = self.options
        threshold = options.rollout_importance_sampling_threshold
        if self.mode is not None:
            for unit in units:
                unit["policy"] = correction.importance(
                    unit["old"],
                    unit["rollout"],
                    unit["trains"],
                    mode=self.mode,
                    threshold=threshold,
                )
        if not options.log_rollout_offpolicy_metrics:
            return {}
        return correction.diagnostics(
            [correction.Sampled(u["old"][u["trains"]], u["rollout"][u["trains"]]) for u in units],
            threshold,
        )


def at_tokens(scores: Floats) -> Floats:
    """Return scores at the tokens themselves: `score` gives them where they are predicted."""
    return np.concatenate((np.zeros(1, np.float32), scores[:-1]))


def recorded(trajectory: Trajectory, length: int) -> NDArray[np.int16]:
    """Return the experts of each token of a completion and its prompt, [P + L, layers, K].

    -1 where the engine has not read a token: the last one, and what came after the last turn.

    Raises:
        UsageError: The engine does not record them.
    """
    routing_TLK = trajectory.routing
    if routing_TLK is None:
        raise usage_error(
            "MC362",
            "--router_replay_mode R3: the rollout engine does not say which experts tokens went to",
            "fix: --rollout_engine native, or --router_replay_mode R2",
        )
    more = length - len(routing_TLK)
    return np.pad(routing_TLK, ((0, more), (0, 0), (0, 0)), constant_values=-1)


def _unit(sampled: Sampled, index: int) -> dict[str, Any]:
    """Return a completion behind its prompt, all arrays [P + L]."""
    prompt = np.asarray(sampled.prompt(index)["input_ids"], np.int32)
    said = sampled.trajectories[index].arrays()
    before = len(prompt)

    def behind(values: NDArray[Any], fill: Any) -> NDArray[Any]:  # noqa: ANN401
        return np.concatenate((np.full(before, fill, values.dtype), values))

    return {
        "input_ids": np.concatenate((prompt, said["token_ids"])),
        "trains": behind(said["trains"], False),
        "rollout": behind(said["rollout"], 0.0),
        "versions": behind(said["versions"], -1),
        "advantage": 0.0,
        "reward": 0.0,
        "kept": True,
        "length": before + len(said["token_ids"]),
    }
