"""TensorBoard event files, written with tensorboard's own writer: torch is not needed.

Tags: train/NAME for a step's values, eval/NAME for evaluations, timers/seconds, memory/peak_gib.
"""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from mcore_core.config.logging import LoggingConfig

FLUSH_SECONDS = 30
_NOT_CURVES = frozenset({"step", "lr", "seconds", "memory_gib"})


class TensorBoardReport:
    """Writes every `tensorboard_log_interval`-th step and every evaluation."""

    def __init__(self, folder: Path, options: LoggingConfig, *, resumed_step: int = 0) -> None:
        """Open an event file. On resume, TensorBoard is told to forget later steps."""
        self._options = options
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(
            str(folder),
            max_queue_size=options.tensorboard_queue_size,
            flush_secs=FLUSH_SECONDS,
        )
        if resumed_step:
            self._writer.add_event(
                Event(
                    wall_time=time.time(),
                    step=resumed_step + 1,
                    session_log=SessionLog(status=SessionLog.START),
                )
            )

    def step(self, line: Mapping[str, float]) -> None:
        """Write the values of one step: a line of metrics.jsonl."""
        step = int(line["step"])
        if step % self._options.tensorboard_log_interval:
            return
        values = [(_train(name), v) for name, v in line.items() if name not in _NOT_CURVES]
        if not self._options.no_log_learning_rate_to_tensorboard:
            values.append(("train/lr", line["lr"]))
        if self._options.log_timers_to_tensorboard:
            values.append(("timers/seconds", line["seconds"]))
        if self._options.log_memory_to_tensorboard and "memory_gib" in line:
            values.append(("memory/peak_gib", line["memory_gib"]))
        self._write(step, values)

    def evaluation(self, line: Mapping[str, float]) -> None:
        """Write an evaluation's values."""
        left_out = () if self._options.log_validation_ppl_to_tensorboard else ("eval/perplexity",)
        values = [
            (name, v)
            for name, v in line.items()
            if name.startswith("eval/") and name not in left_out
        ]
        self._write(int(line["step"]), values)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _write(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in values]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=entries))
        self._writer.add_event(event)


def _train(name: str) -> str:
    return name if "/" in name else f"train/{name}"
