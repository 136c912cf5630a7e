"""What clients may ask, as pydantic checks it: OpenAI's parameters that mean something here, and no others.

A parameter that is not listed is refused by name, whatever its value, unless that is null.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from edge_agent.http.errors import ApiError
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


class ChatMessage(_Shape):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    reasoning_content: str | None = None
    """Of an earlier answer. Thoughts are not part of the chat that a model reads, here as elsewhere."""

    def as_message(self) -> Message:
        role = "system" if self.role == "developer" else self.role
        return Message(role, str(self.content))


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


class ChatCompletion(_Completion):
    """`POST /v1/chat/completions`"""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool = False
    top_logprobs: Literal[0] = 0
    """Of other tokens than the chosen one nothing is kept."""

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs

    def settings(self) -> dict[str, Any]:
        newer = self.max_completion_tokens
        return super().settings() | ({} if newer is None else {"max_tokens": newer})


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
