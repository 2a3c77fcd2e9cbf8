"""Pre-training: documents whole or in pieces, every token predicted once, EOS at each end."""

from itertools import islice

import numpy as np
import pytest
from data_tools import chat, make_config, make_tokenizer, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from mcore_sft.pt.recipe import PTRecipe
from mcore_sft.recipe import SFTRecipe

from mcore_core.cli.run import prepare
from mcore_core.config.template import TemplateConfig
from mcore_core.data.fit import fitted
from mcore_core.data.pipeline import build_data
from mcore_core.data.rows import RowDropped
from mcore_core.data.template import Template
from mcore_core.errors import UsageError

END = 1  # <|im_end|>
PT = {"truncation_strategy": "split", "use_chat_template": False, "loss_scale": "all"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MCORE_CACHE", str(tmp_path / "cache"))


def made(*, bos=False, max_length=8, **options):
    config = make_config(max_length=max_length, **{**PT, **options})
    template = Template(make_tokenizer(bos=bos), config[TemplateConfig], splits=True)
    return config, PTRecipe(config, template), template


@given(st.integers(1, 60), st.integers(2, 20), st.booleans())
def test_pieces_lose_no_token_and_train_each_once(length, limit, some):
    ids = np.arange(length, dtype=np.int32)
    weights = np.ones(length, np.float32)
    if some:
        weights[::3] = 0
    try:
        pieces = fitted(ids, weights, limit, "split")
    except RowDropped:
        assert not weights[1:].any()
        return
    assert all(2 <= len(p.input_ids) <= limit for p in pieces)
    seen = [int(t) for p in pieces for t in p.input_ids[p.weights > 0]]
    assert seen == [t for t in range(1, length) if weights[t]]
    if not some:
        whole = pieces[0].input_ids.tolist()
        for piece in pieces[1:]:
            assert piece.input_ids[0] == whole[-1]
            whole += piece.input_ids[1:].tolist()
        assert whole == ids.tolist()
        assert all(len(p.input_ids) == limit for p in pieces[:-1])


def test_a_long_document():
    _, recipe, template = made(bos=True, enable_channel_loss=True)
    pieces = recipe.encode({"text": "abcdefghijklmno", "channel": "web"})
    shown = [template.describe(piece) for piece in pieces]
    assert shown == ["<s>«abcdefg»", "g«hijklmn»", "n«o<|im_end|>»"]
    assert [piece["length"] for piece in pieces] == [8, 8, 3]
    assert {piece["channel"] for piece in pieces} == {"web"}


def test_a_document_that_fits_is_what_sft_makes_of_it():
    config, recipe, template = made(max_length=64)
    (unit,) = recipe.encode({"text": "a document"})
    expected = SFTRecipe(config, template).encode({"text": "a document"})
    assert unit["input_ids"].tolist() == expected["input_ids"].tolist()
    assert unit["weights"].tolist() == expected["weights"].tolist() == [0.0] + 10 * [1.0]
    assert unit["input_ids"][-1] == END


def test_messages_are_joined_without_a_template_and_all_of_them_train():
    _, recipe, template = made(max_length=64)
    (unit,) = recipe.encode(chat("2+2=", "4"))
    assert template.describe(unit) == "2«+2=4<|im_end|>»"


def test_a_tokenizer_that_cannot_end_a_document():
    _, recipe, template = made()
    template.tokenizer.eos_token = None
    with pytest.raises(UsageError, match=r"MC432.*no EOS token"):
        recipe.encode({"text": "abc"})


TEXTS = ["x" * n for n in (3, 40, 9, 1, 25, 7, 8, 12)]


def tokens_of(steps):
    return sorted(len(u["input_ids"]) for step in steps for micro in step for u in micro)


@pytest.mark.parametrize("options", [{}, {"streaming": True, "num_workers": 0}])
@pytest.mark.parametrize("packing", [False, True])
def test_the_pieces_are_the_samples(tmp_path, options, packing):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": text} for text in TEXTS])
    config, recipe, template = made(dataset=[path], global_batch_size=1, packing=packing, **options)
    bundle = build_data(config, recipe, template)
    lengths = [p["length"] for text in TEXTS for p in recipe.encode({"text": text})]
    assert sum(n - 1 for n in lengths) == sum(map(len, TEXTS))  # each text's end replaces its start
    if not options:
        counts = bundle.report.train[path]
        assert (counts.rows, counts.kept, counts.units) == (8, 8, len(lengths))
        assert next(bundle.report.lines()).startswith(
            f"train {path}: 8 of 8 rows in {len(lengths)} pieces, {sum(lengths)} tokens"
        )
    steps = list(islice(bundle.train, len(lengths) if not packing else 1))
    if packing:
        assert all(sum(u["length"] for u in micro) <= 8 for step in steps for micro in step)
    else:
        assert tokens_of(steps) == sorted(lengths)


def test_pieces_cannot_be_lazy(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "abc"}])
    config, recipe, template = made(dataset=[path], lazy_tokenize=True)
    with pytest.raises(UsageError, match=r"MC416.*split cannot be used with --lazy_tokenize"):
        build_data(config, recipe, template)


def test_a_piece_of_one_token():
    with pytest.raises(UsageError, match="--max_length 1: a token by itself"):
        made(max_length=1)


RUN = ["--plugin", "pt", "--model", "m", "--dataset", "d"]


def test_the_plugin():
    config = prepare(RUN).config
    assert {name: config.get(name) for name in PT} == PT
    assert config.get("calculate_per_token_loss") is True
    with pytest.raises(UsageError) as caught:
        prepare([*RUN, "--use_chat_template", "--loss_scale", "default"])
    text = str(caught.value)
    assert "--use_chat_template true: the plugin 'pt' cannot use it: texts are taken as" in text
    assert "--loss_scale default: the plugin 'pt' cannot use it: every token of a text" in text
