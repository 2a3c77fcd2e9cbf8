"""New special tokens: read from the option, added to a tokenizer, and the rows they take."""

from functools import partial

import pytest
import torch
from data_tools import make_tokenizer

from mcore_core.data.new_tokens import Growth, extend_tokenizer, read_new_tokens
from mcore_core.errors import UsageError


def test_tokens_and_files(tmp_path):
    path = tmp_path / "tokens.txt"
    path.write_text("\ufeff<a>\n\n  <b> \n<a>\n", encoding="utf-8")
    assert read_new_tokens(["<x>", str(path), "<x>", ""]) == ["<x>", "<a>", "<b>"]
    assert read_new_tokens([]) == []


def test_files_that_cannot_be_used(tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError) as caught:
        read_new_tokens([str(empty), str(tmp_path / "none.txt"), str(binary)])
    text = str(caught.value)
    assert f"error[MC433]: --new_special_tokens {empty} cannot be used: it has no lines" in text
    assert f"{tmp_path}/none.txt cannot be used: No such file or directory" in text
    assert text.count("error[MC433]") == 3


def test_a_tokenizer_gets_what_it_lacks():
    tokenizer = make_tokenizer()
    known = len(tokenizer)
    found = extend_tokenizer(tokenizer, ["<|im_start|>", "<a>", "<b>"], known)
    assert found == Growth(known, known, known, known + 2)
    assert found.rows == known + 2
    assert tokenizer("x<b><a>")["input_ids"][1:] == [known + 1, known]
    assert {"<a>", "<b>", "<|im_start|>"} <= set(tokenizer.all_special_tokens)
    assert tokenizer.eos_token == "<|im_end|>"
    assert extend_tokenizer(tokenizer, ["<a>"], known + 2) is None


@pytest.mark.parametrize(("spare", "rows"), [(1, 2), (5, 5)])
def test_a_model_may_have_rows_to_spare(spare, rows):
    tokenizer = make_tokenizer()
    known = len(tokenizer)
    found = extend_tokenizer(tokenizer, ["<a>", "<b>"], known + spare)
    assert found is not None
    assert (found.known, found.first, found.rows) == (known, known, known + rows)


def filled(world, tie, _):
    from sft_case import sft_case

    from mcore_core.model.names import named_weights
    from mcore_core.parallel.topology import Layout
    from mcore_core.testing.cases import Session
    from mcore_core.train.grow import VOCABULARY, fill_rows

    shape = "tied" if tie else "qk-norm"
    session = Session(sft_case(shape), Layout(world=world, tp=world))
    fill_rows(session.chunks, Growth(50, 55, 52, 59))
    weights = named_weights(session.chunks)
    return {n: weights[n].detach().clone() for n in VOCABULARY if n in weights}


@pytest.mark.parametrize("tie", [False, True])
def test_rows_start_as_the_mean_of_the_known_ones(tie, monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "parity"))
    from mcore_core import compat

    compat.apply()
    from mcore_core.testing.ranks import fork_ranks

    (whole,) = fork_ranks(partial(filled, 1, tie), 1)
    assert len(whole) == (1 if tie else 2)
    parts = fork_ranks(partial(filled, 2, tie), 2)
    for name, weight in whole.items():
        mean = weight[:50].double().mean(0)
        torch.testing.assert_close(weight[52:59].double(), mean.expand(7, -1), rtol=1e-6, atol=0)
        assert (weight[50:52] != mean.float()).any(1).all()
        joined = torch.cat([part[name] for part in parts])
        torch.testing.assert_close(joined[: len(weight)], weight, rtol=1e-6, atol=1e-8)
