"""Contradictions between the options of direct preference optimization."""

from collections.abc import Iterator, Mapping

from mcore_core.config.compose import RunConfig
from mcore_core.config.decode import as_typed
from mcore_core.errors import Problem
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.rules import check_method, check_reference

REFERENCE_FREE = frozenset({"sft", "cpo", "simpo", "orpo"})
"""Losses that compare with no reference."""
READ_BY: Mapping[str, frozenset[str]] = {
    "label_smoothing": frozenset(
        {
            "sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo",
        }
    ),
    "f_divergence_type": frozenset(
        {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
    ),
    "simpo_gamma": frozenset({"simpo"}),
    "cpo_alpha": frozenset({"cpo"}),
}  # fmt: skip
"""An option -> the losses that read it. Beyond the pair's difference of scores, f-divergences are
not defined: the term that depends on the prompt alone does not cancel."""


def needs_reference(options: DPOConfig) -> bool:
    """Return whether a loss compares with the reference."""
    return not (options.reference_free or set(options.losses) <= REFERENCE_FREE)


def check(config: RunConfig) -> Iterator[Problem]:
    """Yield every problem."""
    options = config[DPOConfig]
    names = options.losses
    yield from check_method(config, "dpo")
    why = "--reference_free true" if options.reference_free else f"--loss_type {','.join(names)}"
    yield from check_reference(config, used=needs_reference(options), why=why)
    if not names:
        yield Problem("MC302", "--loss_type: there is no loss", ["fix: --loss_type sigmoid"])
        return
    weights = options.loss_weights
    if weights is not None and len(weights) != len(names):
        yield Problem(
            "MC320",
            f"--loss_weights has {len(weights)} values for {len(names)} losses "
            f"({', '.join(names)})",
            ["fix: give one weight for each loss of --loss_type, in the same order"],
        )
    yield from _unread(config, names)
    if "robust" in names and options.label_smoothing >= 0.5:
        yield Problem(
            "MC320",
            f"--loss_type robust divides by 1 - 2 x label_smoothing, which --label_smoothing "
            f"{options.label_smoothing:g} makes {1 - 2 * options.label_smoothing:g}",
            ["fix: --label_smoothing below 0.5"],
        )
    if "exo_pair" in names and options.label_smoothing >= 1:
        yield Problem(
            "MC320",
            "--loss_type exo_pair is infinite with --label_smoothing 1",
            ["fix: --label_smoothing 0.001"],
        )


def _unread(config: RunConfig, names: tuple[str, ...]) -> Iterator[Problem]:
    """Yield a problem for each option that none of the losses reads, or not all can have."""
    built_in = [name for name in names if not name.endswith(".py") and ":" not in name]
    for option, readers in READ_BY.items():
        value = as_typed(config.get(option))
        if not config.changed(option) or len(built_in) < len(names):
            continue  # a loss of the user's own may read anything
        unread = [name for name in names if name not in readers]
        undefined = [name for name in unread if name not in REFERENCE_FREE]
        if option == "f_divergence_type" and undefined:
            yield Problem(
                "MC331",
                f"--f_divergence_type {value} is not defined for --loss_type {','.join(undefined)}",
                [
                    f"losses that have it: {', '.join(sorted(readers))}",
                    "fix: leave out --f_divergence_type, or choose one of these losses",
                ],
            )
        elif len(unread) == len(names):
            yield Problem(
                "MC331",
                f"--{option} {value} does nothing with --loss_type {','.join(names)}",
                [
                    f"losses that read it: {', '.join(sorted(readers))}",
                    f"fix: leave out --{option}, or choose one of these losses",
                ],
            )
