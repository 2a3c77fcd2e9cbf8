"""Opening what --dataset names; every error text."""

import csv
import json

import numpy as np
import pytest
from data_tools import chat, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from mcore_core.component import Component
from mcore_core.data.files import JsonlRows
from mcore_core.data.mix import Joined, interleave, split
from mcore_core.data.rows import RowError
from mcore_core.data.sources import (
    Ref,
    SourceOptions,
    check_stream,
    open_all,
    open_rows,
    parse_ref,
    stream_rows,
)
from mcore_core.errors import UsageError

ROWS = [{"query": f"q{i}", "response": f"a{i}"} for i in range(10)]


def load_numbers(path, *, streaming):
    return ({"text": str(i)} for i in range(int(path)))


LOADERS = {"numbers": Component("numbers", f"{__name__}:load_numbers")}


def opened(text, **options):
    return open_rows(str(text), loaders=LOADERS, options=SourceOptions(**options))


def error_of(text, **options):
    with pytest.raises(UsageError) as caught:
        opened(text, **options)
    return str(caught.value)


def write(folder, kind):
    path = folder / f"data.{kind}"
    match kind:
        case "jsonl":
            write_jsonl(path, ROWS)
        case "json":
            path.write_text(json.dumps(ROWS, indent=1))
        case "csv" | "tsv":
            with path.open("w", newline="") as file:
                delimiter = "," if kind == "csv" else "\t"
                writer = csv.DictWriter(file, ["query", "response"], delimiter=delimiter)
                writer.writeheader()
                writer.writerows(ROWS)
        case "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    source = opened(write(tmp_path, kind))
    assert list(source.rows) == ROWS
    assert source.rows[9] == ROWS[9]
    assert source.rows.columns() == ("query", "response")
    streamed = stream_rows(str(tmp_path / f"data.{kind}"), loaders={}, options=SourceOptions())
    assert list(streamed) == ROWS


def test_a_saved_dataset_and_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    both = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])})
    both.save_to_disk(str(tmp_path / "two"))
    assert list(opened(tmp_path / "one").rows) == ROWS
    assert list(opened(tmp_path / "two").rows) == ROWS
    assert list(opened(f"{tmp_path / 'two'}:test").rows) == ROWS[:2]
    assert error_of(f"{tmp_path / 'two'}:valid") == (
        f"error[MC408]: {tmp_path / 'two'}: no split 'valid'\n  it has: train, test\n"
        f"  fix: {tmp_path / 'two'}:train"
    )


def test_a_folder_of_files_and_a_subset_of_them(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "train-0.jsonl", ROWS[:5])
    write_jsonl(tmp_path / "train-1.jsonl", ROWS[5:])
    (tmp_path / "README.md").write_text("no data")
    assert len(opened(tmp_path).rows) == 12
    assert list(opened(f"{tmp_path}:train").rows) == ROWS
    assert error_of(f"{tmp_path}:dev").startswith(
        f"error[MC402]: {tmp_path}: the folder has no data files whose name begins with 'dev'"
    )


def test_parse_ref():
    assert parse_ref("org/name:sub#50") == Ref(path="org/name", subset="sub", sample=50)
    assert parse_ref("a/b.jsonl#5") == Ref(path="a/b.jsonl", sample=5)
    assert parse_ref("s3://bucket/x:y") == Ref(path="bucket/x:y", scheme="s3")
    assert parse_ref("org/name:sub").name == "org/name:sub"


def test_a_path_that_exists_is_taken_as_written(tmp_path):
    path = tmp_path / "a:b#3.jsonl"
    write_jsonl(path, ROWS)
    assert len(opened(path).rows) == 10
    odd = tmp_path / "c.jsonl#4"
    assert parse_ref(str(odd)).sample == 4
    odd.write_text("")
    assert parse_ref(str(odd)) == Ref(path=str(odd))


