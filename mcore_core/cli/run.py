"""`mcore run`: compose the options of a training run, check them all, and start it."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mcore_core.cli.prepare import Request, Session, compose_request, open_session, read_request
from mcore_core.cli.prepared import Prepared
from mcore_core.cli.render import render_options
from mcore_core.component import Component
from mcore_core.config.compose import RunConfig
from mcore_core.config.layout_rules import check_layout
from mcore_core.config.option import collect_options
from mcore_core.config.refused import check_refused
from mcore_core.config.rules import check_options
from mcore_core.config.settle import settle
from mcore_core.errors import Problem, UsageError

USAGE = """\
usage: mcore run --plugin NAME [options.yaml ...] [--option value ...]

Train a model by the recipe NAME. Options on the command line win over those in files, later files
over earlier ones. In a file, write one `option: value` a line; `plugin: NAME` may stand there too,
so that `mcore run SAVE/run.yaml` repeats a run. Names may be written with - or _, a true-or-false
option may stand alone, and a list takes all values up to the next option.

"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    session = open_session()
    request = read_request(session, argv)
    if request.arguments.help:
        sys.stdout.write(USAGE + _recipes(session))
        options = collect_options(session.groups).values()
        sys.stdout.write(render_options(options, session.defaults))
        return 0
    prepared = _prepare(session, request, argv)
    from mcore_core.cli.execute import execute  # noqa: PLC0415  (imports torch)

    return execute(prepared)


def prepare(argv: Sequence[str]) -> Prepared:
    """Return the run that a command line asks for. Raises UsageError with every problem."""
    session = open_session()
    return _prepare(session, read_request(session, argv), argv)


def _prepare(session: Session, request: Request, argv: Sequence[str]) -> Prepared:
    session.manager.check_one_recipe(session.active)
    config, notes = settle(compose_request(session, request))
    refusals = session.refusals
    manager = session.manager
    manager.keep(session.active)
    problems = [*check_options(config), *check_refused(config, refusals)]
    problems += check_layout(config, world_size(config, os.environ))
    problems += [*_reporters(session, config), *_dispatcher(session, config)]
    recipe = manager.hook.mcore_recipe(config=config)
    losses, wrong = _losses(session, config, recipe.name)
    problems += wrong
    for found in manager.hook.mcore_validate_config(config=config):
        problems += found
    if problems:
        raise UsageError(problems)
    return Prepared(
        config=config,
        manager=manager,
        plugins=session.active,
        names=request.names,
        argv=tuple(argv),
        notes=tuple(notes),
        recipe=recipe,
        losses=losses,
    )


def world_size(config: RunConfig, environ: Mapping[str, str]) -> int:
    """Return how many ranks the run has: as torchrun or Slurm says, else as the options do."""
    if environ.get("WORLD_SIZE", "").isdecimal():
        return int(environ["WORLD_SIZE"])
    if environ.get("SLURM_NTASKS", "").isdecimal() and int(environ["SLURM_NTASKS"]) > 1:
        return int(environ["SLURM_NTASKS"])
    return int((config.get("nproc_per_node") or 1) * config.get("nnodes"))


def _reporters(session: Session, config: RunConfig) -> list[Problem]:
    wanted = [n for n in config.get("report_to") if n not in {"console", "jsonl", "tensorboard"}]
    problems: list[Problem] = []
    known = session.manager.catalogue("mcore_reporters")
    for name in wanted:
        try:
            known.find(name, "--report_to")
        except UsageError as error:
            problems += error.problems
    return problems


def _dispatcher(session: Session, config: RunConfig) -> list[Problem]:
    option = "moe_token_dispatcher_type"
    if option not in config.names or not config.changed(option):
        return []
    try:
        session.manager.catalogue("mcore_dispatchers").find(config.get(option), f"--{option}")
    except UsageError as error:
        return list(error.problems)
    return []


def _losses(
    session: Session, config: RunConfig, recipe: str
) -> tuple[dict[str, Component[Any]], list[Problem]]:
    """Return the losses that loss_type names, where the recipe lists its losses."""
    known = {c.recipe for _, c in session.manager.catalogue("mcore_losses")}
    if recipe not in known or "loss_type" not in config.names:
        return {}, []
    names = [name.strip() for name in (config.get("loss_type") or "").split(",") if name.strip()]
    try:
        return session.manager.losses(recipe, names), []
    except UsageError as error:
        return {}, list(error.problems)


def _recipes(session: Session) -> str:
    """Return the recipes there are, where none has been named."""
    recipes = session.manager.recipes()
    if set(recipes) & set(session.active):
        return ""
    lines = []
    for name in recipes:
        plugin = session.manager.get_plugin(name)
        lines.append(f"  {name:10} {getattr(plugin, 'summary', '')}")
    listed = "\n".join(lines) or "  none installed: uv pip install 'mcore-core[sft]'"
    return f"recipes, for --plugin; each adds options of its own:\n{listed}\n\n"
