"""Which layers of the HF model each pipeline chunk holds, as plain arithmetic."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitOptions:
    """How the user wants layers divided; field names are the options."""

    pipeline_model_parallel_size: int = 1
    virtual: int | None = None
    """Chunks on each rank."""
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    pipeline_model_parallel_layout: str | None = None


def expand_layout(text: str) -> list[str]:
    """Return the stages of a layout such as "Et|(t|)*2tL": "x*N" repeats a letter or a group.

    Raises:
        ValueError: The text holds something else than E, t, m, L, |, parentheses and *N.
    """
    plain = text.replace(" ", "").replace(",", "")
    while (found := re.search(r"\(([^()]*)\)\*(\d+)", plain)) is not None:
        plain = plain[: found.start()] + found[1] * int(found[2]) + plain[found.end() :]
    plain = re.sub(r"([EtmL|])\*(\d+)", lambda m: m[1] * int(m[2]), plain)
    if wrong := sorted(set(plain) - set("EtmL|")):
        raise ValueError(f"{''.join(wrong)!r} is not part of a pipeline layout (E, t, m, L, |, *N)")
    return plain.split("|")


def layers_per_stage(num_layers: int, options: SplitOptions) -> list[int]:
    """Return how many layers each chunk holds, in model order (pp * vpp chunks).

    Raises:
        ValueError: The layers cannot be divided so; the message holds the arithmetic.
    """
    stages = options.pipeline_model_parallel_size * (options.virtual or 1)
    if options.pipeline_model_parallel_layout is not None:
        return _from_layout(num_layers, options.pipeline_model_parallel_layout, stages)
    first, last = (
        options.decoder_first_pipeline_num_layers,
        options.decoder_last_pipeline_num_layers,
    )
    extra_first = int(options.account_for_embedding_in_pipeline_split)
    extra_last = int(options.account_for_loss_in_pipeline_split)
    if first is None and last is None:
        total = num_layers + extra_first + extra_last
        if total % stages:
            raise ValueError(_uneven(num_layers, extra_first + extra_last, stages))
        counts = [total // stages] * stages
        counts[0] -= extra_first
        counts[-1] -= extra_last
        return counts
    if extra_first or extra_last:
        raise ValueError(
            "account_for_embedding/loss_in_pipeline_split and "
            "decoder_first/last_pipeline_num_layers cannot be combined"
        )
    if options.virtual:
        raise ValueError(
            "decoder_first/last_pipeline_num_layers and virtual stages cannot be combined; "
            "use pipeline_model_parallel_layout"
        )
    return _with_ends(num_layers, stages, first, last)


def _with_ends(num_layers: int, stages: int, first: int | None, last: int | None) -> list[int]:
    rest = num_layers - (first or 0) - (last or 0)
    middle = stages - (first is not None) - (last is not None)
    if middle < 0 or rest < 0 or (rest and not middle) or (middle and rest % middle):
        raise ValueError(
            f"{num_layers} layers less {first or 0} on the first and {last or 0} on the last stage "
            f"leave {rest}, which do not divide over {middle} stages"
        )
    each = rest // middle if middle else 0
    ends = ([first] if first is not None else [], [last] if last is not None else [])
    return [*ends[0], *[each] * middle, *ends[1]]


def _from_layout(num_layers: int, text: str, stages: int) -> list[int]:
    parts = expand_layout(text)
    counts = [part.count("t") for part in parts]
    if len(parts) != stages:
        raise ValueError(
            f"layout {text!r} has {len(parts)} stages; the pipeline has {stages} chunks"
        )
    if sum(counts) != num_layers:
        raise ValueError(f"layout {text!r} has {sum(counts)} layers; the model has {num_layers}")
    if not parts[0].startswith("E") or not parts[-1].endswith("L"):
        raise ValueError(f"layout {text!r} must begin with E and end with L")
    if "".join(parts).count("E") != 1 or "".join(parts).count("L") != 1:
        raise ValueError(f"layout {text!r} must have one E and one L")
    return counts


def _uneven(num_layers: int, extra: int, stages: int) -> str:
    total = num_layers + extra
    counted = f"{num_layers} layers" + (f" and {extra} for embedding and loss" if extra else "")
    fits = [n for n in range(1, total + 1) if total % n == 0]
    near = sorted(fits, key=lambda n: abs(n - stages))[:3]
    return f"{counted} do not divide over {stages} stages ({total} / {stages}); {sorted(near)} do"


def chunk_ranges(counts: Sequence[int]) -> list[range]:
    """Return the HF layers of each chunk."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges
