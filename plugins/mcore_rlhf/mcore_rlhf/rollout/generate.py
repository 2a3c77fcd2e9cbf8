"""Generate rounds of completions: in step with training, or ahead of it by a bounded number.

A round is a list of prompts, the same on every data-parallel rank, and some completions of each.
Its completions are numbered prompt by prompt and dealt out to the ranks in equal stretches; when
all are done every rank gets all of them, in order. Staleness 0 is the synchronous case of the same
code: the round that is asked for is the only one under way.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mcore_core.config.compose import RunConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data.template import Template
from mcore_core.protocols import Request, Sampling, StepRun, Turn, Unit
from mcore_rlhf import components
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.prompts import conversation_of, row_of
from mcore_rlhf.rollout.trajectory import Trajectory
from mcore_rlhf.rollout.turns import Continuation, respond

TURN_TIMEOUT = 120.0
"""Seconds for a scheduler's answer, where the recipe has no option that says so."""


@dataclass(slots=True)
class Round:
    """Prompts whose completions are wanted."""

    name: str
    units: list[Unit]
    copies: int
    """Completions of each prompt."""
    submitted: bool = False
    done: dict[int, Trajectory] = field(default_factory=dict)
    """This rank's completions by number."""

    @property
    def size(self) -> int:
        """Completions of all ranks."""
        return len(self.units) * self.copies

    def share(self, dp: tuple[int, int]) -> range:
        """Return the numbers of this rank's completions."""
        rank, size = dp
        return range(rank * self.size // size, (rank + 1) * self.size // size)


def sampling_of(config: RunConfig, template: Template) -> Sampling:
    """Return how completions are sampled."""
    options = config[GenerationConfig]
    return Sampling(
        max_tokens=options.max_completion_length,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty,
        stop=tuple(options.stop_words),
        stop_token_ids=end_tokens(template.tokenizer),
        seed=config[TrainConfig].seed,
    )


def end_tokens(tokenizer: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the tokens that end a turn: the tokenizer's, and those of generation_config.json."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    file = Path(tokenizer.name_or_path or ".") / "generation_config.json"
    try:
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        more = None
    listed = more if isinstance(more, list) else [] if more is None else [more]
    return tuple(dict.fromkeys([*found, *(int(i) for i in listed)]))


class Generator:
    """Keeps rounds under way with the run's engine."""

    def __init__(self, config: RunConfig, template: Template) -> None:
        self.options = config[RolloutConfig]
        self.sampling = sampling_of(config, template)
        self._template, self._continue = template, Continuation(template)
        self._scheduler: Any = None
        if self.options.multi_turn_scheduler is not None:
            made = components.load(
                "mcore_schedulers", self.options.multi_turn_scheduler, "--multi_turn_scheduler"
            )
            self._scheduler = made(config) if isinstance(made, type) else made
        named = "reward_timeout" in config.names
        self._turn_timeout = float(config.get("reward_timeout")) if named else TURN_TIMEOUT
        self._rounds: deque[Round] = deque()
        self._drawn = 0
        self._pending: dict[str, tuple[Round, Trajectory]] = {}
        """By the id of the request under way."""
        self._weights: int | None = None
        self._awake = False

    # -- rounds ------------------------------------------------------------------------------------

    def add(self, units: Sequence[Unit], copies: int) -> None:
        """Queue a round of training prompts."""
        self._rounds.append(Round(f"t{self._drawn}", list(units), copies))
        self._drawn += 1

    def next(self, run: StepRun, copies: int) -> tuple[list[Unit], list[Trajectory]]:
        """Return the oldest round, complete; keep as many under way as staleness allows.

        Collective. Weights are handed to the engine when nothing is under way, or with
        partial_rollouts in the middle of it.
        """
        while len(self._rounds) <= self.options.staleness:
            self.add(run.draw(), copies)
        oldest = self._rounds[0]
        self._wake(run)
        if self.options.partial_rollouts or not oldest.submitted:
            self._finish_all(run, unless=self.options.partial_rollouts)
            self._update(run)
            if not oldest.submitted:
                self._submit(oldest, run)
        if self.options.partial_rollouts:
            self._submit_rest(run)
        self._wait(oldest, run)
        if not self.options.partial_rollouts and any(not r.submitted for r in self._rounds):
            self._finish_all(run)
            self._update(run)
            self._submit_rest(run)
        self._rounds.popleft()
        self._rest(run)
        return oldest.units, self._gathered(oldest, run)

    def evaluate(
        self, units: Sequence[Unit], copies: int, run: StepRun, name: str
    ) -> list[Trajectory]:
        """Return the completions of some prompts, with the weights as they are; collective."""
        evaluated = Round(name, list(units), copies)
        self._wake(run)
        if not self.options.partial_rollouts:
            self._finish_all(run)
        self._update(run, done=run.step)
        self._submit(evaluated, run)
        self._wait(evaluated, run)
        self._rest(run)
        return self._gathered(evaluated, run)

    def _wake(self, run: StepRun) -> None:
        """Have the engine take its memory."""
        if not self._awake:
            run.engine.wake()
            self._awake = True

    def _rest(self, run: StepRun) -> None:
        """Have the engine give it back while the policy trains, where nothing is under way.

        The native engine keeps its cache, and the steps recorded on it, from round to round.
        """
        if self.options.engine != "native" and all(run.gather(not self._pending)):
            run.engine.sleep()
            self._awake = False

    def _submit_rest(self, run: StepRun) -> None:
        for waiting in self._rounds:
            if not waiting.submitted:
                self._submit(waiting, run)

    def _submit(self, wanted: Round, run: StepRun) -> None:
        requests = []
        for index in wanted.share(run.dp):
            unit = wanted.units[index // wanted.copies]
            trajectory = Trajectory(index)
            requests.append(self._request(wanted, trajectory, unit))
        wanted.submitted = True
        run.engine.submit(requests)

    def _request(self, wanted: Round, trajectory: Trajectory, unit: Unit) -> Request:
        left = self.sampling.max_tokens - len(trajectory.token_ids)
        key = f"{wanted.name}-{trajectory.index}-{trajectory.turns}"
        self._pending[key] = (wanted, trajectory)
        return Request(
            id=key,
            token_ids=(*unit["input_ids"].tolist(), *trajectory.token_ids),
            sampling=self.sampling
            if left == self.sampling.max_tokens
            else replace(self.sampling, max_tokens=left),
            row=row_of(unit),
        )

    def _update(self, run: StepRun, done: int | None = None) -> None:
        """Give the engine the policy's weights, unless it has them."""
        steps = run.step - 1 if done is None else done
        if self._weights != steps:
            run.engine.update_weights(step=steps)
            self._weights = steps

    # -- waiting -----------------------------------------------------------------------------------

    def _wait(self, wanted: Round, run: StepRun) -> None:
        """Poll until every rank has its completions of a round."""
        mine = len(wanted.share(run.dp))
        while not all(run.gather(len(wanted.done) == mine)):
            self._take(run)

    def _finish_all(self, run: StepRun, *, unless: bool = False) -> None:
        """Poll until nothing is under way on any rank."""
        while not unless and not all(run.gather(not self._pending)):
            self._take(run)

    def _take(self, run: StepRun) -> None:
        """Take what is finished; ask the scheduler, and go on with what it answers."""
        ended: list[tuple[Round, Trajectory]] = []
        for completion in run.engine.poll(wait=True):
            wanted, trajectory = self._pending.pop(completion.id)
            trajectory.wrote(completion, self._decode(completion.token_ids))
            ended.append((wanted, trajectory))
        going: list[Request] = []
        for (wanted, trajectory), answer in zip(ended, self._answers(ended, run), strict=True):
            unit = wanted.units[trajectory.index // wanted.copies]
            if answer is not None and self._heard(trajectory, unit, answer):
                going.append(self._request(wanted, trajectory, unit))
            else:
                wanted.done[trajectory.index] = trajectory
        if going:
            run.engine.submit(going)

    def _answers(self, ended: Sequence[tuple[Round, Trajectory]], run: StepRun) -> list[Any]:
        """Return the messages that follow each turn, None where the conversation has ended."""
        answers: list[Any] = [None] * len(ended)
        if self._scheduler is None:
            return answers
        most = self.options.max_turns
        asked = [
            i
            for i, (_, trajectory) in enumerate(ended)
            if trajectory.finished and (most is None or trajectory.turns < most)
        ]
        turns = []
        for i in asked:
            wanted, trajectory = ended[i]
            unit = wanted.units[trajectory.index // wanted.copies]
            turns.append(
                Turn(
                    row=row_of(unit),
                    messages=[*conversation_of(unit).messages, *trajectory.messages],
                    text=trajectory.text,
                    number=trajectory.turns,
                    finished=trajectory.finished,
                )
            )
        if not turns:  # the same on every rank of a model: they poll alike
            return answers
        timeout = self._turn_timeout
        for i, answer in zip(
            asked, run.once(lambda: respond(self._scheduler, turns, timeout)), strict=True
        ):
            answers[i] = answer
        return answers

    def _heard(self, trajectory: Trajectory, unit: Unit, answer: list[dict[str, Any]]) -> bool:
        """Add what was answered; false where no token is left for the model's next turn."""
        last = trajectory.token_ids[-1] if trajectory.token_ids else None
        ids = self._continue(answer, conversation_of(unit).tools, last)
        if len(trajectory.token_ids) + len(ids) >= self.sampling.max_tokens:
            trajectory.finished = False
            return False
        trajectory.heard(ids, answer)
        return True

    def _gathered(self, complete: Round, run: StepRun) -> list[Trajectory]:
        """Return the completions of all ranks, in order."""
        mine = [complete.done[i] for i in complete.share(run.dp)]
        return [trajectory for part in run.gather(mine) for trajectory in part]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._template.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    # -- checkpoints -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the rounds that are not trained on yet; they are generated anew."""
        return {
            "drawn": self._drawn,
            "rounds": [(r.name, r.units, r.copies) for r in self._rounds],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._drawn = int(state["drawn"])
        self._rounds = deque(Round(name, units, n) for name, units, n in state["rounds"])
