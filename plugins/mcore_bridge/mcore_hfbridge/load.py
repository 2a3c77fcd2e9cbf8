"""Fills this rank's parameters from safetensors, reading only the slices that it holds."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mcore_core.errors import Problem, UsageError
from mcore_hfbridge.hf_files import BYTES, HFFiles
from mcore_hfbridge.ranks import Ranks, agree

if TYPE_CHECKING:
    from mcore_core.model.family import Piece
    from mcore_hfbridge.plan import Plan, Weight

BUCKET = 64 * 2**20
"""Bytes read at once."""


def load(
    plans: "Sequence[Plan]",
    weights: Mapping[str, torch.Tensor],
    path: Path,
    ranks: Ranks,
    *,
    file: str | None = None,
) -> None:
    """Fill `weights` from the folder; collective. Raises UsageError naming every problem.

    Args:
        plans: The family's own layout first, then others that it reads.
        weights: This rank's weights.
        path: The folder.
        ranks: Who holds what.
        file: The one file in it that is read; None: the model's.
    """
    problems: list[Problem] = []
    files, plan = None, plans[0]
    try:
        files = HFFiles.scan(path, file)
        plan = choose(plans, files)
        problems += plan.check_files(files)
    except UsageError as error:
        problems += error.problems
    for member in ranks.members:
        for name, held in member.held.items():
            if problem := plan.check_shape(name, held.shape, ranks.sizes):
                problems.append(problem)
    problems += plan.check_complete({n for member in ranks.members for n in member.held})
    agree(problems)
    assert files is not None
    try:
        with files.reading(), torch.no_grad():
            for name, weight in weights.items():
                rule = plan.weights[name]
                if rule.rule.optional and not files.tensors.keys() >= {*rule.hf}:
                    continue
                group = rule.rule.shard.group
                part = weight.detach()
                problems += fill(files, rule, part, ranks.at(group), ranks.sizes[group])
    except UsageError as error:
        problems += error.problems
    agree(problems)


def choose(plans: "Sequence[Plan]", files: HFFiles) -> "Plan":
    """Return the plan that misses the fewest tensors in the files; the first of several."""
    return min(plans, key=lambda plan: plan.missing(files)) if len(plans) > 1 else plans[0]


def fill(
    files: HFFiles, weight: "Weight", local: torch.Tensor, rank: int, size: int
) -> list[Problem]:
    """Read one rank's part of one weight. Returns copies in the files that are not equal."""
    if weight.rule.pad:
        local.zero_()
    problems = []
    rule = weight.rule
    copies = [c for c in (*rule.hf_copies, *rule.hf_twins) if c in files.tensors]
    for pieces in _by_tensor(weight.pieces(tuple(local.shape), rank, size)):
        name = weight.hf[pieces[0].hf]
        for piece, box in _read(files, name, pieces):
            local[piece.slices] = box.to(local.dtype)
            for copy in copies:
                other = to_weight(files.read(copy, piece.hf_slices), piece)
                if not torch.equal(other, box):
                    problems.append(_unequal(files, copy, name, tied=copy in rule.hf_copies))
    return problems


def to_weight(box: torch.Tensor, piece: "Piece") -> torch.Tensor:
    """Return a box of an HF tensor with the axes of the weight, as a view."""
    turned = box.permute(*piece.axes, *piece.fixed)
    for _ in piece.fixed:
        turned = turned.squeeze(-1)
    return turned


def _by_tensor(pieces: "list[Piece]") -> "Iterator[list[Piece]]":
    ordered = sorted(pieces, key=lambda p: p.hf)
    yield from (list(group) for _, group in groupby(ordered, key=lambda p: p.hf))


def _read(
    files: HFFiles, name: str, pieces: "list[Piece]"
) -> "Iterator[tuple[Piece, torch.Tensor]]":
    """Yield each piece with its data: in one read where they fit a bucket, else piece by piece."""
    spans = [p.hf_span for p in pieces]
    low = [min(s[k].start for s in spans) for k in range(len(spans[0]))]
    high = [max(s[k].stop for s in spans) for k in range(len(low))]
    width = BYTES[files.tensors[name].dtype]
    size = prod(b - a for a, b in zip(low, high, strict=True)) * width
    if size <= BUCKET:
        yield from _within(files, name, pieces, low, high)
        return
    for piece in pieces:
        for part in split(piece, BUCKET // width):
            span = part.hf_span
            yield from _within(files, name, [part], [s.start for s in span], [s.stop for s in span])


def _within(
    files: HFFiles, name: str, pieces: "list[Piece]", low: Sequence[int], high: Sequence[int]
) -> "Iterator[tuple[Piece, torch.Tensor]]":
    """Read the box [low, high) and yield each piece's part of it."""
    around = files.read(name, tuple(map(slice, low, high)))
    for piece in pieces:
        inner = tuple(
            slice(s.start - a, s.stop - a, s.step)
            for s, a in zip(piece.hf_slices, low, strict=True)
        )
        yield piece, to_weight(around[inner], piece)


def split(piece: "Piece", numel: int) -> "Iterator[Piece]":
    """Yield a piece in parts along the weight's first axis, each of about `numel` elements."""
    steps = prod(piece.step(axis) for axis in range(len(piece.size)))
    rows = max(1, numel // max(1, steps * piece.numel // piece.size[0]))
    for start in range(0, piece.size[0], rows):
        part = piece.cut(0, piece.to[0] + start, piece.to[0] + start + rows)
        assert part is not None
        yield part


def _unequal(files: HFFiles, copy: str, name: str, *, tied: bool) -> Problem:
    why = "the model's embeddings are tied, and" if tied else "the two are one weight here, and"
    return Problem(
        "MC534",
        f"{files.folder}: {why} {copy!r} differs from {name!r}",
        [
            "fix: set tie_word_embeddings to false in config.json, or remove the copy"
            if tied
            else "fix: set num_nextn_predict_layers to 0 in config.json, or make them equal"
        ],
    )
