"""Settings of both commands: frozen, checked once, typos refused. Reading files is `shared.settings`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from shared.addresses import is_loopback
from shared.controller import DRAFT_LENGTHS, DRAFTING, Choices, Way
from shared.draft_ahead import Pace
from shared.errors import InvalidRequest, InvalidSetting, UnknownSetting
from shared.limits import Limits
from shared.messages import Policy
from shared.policies import DEFAULT_ROLLBACK_THRESHOLD
from shared.resumption import OnOutage
from shared.sampling import MAX_TOP_K
from shared.session import MAX_ROUND_TOKENS

DEFAULT_ADDRESS = "127.0.0.1:50151"
DEFAULT_DRAFT = "qwen2.5-coder-0.5b"
DEFAULT_TARGET = "qwen2.5-coder-1.5b"
DEFAULT_DEAD_LINK_S = 10.0
DEFAULT_GUIDANCE_TOKENS = 128
USUAL_DRAFT_TOKENS = 4
USUAL_IN_FLIGHT_TOKENS = 32


def _check_address(value: str) -> str:
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or ("]" not in host and ":" in host):
        raise ValueError("expected HOST:PORT, with a port of at most 65535")
    return value


def _check_addresses(value: str) -> str:
    addresses = [_check_address(address.strip()) for address in value.split(",")]
    _check_distinct(tuple(addresses))
    return ",".join(addresses)


def _check_url(value: str) -> str:
    parts = urlsplit(value)
    # `port` raises ValueError, too, where it is no number.
    known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    if not known or parts.query or parts.fragment:
        raise ValueError("expected http://HOST:PORT or https://HOST")
    return value.rstrip("/")


def _check_distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(values)) < len(values):
        raise ValueError("each may be named once")
    return values


def _check_pair(settings: BaseModel, first: str, second: str) -> None:
    for one, other in ((first, second), (second, first)):
        if getattr(settings, one) is not None and getattr(settings, other) is None:
            raise InvalidSetting(f"{one} is set, and needs {other}")


def _read_json(value: object) -> object:
    """Take a mapping as the text that an environment variable holds."""
    return json.loads(value) if isinstance(value, str) else value


Address = Annotated[str, AfterValidator(_check_address)]
Addresses = Annotated[str, AfterValidator(_check_addresses)]
Url = Annotated[str, AfterValidator(_check_url)]
Secret = Annotated[SecretStr, Field(min_length=16)]
"""Never shown, in errors neither."""
StopText = Annotated[str, Field(min_length=1)]
DrafterName = Literal["model", "lookup", "retrieval"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
CacheType = Literal["f16", "f32", "q8_0"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EdgeConfig(_Settings):
    """Settings of `duet`."""

    mode: Literal["auto", "local", "cloud", "speculate", "guide"] = "auto"
    """Who makes the tokens; auto asks the edge model how hard the question is, and decides."""
    cloud: Addresses = DEFAULT_ADDRESS
    """HOST:PORT of the `duet-cloud` service; of several replicas, separated by commas."""
    model: str = DEFAULT_DRAFT
    """Edge model: a registered name or a GGUF file."""
    system: str | None = None
    """System prompt."""
    max_tokens: int = Field(512, ge=1)
    """Completion tokens at most."""
    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """0 is greedy."""
    top_k: int = Field(MAX_TOP_K, ge=1, le=MAX_TOP_K)
    """Likeliest tokens that are drawn from."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Mass of the likeliest tokens that are drawn from."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Least likelihood relative to the likeliest token."""
    seed: int | None = Field(None, ge=0, lt=2**64)
    """Seed of the noise; unset draws one, or leaves the noise to the cloud."""
    stop: Annotated[tuple[StopText, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)] = ()
    """The answer ends before any of these texts."""
    max_draft_tokens: int | None = Field(None, ge=1, le=MAX_ROUND_TOKENS)
    """Tokens per draft; unset, what is fastest by the speeds measured."""
    proactive: bool | None = None
    """Draft on while verdicts travel, or let each draft wait for the verdict before; unset, the faster."""
    max_in_flight_tokens: int | None = Field(None, ge=1, le=256)
    """Proactive: draft tokens that may be sent and not yet verified; unset, by the speeds measured."""
    acceptance_threshold: float = Field(0.0, ge=0.0, le=1.0)
    """A draft ends where all that is unverified would stand with less probability than this; 0 never."""
    policy: Policy = Policy.LOSSLESS
    """How the cloud verifies drafts: lossless gives its own text; bild keeps drafts that it finds likely,
    judge those that its judge head finds right."""
    fallback_threshold: float = Field(0.0, ge=0.0, le=1.0)
    """A draft ends where the edge's likeliest token is below this probability; 0 never."""
    rollback_threshold: float = Field(DEFAULT_ROLLBACK_THRESHOLD, gt=0.0, allow_inf_nan=False)
    """Nats; under bild a draft token stands while minus the log of its probability is at most this."""
    guidance_tokens: int = Field(DEFAULT_GUIDANCE_TOKENS, ge=1)
    """In mode guide, tokens of the target with which the answer begins; the edge model writes the rest."""
    drafters: Annotated[
        tuple[DrafterName, ...],
        Field(min_length=1),
        BeforeValidator(lambda v: v.split(",") if isinstance(v, str) else v),
        AfterValidator(_check_distinct),
    ] = ("model",)
    """Who proposes tokens: model, lookup (copies from the text itself), retrieval (from your documents)."""
    remember_answers: bool = False
    """Keep answers, but those to private prompts, for retrieval to copy from."""
    context_tokens: int = Field(4096, ge=64)
    """Prompt and completion of the edge model, in tokens."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the edge model; unset takes the physical cores."""
    gpu_layers: int = Field(0, ge=-1)
    """Layers of the edge model on a GPU; -1 is all."""
    private: bool = False
    """The prompt stays on this device; nothing is sent."""
    private_patterns: Annotated[
        tuple[StopText, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)
    ] = ()
    """Regular expressions; a prompt that one of them matches is private."""
    detect_private: bool = True
    """Prompts with secrets (keys, passwords) or personal data (accounts, addresses) are private too."""
    cloud_threshold: float | None = Field(None, ge=0.0, le=1.0)
    """In auto, ask the cloud when it is needed with this probability; unset takes the calibration's."""
    routing_calibration: str | None = None
    """File made by `duet calibrate`; unset takes your own for the model, else the shipped one."""
    routing_templates: str | None = None
    """Folder of probe prompts that replace the shipped ones of the same name."""
    slow_rtt_ms: float | None = Field(None, gt=0.0)
    """In auto, a link with a longer round trip gets the cloud's own stream; unset, measured speeds decide."""
    cloud_price: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    """Price of 1,000 completion tokens of the cloud."""
    max_price: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    """In auto, an answer that would cost more is made by the edge."""
    doubt_threshold: float = Field(0.6, ge=0.0, le=1.0)
    """In auto, a local answer moves to the cloud when its tokens' mean probability falls below; 0 never."""
    connect_timeout_s: float = Field(5.0, gt=0.0)
    """Seconds until a silent address counts as unreachable."""
    verify_timeout_s: float = Field(120.0, gt=0.0)
    """Seconds without any message from the cloud until a stream is given up."""
    dead_link_s: float = Field(DEFAULT_DEAD_LINK_S, ge=1.0, allow_inf_nan=False)
    """Seconds without any sign of life from the cloud until a connection counts as dead."""
    on_outage: OnOutage = OnOutage.CONTINUE
    """What a running answer does while the cloud is away: wait, continue with the edge model, or stop."""
    outage_patience_s: float = Field(60.0, gt=0.0, allow_inf_nan=False)
    """Seconds that a running answer waits for the cloud to come back."""
    log_format: LogFormat = "text"
    """One line or one JSON object per log record."""
    log_level: LogLevel = "warning"
    """Least severe record that is logged."""
    traces_to: Url | None = None
    """URL of an OpenTelemetry collector (OTLP over gRPC) that gets the traces."""
    token: Secret | None = None
    """Token that the cloud asks for; better in DUET_TOKEN than in a file. Never sent in plain text to
    another machine."""
    tls_ca: str | None = None
    """File with the certificates that vouch for the cloud's; unset takes the system's."""
    tls_client_cert: str | None = None
    """File with the certificate that this edge shows to the cloud."""
    tls_client_key: str | None = None
    """File with the key of `tls_client_cert`."""
    tls_server_name: str | None = None
    """Name in the cloud's certificate, where it is not the host of `cloud`."""
    insecure: bool = False
    """Plain text to a cloud on another machine, where no `tls_` setting asks for more."""
    host: str = "127.0.0.1"
    """Address that `duet serve` listens on."""
    port: int = Field(8080, ge=0, le=65535)
    """Its port; 0 takes a free one."""
    slots: int = Field(4, ge=1, le=64)
    """Requests to `duet serve` that use the edge model at once; each has a KV cache."""
    max_waiting: int = Field(64, ge=0)
    """Requests that may wait for the edge model; more are refused."""
    api_key: Secret | None = None
    """Key that `duet serve` asks of its clients."""
    tls_cert: str | None = None
    """File with the certificate of `duet serve`."""
    tls_key: str | None = None
    """File with the key of `tls_cert`."""
    serve_insecure: bool = False
    """`duet serve` may listen for other machines without a key or without TLS."""

    @model_validator(mode="after")
    def _check_trust(self) -> EdgeConfig:
        _check_pair(self, "tls_client_cert", "tls_client_key")
        _check_pair(self, "tls_cert", "tls_key")
        if self.token is not None and not self.encrypts and not self._stays_here:
            raise InvalidSetting(
                f"the token would travel to {self.cloud} in plain text, where others can read it: leave"
                " --insecure out, and set tls_ca where the cloud's certificate is your own"
            )
        return self

    @property
    def encrypts(self) -> bool:
        """Whether the connection to the cloud is TLS."""
        asked = self.tls_ca or self.tls_client_cert or self.tls_server_name
        return bool(asked) or not (self.insecure or self._stays_here)

    @property
    def _stays_here(self) -> bool:
        return all(is_loopback(address) for address in self.cloud.split(","))

    @property
    def pace(self) -> Pace:
        """How speculation drafts where nothing is measured."""
        window = self.max_in_flight_tokens or USUAL_IN_FLIGHT_TOKENS
        return Pace(
            max_draft_tokens=self.max_draft_tokens or USUAL_DRAFT_TOKENS,
            max_in_flight_tokens=None if self.proactive is False else window,
            fallback_threshold=self.fallback_threshold,
            acceptance_threshold=self.acceptance_threshold,
        )

    def choices(self, *, stream: bool, fixed: bool = False) -> Choices:
        """What the speed controller may choose from: all that is not set here.

        Args:
            stream: the cloud's own stream, too; under a policy that is not lossless it never is.
            fixed: leave it no choice of pace.
        """
        pace = self.pace
        lengths = (pace.max_draft_tokens,) if self.max_draft_tokens or fixed else DRAFT_LENGTHS
        ways = {Way.PROACTIVE if pace.proactive else Way.STOP_AND_WAIT}
        if self.proactive is None and not fixed:
            ways = set(DRAFTING)
        window = pace.max_in_flight_tokens if self.max_in_flight_tokens or fixed else None
        if stream and self.policy is Policy.LOSSLESS:
            ways.add(Way.CLOUD)
        return Choices(ways=frozenset(ways), draft_lengths=lengths, window_tokens=window)


