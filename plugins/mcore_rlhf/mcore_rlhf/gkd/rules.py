"""Contradictions between the options of distillation, seen without torch."""

from collections.abc import Iterator

from mcore_core.config.compose import RunConfig
from mcore_core.errors import Problem
from mcore_rlhf.gkd.config import GKDConfig
from mcore_rlhf.rollout.rules import check_rollout
from mcore_rlhf.rules import check_method

GENERATION = (
    "max_completion_length",
    "top_k",
    "top_p",
    "repetition_penalty",
    "stop_words",
    "rollout_engine",
    "use_vllm",
    "native_slots",
    "native_kv_gib",
    "native_cuda_graphs",
)


def check(config: RunConfig) -> Iterator[Problem]:
    """Yield every problem."""
    options = config[GKDConfig]
    yield from check_method(config, "gkd")
    yield from check_rollout(config)
    if options.teacher_model is None:
        yield Problem("MC370", "gkd needs a teacher", ["fix: --teacher_model FOLDER"])
        for name in ("teacher_model_type", "teacher_model_revision"):
            if config.changed(name):
                yield _idle(name, "without --teacher_model")
    if options.lmbda == 1 and options.seq_kd:
        yield _idle("seq_kd", "with --lmbda 1: the student answers in every step")
    if options.sft_alpha and (options.lmbda == 1 or options.seq_kd):
        why = "--lmbda 1" if options.lmbda == 1 else "--seq_kd true"
        yield _idle("sft_alpha", f"with {why}: no step has the dataset's answers")
    if options.lmbda == 0 and not options.seq_kd:
        for name in GENERATION:
            if config.changed(name):
                yield _idle(name, "with --lmbda 0: nothing is generated")
    if options.lmbda == 0 and options.seq_kd:
        for name in ("rollout_engine", "use_vllm"):
            if config.changed(name):
                yield _idle(name, "with --lmbda 0: the teacher answers, with the native engine")


def _idle(name: str, why: str) -> Problem:
    return Problem("MC321", f"--{name} does nothing {why}", [f"fix: leave out --{name}"])
