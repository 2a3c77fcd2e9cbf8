"""The reference model that options name, and what it said about units seen before."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.checkpoint import folders as checkpoints
from mcore_core.config.weights import WeightsConfig
from mcore_core.protocols import FrozenModel, StepRun, Unit
from mcore_rlhf.config import ReferenceConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_core.config.compose import RunConfig

REFERENCE = "ref"
KEY_BYTES = 16

type Summed = Callable[[Unit, "NDArray[np.float32]"], tuple[float, ...]]
"""A unit and its tokens' log-probabilities -> the numbers to keep of it."""


def reference_model(config: "RunConfig") -> FrozenModel:
    """Return the reference that the options name."""
    options = config[ReferenceConfig]
    return FrozenModel(
        model=options.ref_model,
        load=options.ref_load,
        adapters=tuple(options.ref_adapters),
        adapter_load=options.ref_adapter_load,
    )


def unit_key(unit: Unit) -> bytes:
    """Return a hash of the tokens of a unit and of which of them train."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(unit["input_ids"], np.int32))
    digest.update(np.ascontiguousarray(np.asarray(unit["weights"]) > 0))
    digest.update(str(unit.get("chosen_length", "")).encode())
    return digest.digest()


def reference_identity(config: "RunConfig") -> str:
    """Return what tells one reference from another: its options, and the files that they name.

    Of files the names, sizes and times of change are taken. Of a run's folder its newest checkpoint
    counts: another one is another reference.
    """
    options, weights = config[ReferenceConfig], config[WeightsConfig]
    named = [options.ref_model or weights.model, *options.ref_adapters]
    folders = [Path(name).expanduser() for name in named if name]
    for name in (options.ref_load, options.ref_adapter_load):
        found = None if name is None else checkpoints.find(Path(name).expanduser())
        folders += [] if found is None else [found.path]
    files = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns)
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    return repr((weights.model, weights.model_revision, options.model_dump(), files))


class ReferenceScores:
    """Sums of log-probabilities under the reference, computed once for each unit.

    Every rank keeps those of all ranks, since a unit may come to another rank in the next epoch;
    each takes about 150 bytes. They are part of a checkpoint: a resumed run goes on with the same
    numbers.
    """

    def __init__(self, config: "RunConfig", summed: Summed) -> None:
        self._identity = reference_identity(config)
        self._summed = summed
        self._known: dict[bytes, tuple[float, ...]] = {}

    def __call__(self, units: Sequence[Unit], run: StepRun) -> list[tuple[float, ...]]:
        """Return the numbers of each unit; collective.

        The whole global batch is scored as soon as one of its units, on any rank, is new.
        """
        keys = [unit_key(unit) for unit in units]
        if any(run.gather(any(key not in self._known for key in keys))):
            scored = run.score(REFERENCE, list(units))
            mine = {
                key: self._known.get(key) or self._summed(unit, logps)
                for key, unit, logps in zip(keys, units, scored, strict=True)
            }
            for found in run.gather(mine):
                self._known |= found
        return [self._known[key] for key in keys]

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, as arrays."""
        return {
            "of": self._identity,
            "keys": np.frombuffer(b"".join(self._known), np.uint8),
            "values": np.array(list(self._known.values()), np.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was known, unless it was about another reference."""
        if state["of"] != self._identity:
            return
        keys = np.asarray(state["keys"], np.uint8).tobytes()
        parts = [keys[i : i + KEY_BYTES] for i in range(0, len(keys), KEY_BYTES)]
        values = [tuple(map(float, row)) for row in state["values"]]
        self._known = dict(zip(parts, values, strict=True))
