"""Calls of functions, found in text that comes in pieces, and what a model is told of the functions."""

from __future__ import annotations

import itertools
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.http.tool_calls import Function, ToolCall, ToolCallFinder, call_schema, with_functions
from shared.messages import Message

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Function("weather", "The weather of a city.", CITY)
NOW = Function("now")
OSLO = ToolCall("weather", '{"city": "Oslo"}')
SAID_OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def found(*pieces: str, functions=(WEATHER, NOW), **options) -> list[str | ToolCall]:
    """Texts and calls in order; neighbouring texts as one."""
    finder = ToolCallFinder(functions, **options)
    parts: list[str | ToolCall] = []
    for part in [*(part for piece in pieces for part in finder.feed(piece)), *finder.finish()]:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


ANSWERS = [
    pytest.param("It is sunny.", ["It is sunny."], id="text is text"),
    pytest.param(f"<tool_call>\n{SAID_OSLO}\n</tool_call>", [OSLO], id="a call between tags"),
    pytest.param(
        f"Let me see.\n\n<tool_call>{SAID_OSLO}</tool_call>\n",
        ["Let me see.", OSLO, "\n"],
        id="white space before a call is no text",
    ),
    pytest.param(
        f'<tool_call>{SAID_OSLO}</tool_call>\n<tool_call>{{"name": "now"}}</tool_call>',
        [OSLO, ToolCall("now", "{}")],
        id="two calls, one without arguments",
    ),
    pytest.param(f"<tool_call>{SAID_OSLO}", [OSLO], id="a call that is whole but for its last tag"),
    pytest.param(SAID_OSLO, [OSLO], id="an answer that is a call without tags"),
    pytest.param(f"```json\n{SAID_OSLO}\n```", [OSLO], id="an answer that is a call in a fence"),
    pytest.param(f"{SAID_OSLO}\n{SAID_OSLO}", [OSLO, OSLO], id="an answer that is two calls without tags"),
    pytest.param('{"answer": 42}', ['{"answer": 42}'], id="other JSON is text"),
    pytest.param(f"{SAID_OSLO} is it.", [f"{SAID_OSLO} is it."], id="a call with words after it is text"),
    pytest.param("```json\n[1", ["```json\n[1"], id="a fence that ends nowhere is text"),
    pytest.param("``` and so on", ["``` and so on"], id="another fence is text"),
    pytest.param("a < b <tool", ["a < b <tool"], id="the beginning of a tag that never comes is text"),
    pytest.param(
        "<tool_call>weather of Oslo</tool_call>",
        ["<tool_call>weather of Oslo</tool_call>"],
        id="what is no JSON between tags stays as it was",
    ),
    pytest.param(
        '<tool_call>{"name": "rain", "arguments": {}}</tool_call>!',
        ['<tool_call>{"name": "rain", "arguments": {}}</tool_call>!'],
        id="a call of a function that is not there stays as it was",
    ),
    pytest.param(
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        ['<tool_call>{"name": "now", "arguments": [1]}</tool_call>'],
        id="arguments that are no object make no call",
    ),
]


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_an_answer_is_told_apart(answer, expected):
    assert found(answer) == expected


@given(st.sampled_from([answer.values for answer in ANSWERS]), st.lists(st.integers(0, 160), max_size=8))
def test_it_is_the_same_however_the_text_is_cut(answer_and_parts, cuts):
    answer, expected = answer_and_parts
    borders = [0, *sorted(min(cut, len(answer)) for cut in cuts), len(answer)]
    assert found(*(answer[a:b] for a, b in itertools.pairwise(borders))) == expected


def test_without_functions_nothing_is_a_call():
    assert found(SAID_OSLO, f"<tool_call>{SAID_OSLO}</tool_call>", functions=()) == [
        f"{SAID_OSLO}<tool_call>{SAID_OSLO}</tool_call>"
    ]


def test_text_is_handed_on_as_it_comes():
    finder = ToolCallFinder([NOW])
    assert [finder.feed(piece) for piece in ("Hel", "lo ", "you<", "b>")] == [
        ["Hel"], ["lo"], [" you"], ["<b>"],
    ]  # fmt: skip


def test_what_is_no_call_is_remarked():
    finder = ToolCallFinder([NOW])
    finder.feed("<tool_call>now!</tool_call>")
    assert finder.num_calls == 0
    assert finder.remarks == ["what stands between the tags of a call is none, and stays text"]


def test_a_strict_function_is_not_called_with_other_arguments_than_its_schemas():
    strict = Function("weather", parameters=CITY, strict=True)
    wrong = '{"name": "weather", "arguments": {"city": 7}}'
    assert found(SAID_OSLO, functions=[strict]) == [OSLO]
    assert found(wrong, functions=[strict]) == [wrong]
    assert found(wrong) == [ToolCall("weather", '{"city": 7}')]


def test_one_call_at_most_where_calls_are_not_parallel():
    finder = ToolCallFinder([WEATHER], parallel=False)
    assert finder.feed(f"<tool_call>{SAID_OSLO}</tool_call>" * 2) == [OSLO]
    assert "the first was left out" in finder.remarks[0]


def test_a_forced_answer_is_a_call_from_its_first_character():
    finder = ToolCallFinder([WEATHER], forced=True)
    assert finder.feed(f" {SAID_OSLO}") == []
    assert finder.finish() == [OSLO]


@pytest.mark.parametrize("system", [[], [Message("system", "Be brief.")]])
def test_functions_are_told_in_the_system_message(system):
    chat = [*system, Message("user", "Hi")]
    told, *rest = with_functions(chat, [WEATHER])
    assert told.role == "system"
    assert told.content.startswith("Be brief.\n\n# Tools" if system else "# Tools")
    [line] = [line for line in told.content.splitlines() if line.startswith('{"type": "function"')]
    assert json.loads(line)["function"] == {
        "name": "weather", "description": "The weather of a city.", "parameters": CITY,
    }  # fmt: skip
    assert rest == [Message("user", "Hi")]
    assert with_functions(chat, []) == chat


def test_what_a_model_wrote_is_read_back_as_the_same_call():
    assert found(OSLO.written()) == [OSLO]


PERSON = {
    "type": "object",
    "properties": {"who": {"$ref": "#/$defs/Name"}},
    "required": ["who"],
    "$defs": {"Name": {"type": "string"}},
}
NUMBER = {
    "type": "object",
    "properties": {"who": {"$ref": "#/definitions/Name"}},
    "required": ["who"],
    "definitions": {"Name": {"type": "integer"}},
}


def test_the_schema_of_a_call_takes_calls_of_its_functions_and_no_others():
    schema = call_schema([Function("greet", parameters=PERSON), Function("count", parameters=NUMBER)])
    jsonschema.Draft202012Validator.check_schema(schema)
    takes = jsonschema.Draft202012Validator(schema).is_valid
    assert takes({"name": "greet", "arguments": {"who": "Ada"}})
    assert takes({"name": "count", "arguments": {"who": 3}})
    assert not takes({"name": "greet", "arguments": {"who": 3}})
    assert not takes({"name": "part", "arguments": {"who": 3}})
    assert not takes({"name": "greet", "arguments": {}})
