"""Functions that a model may call: how it is told of them, and its calls found in what it writes. Pure.

The tags are those that Hermes and Qwen2.5 models were trained on. All of it is text of an ordinary chat, so
that any mode and any target can answer it, and drafts of it are verified as those of other texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from jsonschema import Draft202012Validator

from shared.messages import Message
from shared.text import length_of_possible

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_FENCE, _FENCE_END = "```json", "```"


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the arguments; empty where it takes none."""
    strict: bool = False
    """Arguments that are not of the schema make no call."""

    def told(self) -> str:
        """As the model reads it: one line of JSON."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """A JSON object, as text."""

    def written(self) -> str:
        """As the model writes it."""
        return f'{_OPEN}\n{{"name": {json.dumps(self.name)}, "arguments": {self.arguments}}}\n{_CLOSE}'


def with_functions(messages: Sequence[Message], functions: Sequence[Function]) -> list[Message]:
    """The chat, whose system message now tells of the functions."""
    if not functions:
        return list(messages)
    lines = "\n".join(function.told() for function in functions)
    told = (
        f"# Tools\n\nThese functions help you to answer:\n<tools>\n{lines}\n</tools>\n\n"
        "Where one of them gives what the user wants, your whole answer is a call of it, a JSON object"
        f' between two tags:\n{_OPEN}\n{{"name": <function-name>, "arguments": <args-json-object>}}\n{_CLOSE}'
    )
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{told}"), *messages[1:]]
    return [Message("system", told), *messages]


def returned(content: str) -> str:
    """What a function returned, as the model reads it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def call_schema(functions: Sequence[Function]) -> dict[str, Any]:
    """JSON schema of a call of one of the functions, at least one."""
    calls, definitions = [], {}
    for number, function in enumerate(functions):
        parameters, own = _hoisted(function.parameters, f"{number}.")
        definitions.update(own)
        arguments = {"type": "object", **parameters} if parameters else _NO_ARGUMENTS
        properties = {"name": {"const": function.name}, "arguments": arguments}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), "$defs": definitions}