REQUEST_SETTINGS = frozenset(
    {
        "mode", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "max_draft_tokens",
        "proactive", "max_in_flight_tokens", "acceptance_threshold", "policy", "fallback_threshold",
        "rollback_threshold", "guidance_tokens", "private", "doubt_threshold", "on_outage",
        "outage_patience_s",
    }
)  # fmt: skip
"""Those of `EdgeConfig` that a single request may change; the others are fixed once a model is loaded."""


class CloudConfig(_Settings):
    """Settings of `duet-cloud`."""

    target: Literal["llama-cpp", "vllm", "openai"] = "llama-cpp"
    """Engine of the target model; openai is a `vllm serve` that runs already."""
    model: str = DEFAULT_TARGET
    """Target model: a registered name, a GGUF file (llama-cpp), a Hugging Face folder or id (the others)."""
    upstream: Url | None = None
    """URL of the `vllm serve` to verify against (openai)."""
    engine: Annotated[dict[str, Any], BeforeValidator(_read_json)] = {}
    """Options of vLLM's engine by name."""
    verification: Literal["auto", "resident", "rounds"] = "auto"
    """How vLLM verifies drafts: in sessions that stay in its engine, or each round by itself."""
    listen: Address = DEFAULT_ADDRESS
    """HOST:PORT; port 0 takes a free one."""
    tls_cert: str | None = None
    """File with the service's certificate; a renewed one is taken up without a restart."""
    tls_key: str | None = None
    """File with the key of `tls_cert`."""
    tls_client_ca: str | None = None
    """File with the certificates that vouch for edges, which must show one then."""
    tokens: str | None = None
    """File with tokens and limits of tenants, made by `duet-cloud tokens add`; calls need a token then."""
    usage: str | None = None
    """File in which tokens a minute are counted, for a restart and for replicas; unset counts in memory."""
    insecure: bool = False
    """Serve other machines without TLS, or anybody who asks."""
    limits: Annotated[Limits, BeforeValidator(_read_json)] = Limits()
    """What a tenant may have, unless `duet-cloud tenants limit` says otherwise."""
    min_free_mb: int = Field(256, ge=0)
    """New streams are refused while this machine, or this container, has less memory left."""
    log_texts: bool = False
    """Log prompts and answers; otherwise their lengths alone."""
    slots: int = Field(4, ge=1, le=256)
    """Streams whose KV caches are held at once; unset, vLLM takes as many as it likes."""
    context_tokens: int = Field(4096, ge=64)
    """Prompt and completion of one stream, in tokens."""
    max_draft_tokens: int = Field(32, ge=1, le=MAX_ROUND_TOKENS)
    """The longest single draft that is taken."""
    lossy_policies: bool = True
    """Streams may ask for a policy that is not lossless; otherwise all get lossless, and are told so."""
    judge_head: str | None = None
    """File made by `duet-cloud judge train`; streams may ask for policy judge then (llama-cpp, vllm)."""
    cache_type: CacheType = "f16"
    """Type of the KV cache."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; unset takes the physical cores."""
    gpu_layers: int = Field(0, ge=-1)
    """Layers on a GPU; -1 is all."""
    admission: Literal["first-come", "shortest"] = "first-come"
    """Which of a tenant's waiting streams goes first: the one that came first, or the one whose answer is
    predicted to be shortest, with ageing."""
    max_waiting_streams: int = Field(64, ge=0)
    """Streams that may wait for a slot; more are refused."""
    max_wait_s: float = Field(30.0, gt=0.0, allow_inf_nan=False)
    """Seconds that a stream waits for a slot before it is refused."""
    drain_s: float = Field(10.0, ge=0.0)
    """Seconds that running streams get to finish after SIGTERM, before they are handed back."""
    log_format: LogFormat = "text"
    """One line or one JSON object per log record."""
    log_level: LogLevel = "info"
    """Least severe record that is logged."""
    metrics_listen: Address | None = None
    """HOST:PORT at which Prometheus reads the metrics."""
    traces_to: Url | None = None
    """URL of an OpenTelemetry collector (OTLP over gRPC) that gets the traces."""

    @model_validator(mode="after")
    def _check_trust(self) -> CloudConfig:
        _check_pair(self, "tls_cert", "tls_key")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InvalidSetting("tls_client_ca is set, and needs tls_cert and tls_key")
        return self