def test_sampling_is_seeded_and_without_repetition(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    first = [r["query"] for r in opened(f"{path}#4").rows]
    assert len(set(first)) == 4
    assert [r["query"] for r in opened(f"{path}#4").rows] == first
    assert [r["query"] for r in opened(f"{path}#4", seed=1).rows] != first
    assert error_of(f"{path}#11") == (
        f"error[MC408]: {path}#11: 11 rows are asked for, {path} has 10\n"
        f"  fix: {path}#10, or leave out #11 to take all"
    )
    assert error_of(f"{path}#0").startswith("error[MC408]")


def test_a_plugins_scheme_gets_the_rest_of_the_reference():
    assert [r["text"] for r in opened("numbers://3").rows] == ["0", "1", "2"]
    streamed = stream_rows("numbers://3", loaders=LOADERS, options=SourceOptions())
    assert len(list(streamed)) == 3
    assert error_of("number://3") == (
        "error[MC407]: number://3: no plugin opens number://\n  known: numbers://\n"
        "  did you mean: numbers?\n  fix: install the plugin, or name a file, a folder or a hub id"
    )


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ROWS)
    first = opened(path).fingerprint
    assert opened(path).fingerprint == first
    write_jsonl(tmp_path / "x.jsonl", [*ROWS[:9], {"query": "q9", "response": "b9"}])
    assert opened(path).fingerprint != first


# -- errors ----------------------------------------------------------------------------------------


