"""Which tokens train, token by token. What trains is shown between «»."""

import pickle

import numpy as np
import pytest
from data_tools import CHATML, TAGGED, THINKING, make_template

from mcore_core.data.rows import Conversation, RowDropped, RowError
from mcore_core.errors import UsageError

U1, A1 = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
U2, A2 = {"role": "user", "content": "and"}, {"role": "assistant", "content": "so"}
TWO = Conversation(messages=(U1, A1, U2, A2))
I, E = "<|im_start|>", "<|im_end|>"  # noqa: E741


def shown(template, conversation):
    encoded = template.encode(conversation)
    return template.describe({"input_ids": encoded.input_ids, "weights": encoded.weights})


@pytest.mark.parametrize("jinja", [CHATML, TAGGED])
@pytest.mark.parametrize(
    ("scale", "messages", "expected"),
    [
        (
            "default",
            (U1, A1, U2, A2),
            f"{I}user\nhi{E}\n{I}assistant\n«yo{E}»\n{I}user\nand{E}\n{I}assistant\n«so{E}»\n",
        ),
        (
            "last_round",
            (U1, A1, U2, A2),
            f"{I}user\nhi{E}\n{I}assistant\nyo{E}\n{I}user\nand{E}\n{I}assistant\n«so{E}»\n",
        ),
        (
            "default",
            (U1, A1 | {"loss": False}, U2, A2),
            f"{I}user\nhi{E}\n{I}assistant\nyo{E}\n{I}user\nand{E}\n{I}assistant\n«so{E}»\n",
        ),
        (
            "last_round",
            (U1, A1 | {"loss": True}, U2, A2 | {"loss": False}),
            f"{I}user\nhi{E}\n{I}assistant\n«yo{E}»\n{I}user\nand{E}\n{I}assistant\nso{E}\n",
        ),
        ("all", (U1, A1), f"{I}«user\nhi{E}\n{I}assistant\nyo{E}\n»"),
    ],
)
def test_the_mask_by_tags_equals_the_one_by_prefixes(jinja, scale, messages, expected):
    template = make_template(jinja, loss_scale=scale)
    assert shown(template, Conversation(messages=messages)) == expected


def test_ids_and_weights_are_aligned_and_typed():
    encoded = make_template().encode(Conversation(messages=(U1, A1)))
    # one token a byte; the special ones are 0 and 1
    text = [0, *b"user\nhi", 1, *b"\n", 0, *b"assistant\nyo", 1, *b"\n"]
    assert len(encoded.input_ids) == len(text)
    assert [i for i in encoded.input_ids if i < 2] == [0, 1, 0, 1]
    assert encoded.weights.tolist() == [0.0] * 21 + [1.0, 1.0, 1.0, 0.0]
    assert (encoded.input_ids.dtype, encoded.weights.dtype) == (np.int32, np.float32)


def test_consecutive_assistant_turns_of_the_last_round_both_train():
    tool = {"role": "tool", "content": "1"}
    template = make_template(loss_scale="last_round")
    assert shown(template, Conversation(messages=(U1, A1, U2, A1, tool, A2))).count("«") == 2


def test_a_system_message_and_unicode_do_not_train():
    system = {"role": "system", "content": "été"}
    answer = {"role": "assistant", "content": "é🙂"}
    got = shown(make_template(), Conversation(messages=(system, U1, answer)))
    assert got == f"{I}system\nété{E}\n{I}user\nhi{E}\n{I}assistant\n«é🙂{E}»\n"


def test_a_template_that_thinks_only_in_the_last_turn_is_masked():
    got = shown(make_template(THINKING), TWO)
    assert got == (
        f"{I}user\nhi{E}\n{I}assistant\n«yo{E}»\n{I}user\nand{E}\n{I}assistant\n"
        f"«<think>\n\n</think>\n\nso{E}»\n"
    )


def test_enable_thinking_is_passed_and_moves_the_empty_block_to_the_prompt():
    got = shown(make_template(THINKING, enable_thinking=False), TWO)
    assert got == (
        f"{I}user\nhi{E}\n{I}assistant\n«yo{E}»\n{I}user\nand{E}\n{I}assistant\n"
        f"<think>\n\n</think>\n\n«so{E}»\n"
    )


@pytest.mark.parametrize("thinking", [None, False])
def test_a_turn_that_begins_with_markup_of_its_own_is_found(thinking):
    call = {"role": "assistant", "content": "<tool_call>f</tool_call>"}
    tool = {"role": "tool", "content": "1"}
    template = make_template(THINKING, enable_thinking=thinking)
    got = shown(template, Conversation(messages=(U1, call, tool, A2)))
    assert f"{I}assistant\n«<tool_call>f</tool_call>{E}»\n{I}tool\n1{E}\n" in got
    assert got.count("«") == 2


