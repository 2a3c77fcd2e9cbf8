"""The tokenized cache: what is stored, counted, reused and refused."""

import errno
import pickle

import numpy as np
import pytest
from data_tools import chat, make_config, make_template, write_jsonl
from mcore_sft.recipe import SFTRecipe

from mcore_core.data import encode, store
from mcore_core.data.encode import LazyUnits, RowEncoder, cache_dir, cache_key, encode_rows
from mcore_core.data.files import JsonlRows, ListRows
from mcore_core.data.store import Counts, UnitTable, to_batch, unit_writer
from mcore_core.errors import UsageError

LONG = chat("q", "a" * 200)
NO_ANSWER = {"messages": [{"role": "user", "content": "q"}]}


def encoder(strict=False, **options):
    options.setdefault("max_length", 64)
    recipe = SFTRecipe(make_config(), make_template(**options))
    return RowEncoder(recipe=recipe, strict=strict)


def rows_of(tmp_path, rows):
    return JsonlRows(tmp_path / write_jsonl(tmp_path / "x.jsonl", rows))


def test_units_come_back_as_they_were_encoded(tmp_path):
    rows = rows_of(tmp_path, [chat(f"q{i}", "a" * (i % 5 + 1)) for i in range(1200)])
    make = encoder()
    path = tmp_path / "c" / "x.arrow"
    counts = encode_rows(rows, make, path=path, name="x")
    table = pickle.loads(pickle.dumps(UnitTable(path)))
    assert len(table) == counts.kept == counts.rows == 1200
    for i in (0, 511, 512, 1199):
        (expected,) = make(rows[i])
        got = table[i]
        assert list(got) == ["input_ids", "weights", "length"]
        assert got["input_ids"].tolist() == expected["input_ids"].tolist()
        assert got["weights"].tolist() == expected["weights"].tolist()
        assert got["length"] == expected["length"] == table.lengths[i]
        assert (got["input_ids"].dtype, got["weights"].dtype) == (np.int32, np.float32)
    assert counts.tokens == table.lengths.sum()
    assert counts.trained == sum(i % 5 + 2 for i in range(1200))
    with pytest.raises(IndexError):
        table[1200]


def test_the_number_of_processes_changes_nothing(tmp_path):
    rows = rows_of(tmp_path, [chat(f"q{i}", "a") if i % 7 else LONG for i in range(1500)])
    one, two = tmp_path / "1.arrow", tmp_path / "2.arrow"
    first = encode_rows(rows, encoder(), path=one, name="x")
    second = encode_rows(rows, encoder(), path=two, name="x", num_proc=2)
    assert one.read_bytes() == two.read_bytes()
    assert first == second
    assert first.dropped == {"longer than --max_length": 215}


def test_dropped_rows_are_counted_by_reason_with_the_first_of_each(tmp_path):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [chat("q", "a"), LONG, NO_ANSWER, LONG, {"messages": 3}])
    with path.open("a") as file:
        file.write("{oops\n")
    counts = encode_rows(JsonlRows(path), encoder(), path=tmp_path / "x.arrow", name="mine")
    assert (counts.rows, counts.kept) == (6, 1)
    assert counts.dropped == {
        "longer than --max_length": 2,
        "nothing to train on": 1,
        "malformed": 2,
    }
    assert counts.examples == {
        "longer than --max_length": f"{path}:2",
        "nothing to train on": f"{path}:3",
        "malformed": f"{path}:5: 'messages' must be a list of messages, found 3 (int)",
    }


