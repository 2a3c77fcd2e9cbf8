"""Rows of the tasks: formats, labels, truncation, prompts, and what is refused."""

import json

import numpy as np
import pytest
from data_tools import THINKING, make_template
from mcore_sft.tasks import documents
from mcore_sft.tasks.documents import Text
from mcore_sft.tasks.labels import labels
from mcore_sft.tasks.model_files import sentence_transformer
from mcore_sft.tasks.reranker_prompt import ASK, JUDGE
from preference_tools import View
from task_tools import recipe

from mcore_core.data.rows import RowDropped, RowError
from mcore_core.errors import UsageError


def text_of(template, ids):
    return template.tokenizer.decode(np.asarray(ids).tolist())


def sides(unit):
    return np.split(unit["input_ids"], np.cumsum(unit["lengths"])[:-1])


USER = [{"role": "user", "content": "good?"}]
ANSWERED = [*USER, {"role": "assistant", "content": "bad"}]
TURN = "<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n"


# -- seq_cls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "good?"}, "good?"),
        ({"messages": USER}, TURN),
        ({"messages": ANSWERED}, TURN + "bad<|im_end|>\n"),
        ({"conversations": [{"from": "human", "value": "good?"}]}, TURN),
        ({"query": "good?"}, TURN),
        ({"query": "good?", "response": "bad"}, TURN + "bad<|im_end|>\n"),
        ({"query": "good?", "system": "S"}, "<|im_start|>system\nS<|im_end|>\n" + TURN),
    ],
)
def test_texts(row, text):
    template = make_template()
    unit = recipe("seq_cls", num_labels=2, template=template).encode({**row, "label": 1})
    assert text_of(template, unit["input_ids"]) == text
    assert unit["labels"].tolist() == [1.0]
    assert np.flatnonzero(unit["weights"]).tolist() == [unit["length"] - 1]


def test_a_plain_text_has_the_tokenizers_own_special_tokens():
    template = make_template(bos=True)
    unit = recipe("seq_cls", num_labels=2, template=template).encode({"text": "a", "label": 0})
    assert text_of(template, unit["input_ids"]) == "<s>a"


@pytest.mark.parametrize(("strategy", "text"), [("left", "cdef"), ("right", "abcd")])
def test_a_long_text_is_cut(strategy, text):
    template = make_template(max_length=4, truncation_strategy=strategy)
    unit = recipe("seq_cls", num_labels=2, template=template).encode({"text": "abcdef", "label": 0})
    assert text_of(template, unit["input_ids"]) == text


def test_a_long_text_is_left_out():
    made = recipe("seq_cls", num_labels=2, template=make_template(max_length=4))
    with pytest.raises(RowDropped, match="max_length"):
        made.encode({"text": "abcdef", "label": 0})


def test_what_is_cut_on_the_right_keeps_the_tokens_at_its_end():
    from tokenizers import processors

    template = make_template(max_length=3, truncation_strategy="right")
    end = template.tokenizer.convert_tokens_to_ids("</s>")
    template.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", end)]
    )
    unit = recipe("embedding", template=template).encode({"query": "abcdef", "positive": "ab"})
    assert [text_of(template, side) for side in sides(unit)] == ["ab</s>", "ab</s>"]


@pytest.mark.parametrize(
    ("problem", "n", "value", "wanted"),
    [
        ("regression", 1, 0.5, [0.5]),
        ("regression", 1, [2], [2.0]),
        ("regression", 2, [0.5, -1], [0.5, -1.0]),
        ("single_label_classification", 3, 2, [2.0]),
        ("single_label_classification", 3, 2.0, [2.0]),
        ("single_label_classification", 2, True, [1.0]),
        ("multi_label_classification", 3, [0, 2], [1.0, 0.0, 1.0]),
        ("multi_label_classification", 3, [], [0.0, 0.0, 0.0]),
    ],
)
def test_labels(problem, n, value, wanted):
    assert labels({"label": value}, problem, n).tolist() == wanted
    assert labels({"labels": value}, problem, n).tolist() == wanted


@pytest.mark.parametrize(
    ("problem", "n", "value", "what"),
    [
        ("regression", 1, None, "there is no 'label'"),
        ("regression", 1, "good", "must be a finite number, found 'good'"),
        ("regression", 1, float("nan"), "must be a finite number"),
        ("single_label_classification", 3, 1.5, "must be the number of a class, found 1.5"),
        ("single_label_classification", 3, "1", "must be the number of a class, found '1'"),
        ("single_label_classification", 3, [1, 2], "must be one class"),
        ("multi_label_classification", 3, 1, "must be a list of the labels that hold"),
    ],
)
def test_labels_that_cannot_be_read(problem, n, value, what):
    with pytest.raises(RowError, match=what):
        labels({"label": value}, problem, n)