@pytest.mark.parametrize("scale", ["ignore_empty_think", "default+ignore_empty_think"])
def test_ignore_empty_think_leaves_the_empty_block_out(scale):
    got = shown(make_template(THINKING, loss_scale=scale), Conversation(messages=(U1, A1)))
    assert got == f"{I}user\nhi{E}\n{I}assistant\n<think>\n\n</think>\n\n«yo{E}»\n"


def test_ignore_empty_think_keeps_real_thinking():
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"}
    template = make_template(THINKING, loss_scale="ignore_empty_think")
    got = shown(template, Conversation(messages=(U1, thought)))
    assert got.endswith(f"«<think>\nhm\n</think>\n\nyo{E}»\n")


EMPTY = {"role": "assistant", "content": "<think>\n\n</think>\n\nyo"}
LATER = {"role": "assistant", "content": "so <think></think> is empty"}


@pytest.mark.parametrize("jinja", [CHATML, TAGGED])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize(
    ("scale", "first", "second"),
    [
        ("default", "<think>\n\n</think>\n\n«yo", "«so <think></think> is empty"),
        ("last_round", "<think>\n\n</think>\n\nyo", "«so <think></think> is empty"),
        ("all", "»<think>\n\n</think>\n\n«yo", "so »<think></think> «is empty"),
    ],
)
def test_ignore_empty_think_with_every_scale(jinja, slow, scale, first, second):
    """It counts where an answer begins with it; with `all`, which knows no answers, anywhere."""
    template = make_template(jinja, loss_scale=f"{scale}+ignore_empty_think")
    talk = Conversation(messages=(U1, EMPTY, U2, LATER))
    if slow:
        template.tokenizer = _Slow(template.tokenizer)
        if jinja == TAGGED:
            with pytest.raises(UsageError, match="the tokens of its text cannot be located"):
                template.encode(talk)
            return
    got = shown(template, talk)
    assert f"{I}assistant\n{first}" in got
    assert f"{I}assistant\n{second}" in got


def test_ignore_empty_think_in_plain_text():
    template = make_template(bos=True, loss_scale="all+ignore_empty_think")
    assert shown(template, Conversation(text="<think> </think>yo")) == f"<s><think> </think>«yo{E}»"
    joined = make_template(None, use_chat_template=False, loss_scale="ignore_empty_think")
    got = shown(joined, Conversation(messages=(U1, EMPTY)))
    assert got == f"hi<think>\n\n</think>\n\n«yo{E}»"


THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"}


def test_a_template_that_removes_earlier_thinking_is_an_error_with_the_example():
    with pytest.raises(UsageError) as caught:
        make_template(THINKING).encode(Conversation(messages=(U1, THOUGHT, U2, A2)))
    text = str(caught.value)
    assert text.startswith(
        "error[MC412]: the chat template cannot be masked: which tokens the assistant writes is "
        "ambiguous\n  message 1 (assistant) is not rendered alone as within the whole conversation"
    )
    assert r"alone:  ...'user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\nhm" in text
    assert r"within: ...'user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>" in text
    assert "--loss_scale last_round to train only the last answer" in text


def test_last_round_trains_what_the_template_keeps():
    template = make_template(THINKING, loss_scale="last_round")
    got = shown(template, Conversation(messages=(U1, THOUGHT, U2, A2)))
    assert got.count("«") == 1
    assert got.endswith(f"«<think>\n\n</think>\n\nso{E}»\n")


def test_a_generation_prompt_that_the_last_turn_does_not_have_is_an_error():
    forced = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(UsageError, match="cannot be masked"):
        make_template(forced).encode(Conversation(messages=(U1, A1)))


def test_tags_that_mark_other_stretches_than_turns_are_an_error_only_where_turns_differ():
    merged = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    assert shown(make_template(merged), TWO) == "h«iyoandso»"
    with pytest.raises(UsageError, match=r"it has 2 assistant turns, but .* mark 1 stretches"):
        make_template(merged, loss_scale="last_round").encode(TWO)


def test_a_tokenizer_without_offsets_gives_the_same_mask():
    template = make_template()
    expected = template.encode(TWO)
    slow = make_template()
    slow.tokenizer = _Slow(slow.tokenizer)
    got = slow.encode(TWO)
    trained = np.flatnonzero(expected.weights).tolist()
    # without offsets, what follows the end of turn cannot be told apart and trains too
    assert set(trained) <= set(np.flatnonzero(got.weights).tolist())
    assert got.input_ids.tolist() == expected.input_ids.tolist()
    assert got.weights.sum() == expected.weights.sum() + 2


class _Slow:
    is_fast = False

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, text, **options):
        options.pop("return_offsets_mapping", None)
        return self._tokenizer(text, **options)


# -- plain text ------------------------------------------------------------------------------------


