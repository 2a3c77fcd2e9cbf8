"""The first half of the data's work: check, open and encode, on one rank of each file system."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcore_core.config.data import DataConfig
from mcore_core.config.dataloader import DataLoaderConfig
from mcore_core.config.weights import WeightsConfig
from mcore_core.data import mix
from mcore_core.data.encode import RowEncoder, cache_dir, cache_key, encode_rows
from mcore_core.data.report import DataReport
from mcore_core.data.rows import FIELDS, recognize
from mcore_core.data.sources import Loaders, Source, SourceOptions, check_stream, open_all
from mcore_core.data.store import Counts, UnitTable
from mcore_core.errors import Problem, UsageError
from mcore_core.protocols import Recipe

if TYPE_CHECKING:
    from mcore_core.config.compose import RunConfig
    from mcore_core.data.template import Template


@dataclass(frozen=True, slots=True)
class DataPlan:
    """What the first half found; picklable and small."""

    train: tuple[Path, ...] = ()
    """Tokenized files, one a source; empty where rows are encoded on access."""
    val: tuple[Path, ...] = ()
    fingerprint: str = ""
    report: DataReport = field(default_factory=DataReport)


def prepare_data(
    config: "RunConfig",
    recipe: Recipe[Any],
    template: "Template",
    *,
    loaders: Loaders,
    progress: bool = True,
) -> DataPlan:
    """Check the sources and encode them into the cache; for one rank of each file system."""
    data, loading = config[DataConfig], config[DataLoaderConfig]
    problems = _check(config, template)
    if problems:
        raise UsageError(problems)
    options = source_options(config, recipe)
    report = DataReport()
    sources: list[Source] = []
    val_sources = open_all(data.val_dataset, loaders=loaders, options=options)
    if loading.streaming:
        for text in data.dataset:
            check_stream(text, loaders=loaders, options=options)
        names = list(data.dataset)
    else:
        sources = open_all(data.dataset, loaders=loaders, options=options)
        names = [source.fingerprint for source in sources]
    facts = [_encoding_facts(config, recipe, template), names, _mix_facts(config)]
    plan = DataPlan(fingerprint=cache_key(facts), report=report)
    if not loading.lazy_tokenize:
        write = partial(_write, config, recipe, template, progress)
        train = tuple(write(source, report.train) for source in sources)
        if check := getattr(recipe, "check_data", None):  # a recipe may refuse what it cannot use
            check([UnitTable(path) for path in train])
        val = tuple(write(source, report.val) for source in val_sources)
        return DataPlan(train, val, plan.fingerprint, report)
    return plan


def _check(config: "RunConfig", template: "Template") -> list[Problem]:
    data, loading = config[DataConfig], config[DataLoaderConfig]
    problems = []
    if not data.dataset:
        problems.append(Problem("MC400", "there is no data", ["fix: --dataset FILE"]))
    if data.interleave_prob is not None:
        try:
            mix.check_probabilities(len(data.dataset), data.interleave_prob)
        except UsageError as error:
            problems.extend(error.problems)
    if loading.packing and (loading.packing_length or template.max_length) is None:
        problems.append(
            Problem(
                "MC418",
                "--packing true needs a length to pack to, and the model names no limit",
                ["fix: --packing_length 4096, or --max_length 4096"],
            )
        )
    if loading.streaming and data.split_dataset_ratio and not data.val_dataset:
        problems.append(
            Problem(
                "MC416",
                f"--split_dataset_ratio {data.split_dataset_ratio:g} cannot be used with "
                "--streaming true: a stream's length is not known",
                ["fix: --val_dataset FILE, or --streaming false"],
            )
        )
    clashes = (
        ("packing", loading.packing, "lazy_tokenize", bool(loading.lazy_tokenize)),
        ("group_by_length", loading.group_by_length, "lazy_tokenize", bool(loading.lazy_tokenize)),
        ("group_by_length", loading.group_by_length, "streaming", loading.streaming),
    )
    if loading.lazy_tokenize and template.config.truncation_strategy == "split":
        problems.append(
            Problem(
                "MC416",
                "--truncation_strategy split cannot be used with --lazy_tokenize true: how many "
                "pieces there are is not known before all is tokenized",
                ["fix: --lazy_tokenize false, or --truncation_strategy right or delete"],
            )
        )
    for needs, used, name, on in clashes:
        if used and on:
            problems.append(
                Problem(
                    "MC416",
                    f"--{needs} true cannot be used with --{name} true: it needs the length of "
                    "every sample beforehand",
                    [f"fix: --{name} false, or --{needs} false"],
                )
            )
    return problems


def source_options(config: "RunConfig", recipe: Recipe[Any]) -> SourceOptions:
    """Return what opening a source needs.

    A recipe may have a `recognize` of its own, with `formats_help` and `columns_example`.
    """
    data, weights = config[DataConfig], config[WeightsConfig]
    words = {
        name: getattr(recipe, name)
        for name in ("formats_help", "columns_example")
        if hasattr(recipe, name)
    }
    return SourceOptions(
        **words,
        seed=data.data_seed,
        columns=data.columns,
        recognize=getattr(recipe, "recognize", recognize),
        use_hf=weights.use_hf,
        hub_token=weights.hub_token,
    )


def row_encoder(config: "RunConfig", recipe: Recipe[Any]) -> RowEncoder:
    """Return how rows become units. A recipe may name the `fields` that it reads."""
    data = config[DataConfig]
    fields = getattr(recipe, "fields", FIELDS) if data.remove_unused_columns else None
    return RowEncoder(recipe=recipe, columns=data.columns, fields=fields, strict=data.strict)


def _encoding_facts(
    config: "RunConfig", recipe: Recipe[Any], template: "Template"
) -> dict[str, Any]:
    """Return everything but the rows that decides what a row becomes."""
    data = config[DataConfig]
    return {
        "recipe": f"{type(recipe).__module__}.{type(recipe).__qualname__}",
        "recipe_options": getattr(recipe, "encoding_options", dict)(),
        "template": template.fingerprint(),
        "columns": data.columns,
        "remove_unused_columns": data.remove_unused_columns,
        "strict": data.strict,
    }


def _mix_facts(config: "RunConfig") -> dict[str, Any]:
    """Return the options that decide the order of the items."""
    data, loading = config[DataConfig], config[DataLoaderConfig]
    names = ("split_dataset_ratio", "interleave_prob", "stopping_strategy", "shuffle_buffer_size")
    order = (
        "packing",
        "packing_length",
        "dataset_shuffle",
        "train_dataloader_shuffle",
        "dataloader_type",
        "group_by_length",
        "streaming",
    )
    return {n: getattr(data, n) for n in names} | {n: getattr(loading, n) for n in order}


def _write(
    config: "RunConfig",
    recipe: Recipe[Any],
    template: "Template",
    progress: bool,
    source: Source,
    counts: dict[str, Counts],
) -> Path:
    data = config[DataConfig]
    chosen = source.rows.chosen if isinstance(source.rows, mix.Picked) else None
    digest = None if chosen is None else mix.digest(chosen)
    key = cache_key([_encoding_facts(config, recipe, template), source.fingerprint, digest])
    path = cache_dir() / f"{key}.arrow"
    label = source.name if source.name not in counts else f"{source.name} ({len(counts) + 1})"
    counts[label] = encode_rows(
        source.rows,
        row_encoder(config, recipe),
        path=path,
        name=source.name,
        num_proc=data.dataset_num_proc,
        reuse=data.load_from_cache_file,
        progress=progress,
    )
    return path
