"""Open what `--dataset` names: a file, a folder, a hub id or `scheme://path` of a plugin.

A reference is `ref[:subset][#N]`. `subset` is a split of a saved folder, the files of a folder
whose name begins with it, or a configuration of a hub dataset; `#N` draws N of the rows with
data_seed.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mcore_core.component import Component
from mcore_core.data.files import READERS, ListRows, Rows, SavedRows, content_hash, stream_file
from mcore_core.data.mix import Picked
from mcore_core.data.rows import FORMATS_HELP, Recognizer, RowError, recognize, rename
from mcore_core.errors import Problem, UsageError, did_you_mean, usage_error
from mcore_core.protocols import DatasetLoader, Row

type Loaders = Mapping[str, Component[DatasetLoader]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """A parsed reference."""

    path: str
    subset: str | None = None
    sample: int | None = None
    scheme: str | None = None

    @property
    def name(self) -> str:
        """The reference as typed, without the sample size."""
        scheme = f"{self.scheme}://" if self.scheme else ""
        return scheme + self.path + (f":{self.subset}" if self.subset else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What opening needs beside the reference."""

    seed: int = 42
    columns: Mapping[str, str] | None = None
    recognize: Recognizer = recognize
    formats_help: str = FORMATS_HELP
    """What `recognize` knows, for the message where it knows nothing."""
    columns_example: str = '{"question": "query", "answer": "response"}'
    use_hf: bool = True
    hub_token: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """An opened reference."""

    name: str
    rows: Rows
    fingerprint: str
    """Hash of the content."""


def parse_ref(text: str) -> Ref:
    """Split a reference. A path that exists as written is taken as written."""
    sample = None
    if not Path(text).exists() and (found := re.fullmatch(r"(.+)#(\d+)", text)):
        text, sample = found[1], int(found[2])
    if found := re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)", text):
        return Ref(path=found[2], scheme=found[1], sample=sample)
    subset = None
    if not Path(text).exists() and (found := re.fullmatch(r"(.+):([^/:]+)", text)):
        text, subset = found[1], found[2]
    return Ref(path=text, subset=subset, sample=sample)


def open_rows(text: str, *, loaders: Loaders, options: SourceOptions) -> Source:
    """Open one reference and check that it has rows with usable columns.

    Raises:
        UsageError: Missing, empty, unreadable, or without usable columns.
    """
    ref = parse_ref(text)
    source = _open(ref, loaders, options)
    if not len(source.rows):
        raise _empty(ref)
    _check_columns(ref, source.rows.columns(), options)
    if ref.sample is None:
        return source
    if not 0 < ref.sample <= len(source.rows):
        raise usage_error(
            "MC408",
            f"{text}: {ref.sample} rows are asked for, {ref.name} has {len(source.rows)}",
            f"fix: {ref.name}#{len(source.rows)}, or leave out #{ref.sample} to take all",
        )
    drawn = np.random.default_rng(options.seed).permutation(len(source.rows))[: ref.sample]
    return replace(source, name=text, rows=Picked(source.rows, np.sort(drawn)))


def open_all(texts: Iterable[str], *, loaders: Loaders, options: SourceOptions) -> list[Source]:
    """Open several references; every problem is reported at once."""
    sources: list[Source] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            sources.append(open_rows(text, loaders=loaders, options=options))
        except UsageError as error:
            problems.extend(error.problems)
    if problems:
        raise UsageError(problems)
    return sources


def stream_rows(text: str, *, loaders: Loaders, options: SourceOptions) -> Iterator[Row | RowError]:
    """Yield the rows of one reference, once; a malformed one as the RowError that says so."""
    ref = parse_ref(text)
    if ref.sample is not None:
        raise usage_error(
            "MC416",
            f"{text}: #{ref.sample} draws from all rows, which --streaming true never sees",
            f"fix: --streaming false, or {ref.name}",
        )
    if ref.scheme:
        yield from _loader(ref, loaders)(ref.path, streaming=True)
        return
    path = Path(ref.path)
    if path.exists() and not _is_saved(path):
        for file in _files(ref, path):
            yield from stream_file(file)
        return
    if path.exists():
        rows = _open(ref, loaders, options).rows
        yield from (rows.get(i) for i in range(len(rows)))
        return
    yield from _hub(ref, options, streaming=True)


def check_stream(text: str, *, loaders: Loaders, options: SourceOptions) -> None:
    """Check that a streamed reference begins with something usable."""
    errors: list[RowError] = []
    for row in islice(stream_rows(text, loaders=loaders, options=options), 1000):
        if not isinstance(row, RowError):
            _check_columns(parse_ref(text), tuple(row), options)
            return
        errors.append(row)
    if not errors:
        raise _empty(parse_ref(text))
    raise nothing_parses(text, len(errors), str(errors[0]))


def nothing_parses(name: str, count: int, example: str) -> UsageError:
    """Return the error for a source in which no row can be read."""
    return usage_error(
        "MC405",
        f"{name}: none of its {count:,} rows can be read",
        f"the first: {example}",
        "fix: check the format; a .jsonl file has one JSON object a line",
    )