@pytest.mark.parametrize(
    ("problem", "n", "value", "what"),
    [
        ("single_label_classification", 3, 3, "--num_labels 3 has classes 0 to 2"),
        ("single_label_classification", 3, -1, "--num_labels 3 has classes 0 to 2"),
        ("multi_label_classification", 2, [0, 2], "--num_labels 2 has classes 0 to 1"),
        ("regression", 2, [1.0], "--num_labels 2 needs 2 numbers"),
        ("regression", 2, 1.0, "--num_labels 2 needs 2 numbers"),
    ],
)
def test_labels_that_do_not_fit_stop_the_run(problem, n, value, what):
    with pytest.raises(UsageError) as caught:
        labels({"label": value}, problem, n)
    (problem,) = caught.value.problems
    assert problem.code == "MC382"
    assert what in problem.message


def test_rows_without_a_label_are_no_format():
    assert documents.recognize_text({"text"}) is None
    assert documents.recognize_text({"text", "label"}) == "text"
    assert documents.recognize_text({"label"}) is None


# -- documents -------------------------------------------------------------------------------------


def said(text, role="user"):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "positive": "p", "negative": ["n", "m"]},
        {"query": "q", "positive": ["p"], "negatives": ["n", "m"]},
        {"anchor": "q", "positive": "p", "negative": ["n", "m"]},
        {"query": "q", "response": "p", "rejected_response": ["n", "m"]},
        {
            "messages": said("q"),
            "positive_messages": [said("p")],
            "negative_messages": [said("n"), said("m", "assistant")],
        },
        {"query": said("q"), "positive": [said("p")], "negative": [said("n"), said("m")]},
    ],
)
def test_formats_of_documents(row):
    found = documents.documents(row)
    assert found.query == Text("q")
    assert [t.text for t in found.positives] == ["p"]
    assert [t.text for t in found.negatives] == ["n", "m"]
    assert documents.recognize_pair(row) is not None


def test_pairs_need_no_negatives():
    found = documents.documents({"sentence1": "q", "sentence2": "p", "score": 0.5})
    assert (found.query, found.positives, found.negatives) == (Text("q"), (Text("p"),), ())


def test_an_instruction_stands_before_the_text():
    row = {
        "messages": [{"role": "system", "content": "find"}, *said("q")],
        "positive_messages": [said("p")],
    }
    assert documents.documents(row).query.joined == "find q"
    assert documents.documents({"query": "q", "positive": "p", "system": "S"}).query.system == "S"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"query": "q"}, "no query with a positive document .it has: query"),
        ({"query": "q", "positive": None}, "no query with a positive"),
        ({"query": "q", "positive": ""}, "no query with a positive"),
        ({"query": 3, "positive": "p"}, "'query' must be a text or a conversation, found 3"),
        ({"query": ["a", "b"], "positive": "p"}, "'query' must be a text or a conversation"),
        ({"query": "q", "positive": ["p", 3]}, "'positive' must be a text or a conversation, a li"),
        ({"query": "q", "positive": ["p", ""]}, "'positive' must be a text, found ''"),
    ],
)
def test_documents_that_cannot_be_read(row, what):
    with pytest.raises(RowError, match=what):
        documents.documents(row)


def test_a_unit_of_an_embedding():
    template = make_template()
    made = recipe("embedding", template=template)
    unit = made.encode({"query": "ab", "positive": "c", "negative": ["def", "g"], "label": 0.5})
    assert [text_of(template, side) for side in sides(unit)] == ["ab", "c", "def", "g"]
    assert unit["roles"].tolist() == [0, 1, 2, 2]
    assert unit["weights"].tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert (unit["length"], unit["label"]) == (7, 0.0)  # infonce has no labels
    batch = made.collate([unit, made.encode({"query": "a", "positive": "b"})])
    assert batch.lengths == (2, 1, 3, 1, 1, 1)
    assert batch.roles_S.tolist() == [0, 1, 2, 2, 0, 1]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [(["a", "b", "c"], ["a", "b"]), (["a"], ["a", "a"]), (["a", "b"], ["a", "b"])],
)
def test_hard_negatives_have_one_number(row, wanted):
    template = make_template()
    made = recipe("embedding", template=template, infonce_hard_negatives=2)
    unit = made.encode({"query": "q", "positive": "p", "negative": row})
    assert [text_of(template, side) for side in sides(unit)[2:]] == wanted


def test_more_than_one_positive_of_an_embedding():
    with pytest.raises(RowError, match="2 positives"):
        recipe("embedding").encode({"query": "q", "positive": ["p", "r"]})


@pytest.mark.parametrize(
    ("options", "row", "code", "what"),
    [
        ({"infonce_use_batch": False}, {}, "MC384", "--infonce_use_batch false needs some"),
        ({"infonce_hard_negatives": 2}, {}, "MC384", "--infonce_hard_negatives 2 needs some"),
        ({"loss_type": "contrastive"}, {"label": 0.5}, "MC383", "0.5 is neither 0 nor 1"),
        ({"loss_type": "cosine_similarity"}, {"label": 5}, "MC383", "5 is no cosine"),
    ],
)
def test_rows_that_stop_an_embedding(options, row, code, what):
    with pytest.raises(UsageError) as caught:
        recipe("embedding", **options).encode({"query": "q", "positive": "p", **row})
    (problem,) = caught.value.problems
    assert problem.code == code
    assert what in problem.message


