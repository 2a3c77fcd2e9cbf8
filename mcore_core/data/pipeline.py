"""From `--dataset` to the loaders of one rank: the one entry point into the data.

The work is in two halves. `prepare_data` runs on one rank of each file system: it opens the
sources, encodes what is not yet in the cache, and returns a small picklable plan, or raises
UsageError. `open_data` runs on every rank and turns the plan into loaders. `build_data` runs
both; `on_writer` is how the first half's result, or its error, reaches the other ranks.
"""

import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mcore_core.config.data import DataConfig
from mcore_core.config.dataloader import DataLoaderConfig
from mcore_core.config.evaluation import EvaluationConfig
from mcore_core.config.train import TrainConfig
from mcore_core.data import mix
from mcore_core.data.encode import LazyUnits, RowEncoder
from mcore_core.data.loader import EvalLoader, Items, TrainLoader, Workers, item_lengths
from mcore_core.data.pack import fill, pack
from mcore_core.data.prepare import DataPlan, prepare_data, row_encoder, source_options
from mcore_core.data.report import DataReport
from mcore_core.data.rows import RowError
from mcore_core.data.sampler import GlobalBatches, Share
from mcore_core.data.sources import Loaders, SourceOptions, open_all, stream_rows
from mcore_core.data.store import UnitTable
from mcore_core.data.stream import Stream, StreamLoader, StreamOptions, in_order, interleaved
from mcore_core.errors import usage_error
from mcore_core.protocols import Recipe, Rounds, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mcore_core.config.compose import RunConfig
    from mcore_core.data.template import Template

type OnWriter = Callable[[Callable[[], DataPlan]], DataPlan]
"""Calls its argument on the rank that writes, and returns the result, or raises, on every rank."""


@dataclass(frozen=True, slots=True)
class DataBundle:
    """The loaders of one rank."""

    train: TrainLoader | StreamLoader
    val: EvalLoader | None
    report: DataReport
    fingerprint: str


def build_data(
    config: "RunConfig",
    recipe: Recipe[Any],
    template: "Template",
    *,
    loaders: Loaders | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
    on_writer: OnWriter | None = None,
    progress: bool = True,
) -> DataBundle:
    """Open, encode, pack and load the data of a run.

    Args:
        config: The options.
        recipe: Encodes rows.
        template: Its fingerprint is part of the cache's name.
        loaders: Dataset plugins by scheme.
        dp_rank: This rank among the data-parallel ones.
        dp_size: How many there are.
        on_writer: Calls its argument on the rank that writes, and returns its result, or raises its
            UsageError, on every rank. None: this is the only rank.
        progress: Show a bar while encoding.

    Raises:
        UsageError: Every problem with the data.
    """
    prepare = partial(
        prepare_data, config, recipe, template, loaders=loaders or {}, progress=progress
    )
    plan = on_writer(prepare) if on_writer is not None else prepare()
    return open_data(
        plan, config, recipe, template, loaders=loaders or {}, dp_rank=dp_rank, dp_size=dp_size
    )


