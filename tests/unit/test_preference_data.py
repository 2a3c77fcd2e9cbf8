"""Rows with two answers or a label: what is read, what is refused, and how pairs are cut."""

import json

import numpy as np
import pytest
from data_tools import CHATML, make_config, make_template, write_jsonl
from mcore_rlhf.config import ReferenceConfig, RLHFConfig
from mcore_rlhf.dpo.config import DPOConfig
from mcore_rlhf.dpo.recipe import DPORecipe
from mcore_rlhf.kto.config import KTOConfig
from mcore_rlhf.kto.recipe import KTORecipe
from mcore_rlhf.pairs import ANSWERS_TOO_LONG, ONE_TOO_LONG, PairEncoder, collate_pairs
from mcore_rlhf.rows import labelled, margin, pair, recognize_label, recognize_pair

from mcore_core.config.kernel import kernel_config
from mcore_core.data.pipeline import build_data
from mcore_core.data.rows import Conversation, RowDropped, RowError
from mcore_core.data.template import TOO_LONG
from mcore_core.errors import UsageError

USER = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "five"}
ROWS = {
    "messages": {"messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "response": {"messages": [USER, GOOD], "rejected_response": "five"},
    "query": {"query": "2+2?", "response": "4", "rejected_response": "five"},
    "strings": {"prompt": "2+2?", "chosen": "4", "rejected": "five"},
    "lists": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "implicit": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


@pytest.mark.parametrize("name", ROWS)
def test_pairs(name):
    row = ROWS[name]
    assert recognize_pair(row)
    chosen, rejected = pair(row)
    assert chosen == Conversation(messages=(USER, GOOD))
    assert rejected == Conversation(messages=(USER, BAD))
    chosen, rejected = pair({**row, "system": "Be brief."})
    assert chosen.messages[0] == rejected.messages[0] == {"role": "system", "content": "Be brief."}


def test_conversations_may_part_after_the_first_answer():
    tail = [{"role": "user", "content": "sure?"}, GOOD]
    chosen, rejected = pair(
        {"messages": [USER, GOOD, *tail], "rejected_messages": [USER, BAD, *tail]}
    )
    assert (len(chosen.messages), len(rejected.messages)) == (4, 4)


ASKED = {"role": "user", "content": "3+3?"}
LACKS = "there is no rejected answer (it has: chosen, prompt)"
SAME = "the chosen and the rejected answer are the same"
BAD_PAIRS = {
    "no rejected column": ({"prompt": "q", "chosen": "a"}, LACKS),
    "rejected is null": ({"prompt": "q", "chosen": "a", "rejected": None}, LACKS),
    "rejected is empty": ({"prompt": "q", "chosen": "a", "rejected": ""}, LACKS),
    "no chosen": (
        {"prompt": "q", "rejected": "a"},
        "there is no chosen answer (it has: prompt, rejected)",
    ),
    "same texts": ({"prompt": "q", "chosen": "a", "rejected": "a"}, SAME),
    "same response": ({"messages": [USER, GOOD], "rejected_response": "4"}, SAME),
    "two prompts": (
        {"messages": [USER, GOOD], "rejected_messages": [ASKED, BAD]},
        "the chosen and the rejected answer have different prompts",
    ),
    "no answer": (
        {"messages": [USER], "rejected_response": "x"},
        "'messages' does not end with an assistant's message to be replaced",
    ),
    "ends with a user": (
        {"messages": [USER, GOOD, USER], "rejected_messages": [USER, BAD]},
        "the chosen conversation does not end with an assistant's message",
    ),
    "texts without a prompt": (
        {"chosen": "a", "rejected": "b"},
        "'chosen' and 'rejected' are texts without a 'prompt'",
    ),
    "not a text": (
        {"messages": [USER, GOOD], "rejected_response": ["x"]},
        "'rejected_response' must be a string, found list",
    ),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs(name):
    row, text = BAD_PAIRS[name]
    with pytest.raises(RowError) as error:
        pair(row)
    assert error.value.reason == text


def test_margins():
    assert margin({}) == 0.0
    assert margin({"margin": 2}) == 2.0
    for value in ("big", True, float("nan")):
        with pytest.raises(RowError, match="'margin' must be a finite number"):
            margin({"margin": value})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [USER], "completion": [GOOD]},
        {"messages": [USER, GOOD]},
        {"query": "2+2?", "response": "4"},
    ],
)
@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False)])
def test_labels(row, label, good):
    assert recognize_label({**row, "label": label})
    assert labelled({**row, "label": label}) == (Conversation(messages=(USER, GOOD)), good)


