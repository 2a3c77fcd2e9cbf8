"""Distillation: a unit is a prompt with the dataset's answer, the student's or the teacher's."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from mcore_core.config.compose import RunConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data.prompt import encode_prompt
from mcore_core.data.rows import RowError, conversation
from mcore_core.data.template import Template
from mcore_core.protocols import (
    Divergence,
    FrozenModel,
    HeadOut,
    HeadSpec,
    LossOutput,
    Reduce,
    Row,
    StepRun,
    Unit,
)
from mcore_rlhf.gkd.answers import answers
from mcore_rlhf.gkd.batch import GKDBatch, answered, collate
from mcore_rlhf.gkd.config import GKDConfig
from mcore_rlhf.gkd.loss import distillation
from mcore_rlhf.rollout.config import GenerationConfig, RolloutConfig
from mcore_rlhf.rollout.generate import sampling_of
from mcore_rlhf.rollout.prompts import FORMATS_HELP, prompt_of, recognize_prompt

TEACHER = "teacher"
NO_ANSWER = "there is no answer to distill on; with --lmbda 1 or --seq_kd true none is needed"


class GKDRecipe:
    """The divergence from a teacher on answers of the dataset, the student or the teacher."""

    formats_help: ClassVar[str] = FORMATS_HELP
    columns_example: ClassVar[str] = "question=prompt"
    recognize = staticmethod(recognize_prompt)
    token_local = True
    predicts_ahead = False

    def __init__(self, config: RunConfig, template: Template) -> None:
        options, generation = config[GKDConfig], config[GenerationConfig]
        self.options = options
        self.head = HeadSpec(
            divergence=Divergence(
                model=TEACHER, beta=options.beta, temperature=generation.temperature
            )
        )
        self.frozen = {
            TEACHER: FrozenModel(
                model=options.teacher_model,
                revision=options.teacher_model_revision,
                model_type=options.teacher_model_type,
                own_vocabulary=True,
                offload=options.offload_teacher_model,
            )
        }
        self.generates = options.lmbda > 0
        answers_are_made = self.generates or options.seq_kd
        self.generated_length = generation.max_completion_length if answers_are_made else 0
        self.engine = config[RolloutConfig].engine if self.generates else None
        self.seed = config[TrainConfig].seed
        self._config, self._template = config, template
        self._evaluations = 0

    @property
    def needs_answers(self) -> bool:
        """Whether some steps train on the dataset's answers."""
        return self.options.lmbda < 1 and not self.options.seq_kd

    def encode(self, row: Row) -> Unit | None:
        """Tokenize a conversation: `input_ids` and `weights` [L], `prompt_ids` [P], `length`.

        Without an answer `input_ids` is the prompt, and nothing of it trains.
        """
        template = self._template
        prompt = encode_prompt(template, prompt_of(row, system=template.system))
        full = None
        if not (row.get("prompt") is not None and row.get("completion") is None):
            full = conversation(row, system=template.system)
        has_answer = full is not None and (
            full.text is not None or full.messages[-1]["role"] == "assistant"
        )
        if not has_answer:
            if self.needs_answers:
                raise RowError(NO_ANSWER)
            return {
                "input_ids": prompt,
                "weights": np.zeros(len(prompt), np.float32),
                "prompt_ids": prompt,
                "length": len(prompt),
            }
        assert full is not None
        encoded = template.encode(full)
        return {
            "input_ids": encoded.input_ids,
            "weights": encoded.weights,
            "prompt_ids": prompt,
            "length": len(encoded.input_ids),
        }

    def source(self, run: StepRun) -> str:
        """Return whose answers a step has: student, teacher or dataset.

        Decided by the seed and the number of the step, so on every rank and after a resume alike.
        An evaluation has the dataset's answers, or as training where rows need not have any.
        """
        options = self.options
        if not run.training and self.needs_answers:
            return "dataset"
        draw = np.random.default_rng([self.seed, 11, run.step]).random()
        if draw < options.lmbda:
            return "student"
        return "teacher" if options.seq_kd else "dataset"

    def prepare(self, units: list[Unit], run: StepRun) -> Iterator[list[Unit]]:
        """Yield the units, with generated answers where the step is to have them."""
        source = self.source(run)
        if run.training:
            run.log({"on_policy": float(source == "student")})
        if source == "dataset":
            yield units
            return
        name = f"{source}{run.step}"
        if not run.training:
            self._evaluations += 1
            name = f"e{self._evaluations}-{name}"
        done = run.step - 1 if run.training else run.step
        sampling = sampling_of(self._config, self._template)
        if source == "student":
            found = answers(run.engine, units, sampling, run, name=name, weights_of=done)
        else:
            with run.generating(TEACHER) as engine:
                found = answers(engine, units, sampling, run, name=name, weights_of=0)
        if run.training:
            lengths = [n for part in run.gather([len(a) for a in found]) for n in part]
            run.log({"completions/mean_length": float(np.mean(lengths))})
        yield [answered(unit, answer) for unit, answer in zip(units, found, strict=True)]

    def collate(self, units: list[Unit]) -> GKDBatch:
        """Pack prompts and answers."""
        return collate(units, sft_alpha=self.options.sft_alpha)

    def loss(self, out: HeadOut, batch: GKDBatch, reduce: Reduce, /) -> LossOutput:
        """Return this micro-batch's share of the loss."""
        return distillation(out, batch, reduce)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of evaluations, which requests are named after."""
        return {"evaluations": self._evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._evaluations = int(state["evaluations"])
