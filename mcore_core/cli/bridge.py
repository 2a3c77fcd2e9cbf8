"""`mcore bridge coverage`: which tensors of a model are claimed by which rule of its family."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mcore_core.cli.arguments import parse
from mcore_core.cli.prepare import open_session
from mcore_core.config.compose import compose
from mcore_core.config.option import collect_options
from mcore_core.config.source import COMMAND_LINE, Source
from mcore_core.config.weights import WeightsConfig
from mcore_core.errors import UsageError, did_you_mean, usage_error
from mcore_core.model.hf_head import read_head
from mcore_core.model.resolve import read_hf_config, resolve_family, resolve_model_dir

if TYPE_CHECKING:
    from mcore_core.config.group import ConfigGroup

USAGE = """\
usage: mcore bridge coverage --model DIR [--model_type NAME] [--json]

Show which tensors of a Hugging Face model are claimed by which rule of its family. Only the
headers of the files are read. The exit code is 2 where a tensor is missing or unclaimed.
"""
ACTIONS = ("coverage",)


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    if not argv or {"-h", "--help"} & set(argv):
        sys.stdout.write(USAGE)
        return 0
    if argv[0] not in ACTIONS:
        raise usage_error(
            "MC001",
            f"unknown action {argv[0]!r} of mcore bridge",
            did_you_mean(argv[0], ACTIONS),
            "fix: mcore bridge coverage --model DIR",
        )
    rest = [a for a in argv[1:] if a != "--json"]
    found = _coverage(rest)
    if len(rest) < len(argv) - 1:
        json.dump(_as_json(found), sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(_render(found))
    if found.problems:
        raise UsageError(found.problems)
    return 0


def _coverage(argv: Sequence[str]) -> Any:  # noqa: ANN401
    session = open_session()
    groups: dict[type[ConfigGroup], str] = {WeightsConfig: session.kernel[WeightsConfig]}
    arguments = parse(argv, collect_options(groups))
    if arguments.problems:
        raise UsageError(arguments.problems)
    config = compose(groups, [Source(COMMAND_LINE, arguments.values)])
    options = config[WeightsConfig]
    if options.model is None:
        raise usage_error("MC002", "mcore bridge coverage needs --model", "fix: --model DIR")
    folder = resolve_model_dir(
        options.model,
        revision=options.model_revision,
        use_hf=options.use_hf,
        token=options.hub_token,
    )
    families = session.manager.catalogue("mcore_model_specs")
    hf_config = read_hf_config(folder)
    family = resolve_family(hf_config, families, options.model_type)
    bridge = session.manager.hook.mcore_build_bridge(config=config)
    if bridge is None or not hasattr(bridge.load(), "coverage"):
        raise usage_error(
            "MC516",
            "nothing here tells which tensors of a Hugging Face model are claimed",
            "fix: uv pip install mcore-hfbridge",
        )
    architecture = read_head(family.architecture(hf_config), hf_config)
    return bridge.load()(family, architecture).coverage(folder)


def _render(found: Any) -> str:  # noqa: ANN401
    lines = [f"family {found.family}"]
    for claim in found.claims:
        count = f"{len(claim.tensors)} of {claim.expected} tensors"
        lines.append(f"{count:>20}  {' + '.join(claim.hf)}")
        lines.append(f"{'':>20}  -> {claim.mcore} {list(claim.shape)}, {claim.split}")
    lines += [f"{'left out':>20}  {name}: {why}" for name, why in found.ignored.items()]
    claimed = sum(len(claim.tensors) for claim in found.claims)
    lines.append(
        f"{claimed} tensors are claimed by {len(found.claims)} rules, {len(found.ignored)} are "
        f"left out on purpose, {len(found.problems)} problems"
    )
    return "\n".join(lines) + "\n"


def _as_json(found: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "family": found.family,
        "rules": [asdict(claim) for claim in found.claims],
        "ignored": found.ignored,
        "problems": [str(problem) for problem in found.problems],
    }