def _open(ref: Ref, loaders: Loaders, options: SourceOptions) -> Source:
    path = Path(ref.path)
    if ref.scheme:
        rows = list(_loader(ref, loaders)(ref.path, streaming=False))
        text = json.dumps(rows, default=str, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return Source(ref.name, ListRows(rows, ref.name), digest)
    if not path.exists():
        dataset = _hub(ref, options, streaming=False)
        return Source(ref.name, SavedRows(dataset), str(dataset._fingerprint))
    if _is_saved(path):
        return _saved(ref, path)
    files = _files(ref, path)
    parts = [READERS[file.suffix](file) for file in files]
    rows_of_all = parts[0] if len(parts) == 1 else Picked.join(parts)
    return Source(ref.name, rows_of_all, content_hash(files))


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(ref: Ref, path: Path) -> Source:
    from datasets import DatasetDict, load_from_disk  # noqa: PLC0415 - start-up stays light

    dataset = load_from_disk(str(path))
    if isinstance(dataset, DatasetDict):
        split = ref.subset or "train"
        if split not in dataset:
            raise usage_error(
                "MC408",
                f"{ref.path}: no split {split!r}",
                f"it has: {', '.join(dataset)}",
                f"fix: {ref.path}:{next(iter(dataset), 'SPLIT')}",
            )
        path, dataset = path / split, dataset[split]
    elif ref.subset:
        raise usage_error(
            "MC408", f"{ref.path}: a single dataset, without splits", f"fix: {ref.path}"
        )
    state = (path / "state.json").read_text(encoding="utf-8")
    sizes = [file.stat().st_size for file in sorted(path.glob("*.arrow"))]
    digest = hashlib.blake2b(f"{state}{sizes}".encode(), digest_size=16).hexdigest()
    return Source(ref.name, SavedRows(dataset), digest)


def _files(ref: Ref, path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in READERS:
            raise usage_error(
                "MC419",
                f"{path}: files that end in {path.suffix or 'nothing'!r} cannot be read",
                f"known: {', '.join(READERS)}",
                "fix: rename or convert the file",
            )
        files = [path]
    else:
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in READERS and not any(p.startswith(".") for p in file.parts)
        )
        if ref.subset:
            files = [f for f in files if _belongs(f.relative_to(path), ref.subset)]
        if not files:
            within = f" whose name begins with {ref.subset!r}" if ref.subset else ""
            raise usage_error(
                "MC402",
                f"{path}: the folder has no data files{within}",
                f"known: {', '.join(READERS)}, or a folder written by datasets' save_to_disk",
                "fix: name another folder, or a file",
            )
    return files


def _belongs(file: Path, subset: str) -> bool:
    return file.name.startswith(subset) or subset in file.parts[:-1]


def _loader(ref: Ref, loaders: Loaders) -> DatasetLoader:
    return _known(ref, loaders).load()


def _known(ref: Ref, loaders: Loaders) -> Component[DatasetLoader]:
    assert ref.scheme is not None
    if ref.scheme not in loaders:
        raise usage_error(
            "MC407",
            f"{ref.name}: no plugin opens {ref.scheme}://",
            f"known: {', '.join(f'{s}://' for s in sorted(loaders)) or 'none'}",
            did_you_mean(ref.scheme, loaders),
            "fix: install the plugin, or name a file, a folder or a hub id",
        )
    return loaders[ref.scheme]


def check_reference(text: str, *, loaders: Loaders) -> list[Problem]:
    """Return what is wrong with a reference, as far as names and sizes tell; reads nothing."""
    ref = parse_ref(text)
    path = Path(ref.path)
    try:
        if ref.scheme:
            _known(ref, loaders)
        elif not path.exists():
            _check_hub_name(ref)
        elif not _is_saved(path) and not any(f.stat().st_size for f in _files(ref, path)):
            raise _empty(ref)
    except UsageError as error:
        return list(error.problems)
    return []


def _check_hub_name(ref: Ref) -> None:
    """Raise where a path that does not exist cannot be the name of a dataset on the hub."""
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", ref.path)
    if not named or Path(ref.path).suffix in READERS:
        parent = Path(ref.path).parent
        near = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        raise usage_error(
            "MC401",
            f"{ref.path}: no such file or folder",
            did_you_mean(Path(ref.path).name, near),
            "fix: check the path; relative paths start at " + str(Path.cwd()),
        )


def _hub(ref: Ref, options: SourceOptions, *, streaming: bool) -> Any:  # noqa: ANN401
    _check_hub_name(ref)
    if not options.use_hf:
        raise usage_error(
            "MC406",
            f"{ref.path}: no such file or folder, and --use_hf false forbids asking Hugging Face",
            "fix: check the path, or --use_hf true",
        )
    from datasets import load_dataset  # noqa: PLC0415 - start-up stays light

    try:
        return load_dataset(
            ref.path, ref.subset, split="train", token=options.hub_token, streaming=streaming
        )
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        raise usage_error(
            "MC406",
            f"{ref.path}: not a file or folder here, and the hub does not give it",
            f"{type(error).__name__}: {first}",
            "fix: check the name and the network (HF_HOME names the cache, HF_ENDPOINT a mirror, "
            "--hub_token opens private ones), or give a path",
        ) from error


def _check_columns(ref: Ref, columns: tuple[str, ...], options: SourceOptions) -> None:
    if not columns:  # no row can be read: encoding says so, with the first one
        return
    if options.recognize(rename(dict.fromkeys(columns, ""), options.columns)) is None:
        raise usage_error(
            "MC403",
            f"{ref.name}: no usable columns",
            f"found: {', '.join(columns)}",
            f"usable: {options.formats_help}",
            f"fix: say what they mean, for example --columns '{options.columns_example}'",
        )


def _empty(ref: Ref) -> UsageError:
    return usage_error(
        "MC402", f"{ref.name}: it has no rows", "fix: check the file, or name another"
    )