@pytest.mark.parametrize("label", ["yes", None, 2, 0.5])
def test_bad_labels(label):
    with pytest.raises(RowError, match="'label' must be true or false"):
        labelled({"prompt": "q", "completion": "a", "label": label})


def encoder(**options):
    return PairEncoder(make_template(CHATML, **{"loss_scale": "last_round", **options}))


def split(unit):
    at = unit["chosen_length"]
    return [(unit[k][:at], unit[k][at:]) for k in ("input_ids", "weights")]


def pair_of(question, chosen, rejected):
    return pair({"prompt": question, "chosen": chosen, "rejected": rejected})


def test_a_unit_is_both_conversations():
    make = encoder()
    unit = make(*pair_of("2+2?", "4", "five"))
    (a, b), (wa, wb) = split(unit)
    template = make_template(CHATML, loss_scale="last_round")
    for ids, weights, answer in ((a, wa, "4"), (b, wb, "five")):
        talk = Conversation(messages=(USER, {"role": "assistant", "content": answer}))
        expected = template.encode(talk)
        assert (ids == expected.input_ids).all()
        assert (weights == expected.weights).all()
    assert unit["length"] == len(a) + len(b)


def test_only_the_last_answer_trains():
    talk = [USER, GOOD, {"role": "user", "content": "sure?"}, GOOD]
    make = encoder()
    unit = make(*pair({"messages": talk, "rejected_response": "no"}))
    once = make(*pair_of("q", "4", "no"))
    assert [w.sum() for w in split(unit)[1]] == [w.sum() for w in split(once)[1]]


def lengths(question, chosen, rejected):
    unit = encoder()(*pair_of(question, chosen, rejected))
    return unit["chosen_length"], unit["length"] - unit["chosen_length"]


def test_delete_drops_a_pair_if_either_side_is_too_long():
    a, b = lengths("q", "aaaa", "bb")
    assert encoder(max_length=a)(*pair_of("q", "aaaa", "bb"))["length"] == a + b
    for answers in (("aaaa", "bb"), ("bb", "aaaa")):
        with pytest.raises(RowDropped) as dropped:
            encoder(max_length=a - 1)(*pair_of("q", *answers))
        assert dropped.value.reason == TOO_LONG


def test_left_takes_the_same_tokens_off_both():
    """The prompt loses its beginning, in both alike; the answers stay whole."""
    question = "a question of some length"
    a, b = lengths(question, "long answer", "short")
    for answers in (("long answer", "short"), ("short", "long answer")):
        whole, cut = (
            encoder(max_length=limit, truncation_strategy="left")(*pair_of(question, *answers))
            for limit in (None, a - 7)
        )
        for before, after in zip(split(whole)[0], split(cut)[0], strict=True):
            assert (before[7:] == after).all()
        assert cut["weights"].sum() == whole["weights"].sum()
        assert cut["length"] == a + b - 14
    with pytest.raises(RowDropped) as dropped:
        encoder(max_length=12, truncation_strategy="left")(*pair_of(question, "long answer", "x"))
    assert dropped.value.reason == ANSWERS_TOO_LONG


def test_left_keeps_one_token_to_predict_from():
    """The longest cut leaves the first answer token predicted; one more drops the pair."""
    question = "ab"
    a, _ = lengths(question, "xyz", "w")
    whole = encoder()(*pair_of(question, "xyz", "w"))
    first = int(np.flatnonzero(whole["weights"])[0])
    cut = encoder(max_length=a - first + 1, truncation_strategy="left")(
        *pair_of(question, "xyz", "w")
    )
    assert cut["weights"].sum() == whole["weights"].sum()
    assert cut["weights"][0] == 0
    assert cut["weights"][1] == 1
    with pytest.raises(RowDropped):
        encoder(max_length=a - first, truncation_strategy="left")(*pair_of(question, "xyz", "w"))


def test_right_never_cuts_one_answer_alone():
    long, longer, short = "x" * 20, "y" * 30, "z"
    limit = min(lengths("q", long, longer)) - 5
    cut = encoder(max_length=limit, truncation_strategy="right")
    unit = cut(*pair_of("q", long, longer))
    assert (unit["chosen_length"], unit["length"]) == (limit, 2 * limit)
    (_, _), (wa, wb) = split(unit)
    assert wa.sum() == wb.sum() > 0  # both lost what came after the same place
    for answers in ((long, short), (short, long)):
        with pytest.raises(RowDropped) as dropped:
            cut(*pair_of("q", *answers))
        assert dropped.value.reason == ONE_TOO_LONG
    with pytest.raises(RowDropped) as dropped:  # the same tokens, once cut
        cut(*pair_of("q", "x" * 30, "x" * 31))
    assert dropped.value.reason == ANSWERS_TOO_LONG