def open_data(
    plan: DataPlan,
    config: "RunConfig",
    recipe: Recipe[Any],
    template: "Template",
    *,
    loaders: Loaders,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> DataBundle:
    """Turn a plan into this rank's loaders."""
    data, loading, train = config[DataConfig], config[DataLoaderConfig], config[TrainConfig]
    share = Share(
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=dp_rank,
        size=dp_size,
    )
    eval_share, needed = share, "--global_batch_size"
    rounds: Rounds | None = getattr(recipe, "rounds", None)
    if rounds is not None:  # every rank is given all prompts of a round
        share = Share(global_batch_size=rounds.prompts, micro_batch_size=rounds.prompts)
        eval_share = Share(
            global_batch_size=rounds.eval_prompts, micro_batch_size=rounds.eval_prompts
        )
        needed = "the prompts of an evaluation step,"
    report = plan.report
    encoder = row_encoder(config, recipe)
    options = source_options(config, recipe)
    parts, val_parts = _parts(plan, config, encoder, loaders, options)
    capacity = _capacity(config, template)
    val_units, units = mix.Units(val_parts), mix.Units([])
    if not loading.streaming:
        units, held = _mixed(parts, data)
        if not data.val_dataset:
            val_units = held
    val = _eval_loader(val_units, config, eval_share, capacity, report, needed)
    if loading.streaming:
        stream = Stream(
            _StreamRows(tuple(data.dataset), loaders, options, data),
            encoder,
            StreamOptions(
                seed=data.data_seed,
                shuffle=_shuffles(loading) and loading.dataset_shuffle,
                buffer_size=data.shuffle_buffer_size,
                packing_length=capacity,
                balance=_balances(recipe, share, loading) and loading.dataset_shuffle,
            ),
            name=", ".join(data.dataset),
        )
        workers = _workers(config)
        stream_loader = StreamLoader(
            stream, share=share, workers=workers, fingerprint=plan.fingerprint
        )
        return DataBundle(stream_loader, val, report, plan.fingerprint)
    if loading.dataset_shuffle and loading.dataloader_type != "single":
        rng = np.random.default_rng([data.data_seed, 5])
        units = units.reordered(rng.permutation(len(units)))
    items = _items(units, capacity, loading.packing_num_proc)
    report.train_items = len(items)
    sizes = None
    if not loading.lazy_tokenize:
        lengths = _lengths(units)
        sizes = item_lengths(items, lengths)
        report.max_length = int(lengths.max())
        if capacity is not None:
            report.packing_fill = fill(lengths, len(items), capacity)
    batches = GlobalBatches(
        len(items),
        share.global_batch_size,
        seed=data.data_seed,
        shuffle=_shuffles(loading),
        lengths=sizes if loading.group_by_length else None,
    )
    loader = TrainLoader(
        items,
        batches,
        share=share,
        workers=_workers(config),
        fingerprint=plan.fingerprint,
        lengths=sizes if _balances(recipe, share, loading) else None,
    )
    return DataBundle(loader, val, report, plan.fingerprint)


def _parts(
    plan: DataPlan,
    config: "RunConfig",
    encoder: RowEncoder,
    loaders: Loaders,
    options: SourceOptions,
) -> tuple[list[Any], list[Any]]:
    """Return the units of each training and of each validation source."""
    data, loading = config[DataConfig], config[DataLoaderConfig]
    if not loading.lazy_tokenize:
        for path in (*plan.train, *plan.val):
            if not path.exists():
                raise usage_error(
                    "MC421",
                    f"the tokenized data {path} is not on this machine ({platform.node()})",
                    "fix: set MCORE_CACHE to a folder that every machine shares",
                )
        return [UnitTable(p) for p in plan.train], [UnitTable(p) for p in plan.val]
    texts = [] if loading.streaming else data.dataset
    train, val = (
        [
            LazyUnits(source.rows, encoder, source.name)
            for source in open_all(names, loaders=loaders, options=options)
        ]
        for names in (texts, data.val_dataset)
    )
    return train, val


def _mixed(parts: list[Any], data: DataConfig) -> tuple[mix.Units, mix.Units]:
    """Split each source, then join or interleave; return what trains and what was held out."""
    ratio = 0.0 if data.val_dataset else data.split_dataset_ratio
    cuts = [mix.split(len(part), ratio, data.data_seed) for part in parts]
    starts = np.cumsum([0, *(len(part) for part in parts)])[:-1]
    kept = np.concatenate([start + cut[0] for start, cut in zip(starts, cuts, strict=True)])
    held = np.concatenate([start + cut[1] for start, cut in zip(starts, cuts, strict=True)])
    if data.interleave_prob is not None:
        order = mix.interleave(
            [len(cut[0]) for cut in cuts],
            data.interleave_prob,
            seed=data.data_seed,
            stopping=data.stopping_strategy,
        )
        kept = kept[order]
    return mix.Units(parts, kept), mix.Units(parts, held)


def _balances(recipe: Recipe[Any], share: Share, loading: DataLoaderConfig) -> bool:
    """Return whether items may be divided among ranks and micro-batches by their length.

    Where every token counts by itself it makes no difference to the loss which rank has it. Where
    the order of the data is to be kept, it is.
    """
    divided = share.global_batch_size > share.micro_batch_size
    return recipe.token_local and divided and _shuffles(loading)


def _lengths(units: mix.Units) -> "NDArray[np.int64]":
    tables = [part.lengths for part in units.parts if isinstance(part, UnitTable)]
    lengths: NDArray[np.int64] = np.concatenate(tables)[units.chosen]
    return lengths


def _items(units: mix.Units, capacity: int | None, num_proc: int) -> Items:
    if capacity is None:
        return Items(units)
    return Items(units, pack(_lengths(units), capacity, num_proc=num_proc))


def _capacity(config: "RunConfig", template: "Template") -> int | None:
    loading = config[DataLoaderConfig]
    return (loading.packing_length or template.max_length) if loading.packing else None


def _shuffles(loading: DataLoaderConfig) -> bool:
    return loading.train_dataloader_shuffle and loading.dataloader_type != "single"


def _eval_loader(
    units: mix.Units,
    config: "RunConfig",
    share: Share,
    capacity: int | None,
    report: DataReport,
    needed: str,
) -> EvalLoader | None:
    iters = config[EvaluationConfig].eval_iters
    if not len(units) or iters == 0:
        return None
    items = _items(units, None if config[DataLoaderConfig].lazy_tokenize else capacity, 1)
    report.val_items = len(items)
    if len(items) < share.global_batch_size:
        kind = "packed rows" if items.packs is not None else "samples"
        report.warnings.append(
            f"no evaluation: {len(items)} validation {kind}, fewer than {needed} "
            f"{share.global_batch_size}"
        )
        return None
    return EvalLoader(items, share=share, iters=iters)


def _workers(config: "RunConfig") -> Workers:
    """Return the worker options.

    Where num_workers was not given, tokenized data needs none, and the rest one for each core.
    """
    loading = config[DataLoaderConfig]
    encodes = loading.streaming or bool(loading.lazy_tokenize)
    num = loading.num_workers
    if "num_workers" not in loading.model_fields_set:
        num = min(num, os.cpu_count() or 1) if encodes else 0
    return Workers(
        num=num,
        prefetch_factor=loading.dataloader_prefetch_factor,
        persistent=loading.dataloader_persistent_workers,
    )


@dataclass(frozen=True, slots=True)
class _StreamRows:
    """Opens the rows of one epoch of the training streams."""

    texts: tuple[str, ...]
    loaders: Loaders
    options: SourceOptions
    data: DataConfig

    def __call__(self, epoch: int) -> Iterable[Row | RowError]:
        opens = [
            partial(stream_rows, text, loaders=self.loaders, options=self.options)
            for text in self.texts
        ]
        if self.data.interleave_prob is None:
            return in_order([open_part() for open_part in opens])
        return interleaved(
            opens,
            self.data.interleave_prob,
            np.random.default_rng([self.data.data_seed, 6, epoch]),
            all_exhausted=self.data.stopping_strategy == "all_exhausted",
        )
