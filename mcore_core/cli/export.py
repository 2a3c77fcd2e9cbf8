"""`mcore export`: convert a model between Hugging Face and megatron-core."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence

from mcore_core.cli.prepare import Request, Session, compose_request, open_session, read_request
from mcore_core.cli.prepared import PreparedExport
from mcore_core.cli.render import render_options
from mcore_core.cli.run import world_size
from mcore_core.config.compose import RunConfig
from mcore_core.config.export import ExportConfig
from mcore_core.config.layout_rules import check_layout
from mcore_core.config.option import collect_options
from mcore_core.config.refused import check_refused
from mcore_core.config.settle import settle
from mcore_core.errors import Problem, UsageError

USAGE = """\
usage: mcore export --to_hf --load RUN --save DIR [--option value ...]
       mcore export --to_hf --model DIR --adapters DIR --save DIR [--option value ...]
       mcore export --to_hf --model DIR --save DIR [--option value ...]
       mcore export --to_hf --model DENSE --upcycle 8 --save DIR [--option value ...]
       mcore export --to_mcore --model DIR --save DIR [--option value ...]

Convert the weights of a checkpoint to safetensors that transformers opens, or the other way. From
--model, --to_hf is a round trip through megatron-core. --test_convert_precision compares the result
with transformers, layer by layer.

"""


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    session = open_session([ExportConfig])
    request = read_request(session, argv)
    if request.arguments.help:
        options = [o for o in collect_options(session.groups).values() if not o.group.training]
        sys.stdout.write(USAGE + render_options(options, session.defaults))
        return 0
    prepared = _prepare(session, request, argv)
    if prepared.config[ExportConfig].upcycle is not None:
        from mcore_core.cli.upcycle import upcycle  # noqa: PLC0415  (imports torch)

        return upcycle(prepared)
    from mcore_core.cli.execute import execute_export  # noqa: PLC0415  (imports torch)

    return execute_export(prepared)


def prepare(argv: Sequence[str]) -> PreparedExport:
    """Return the export that a command line asks for. Raises UsageError with every problem."""
    session = open_session([ExportConfig])
    return _prepare(session, read_request(session, argv), argv)


def _prepare(session: Session, request: Request, argv: Sequence[str]) -> PreparedExport:
    config, _ = settle(compose_request(session, request))
    refusals = session.refusals
    session.manager.keep(session.active)
    size = world_size(config, os.environ)
    given = request.arguments.values
    problems = [*_about_training(session, given), *_check(config), *check_refused(config, refusals)]
    problems += [p for p in check_layout(config, size) if p.code not in {"MC602", "MC605"}]
    if problems:
        raise UsageError(problems)
    return PreparedExport(
        config=config,
        manager=session.manager,
        plugins=session.active,
        names=request.names,
        argv=tuple(argv),
    )


def _about_training(session: Session, given: Iterable[str]) -> Iterator[Problem]:
    """Name the flags that an export has no use for; in files of options they may stand."""
    options = collect_options(session.groups)
    for name in given:
        if name in options and options[name].group.training:
            why = f"--{name} says how to train, and an export does not"
            yield Problem("MC321", why, ["fix: leave it out"])


def _check(config: RunConfig) -> Iterator[Problem]:
    export = config[ExportConfig]
    if export.to_hf == export.to_mcore:
        both = "both are given" if export.to_hf else "neither is given"
        yield Problem(
            "MC323",
            f"an export goes one way, --to_hf or --to_mcore: {both}",
            ["fix: --to_hf --load RUN --save DIR, or --to_mcore --model DIR --save DIR"],
        )
        return
    way = "--to_hf" if export.to_hf else "--to_mcore"
    sources = ("load", "model") if export.to_hf else ("model",)
    if all(config.get(name) is None for name in sources) and not config.get("adapters"):
        either = " or ".join(f"--{name}" for name in sources)
        yield Problem("MC323", f"{way} needs {either}", [f"fix: --{sources[0]} FOLDER"])
    if config.get("save") is None:
        yield Problem("MC323", f"{way} needs --save", ["fix: --save FOLDER"])
    yield from _about_adapters(config)
    if export.to_mcore and config.get("load") is not None:
        yield Problem(
            "MC320",
            "--to_mcore converts the weights of --model, and --load is given too",
            ["fix: leave out --load"],
        )
    if export.to_mcore and config.changed("max_shard_size"):
        yield Problem(
            "MC321",
            "--max_shard_size does nothing with --to_mcore",
            ["fix: leave it out"],
        )
    if export.upcycle is None and export.moe_upcycling_granularity != 1:
        yield Problem(
            "MC321",
            "--moe_upcycling_granularity does nothing without --upcycle",
            ["fix: add --upcycle 8, or leave it out"],
        )
    if export.upcycle is not None and (config.get("load") is not None or not export.to_hf):
        yield Problem(
            "MC320",
            "--upcycle turns the weights of --model into safetensors",
            ["fix: --to_hf --model DENSE --upcycle 8 --save DIR, without --load"],
        )
    for name in ("test_convert_dtype", "device_map"):
        if config.changed(name) and not export.test_convert_precision:
            yield Problem(
                "MC321",
                f"--{name} does nothing without --test_convert_precision",
                [f"fix: add --test_convert_precision, or leave out --{name}"],
            )


def _about_adapters(config: RunConfig) -> Iterator[Problem]:
    adapters, export = config.get("adapters"), config[ExportConfig]
    if adapters and config.get("model") is None:
        yield Problem(
            "MC323",
            "--adapters needs the model that the adapter was trained on",
            ["fix: --model FOLDER"],
        )
    if config.get("merge_lora") and not adapters and config.get("load") is None:
        yield Problem(
            "MC321",
            "--merge_lora does nothing without an adapter",
            ["fix: add --adapters FOLDER, or --load with a LoRA run, or leave it out"],
        )
    if adapters and export.to_hf and config.get("load") is not None:
        yield Problem(
            "MC320",
            "--adapters and --load both say what is exported",
            ["fix: keep one of them; --load takes a checkpoint of a LoRA run, too"],
        )
