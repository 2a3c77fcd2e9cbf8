"""What adapters start from: the options, a PEFT adapter, or a checkpoint of an earlier run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mcore_core.checkpoint import folders
from mcore_core.checkpoint.load import load
from mcore_core.checkpoint.state import Trainable
from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import Problem, UsageError, usage_error
from mcore_core.train.tuning import check_same_tuner
from mcore_sft.tuners.lora.peft_table import PREFIX, tensor_names
from mcore_sft.tuners.lora.spec import WEIGHTS, LoraSpec, from_options, from_peft, read_config
from mcore_sft.tuners.lora.targets import ends

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mcore_core.config.compose import RunConfig
    from mcore_core.protocols import ModelChunk
    from mcore_sft.tuners.lora.split import Projection
    from mcore_sft.tuners.lora.tuner import Lora

_EXPERT = re.compile(r"\.experts\.\d+\.")
SHOWN = 5


def spec_of(config: "RunConfig") -> LoraSpec:
    """Return what the options say, or the adapter that they name."""
    given = config[WeightsConfig].adapters
    if not given:
        return from_options(config)
    if len(given) > 1:
        raise usage_error(
            "MC553",
            f"--adapters {' '.join(given)}: a model has one adapter at a time",
            "fix: merge the first with mcore export --merge_lora true, and go on with the result",
        )
    return from_peft(Path(given[0]).expanduser(), config)


def without_expert(name: str) -> str:
    """Return a canonical name with the wildcard in place of an expert's number."""
    return _EXPERT.sub(".experts.{e}.", name)


def in_file(file: Path, spec: LoraSpec, every: "Sequence[Projection]") -> "list[Projection]":
    """Return the projections that a PEFT adapter has, as its tensors say.

    Raises:
        UsageError: The file cannot be read, or is of an adapter of another model.
    """
    names = _names(file)
    found = [
        p
        for p in every
        if (
            any(ends(p.tensor, t) for t in spec.parameters)
            if p.experts
            else tensor_names(p, [])[0] in names
        )
    ]
    if not found:
        raise usage_error(
            "MC555",
            f"{file} has no tensor of an adapter of this model",
            f"it has, for example, {min(names).removeprefix(PREFIX)}" if names else "it is empty",
            f"of this model would be {tensor_names(every[0], [])[0].removeprefix(PREFIX)}",
            "fix: --model with the model that the adapter was trained on",
        )
    return found


def _names(file: Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return set(opened.keys())
    except FileNotFoundError as error:
        raise usage_error(
            "MC550",
            f"{file.parent} has no {file.name}",
            f"found: {', '.join(sorted(p.name for p in file.parent.iterdir())[:8])}",
            "fix: save the adapter again with PEFT, which writes safetensors",
        ) from error
    except (OSError, SafetensorError) as error:
        raise usage_error(
            "MC551", f"{file} cannot be read: {error}", "fix: copy the adapter again"
        ) from error


def read_peft(tuner: "Lora", chunks: "Sequence[ModelChunk]", folder: Path) -> None:
    """Fill the adapters from a PEFT adapter; collective.

    Raises:
        UsageError: The adapter is of another model, or incomplete.
    """
    assert tuner.context.bridge is not None
    try:
        tuner.context.bridge.load_table(tuner.rules(), tuner.tensors(chunks), folder / WEIGHTS)
    except UsageError as error:
        raise UsageError([_another_model(tuner, folder, error)]) from error


def _another_model(tuner: "Lora", folder: Path, error: UsageError) -> Problem:
    notes = [
        p.message.removeprefix(f"{folder / 'adapter_model.safetensors'}: ") for p in error.problems
    ]
    more = [f"and {len(notes) - SHOWN} more like these"] if len(notes) > SHOWN else []
    made_for = read_config(folder).get("base_model_name_or_path")
    return Problem(
        "MC555",
        f"the adapter in {folder} does not fit --model {tuner.context.config.get('model')}",
        [
            *notes[:SHOWN],
            *more,
            *([f"it says that it was made for {made_for}"] if made_for else []),
            "fix: --model with the model that the adapter was trained on",
        ],
    )


def read_checkpoint(tuner: "Lora", chunks: "Sequence[ModelChunk]", path: Path) -> None:
    """Fill the adapters from a checkpoint of an earlier run, in any layout; collective."""
    checkpoint = folders.require(path)
    check_same_tuner(checkpoint, tuner)
    options = tuner.context.config[CheckpointConfig].model_copy(update={"finetune": True})
    layout: Any = None  # only random states depend on it, and they are not taken
    load(Trainable(chunks, None, layout, partial=True), checkpoint, options)