def _hoisted(schema: Mapping[str, Any], prefix: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema without its definitions, and those under new names: references count from the root."""

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key: _renamed_reference(item, prefix) if key == "$ref" else renamed(item)
                for key, item in value.items()
            }
        return [renamed(item) for item in value] if isinstance(value, list) else value

    own = {
        f"{prefix}{name}": renamed(definition)
        for key in ("$defs", "definitions")
        for name, definition in schema.get(key, {}).items()
    }
    rest = {key: renamed(item) for key, item in schema.items() if key not in ("$defs", "definitions")}
    return rest, own


def _renamed_reference(reference: Any, prefix: str) -> Any:
    for start in ("#/$defs/", "#/definitions/"):
        if isinstance(reference, str) and reference.startswith(start):
            return f"#/$defs/{prefix}{reference.removeprefix(start)}"
    return reference


class _Part(Enum):
    BEGINNING = auto()
    """White space so far, or the beginning of what decides."""
    WHOLE = auto()
    """The whole answer may be a call, without tags: it is held to its end."""
    TEXT = auto()
    CALL = auto()


class ToolCallFinder:
    """Tells calls from text in an answer that comes in pieces.

    A call stands between tags; or the whole answer is one, or several, alone or fenced as JSON, as smaller
    models write them. What looks like a call and is none stays text.

    >>> finder = ToolCallFinder([Function("now")])
    >>> finder.feed("Let me see.\\n<tool_")
    ['Let me see.']
    >>> finder.feed('call>{"name": "now", "arguments": {}}</tool_call>')
    [ToolCall(name='now', arguments='{}')]
    """

    def __init__(
        self, functions: Sequence[Function] = (), *, forced: bool = False, parallel: bool = True
    ) -> None:
        """
        Args:
            functions: without any, all is text.
            forced: the answer is a call and nothing else.
            parallel: there may be several calls; otherwise those after the first are left out.
        """
        self._functions = {function.name: function for function in functions}
        self._part = _Part.WHOLE if forced else _Part.BEGINNING if functions else _Part.TEXT
        self._parallel = parallel
        self._held = ""
        self.num_calls = 0
        self.remarks = ["tool_choice: the answer is held to the JSON schema of a call"] if forced else []
        """On calls, and on what looked like one; for people."""

    def feed(self, text: str) -> list[str | ToolCall]:
        """Texts and calls that are certain now."""
        if not self._functions:
            return [text]
        self._held += text
        return list(self._certain())

    def finish(self) -> list[str | ToolCall]:
        """What was held back."""
        held, self._held = self._held, ""
        if self._part is _Part.WHOLE:
            calls = self._bare_calls(held)
            return [held] if calls is None else self._counted(calls)
        if self._part is _Part.CALL:
            return self._call(held, f"{_OPEN}{held}")
        return [held] if held else []

    def _certain(self) -> Iterator[str | ToolCall]:
        if self._part is _Part.BEGINNING:
            begun = self._held.lstrip()
            if begun.startswith(("{", _FENCE)):
                self._part = _Part.WHOLE
            elif not _FENCE.startswith(begun):
                self._part = _Part.TEXT
        while self._part in (_Part.TEXT, _Part.CALL):
            before, tag, rest = self._held.partition(_OPEN if self._part is _Part.TEXT else _CLOSE)
            if not tag:
                break
            self._held = rest
            if self._part is _Part.TEXT:
                self._part = _Part.CALL
                if before.strip():
                    yield before.rstrip()
            else:
                self._part = _Part.TEXT
                yield from self._call(before, f"{_OPEN}{before}{_CLOSE}")
        if self._part is _Part.TEXT:
            # White space before a call belongs to neither.
            certain = self._held[: len(self._held) - length_of_possible(_OPEN, self._held)].rstrip()
            self._held = self._held[len(certain) :]
            if certain:
                yield certain

    def _call(self, body: str, written: str) -> list[str | ToolCall]:
        call = self._read(body)
        if call is not None:
            return self._counted([call])
        self.remarks.append("what stands between the tags of a call is none, and stays text")
        return [written]

    def _counted(self, calls: Sequence[ToolCall]) -> list[str | ToolCall]:
        taken = list(calls) if self._parallel else list(calls)[: max(0, 1 - self.num_calls)]
        if len(taken) < len(calls):
            self.remarks.append("parallel_tool_calls is false: a call after the first was left out")
        self.num_calls += len(taken)
        return list(taken)

    def _bare_calls(self, text: str) -> list[ToolCall] | None:
        text = text.strip()
        if text.startswith(_FENCE) and text.endswith(_FENCE_END):
            text = text.removeprefix(_FENCE).removesuffix(_FENCE_END).strip()
        calls = []
        while text:
            try:
                _, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                return None
            call = self._read(text[:end])
            if call is None:
                return None
            calls.append(call)
            text = text[end:].lstrip()
        return calls or None

    def _read(self, body: str) -> ToolCall | None:
        try:
            raw = json.loads(body)
        except (ValueError, RecursionError):
            return None
        function = self._functions.get(raw["name"]) if _is_call(raw) else None
        if function is None:
            return None
        arguments = raw.get("arguments", {})
        if function.strict and not Draft202012Validator(function.parameters).is_valid(arguments):
            self.remarks.append(f"a call of {function.name} is not of its strict schema, and stays text")
            return None
        return ToolCall(function.name, json.dumps(arguments, ensure_ascii=False))


def _is_call(raw: Any) -> bool:
    return (
        isinstance(raw, dict)
        and raw.keys() <= {"name", "arguments"}
        and isinstance(raw.get("name"), str)
        and isinstance(raw.get("arguments", {}), dict)
    )
