"""`mcore plan`: what a run will take, and which layouts fit a cluster, before anything is built."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.cli.prepare import compose_request, open_session, read_request
from mcore_core.cli.render import render_options
from mcore_core.config.option import collect_options
from mcore_core.config.plan import PlanConfig
from mcore_core.config.settle import settle
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import usage_error

if TYPE_CHECKING:
    from mcore_core.cli.prepare import Session
    from mcore_core.config.compose import RunConfig
    from mcore_core.planning.render import Plan

USAGE = """\
usage: mcore plan --model DIR --gpus N [--gpu_memory GIB] [--option value ...] [--json]

Parameters, memory of each rank and a ranked list of layouts, from the model's config.json alone: no
weights, no GPU. Any option of `mcore run` may be given; where one of them is a size of the layout,
that layout is shown too.

"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    session = open_session([PlanConfig])
    rest = [a for a in argv if a != "--json"]
    request = read_request(session, rest)
    if request.arguments.help:
        options = collect_options({PlanConfig: session.kernel[PlanConfig]}).values()
        sys.stdout.write(USAGE + render_options(options, session.defaults))
        return 0
    session, config = read(rest)
    plan = make_plan(session, config)
    if len(rest) < len(argv):
        from mcore_core.planning.render import as_json  # noqa: PLC0415  (start-up time)

        json.dump(as_json(plan), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        from mcore_core.planning.render import as_text  # noqa: PLC0415  (start-up time)

        sys.stdout.write(as_text(plan, top=config[PlanConfig].top))
    return 0


def read(argv: Sequence[str]) -> "tuple[Session, RunConfig]":
    """Return the plugins and options of a command line. Raises UsageError with every problem."""
    session = open_session([PlanConfig])
    config, _ = settle(compose_request(session, read_request(session, argv)))
    return session, config


def make_plan(session: "Session", config: "RunConfig") -> "Plan":
    """Return the plan of a config. Raises UsageError where the model cannot be read."""
    from mcore_core.model.overrides import override  # noqa: PLC0415  (start-up time)
    from mcore_core.model.resolve import resolve_family  # noqa: PLC0415
    from mcore_core.planning.memory import GIB  # noqa: PLC0415
    from mcore_core.planning.render import Plan  # noqa: PLC0415
    from mcore_core.planning.search import AXES, SPLITS, Cluster, judge, search  # noqa: PLC0415

    options = config[PlanConfig]
    if options.gpus is None:
        raise usage_error("MC002", "mcore plan needs --gpus", "fix: --gpus 8")
    name, hf_config = model_config(config)
    families = session.manager.catalogue("mcore_model_specs")
    family = resolve_family(hf_config, families, config[WeightsConfig].model_type)
    shape = override(family.architecture(hf_config), config)
    cluster = Cluster(
        gpus=options.gpus,
        memory=round(options.gpu_memory * GIB),
        per_node=min(options.gpus_per_node, options.gpus),
    )
    named = {n: config.get(n) for n in (*AXES, *SPLITS) if n in config.names and config.is_set(n)}
    return Plan(
        model=name,
        family=family.name,
        shape=shape,
        config=config,
        cluster=cluster,
        given=judge(config, shape, cluster, named) if named else None,
        candidates=search(config, shape, cluster),
    )


def model_config(config: "RunConfig") -> tuple[str, dict[str, Any]]:
    """Return the model's name and its config.json, of a hub model only that file."""
    from mcore_core.model.resolve import read_hf_config, resolve_model_dir  # noqa: PLC0415

    weights = config[WeightsConfig]
    if weights.model is None:
        raise usage_error("MC002", "mcore plan needs --model", "fix: --model DIR")
    folder = resolve_model_dir(
        weights.model,
        revision=weights.model_revision,
        use_hf=weights.use_hf,
        token=weights.hub_token,
        wanted=("config.json",),
    )
    return Path(weights.model).name, read_hf_config(folder)
