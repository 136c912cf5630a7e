"""What clients may ask, as pydantic checks it: OpenAI's parameters that mean something here, and no others.

A parameter that is not listed is refused by name, whatever its value, unless that is null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

from jsonschema import Draft202012Validator, SchemaError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from edge_agent.http.errors import ApiError
from edge_agent.http.tool_calls import Function, ToolCall, call_schema, returned, with_functions
from shared.config import REQUEST_SETTINGS
from shared.messages import Message
from shared.sampling import MAX_TOP_K
from shared.shaping import Shaping

Number = Annotated[float, Field(allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1)]


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Shape):
    type: Literal["text"]
    text: str


def _only_text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


Content = Annotated[str | list[TextPart], AfterValidator(_only_text)]


def _json_object(text: str) -> str:
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ValueError("must be a JSON object, as text")
    return text


class CalledFunction(_Shape):
    name: str
    arguments: Annotated[str, AfterValidator(_json_object)]


class MadeCall(_Shape):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def written(self) -> str:
        return ToolCall(self.function.name, self.function.arguments).written()


class ChatMessage(_Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    reasoning_content: str | None = None
    """Of an earlier answer. Thoughts are not part of the chat that a model reads, here as elsewhere."""
    tool_calls: list[MadeCall] = []
    """By the assistant."""
    tool_call_id: Annotated[str | None, Field(validate_default=True)] = None
    """Which call the tool's content answers."""
    content: Annotated[Content | None, Field(validate_default=True)] = None

    @field_validator("tool_calls")
    @classmethod
    def _of_the_assistant(cls, calls: list[MadeCall], known: ValidationInfo) -> list[MadeCall]:
        if calls and known.data.get("role") != "assistant":
            raise ValueError("only the role assistant makes calls")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_tool(cls, call_id: str | None, known: ValidationInfo) -> str | None:
        if (call_id is not None) != (known.data.get("role") == "tool"):
            raise ValueError("the role tool needs one, and no other has it")
        return call_id

    @field_validator("content")
    @classmethod
    def _said_or_called(cls, content: str | None, known: ValidationInfo) -> str | None:
        if content is None and not known.data.get("tool_calls"):
            raise ValueError("is missing")
        return content

    def as_message(self) -> Message:
        text = str(self.content or "")
        if self.role == "tool":
            return Message("user", returned(text))
        calls = [call.written() for call in self.tool_calls]
        role = "system" if self.role == "developer" else self.role
        return Message(role, "\n".join(filter(None, [text, *calls])))


def as_chat(messages: Sequence[ChatMessage]) -> list[Message]:
    """As a model reads it: what several tools returned is one turn.

    Raises:
        ApiError: a tool answers a call that nobody made.
    """
    made: set[str] = set()
    for number, message in enumerate(messages):
        made.update(call.id for call in message.tool_calls)
        if message.tool_call_id is not None and message.tool_call_id not in made:
            raise ApiError(
                f"messages.{number}.tool_call_id: no message before has a call {message.tool_call_id!r}",
                param=f"messages.{number}.tool_call_id",
                code="invalid_value",
            )
    chat: list[Message] = []
    for of_tools, group in groupby(messages, lambda message: message.role == "tool"):
        read = [message.as_message() for message in group]
        chat += [Message("user", "\n".join(message.content for message in read))] if of_tools else read
    return chat


class JsonSchema(_Shape):
    name: str = ""
    """What OpenAI's clients call it; nobody here reads it."""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema", default={})
    strict: bool = True


class ResponseFormat(_Shape):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_text(self) -> str | None:
        if self.type == "text":
            return None
        schema = {"type": "object"} if self.json_schema is None else self.json_schema.schema_
        return json.dumps(schema)


class StreamOptions(_Shape):
    include_usage: bool = False


def _known_settings(settings: dict[str, Any]) -> dict[str, Any]:
    if unknown := sorted(settings.keys() - REQUEST_SETTINGS):
        raise ValueError(
            f"{unknown[0]} is not a setting of a request; those are {', '.join(sorted(REQUEST_SETTINGS))}"
        )
    return settings


def _known_settings_but_mode(settings: dict[str, Any]) -> dict[str, Any]:
    if "mode" in settings:
        raise ValueError(
            "the model's name says the mode: duet, duet-local, duet-cloud, duet-speculate or duet-guide"
        )
    return _known_settings(settings)