def test_text_has_bos_and_eos_once_and_trains_but_for_the_first():
    got = shown(make_template(bos=True), Conversation(text="hi"))
    assert got == f"<s>«hi{E}»"
    assert shown(make_template(bos=True), Conversation(text=f"<s>hi{E}")) == f"<s>«hi{E}»"
    assert shown(make_template(), Conversation(text="hi")) == f"h«i{E}»"


def test_without_the_chat_template_messages_are_joined():
    template = make_template(None, bos=True, use_chat_template=False)
    assert shown(template, Conversation(messages=(U1, A1))) == f"<s>hi«yo{E}»"
    assert shown(template, TWO) == f"<s>hi«yo»and«so{E}»"
    assert shown(template, Conversation(messages=(U1, A1, U2))) == f"<s>hi«yo»and{E}"


def test_the_chat_template_decides_about_bos():
    template = make_template("{{ bos_token }}" + CHATML, bos=True)
    assert shown(template, Conversation(messages=(U1, A1))).startswith(f"<s>{I}user")


# -- length ----------------------------------------------------------------------------------------

PLAIN = Conversation(text="abcdef")  # and the end: 7 tokens


def test_delete_drops_what_is_too_long():
    with pytest.raises(RowDropped) as caught:
        make_template(max_length=6).encode(PLAIN)
    assert caught.value.reason == "longer than --max_length"
    assert len(make_template(max_length=7).encode(PLAIN).input_ids) == 7


@pytest.mark.parametrize(("side", "expected"), [("left", f"c«def{E}»"), ("right", "a«bcde»")])
def test_truncation_keeps_one_side_and_its_first_token_trains_nothing(side, expected):
    assert shown(make_template(max_length=5, truncation_strategy=side), PLAIN) == expected


def test_the_models_limit_is_used_where_max_length_is_none():
    from data_tools import make_tokenizer

    from mcore_core.config.template import TemplateConfig
    from mcore_core.data.template import Template

    tokenizer = make_tokenizer()
    assert Template(tokenizer, TemplateConfig(), max_length=9).max_length == 9
    assert Template(tokenizer, TemplateConfig(max_length=5), max_length=9).max_length == 5


def test_truncation_that_leaves_nothing_to_train_drops_the_row():
    template = make_template(max_length=10, truncation_strategy="right")
    with pytest.raises(RowDropped) as caught:
        template.encode(TWO)
    assert caught.value.reason == "nothing to train on"


# -- errors and options ----------------------------------------------------------------------------


def test_no_chat_template_is_an_error_with_the_ways_out():
    with pytest.raises(UsageError) as caught:
        make_template(None).encode(TWO)
    text = str(caught.value)
    assert text.startswith(
        "error[MC411]: the tokenizer has no chat template, and the dataset's rows are conversations"
    )
    assert "fix: --chat_template FILE.jinja, or --use_chat_template false" in text


def test_messages_that_the_template_refuses_are_malformed():
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="the chat template refuses these messages: roles must alt"):
        make_template(strict).encode(TWO)


def test_split_is_refused_with_the_reason():
    with pytest.raises(UsageError) as caught:
        make_template(truncation_strategy="split")
    assert str(caught.value).startswith("error[MC414]: --truncation_strategy split cannot be used")


def test_a_chat_template_file_replaces_the_tokenizers(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    template = make_template(None, chat_template=str(file))
    assert shown(template, Conversation(messages=(U1, A1))) == "[hi]«[yo]»"


def test_a_missing_or_broken_template_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"--chat_template nowhere.jinja: No such file"):
        make_template(chat_template="nowhere.jinja")
    broken = tmp_path / "broken.jinja"
    broken.write_text("a\n{% for %}")
    with pytest.raises(UsageError, match=r"error\[MC413\]: --chat_template .*broken.jinja:2: "):
        make_template(chat_template=str(broken))


def test_the_system_option_is_text_or_a_file(tmp_path):
    file = tmp_path / "system.txt"
    file.write_text("be kind\n")
    assert make_template(system=str(file)).system == "be kind"
    assert make_template(system="be brief").system == "be brief"
    with pytest.raises(UsageError, match=r"--system gone.txt: No such file or directory"):
        make_template(system="gone.txt")


def test_the_fingerprint_changes_with_what_encodes_and_survives_pickling():
    first = make_template().fingerprint()
    assert make_template().fingerprint() == first
    others = [
        make_template(TAGGED),
        make_template(bos=True),
        make_template(max_length=5),
        make_template(loss_scale="all"),
        make_template(system="x"),
        make_template(enable_thinking=True),
    ]
    assert len({first, *(t.fingerprint() for t in others)}) == 7
    copy = pickle.loads(pickle.dumps(make_template()))
    assert copy.fingerprint() == first
    assert shown(copy, TWO) == shown(make_template(), TWO)
