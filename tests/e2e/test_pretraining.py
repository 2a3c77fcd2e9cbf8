"""`mcore run --plugin pt` on plain text: long documents in pieces, packed, in any layout."""

import json
import random

import pytest
from commands import losses, metrics


@pytest.fixture(scope="module")
def texts(place):
    """40 documents of 4 to 700 characters, one token each, from two channels."""
    rng = random.Random(0)
    file = place / "texts.jsonl"
    with file.open("w") as out:
        for i in range(40):
            words = " ".join(
                rng.choice(["one", "two", "three"]) for _ in range(rng.randint(1, 160))
            )
            out.write(json.dumps({"text": words[:700], "channel": "ab"[i % 2]}) + "\n")
    return file


@pytest.fixture(scope="module")
def pt(model, texts):
    return [
        "run", "--plugin", "pt", "--model", model, "--dataset", texts, "--max_length", 64,
        "--packing", "--num_workers", 0, "--lr", "1e-3", "--micro_batch_size", 2,
        "--global_batch_size", 4, "--train_iters", 4, "--enable_channel_loss",
    ]  # fmt: skip


def test_long_documents_train_in_pieces(mcore, pt, texts, tmp_path):
    ran = mcore(*pt, "--save", tmp_path / "one")
    assert ran.code == 0, ran.err
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    pieces = sum(-(-len(row) // 63) for row in rows)  # and EOS, less the first token
    assert f"40 rows, {pieces:,} pieces, " in ran.err
    facts = json.loads((ran.folder() / "run.json").read_text())["data"]["train"]
    # a piece begins with the last token of the one before
    assert facts["tokens"] == sum(map(len, rows)) + pieces
    lines = [line for line in metrics(ran.folder()) if "loss" in line]
    for line in lines:
        low, high = sorted((line["loss/a"], line["loss/b"]))
        assert low <= line["loss"] <= high
    assert lines[-1]["loss"] < lines[0]["loss"]
    two = mcore.ranks(2, *pt, "--save", tmp_path / "two")
    assert two.code == 0, two.err
    for mine, theirs in zip(metrics(two.folder()), lines, strict=True):
        for name in ("loss", "loss/a", "loss/b"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4)


@pytest.mark.parity
def test_what_fits_trains_as_with_sft(mcore, pt, texts, tmp_path):
    """The same documents, all of them short: the machinery is one."""
    short = tmp_path / "short.jsonl"
    rows = [json.loads(line) for line in texts.read_text().splitlines()]
    short.write_text("".join(json.dumps(row | {"text": row["text"][:60]}) + "\n" for row in rows))
    found = []
    for plugin in ("pt", "sft"):
        argv = [short if a == texts else plugin if a == "pt" else a for a in pt]
        ran = mcore(*argv, "--save", tmp_path / plugin)
        assert ran.code == 0, ran.err
        found.append(losses(ran.folder()))
    assert found[0] == found[1]
    assert len(found[0]) == 4