def test_answers_that_differ_in_nothing_but_the_tokens_left_out():
    with pytest.raises(RowError, match="are the same tokens"):
        encoder()(
            Conversation(messages=(USER, {"role": "assistant", "content": "4"})),
            Conversation(messages=(USER, {"role": "assistant", "content": "4", "note": "x"})),
        )


def test_both_sides_of_a_pair_share_a_row():
    make = encoder()
    units = [make(*pair_of(f"q{i}", "a" * (i + 1), "b")) for i in range(3)]
    units[1]["ref_logps"] = (-1.5, -2.5)
    batch = collate_pairs(units)
    a = [u["chosen_length"] for u in units]
    assert batch.lengths == (
        a[0],
        units[0]["length"] - a[0],
        a[1],
        units[1]["length"] - a[1],
        a[2],
        units[2]["length"] - a[2],
    )
    assert (batch.tokens_T.numpy() == np.concatenate([u["input_ids"] for u in units])).all()
    assert batch.ref_logps_S.tolist() == [0, 0, -1.5, -2.5, 0, 0]
    # the answer and the end of the turn train, shifted to the position that predicts them
    assert batch.answer_tokens_S.tolist() == [2, 2, 3, 2, 4, 2]
    given = [weights for unit in units for weights in split(unit)[1]]
    start = 0
    rows = zip(batch.lengths, batch.answer_tokens_S.tolist(), given, strict=True)
    for length, count, each in rows:
        part = slice(start, start + length)
        weights, targets = batch.weights_T[part], batch.targets_T[part]
        assert weights.sum() == count
        assert weights[-1] == 0
        assert (targets[:-1] == batch.tokens_T[part][1:]).all()
        assert (weights[:-1].numpy() == each[1:]).all()
        start += length


def data(tmp_path, rows, recipe_class, *groups, **options):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    made = make_config(dataset=[file], loss_scale="last_round", global_batch_size=2, **options)
    recipe = recipe_class(
        kernel_config(RLHFConfig, ReferenceConfig, *groups),
        make_template(CHATML, loss_scale="last_round"),
    )
    return build_data(made, recipe, make_template(CHATML, loss_scale="last_round"), progress=False)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MCORE_CACHE", str(tmp_path / "cache"))


def test_pairs_through_the_pipeline(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a" * i, "rejected": "b" * (9 - i)} for i in range(1, 9)]
    rows.append({"prompt": "q", "chosen": "same", "rejected": "same"})
    bundle = data(tmp_path, rows, DPORecipe, DPOConfig)
    (counts,) = bundle.report.train.values()
    assert (counts.rows, counts.kept) == (9, 8)
    assert "the chosen and the rejected answer are the same" in json.dumps(counts.examples)
    first = next(iter(bundle.train))
    assert [len(micro) for micro in first] == [1, 1]  # a micro-batch counts pairs
    assert all("chosen_length" in unit for micro in first for unit in micro)


def test_no_rejected_answer_anywhere(tmp_path):
    with pytest.raises(UsageError) as error:
        data(tmp_path, [{"prompt": "q", "chosen": "a"}], DPORecipe, DPOConfig)
    assert "MC403" in str(error.value)
    assert "usable: messages, rejected_messages | messages, rejected_response |" in str(error.value)
    columns = '{"question": "prompt", "better": "chosen", "worse": "rejected"}'
    assert f"fix: say what they mean, for example --columns '{columns}'" in str(error.value)


def test_strict_stops_at_the_row(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": ""},
    ]
    with pytest.raises(UsageError, match=r"MC404.*rows.jsonl:2: there is no rejected answer"):
        data(tmp_path, rows, DPORecipe, DPOConfig, strict=True)


def test_labels_through_the_pipeline(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i % 3 == 0} for i in range(6)]
    bundle = data(tmp_path, rows, KTORecipe, KTOConfig)
    assert bundle.train.num_items == 6
    with pytest.raises(UsageError, match="all 6 answers are undesirable"):
        data(tmp_path, [{**r, "label": False} for r in rows], KTORecipe, KTOConfig)