def test_a_missing_file_suggests_its_neighbour(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert error_of(tmp_path / "trian.jsonl") == (
        f"error[MC401]: {tmp_path}/trian.jsonl: no such file or folder\n"
        "  did you mean: train.jsonl?\n"
        f"  fix: check the path; relative paths start at {tmp_path}"
    )
    assert error_of("nothing.jsonl").startswith(
        "error[MC401]: nothing.jsonl: no such file or folder"
    )


def test_empty_files(tmp_path):
    for name, text in (("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]"), ("d.csv", "text\n")):
        (tmp_path / name).write_text(text)
        assert error_of(tmp_path / name) == (
            f"error[MC402]: {tmp_path / name}: it has no rows\n"
            "  fix: check the file, or name another"
        )
    (tmp_path / "folder").mkdir()
    assert error_of(tmp_path / "folder").startswith(
        f"error[MC402]: {tmp_path / 'folder'}: the folder has no data files\n"
        "  known: .jsonl, .json, .csv, .tsv, .parquet, or a folder written by datasets'"
    )


def test_no_usable_columns_says_what_was_found_and_how_to_map(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a"}])
    assert error_of(path) == (
        f"error[MC403]: {path}: no usable columns\n"
        "  found: question, answer\n"
        "  usable: messages | conversations | prompt, completion | query, response | "
        "instruction, input, output | text\n"
        "  fix: say what they mean, for example "
        """--columns '{"question": "query", "answer": "response"}'"""
    )
    opened(path, columns={"question": "query", "answer": "response"})


def test_malformed_lines_are_named_when_read(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": \n[1]\n\xff\n{"text": "b"}')
    rows = opened(path).rows
    assert len(rows) == 5
    assert rows[0] == {"text": "a"} and rows[4] == {"text": "b"}
    messages = []
    for i in (1, 2, 3):
        with pytest.raises(RowError) as caught:
            rows[i]
        messages.append(str(caught.value))
    assert messages == [
        f"{path}:3: not valid JSON (Expecting value, column 1)",
        f"{path}:4: a row must be a JSON object, found list",
        f"{path}:5: not valid UTF-8",
    ]
    streamed = list(stream_rows(str(path), loaders={}, options=SourceOptions()))
    assert [str(r) for r in streamed if isinstance(r, RowError)] == messages


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
    assert JsonlRows(path)[0] == {"text": "a"}


def test_a_malformed_json_file_names_the_line(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"text": "a"},\n{"text": }]')
    assert error_of(path).startswith(
        f"error[MC404]: {path}:2: not valid JSON (Expecting value, column 10)"
    )
    path.write_text("3")
    assert error_of(path).startswith(f"error[MC404]: {path}: expected a list of rows, found int")


def test_json_may_hold_lines_or_a_data_list(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(opened(path).rows) == 2
    path.write_text('{"data": [{"text": "a"}]}')
    assert list(opened(path).rows) == [{"text": "a"}]


def test_a_csv_row_with_other_columns_is_malformed(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('query,response\nq,"a\nb"\nq,a,more\nq\n')
    rows = opened(path).rows
    assert rows[0] == {"query": "q", "response": "a\nb"}
    with pytest.raises(RowError, match=r"x.csv:4: 3 values under 2 columns"):
        rows[1]
    with pytest.raises(RowError, match=r"x.csv:5: 1 values under 2 columns"):
        rows[2]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.xlsx").write_text("?")
    assert error_of(tmp_path / "x.xlsx").startswith(
        f"error[MC419]: {tmp_path / 'x.xlsx'}: files that end in '.xlsx' cannot be read\n"
        "  known: .jsonl, .json, .csv, .tsv, .parquet"
    )
    (tmp_path / "x.parquet").write_text("?")
    assert error_of(tmp_path / "x.parquet").startswith(
        f"error[MC404]: {tmp_path / 'x.parquet'}: not a parquet file ("
    )


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (offline)\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert error_of("org/name").startswith(
        "error[MC406]: org/name: not a file or folder here, and the hub does not give it\n"
        "  ConnectionError: Couldn't reach 'org/name' on the Hub (offline)\n"
        "  fix: check the name and the network"
    )
    assert error_of("org/name", use_hf=False).startswith(
        "error[MC406]: org/name: no such file or folder, and --use_hf false"
    )


def test_a_hub_dataset_gets_subset_and_token(monkeypatch):
    import datasets

    seen = {}

    def load(path, subset, **options):
        seen.update(path=path, subset=subset, **options)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(opened("org/name:main#3", hub_token="t").rows) == 3
    assert seen == {
        "path": "org/name",
        "subset": "main",
        "split": "train",
        "token": "t",
        "streaming": False,
    }


def test_every_problem_is_reported_at_once(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError) as caught:
        open_all(
            ["gone.jsonl", str(tmp_path / "empty.jsonl"), "x://1"],
            loaders={},
            options=SourceOptions(),
        )
    assert [p.code for p in caught.value.problems] == ["MC401", "MC402", "MC407"]


def test_streams_are_checked_by_their_beginning(tmp_path):
    def check(text):
        with pytest.raises(UsageError) as caught:
            check_stream(str(text), loaders={}, options=SourceOptions())
        return str(caught.value)

    bad = tmp_path / "bad.jsonl"
    bad.write_text("oops\n" * 3)
    assert check(bad).startswith(
        f"error[MC405]: {bad}: none of its 3 rows can be read\n  the first: {bad}:1: not valid JSON"
    )
    (tmp_path / "e.jsonl").write_text("")
    assert check(tmp_path / "e.jsonl").startswith("error[MC402]")
    write_jsonl(tmp_path / "c.jsonl", [{"a": 1}])
    assert check(tmp_path / "c.jsonl").startswith("error[MC403]")
    path = write_jsonl(tmp_path / "ok.jsonl", [chat("q", "a")])
    assert check(f"{path}#1").startswith(f"error[MC416]: {path}#1: #1 draws from all rows")


# -- choosing rows ---------------------------------------------------------------------------------


@given(n=st.integers(0, 200), ratio=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_split_gives_each_row_to_one_part(n, ratio, seed):
    train, val = split(n, ratio, seed)
    assert sorted([*train, *val]) == list(range(n))
    if n >= 2 and ratio > 0:
        assert len(val) == min(max(1, round(n * ratio)), n - 1)


def test_interleave_stops_with_the_first_or_when_all_are_used_up():
    first = interleave([5, 100], [0.5, 0.5], seed=0)
    assert (first < 5).sum() == 5 and first[-1] == 4
    assert first[first < 5].tolist() == [0, 1, 2, 3, 4]
    big = first[first >= 5]
    assert big.tolist() == list(range(5, 5 + len(big)))
    everything = interleave([5, 100], [0.5, 0.5], seed=0, stopping="all_exhausted")
    assert set(everything.tolist()) == set(range(105))
    small = everything[everything < 5]
    assert small.tolist() == [i % 5 for i in range(len(small))]


def test_interleave_follows_the_probabilities():
    order = interleave([10000, 10000], [0.8, 0.2], seed=3)
    assert abs((order < 10000).mean() - 0.8) < 0.02
    assert np.array_equal(order, interleave([10000, 10000], [0.8, 0.2], seed=3))


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [
        ([1.0], "--interleave_prob has 1 values for 2 datasets"),
        ([0.5, 0.6], "--interleave_prob 0.5 0.6: the values must be above 0 and sum to 1, they"),
        ([1.0, 0.0], "--interleave_prob 1.0 0.0: the values must be above 0 and sum to 1"),
    ],
)
def test_interleave_probabilities_that_do_not_fit(probabilities, message):
    with pytest.raises(UsageError) as caught:
        interleave([1, 1], probabilities, seed=0)
    assert str(caught.value).startswith(f"error[MC409]: {message}")


def test_joined_rows_know_their_source(tmp_path):
    a = opened(write_jsonl(tmp_path / "a.jsonl", ROWS[:3])).rows
    b = opened(write_jsonl(tmp_path / "b.jsonl", ROWS[3:])).rows
    assert list(Joined([a, b])) == ROWS
