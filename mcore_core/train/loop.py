"""The training loop: steps, evaluations, checkpoints, reports; it ends in good order on SIGTERM."""

import dataclasses
import gc
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mcore_core.checkpoint import folders as checkpoints
from mcore_core.checkpoint.save import Contents, writing
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.evaluation import EvaluationConfig
from mcore_core.config.logging import LoggingConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.parallel.reduce import from_last_stage
from mcore_core.train.exports import export_config, write_files, write_tokenizer
from mcore_core.train.facts import params_norm
from mcore_core.train.flops import step_flops
from mcore_core.train.services import RunServices
from mcore_core.train.session import Session, plain_architecture
from mcore_core.train.stepping import StepView, flat, regroup

if TYPE_CHECKING:
    from mcore_core.protocols import StepResult, Unit


LARGEST_EXPONENT = 700.0
"""Beyond it exp is no double."""


@dataclass(slots=True)
class _Stop:
    """Set by SIGTERM."""

    wanted: bool = False


def train(session: Session) -> None:
    """Train until `train_iters`; collective."""
    run, options = session.run, session.run.config[TrainConfig]
    with _garbage(options), _until_sigterm() as stop:
        session.stepper.wants_stop = lambda: stop.wanted
        session.reports.begin(run, session.facts)
        for text in session.data.report.warnings:
            session.reports.warn_once(text, text)
        session.hooks.mcore_train_begin(run=run, chunks=session.stepper.chunks)
        waiting = time.perf_counter()
        for micros in rounds(session) if run.step < run.train_iters else ():
            waited = time.perf_counter() - waiting
            result = session.stepper.train(micros, run.step + 1)
            run.step += 1
            _after_step(session, result, waited)
            ends = session.stepper.stops
            _maybe_evaluate(session)
            if ends or _saves_now(session):
                save(session)
            if options.manual_gc_interval and run.step % options.manual_gc_interval == 0:
                gc.collect()
            if ends:
                session.reports.warn_once(
                    "sigterm", f"SIGTERM: saved and stopped after step {run.step}"
                )
                break
            if run.step >= run.train_iters:
                break
            waiting = time.perf_counter()
        if session.saver.last_step != run.step:
            save(session)
        session.saver.close()
        if session.services.engine is not None:
            session.services.engine.close()


def rounds(session: Session) -> "Iterator[Sequence[list[Unit]]]":
    """Yield this rank's micro-batches of each step; what a checkpoint has interrupted first."""
    run, recipe, services = session.run, session.recipe, session.services
    data = iter(session.data.train)
    services.draws = (flat(micros) for micros in data)
    view = StepView(session.models, run.step + 1, services=services)
    resume = getattr(recipe, "resume", None)
    for prepared in resume(view) if resume is not None else ():
        yield regroup(prepared, ())
        view.step = run.step + 1
    for micros in data:
        for prepared in recipe.prepare(flat(micros), view):
            yield regroup(prepared, micros)
            view.step = run.step + 1


def _after_step(session: Session, result: "StepResult", waited: float) -> None:
    run, stepper = session.run, session.stepper
    logging = run.config[LoggingConfig]
    extra = session.services.take_logged()
    if logging.log_timers_to_tensorboard:
        extra |= {
            "timers/data": waited,
            "timers/place": stepper.timers.place,
            "timers/forward_backward": stepper.timers.forward_backward,
            "timers/optimizer": stepper.timers.optimizer,
        }
    if logging.log_throughput:
        facts = session.facts
        every = facts.trainable is None or not facts.parameters
        flops = step_flops(
            session.source.architecture,
            stepper.size,
            trained=1.0 if every else (facts.trainable or 0) / facts.parameters,
            depths=stepper.forward.depths,
        )
        extra["tflops_per_device"] = flops / result.seconds / run.world_size / 1e12
    if logging.log_params_norm:
        extra["params_norm"] = params_norm(stepper.chunks)
    if stepper.empty:
        session.reports.warn_once(
            f"empty {run.step}",
            f"step {run.step}: no token of its global batch trains; nothing was changed",
        )
    logged = session.reports.step(run, result, extra)
    session.hooks.mcore_step_end(run=run, step=run.step, result=result)
    if logged is not None and run.is_main:
        session.hooks.mcore_log(run=run, step=run.step, metrics=logged)
    session.saver.finish(blocking=False)