Settings = TypeVar("Settings", EdgeConfig, CloudConfig)


def resolve(cls: type[Settings], layers: Mapping[str, Mapping[str, Any]]) -> tuple[Settings, dict[str, str]]:
    """Merge layers of settings into one checked config.

    Args:
        layers: source name -> settings, weakest first, for example defaults < "duet.yaml" < "environment"
            < "flags". Text is converted to the setting's type.
    Returns:
        The config, and for each setting the name of the source that set it ("default" where none did).
    Raises:
        UnknownSetting: names the setting, its source and the nearest known one.
        InvalidSetting: names the setting, its source and what is allowed.
    """
    merged: dict[str, Any] = {}
    origin = dict.fromkeys(cls.model_fields, "default")
    for source, values in layers.items():
        for name, value in values.items():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(str(name), cls.model_fields, n=1, cutoff=0.0)[0]
                raise UnknownSetting(f"unknown setting {name!r} in {source}; did you mean {near!r}?")
            weaker = merged.get(name)
            if isinstance(value, Mapping) and isinstance(weaker, Mapping):
                value = {**weaker, **value}
            merged[name] = value
            origin[name] = source
    try:
        return cls(**merged), origin
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        shown = "..." if cls.model_fields[name].annotation == Secret | None else repr(merged.get(name))
        raise InvalidSetting(
            f"{name} = {shown} in {origin[name]} cannot be used: {first['msg'].lower()}"
        ) from None


def for_request(config: EdgeConfig, changes: Mapping[str, Any]) -> EdgeConfig:
    """The settings of one request.

    Args:
        changes: any of `REQUEST_SETTINGS`.
    Raises:
        InvalidRequest: names what cannot be changed, or what is out of range.
    """
    if not changes:
        return config
    for name in changes:
        if name not in REQUEST_SETTINGS:
            fixed = "is fixed once the agent is open" if name in EdgeConfig.model_fields else "is not known"
            raise InvalidRequest(
                f"{name} {fixed}; a request may change {', '.join(sorted(REQUEST_SETTINGS))}"
            )
    try:
        return EdgeConfig(**{**dict(config), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InvalidRequest(
            f"{name} = {changes.get(name)!r} cannot be used: {first['msg'].lower()}"
        ) from None
