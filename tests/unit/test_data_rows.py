"""Recognizing rows and turning them into conversations."""

import pytest

from mcore_core.data.rows import RowError, conversation, recognize, rename

QA = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QA},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": QA},
        {"prompt": "q", "completion": "a"},
        {"prompt": QA[:1], "completion": QA[1:]},
        {"query": "q", "response": "a", "other": 1},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"messages": None, "query": "q", "response": "a"},
        {"messages": [QA[0] | {"tool_calls": None}, QA[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, QA[1]]},
    ],
)
def test_every_format_gives_the_same_conversation(row):
    assert list(conversation(row).messages) == QA


def test_instruction_and_input_are_joined_by_a_newline():
    row = {"instruction": "add", "input": "1 2", "output": "3"}
    assert conversation(row).messages[0]["content"] == "add\n1 2"


def test_text_is_plain():
    got = conversation({"text": "hello"}, system="ignored")
    assert (got.text, got.messages) == ("hello", ())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": QA}, "option"),
        ({"messages": QA, "system": "column"}, "column"),
        ({"messages": [{"role": "system", "content": "own"}, *QA]}, "own"),
        ({"query": "q", "response": "a", "system": "column"}, "column"),
        ({"query": "q", "response": "a", "system": None}, "option"),
    ],
)
def test_the_rows_own_system_message_wins(row, expected):
    messages = conversation(row, system="option").messages
    assert [m["content"] for m in messages if m["role"] == "system"] == [expected]


def test_tools_and_tool_turns_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    row = {
        "messages": [QA[0], call, {"role": "tool", "content": "1"}, QA[1]],
        "tools": '[{"type": "function"}]',
    }
    got = conversation(row)
    assert got.tools == ({"type": "function"},)
    assert got.messages[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f"}}],
    }
    assert got.messages[2]["role"] == "tool"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1, "b": 2}, "no usable columns (it has: a, b)"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "oops"}, "'messages' is a string that is not JSON"),
        ({"messages": {"role": "user"}}, "'messages' must be a list of messages, found an object"),
        (
            {"messages": ["hi"]},
            "messages[0] must be an object with role and content, found a string",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "the content of messages[0] must be a string, found 5 (int)",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "the content of messages[0] has a part of type 'image'; only text is read",
        ),
        (
            {"messages": [QA[0], QA[1] | {"loss": "no"}]},
            "'loss' of messages[1] must be true or false, found 'no'",
        ),
        ({"query": "q", "response": 3}, "'response' must be a string or a list of messages, found"),
        ({"instruction": 3, "output": "a"}, "'instruction' must be a string, found 3 (int)"),
        ({"text": ""}, "'text' is empty"),
        ({"messages": QA, "tools": "{"}, "'tools' is a string that is not JSON"),
        ({"messages": QA, "tools": {"a": 1}}, "'tools' must be a list, found an object"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, message):
    with pytest.raises(RowError) as caught:
        conversation(row)
    assert str(caught.value).startswith(message)


def test_an_unknown_role_names_the_known_ones():
    with pytest.raises(RowError, match=r"messages\[0\] has the role 'bot', not one of system, dev"):
        conversation({"messages": [{"role": "bot", "content": "x"}]})


def test_rename_replaces_columns_and_the_new_name_wins():
    row = {"question": "q", "answer": "a", "query": "other"}
    assert rename(row, {"question": "query", "answer": "response"}) == {
        "query": "q",
        "response": "a",
    }
    assert rename(row, None) is row


def test_recognize_takes_the_first_format_that_fits():
    assert recognize(["text", "query", "response"]) == "query/response"
    assert recognize(["prompt"]) is None