def _maybe_evaluate(session: Session) -> None:
    run = session.run
    interval = run.config[EvaluationConfig].eval_interval
    interval = interval or run.config[CheckpointConfig].save_interval
    if session.data.val is None or (run.step % interval and run.step < run.train_iters):
        return
    services = dataclasses.replace(session.services, draws=None, logged={})
    logged: list[dict[str, float]] = []
    metrics = session.stepper.evaluate(_prepared(session, services, logged))
    for name in sorted({name for each in logged for name in each}):
        values = [each[name] for each in logged if name in each]
        metrics[name] = sum(values) / len(values)
    if metrics:
        if getattr(session.recipe, "loss_is_nll", False):
            metrics["perplexity"] = math.exp(min(metrics["loss"], LARGEST_EXPONENT))
        session.reports.evaluation(run.step, metrics)


def _prepared(
    session: Session, services: RunServices, logged: list[dict[str, float]]
) -> "Iterator[Sequence[list[Unit]]]":
    assert session.data.val is not None
    view = StepView(session.models, session.run.step, training=False, services=services)
    for micros in session.data.val:
        for prepared in session.recipe.prepare(flat(micros), view):
            logged.append(services.take_logged())
            yield regroup(prepared, micros)


def _saves_now(session: Session) -> bool:
    run, options = session.run, session.run.config[CheckpointConfig]
    if run.step >= run.train_iters:
        return True
    if options.save_strategy == "epoch":
        each = run.steps_per_epoch
        return each is not None and int(run.step / each) > int((run.step - 1) / each)
    return run.step % options.save_interval == 0


def save(session: Session) -> None:
    """Write a checkpoint of the current step; collective."""
    run, options = session.run, session.run.config[CheckpointConfig]
    gc.collect()
    weights = run.config[WeightsConfig]
    contents = Contents(
        step=run.step,
        training={
            "train_iters": run.train_iters,
            "layout": str(run.layout),
            "world": run.world_size,
            "plugins": run.plugins,
            "architecture": plain_architecture(session.source),
            "tuner": session.tuner.identity(),
            "data": session.data.train.state_dict(),
            "has_optimizer": not options.no_save_optim,
            "has_rng": not options.no_save_rng,
        },
        common={
            "data": session.data.train.state_dict(),
            # what a loss remembers, the last pipeline stage knows
            "recipe": from_last_stage(session.recipe.state_dict()),
        },
        write_model=partial(
            write_model, session, hf=weights.save_safetensors, max_shard=weights.max_shard_bytes
        ),
    )
    session.saver.save(session.trainable, contents)


def write_model(session: Session, folder: Path, *, hf: bool, max_shard: int) -> None:
    """Write what other programs read: safetensors, tokenizer, options."""
    run, tuner = session.run, session.tuner
    if run.is_main:
        options = (run.output_dir / "run.yaml").read_text(encoding="utf-8")
        (folder / "run.yaml").write_text(options, encoding="utf-8")
    chunks = session.stepper.chunks
    if tuner.partial:
        tuner.export(chunks, folder)
        wanted = run.config[WeightsConfig].merge_lora
        if (hf and tuner.mergeable) if wanted is None else wanted:
            _write_merged(session, max_shard)
    elif hf:
        session.bridge.save(
            chunks,
            folder,
            max_shard_size=max_shard,
            source=session.source.path,
            config=export_config(session.source, session.template.tokenizer, session.recipe),
        )
        if run.is_main:
            write_files(folder, session.recipe, session.source.architecture)
    if run.is_main and run.config[TrainConfig].new_special_tokens:
        write_tokenizer(folder, session.template.tokenizer)
    dist.barrier()


def _write_merged(session: Session, max_shard: int) -> None:
    """Write the model with the adapters in its weights, in a folder beside the checkpoint."""
    run, chunks = session.run, session.stepper.chunks
    final = checkpoints.merged_path(run.output_dir, run.step)
    unfinished = final.with_name(f".partial-{final.name}")
    if run.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
    dist.barrier()
    with writing(unfinished):
        session.bridge.save(
            chunks,
            unfinished,
            max_shard_size=max_shard,
            source=session.source.path,
            weights=session.tuner.merged(chunks),
            config=export_config(session.source, session.template.tokenizer, session.recipe),
        )
    if run.is_main:
        write_files(unfinished, session.recipe, session.source.architecture)
        if run.config[TrainConfig].new_special_tokens:
            write_tokenizer(unfinished, session.template.tokenizer)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)


@contextmanager
def _garbage(options: TrainConfig) -> Iterator[None]:
    """Leave what was there before the loop, modules above all, out of every collection."""
    gc.collect()
    gc.freeze()
    if options.manual_gc:
        gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def _until_sigterm() -> Iterator[_Stop]:
    stop = _Stop()

    def handler(number: int, frame: Any) -> None:  # noqa: ANN401
        stop.wanted = True

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def deterministic(options: TrainConfig) -> None:
    """Choose kernels that give the same bits each time."""
    if options.deterministic_mode:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