def test_a_pair_without_a_label():
    with pytest.raises(RowError, match="there is no 'label'"):
        recipe("embedding", loss_type="contrastive").encode({"query": "q", "positive": "p"})


def test_a_query_alone_in_its_micro_batch_is_refused():
    made = recipe("embedding")
    alone = [made.encode({"query": "q", "positive": "p"})]
    with pytest.raises(UsageError) as caught:
        next(made.prepare(alone * 2, View()))
    assert caught.value.problems[0].code == "MC384"
    helped = [*alone, made.encode({"query": "q", "positive": "p", "negative": "n"})]
    assert next(made.prepare(helped, View())) == helped
    assert next(made.prepare(alone, View(dp=(0, 2)))) == alone
    several = recipe("embedding", micro_batch_size=2, global_batch_size=2)
    assert next(several.prepare(alone, View())) == alone
    packed = recipe("embedding", packing=True)
    assert next(packed.prepare(alone, View())) == alone


def test_files_of_sentence_transformers():
    files = sentence_transformer(48, 256)
    assert [m["path"] for m in json.loads(files["modules.json"])] == [
        "",
        "1_Pooling",
        "2_Normalize",
    ]
    pooling = json.loads(files["1_Pooling/config.json"])
    assert [k for k, v in pooling.items() if v is True] == [
        "pooling_mode_lasttoken",
        "include_prompt",
    ]


# -- rerankers -------------------------------------------------------------------------------------


def reranker(template, **options):
    return recipe("generative_reranker", template=template, reranker_instruction="I", **options)


def prompt(query, document, instruction="I", end="<|im_start|>assistant\n"):
    judge = JUDGE.format(yes="y", no="n")
    ask = ASK.format(instruction=instruction, query=query, document=document)
    return f"<|im_start|>system\n{judge}<|im_end|>\n<|im_start|>user\n{ask}<|im_end|>\n{end}"


def test_prompts():
    template = make_template()
    unit = reranker(template).encode({"query": "q", "positive": "p", "negative": ["n", "m"]})
    assert [text_of(template, s) for s in sides(unit)] == [prompt("q", d) for d in "pnm"]
    assert unit["roles"].tolist() == [1, 2, 2]


def test_thinking_is_off_unless_asked_for():
    thought = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for told, end in ((None, thought), (False, thought), (True, "<|im_start|>assistant\n")):
        template = make_template(THINKING, enable_thinking=told)
        unit = reranker(template).encode({"query": "q", "positive": "p"})
        assert text_of(template, unit["input_ids"]) == prompt("q", "p", end=end)


def test_a_system_message_is_the_instruction():
    template = make_template()
    row = {
        "messages": [{"role": "system", "content": "A"}, *said("q")],
        "positive_messages": [said("p")],
        "negative_messages": [[{"role": "system", "content": "B"}, *said("n")]],
    }
    good, bad = sides(reranker(template).encode(row))
    assert text_of(template, good) == prompt("q", "p", "A")
    assert text_of(template, bad) == prompt("q", "n", "B")


@pytest.mark.parametrize(("strategy", "kept"), [("right", "abc"), ("left", "fgh")])
def test_a_long_prompt_loses_of_its_document(strategy, kept):
    whole = make_template()
    room = len(whole.tokenizer(prompt("q", "abc"), add_special_tokens=False)["input_ids"])
    template = make_template(max_length=room, truncation_strategy=strategy)
    unit = reranker(template).encode({"query": "q", "positive": "abcdefgh"})
    assert text_of(template, unit["input_ids"]) == prompt("q", kept)
    for limit, chosen in ((room, "delete"), (20, strategy)):
        template = make_template(max_length=limit, truncation_strategy=chosen)
        with pytest.raises(RowDropped, match="max_length"):
            reranker(template).encode({"query": "q", "positive": "abcdefgh"})


def test_documents_are_drawn_once():
    template = make_template()
    made = reranker(template, max_positive_samples=2, max_negative_samples=3)
    row = {"query": "q", "positive": list("abcd"), "negative": list("efghij")}
    first, again = made.encode(row), made.encode(row)
    assert first["input_ids"].tolist() == again["input_ids"].tolist()
    assert first["roles"].tolist() == [1, 1, 2, 2, 2]
    assert len({text_of(template, side) for side in sides(first)}) == 5


def test_an_answer_of_several_tokens():
    with pytest.raises(UsageError) as caught:
        reranker(make_template(), reranker_positive_token="yes")
    (problem,) = caught.value.problems
    assert problem.code == "MC386"
    assert "--reranker_positive_token 'yes' is not one token" in problem.message


def test_a_list_without_negatives():
    made = reranker(make_template(), loss_type="listwise_reranker")
    with pytest.raises(UsageError) as caught:
        made.encode({"query": "q", "positive": "p"})
    assert caught.value.problems[0].code == "MC384"
