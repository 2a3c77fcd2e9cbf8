"""What can be seen of a run's files before torch is imported: a wrong path costs no time."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_core.config.checkpoint import CheckpointConfig
from mcore_core.config.template import TemplateConfig
from mcore_core.config.train import TrainConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import Problem, UsageError

if TYPE_CHECKING:
    from mcore_core.cli.prepared import PreparedExport
    from mcore_core.config.compose import RunConfig
    from mcore_core.train.plan import ModelSource


def check_files(prepared: "PreparedExport", source: "ModelSource") -> None:
    """Check that data is there, weights are whole and the run folder can be written.

    Raises:
        UsageError: Every problem found.
    """
    config = prepared.config
    problems = [*_data(prepared), *_folder(config), *_texts(config), *_named(config)]
    if (
        config[CheckpointConfig].load is None
        and config[WeightsConfig].load_safetensors is not False
    ):
        from mcore_core.model.weight_files import check_weights  # noqa: PLC0415  (a run only)

        problems += check_weights(source.path)
    if problems:
        raise UsageError(problems)


def _data(prepared: "PreparedExport") -> Iterator[Problem]:
    from mcore_core.cli.prepared import Prepared  # noqa: PLC0415
    from mcore_core.data.sources import check_reference  # noqa: PLC0415  (numpy)

    if not isinstance(prepared, Prepared):
        return
    loaders = {c.name: c for _, c in prepared.manager.catalogue("mcore_datasets")}
    for option in ("dataset", "val_dataset"):
        for text in prepared.config.get(option):
            yield from check_reference(text, loaders=loaders)


def _texts(config: "RunConfig") -> Iterator[Problem]:
    from mcore_core.data.new_tokens import read_new_tokens  # noqa: PLC0415  (a run only)
    from mcore_core.data.template_files import read_system, template_text  # noqa: PLC0415

    yield from _problems(read_new_tokens, config[TrainConfig].new_special_tokens)
    if TemplateConfig in config:
        options = config[TemplateConfig]
        yield from _problems(read_system, options.system)
        if options.chat_template is not None:
            yield from _problems(template_text, options.chat_template)


def _named(config: "RunConfig") -> Iterator[Problem]:
    """Find what options name and is not there: models, checkpoints, adapters."""
    from mcore_core.checkpoint import folders  # noqa: PLC0415  (a run only)
    from mcore_core.model.resolve import local_model_dir  # noqa: PLC0415

    for name, kind, value in config.naming():
        path, option = Path(value).expanduser(), f"--{name}"
        match kind:
            case "model":
                yield from _problems(local_model_dir, value, option)
            case "checkpoint":
                if name != "load" or config[CheckpointConfig].exit_on_missing_checkpoint:
                    yield from _problems(folders.require, path, option)
            case "adapter":
                # an export also takes a run folder, whose newest checkpoint is meant
                if folders.find(path) is None:
                    yield from _problems(folders.require_adapter, path, option)


def _problems[**P](check: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> list[Problem]:
    """Return what a check raises."""
    try:
        check(*args, **kwargs)
    except UsageError as error:
        return list(error.problems)
    return []


def _folder(config: "RunConfig") -> Iterator[Problem]:
    """Find the deepest part of --save that exists: it must be a folder that can be written."""
    save = config[CheckpointConfig].save
    if save is None:
        return
    path = Path(save).expanduser().absolute()
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        yield Problem(
            "MC708",
            f"--save {save}: {there} is a file, not a folder",
            ["fix: --save with another folder"],
        )
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Problem(
            "MC708",
            f"--save {save}: {there} cannot be written by this user",
            ["fix: --save with a folder of your own, or change its permissions"],
        )