class _Completion(_Shape):
    """What both kinds of completion take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0.0)] | None = None
    top_p: Annotated[Number, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[Number, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[
        list[StopText], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(max_length=16)
    ] = []
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    repetition_penalty: Number = 1.0
    logit_bias: dict[str, Number] = {}
    """By token id: the target's, or in duet-local the edge model's."""
    response_format: ResponseFormat = ResponseFormat(type="text")
    grammar: str | None = None
    """GBNF, as llama.cpp's server takes it."""
    n: Literal[1] = 1
    user: str | None = None
    """A label of the client's own, for nobody here."""
    duet: Annotated[dict[str, Any], AfterValidator(_known_settings_but_mode)] = {}
    """Settings of duet for this request, by their names in duet.yaml."""

    def settings(self) -> dict[str, Any]:
        """In the agent's words; what the client left out is the server's own setting."""
        asked = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": tuple(self.stop) or None,
        }
        return {name: value for name, value in asked.items() if value is not None} | self.duet

    def shaping(self) -> Shaping:
        """Raises InvalidRequest."""
        return Shaping(
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(sorted((int(token), bias) for token, bias in self.logit_bias.items())),
            json_schema=self.response_format.schema_text(),
            grammar=self.grammar,
        )

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[str, float]) -> dict[str, float]:
        if bad := [name for name in bias if not name.isdecimal()]:
            raise ValueError(f"{bad[0]!r} is no token id")
        return bias


def _json_schema(schema: dict[str, Any]) -> dict[str, Any]:
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"is no JSON schema: {error.message}") from None
    return schema


class FunctionShape(_Shape):
    name: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    description: str = ""
    parameters: Annotated[dict[str, Any], AfterValidator(_json_schema)] = {}
    strict: bool = False


class Tool(_Shape):
    type: Literal["function"]
    function: FunctionShape


class FunctionName(_Shape):
    name: str


class ChosenTool(_Shape):
    type: Literal["function"]
    function: FunctionName


class ChatCompletion(_Completion):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: Literal[0] = 0
    """Of other tokens than the chosen one nothing is kept."""
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | ChosenTool = "auto"
    parallel_tool_calls: bool = True

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    @property
    def forces_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @property
    def functions(self) -> list[Function]:
        """Those that may be called."""
        if self.tool_choice == "none":
            return []
        chosen = self.tool_choice.function.name if isinstance(self.tool_choice, ChosenTool) else None
        return [
            Function(f.name, f.description, f.parameters, f.strict)
            for f in (tool.function for tool in self.tools)
            if chosen in (None, f.name)
        ]

    def chat(self) -> list[Message]:
        """Raises ApiError."""
        return with_functions(as_chat(self.messages), self.functions)

    def settings(self) -> dict[str, Any]:
        newer = self.max_completion_tokens
        return super().settings() | ({} if newer is None else {"max_tokens": newer})

    def shaping(self) -> Shaping:
        shaping = super().shaping()
        return (
            replace(shaping, json_schema=json.dumps(call_schema(self.functions)))
            if self.forces_call
            else shaping
        )

    @model_validator(mode="after")
    def _tools_fit_together(self) -> ChatCompletion:
        names = [tool.function.name for tool in self.tools]
        if not names and (given := self.model_fields_set & {"tool_choice", "parallel_tool_calls"}):
            raise _unfit(min(given), "needs tools")
        if len(set(names)) < len(names):
            raise _unfit("tools", "two functions have one name")
        if self.forces_call and not self.functions:
            raise _unfit("tool_choice", "names none of the tools")
        if self.functions and self.response_format.type != "text":
            raise _unfit("response_format", "and tools exclude each other: a call has a form of its own")
        if self.forces_call and self.grammar is not None:
            raise _unfit("grammar", "and a tool_choice that asks for a call exclude each other")
        return self


def _unfit(param: str, what: str) -> ApiError:
    return ApiError(f"{param} {what}", param=param, code="invalid_value")


def _one_prompt(prompt: Any) -> Any:
    """A list of one text or of one list of ids is as good as what is in it."""
    return (
        prompt[0]
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int)
        else prompt
    )


class TextCompletion(_Completion):
    """`POST /v1/completions`: the text goes on as it stands."""

    prompt: Annotated[str | list[Annotated[int, Field(ge=0)]], BeforeValidator(_one_prompt)]
    logprobs: Literal[0] | None = None
    """0 asks for those of the chosen tokens; of others nothing is kept."""

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class LiveChat(_Shape):
    """`POST /api/chat`"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    settings: Annotated[dict[str, Any], AfterValidator(_known_settings)] = {}


Asked = TypeVar("Asked", bound=BaseModel)


def parse(cls: type[Asked], body: bytes) -> Asked:
    """Raises ApiError, or pydantic's ValidationError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(
            f"the body is not valid UTF-8: {error.reason} at byte {error.start}", code="invalid_json"
        ) from None
    try:
        raw = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError("the body is not valid JSON: it is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    return cls.model_validate(_cleaned(raw))


def _cleaned(value: Any) -> Any:
    """Without nulls, which clients send for what they leave out.

    Raises:
        ApiError: an escape in a text stands for no character.
    """
    if isinstance(value, dict):
        return {name: _cleaned(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ApiError("a text in the body holds half of a surrogate pair", code="invalid_json") from None
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