@pytest.mark.parametrize("num_proc", [1, 2])
def test_strict_stops_at_a_malformed_line_and_names_it(tmp_path, num_proc):
    path = tmp_path / "x.jsonl"
    write_jsonl(path, [chat("q", "a")] * 1000)
    with path.open("a") as file:
        file.write("{oops\n")
    with pytest.raises(UsageError) as caught:
        encode_rows(
            JsonlRows(path),
            encoder(strict=True),
            path=tmp_path / "x.arrow",
            name="mine",
            num_proc=num_proc,
        )
    assert str(caught.value) == (
        f"error[MC404]: {path}:1001: not valid JSON (Expecting property name enclosed in double "
        "quotes, column 2)\n  fix: correct the row, or --strict false to leave it out"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_file_in_which_nothing_parses_is_an_error(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("a\nb\n")
    with pytest.raises(UsageError) as caught:
        encode_rows(JsonlRows(path), encoder(), path=tmp_path / "x.arrow", name="mine")
    assert str(caught.value) == (
        "error[MC405]: mine: none of its 2 rows can be read\n"
        f"  the first: {path}:1: not valid JSON (Expecting value, column 1)\n"
        "  fix: check the format; a .jsonl file has one JSON object a line"
    )


def test_all_rows_dropped_says_why_and_what_to_do(tmp_path):
    rows = rows_of(tmp_path, [LONG] * 3 + [NO_ANSWER])
    with pytest.raises(UsageError) as caught:
        encode_rows(rows, encoder(), path=tmp_path / "x.arrow", name="mine")
    assert str(caught.value) == (
        "error[MC410]: mine: nothing is left to train on, all 4 rows were dropped\n"
        f"  3 x longer than --max_length (first: {tmp_path}/x.jsonl:1)\n"
        f"  1 x nothing to train on (first: {tmp_path}/x.jsonl:4)\n"
        "  fix: raise --max_length, or --truncation_strategy right cuts them; the rows have no "
        "assistant message that trains; see --loss_scale"
    )
    assert not (tmp_path / "x.arrow").exists()


def test_reuse_takes_the_file_and_its_counts(tmp_path):
    rows = rows_of(tmp_path, [chat("q", "a"), LONG])
    path = tmp_path / "x.arrow"
    first = encode_rows(rows, encoder(), path=path, name="x")
    before = path.stat().st_ino
    again = encode_rows(rows, encoder(), path=path, name="x", reuse=True)
    assert again == first and path.stat().st_ino == before
    encode_rows(rows, encoder(), path=path, name="x", reuse=False)
    assert path.stat().st_ino != before


def test_a_damaged_cache_file_is_written_again(tmp_path):
    rows = rows_of(tmp_path, [chat("q", "a")])
    path = tmp_path / "x.arrow"
    encode_rows(rows, encoder(), path=path, name="x")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    encode_rows(rows, encoder(), path=path, name="x", reuse=True)
    assert path.read_bytes() == whole


def test_a_file_that_another_run_replaces_stays_readable(tmp_path):
    rows = rows_of(tmp_path, [chat("q", "a")])
    path = tmp_path / "x.arrow"
    encode_rows(rows, encoder(), path=path, name="x")
    table = UnitTable(path)
    encode_rows(rows, encoder(), path=path, name="x")
    assert table[0]["length"] == UnitTable(path)[0]["length"]


def test_a_full_disk_is_a_users_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.UnitWriter, "write", full)
    rows = rows_of(tmp_path, [chat("q", "a")])
    with pytest.raises(UsageError) as caught:
        encode_rows(rows, encoder(), path=tmp_path / "c" / "x.arrow", name="x")
    assert str(caught.value) == (
        f"error[MC417]: cannot write the tokenized data to {tmp_path / 'c'}: No space left on "
        "device\n  fix: free some space, or set MCORE_CACHE to a folder on another disk"
    )
    assert list((tmp_path / "c").iterdir()) == []


def test_the_cache_folder_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv("MCORE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path / "tokens"
    monkeypatch.delenv("MCORE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mcore" / "tokens"
    first = cache_key([{"a": 1}])
    assert first == cache_key([{"a": 1}]) != cache_key([{"a": 2}])
    monkeypatch.setattr(encode, "version", lambda _: "9.9")
    assert cache_key([{"a": 1}]) != first


def test_units_may_hold_numbers_strings_and_arrays_of_other_types(tmp_path):
    units = [
        {"ids": np.arange(n, dtype=np.int64), "score": n / 2, "name": f"u{n}", "length": n}
        for n in range(3)
    ]
    with unit_writer(tmp_path / "u.arrow") as writer:
        writer.write(to_batch(units))
    table = UnitTable(tmp_path / "u.arrow")
    assert [u["ids"].tolist() for u in table] == [[], [0], [0, 1]]
    assert [(u["score"], u["name"]) for u in table] == [(0.0, "u0"), (0.5, "u1"), (1.0, "u2")]


def test_lazy_units_replace_a_row_that_cannot_train_by_the_next():
    rows = ListRows([chat("q", "a"), LONG, NO_ANSWER, chat("q", "bb"), LONG], "x")
    units = LazyUnits(rows, encoder(), "x")
    lengths = [units[i]["length"] for i in range(5)]
    assert lengths[1] == lengths[2] == lengths[3] == lengths[0] + 1
    assert lengths[4] == lengths[0]
    with pytest.raises(UsageError, match="nothing is left to train on, all 1 rows were dropped"):
        LazyUnits(ListRows([LONG], "x"), encoder(), "x")[0]


def test_a_recipe_that_drops_a_row_is_counted_as_such(tmp_path):
    class Picky(SFTRecipe):
        def encode(self, row):
            return None if row["messages"][0]["content"] == "no" else super().encode(row)

    recipe = Picky(make_config(), make_template())
    rows = ListRows([chat("no", "a"), chat("q", "a")], "x")
    counts = encode_rows(rows, RowEncoder(recipe=recipe), path=tmp_path / "x.arrow", name="x")
    assert counts.dropped == {"left out by the recipe": 1}


def test_counts_survive_json():
    counts = Counts(rows=2, kept=1, tokens=5, trained=2)
    counts.drop("malformed", "x:1")
    assert Counts.from_json(counts.to_json()) == counts
