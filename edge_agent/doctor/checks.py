"""What the facts mean: one finding each, with a line that says what to do. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from edge_agent.doctor.facts import EngineFacts, Facts, TlsFault
from shared.breaker import BreakerState
from shared.routing import Decision, Route


class Status(str, Enum):
    OK = "ok"
    WARN = "warn"
    """It works, less well than it could."""
    FAIL = "fail"
    """Something that the settings ask for does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    status: Status
    found: str
    do: str = ""
    """What to do; empty where all is well."""


OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
RELEASED_UNIX_S = 1_735_689_600.0
"""A clock that shows an earlier time than this version's year is wrong."""
MAX_CLOCK_AHEAD_S = 30.0
"""More than this, and certificates and tokens may count as expired or not valid yet."""
EXPIRES_SOON_S = 14 * 86_400.0
_KERNELS = {
    "AVX2": "avx2",
    "FMA": "fma",
    "F16C": "f16c",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "NEON": "asimd",
    "DOTPROD": "asimddp",
}
"""llama.cpp's name of a kernel set -> Linux's name of what it takes."""
_REBUILD = (
    "compile it for this machine: pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python"
    " llama-cpp-python"
)


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order in which a reader should see them."""
    checks: tuple[Callable[[Facts], Finding | None], ...] = (
        check_python,
        check_engine,
        check_gpu,
        check_model,
        check_memory,
        check_clock,
        check_cloud,
        check_breakers,
        check_tls,
        check_vocabulary,
        check_draft_speed,
        check_link_speed,
        check_calibration,
    )
    return [finding for check in checks if (finding := check(facts)) is not None]


def exit_code(findings: list[Finding]) -> int:
    """1 where something fails."""
    return int(any(finding.status is Status.FAIL for finding in findings))


def check_python(facts: Facts) -> Finding:
    found = f"{'.'.join(map(str, facts.python))} on {facts.system}"
    if OLDEST_PYTHON <= facts.python[:2] <= NEWEST_PYTHON:
        return Finding("python", Status.OK, found)
    return Finding(
        "python", Status.WARN, found, "duet is tested with Python 3.10 to 3.13; make an environment with one"
    )


def check_engine(facts: Facts) -> Finding:
    engine = facts.engine
    if engine is None:
        needed = facts.settings.mode != "cloud"
        return Finding(
            "llama.cpp",
            Status.FAIL if needed else Status.WARN,
            "not installed",
            "pip install 'duet-llm[edge]', or answer with --mode cloud only",
        )
    kernels = [name for name in _KERNELS if engine.features.get(name)]
    found = f"llama-cpp-python {engine.version}, CPU kernels: {', '.join(kernels) or 'plain'}"
    if missing := _unused_kernels(engine):
        return Finding("llama.cpp", Status.WARN, f"{found}; this CPU also has {', '.join(missing)}", _REBUILD)
    return Finding("llama.cpp", Status.OK, found)


def _unused_kernels(engine: EngineFacts) -> list[str]:
    """Faster kernels that this CPU could run and the build does not have."""
    return [
        name for name, flag in _KERNELS.items() if flag in engine.cpu_flags and not engine.features.get(name)
    ]


def check_gpu(facts: Facts) -> Finding | None:
    if facts.engine is None:
        return None
    wanted = facts.settings.gpu_layers != 0
    if wanted and not facts.engine.offloads:
        return Finding(
            "gpu",
            Status.FAIL,
            f"gpu_layers is {facts.settings.gpu_layers}, but llama.cpp was compiled for the CPU only",
            "install a CUDA or Metal build of llama-cpp-python, or set gpu_layers: 0",
        )
    if facts.engine.offloads and not wanted:
        return Finding(
            "gpu", Status.WARN, "llama.cpp can use a GPU, and gpu_layers is 0", "set gpu_layers: -1"
        )
    return Finding("gpu", Status.OK, "all layers set are on it" if wanted else "none in use")


def check_model(facts: Facts) -> Finding:
    model = facts.model
    size = f"{model.size_bytes / 1e6:,.0f} MB"
    if model.path is None:
        if model.error is not None:
            return Finding("model", Status.FAIL, model.error, "see `duet models list`")
        return Finding(
            "model",
            Status.WARN,
            f"{model.name} is not here; its {size} come with the first question",
            f"duet models pull {model.name}",
        )
    if model.expected_sha256 is not None and model.sha256 != model.expected_sha256:
        return Finding(
            "model",
            Status.FAIL,
            f"{model.path} is damaged: sha256 {model.sha256}, expected {model.expected_sha256}",
            f"duet models pull {model.name}, which gets it anew",
        )
    if model.error is not None:
        return Finding("model", Status.FAIL, model.error, "choose another --model; see `duet models list`")
    checked = "sha256 as registered" if model.expected_sha256 else "a file of your own"
    return Finding("model", Status.OK, f"{model.name}, {size}, {checked}")


def check_memory(facts: Facts) -> Finding:
    needed = facts.model.size_bytes + (facts.cache_bytes or 0)
    found = f"{facts.available_bytes / 1e6:,.0f} MB available, {needed / 1e6:,.0f} MB for model and KV cache"
    if needed > facts.available_bytes:
        return Finding(
            "memory", Status.FAIL, found, "close programs, or choose a smaller model or context_tokens"
        )
    if 1.25 * needed > facts.available_bytes:
        return Finding("memory", Status.WARN, found, "little is left: choose a smaller context_tokens")
    return Finding("memory", Status.OK, found)


def check_clock(facts: Facts) -> Finding:
    if facts.unix_time < RELEASED_UNIX_S:
        return Finding("clock", Status.FAIL, "it shows a year before 2025", "set the clock of this machine")
    ahead = None if facts.cloud is None else facts.cloud.clock_ahead_s
    if ahead is None:
        return Finding("clock", Status.OK, "plausible; no cloud told the time to compare with")
    if abs(ahead) > MAX_CLOCK_AHEAD_S:
        which = "ahead of" if ahead > 0 else "behind"
        return Finding(
            "clock",
            Status.WARN,
            f"the cloud's is {abs(ahead):,.0f} s {which} this one",
            "set both by NTP: certificates and tokens are judged by the time",
        )
    return Finding("clock", Status.OK, "agrees with the cloud's to the second or two")


def check_cloud(facts: Facts) -> Finding:
    cloud = facts.cloud
    if cloud is None:
        why = "the settings keep all prompts here" if facts.settings.private else "mode local asks none"
        return Finding("cloud", Status.OK, f"not asked: {why}")
    if cloud.error is not None:
        needed = facts.settings.mode in ("cloud", "speculate", "guide")
        status = Status.FAIL if needed else Status.WARN
        happened, _, advice = cloud.error.partition("; ")
        return Finding("cloud", status, happened, advice or "see `duet-cloud serve --help`")
    found = (
        f"{cloud.address} serves {cloud.model} by {cloud.target}, {cloud.context_tokens} tokens of context"
    )
    if cloud.context_tokens < facts.settings.context_tokens:
        return Finding(
            "cloud",
            Status.WARN,
            f"{found}, fewer than the edge's {facts.settings.context_tokens}",
            "start it with a larger --context-tokens, or long chats will not fit there",
        )
    return Finding("cloud", Status.OK, found)


def check_breakers(facts: Facts) -> Finding | None:
    """Of several replicas; one alone is what `check_cloud` is about."""
    replicas = () if facts.cloud is None else facts.cloud.replicas
    if len(replicas) < 2:
        return None
    away = [replica for replica in replicas if replica.state is not BreakerState.CLOSED]
    found = f"{len(replicas) - len(away)} of {len(replicas)} are let through"
    if not away:
        return Finding("replicas", Status.OK, found)
    errors = "; ".join(f"{each.address} {each.state.value}: {each.last_error}" for each in away)
    return Finding("replicas", Status.WARN, f"{found}; {errors}", "start them, or take them out of `cloud`")


def check_tls(facts: Facts) -> Finding | None:
    if facts.cloud is None:
        return None
    if not facts.settings.encrypts:
        if facts.settings.insecure:
            return Finding(
                "tls", Status.WARN, "the connection is plain text (insecure)", "leave --insecure out"
            )
        return Finding("tls", Status.OK, "not needed: the cloud is on this machine")
    for replica in facts.tls:
        if replica.fault is not None:
            said = f"no TLS with {replica.address}: {replica.error}"
            return Finding("tls", Status.FAIL, said, _TLS_REMEDIES[replica.fault])
    seen = [replica.expires_in_s for replica in facts.tls if replica.expires_in_s is not None]
    if not seen:
        return Finding("tls", Status.WARN, "no certificate was seen", "start the cloud, then ask again")
    found = f"the cloud's certificate is valid for {min(seen) / 86_400:.0f} days"
    if min(seen) < EXPIRES_SOON_S:
        return Finding("tls", Status.WARN, found, "renew it")
    return Finding("tls", Status.OK, found)


_TLS_REMEDIES = {
    TlsFault.EXPIRED: "renew the certificate (`duet-cloud certs server`), or set this machine's clock right",
    TlsFault.NOT_YET_VALID: "set the clocks of both machines right",
    TlsFault.OTHER_NAME: "call the cloud by a name in its certificate, or set tls_server_name to that",
    TlsFault.UNKNOWN_AUTHORITY: "set tls_ca to the file that vouches for the cloud's certificate",
    TlsFault.PLAIN_TEXT: "give the service a certificate (tls_cert, tls_key), or leave tls_ca out here",
    TlsFault.OTHER: "see docs/security.md",
}


def check_vocabulary(facts: Facts) -> Finding | None:
    cloud = facts.cloud
    if cloud is None or (cloud.num_masked is None and cloud.vocabulary_error is None):
        return None
    if cloud.vocabulary_error is not None:
        return Finding(
            "vocabulary",
            Status.WARN,
            cloud.vocabulary_error.partition("; ")[0],
            "choose models of one family: until then drafts are carried over as text, which costs speed",
        )
    if cloud.num_masked:
        return Finding(
            "vocabulary", Status.OK, f"matches; {cloud.num_masked} special tokens are the edge's only"
        )
    return Finding("vocabulary", Status.OK, "the same at both ends")


def check_draft_speed(facts: Facts) -> Finding | None:
    draft = facts.draft
    if draft is None:
        return None
    found = f"drafts {draft.draft_tokens_per_s:.1f} tokens/s, reads {draft.prefill_tokens_per_s:.0f} tokens/s"
    if facts.link is not None and draft.t_draft > facts.link.t_step_s:
        return Finding(
            "draft speed",
            Status.WARN,
            f"{found}, slower than the target itself",
            "choose a smaller --model, a GPU (gpu_layers), or --mode cloud",
        )
    return Finding("draft speed", Status.OK, found)


def check_link_speed(facts: Facts) -> Finding | None:
    if facts.measure_error is not None:
        return Finding("link", Status.WARN, facts.measure_error.partition("; ")[0], "ask again")
    link = facts.link
    if link is None:
        return None
    passes = ", ".join(f"{1e3 * seconds:.0f} ms for {n}" for n, seconds in link.t_verify_s.items())
    return Finding(
        "link",
        Status.OK,
        f"round trip {1e3 * link.rtt_s:.1f} ms; the target takes {1e3 * link.t_step_s:.0f} ms a token,"
        f" and verifies drafts in {passes} tokens",
    )


def check_calibration(facts: Facts) -> Finding | None:
    if facts.settings.mode != "auto":
        return None
    if facts.calibration is None:
        return Finding(
            "calibration",
            Status.WARN,
            f"none for {facts.model.name}: the router takes the plain mean of its probes",
            "measure with `duet eval routing`, fit with `duet calibrate`; see docs/routing.md",
        )
    return Finding("calibration", Status.OK, f"threshold {facts.threshold:.2f}, {facts.calibration}")


def outlook(facts: Facts) -> list[str]:
    """What mode `auto` will do, and why."""
    if facts.easy.route is facts.hard.route is Route.LOCAL:
        return [f"auto answers every question here: {_why(facts.hard)}"]
    lines = [
        f"auto answers here where the cloud is needed with a probability below {facts.threshold:.2f}",
        f"auto answers other questions by {facts.hard.route.value}: {_why(facts.hard)}",
    ]
    if facts.hard.route is Route.SPECULATE and facts.forecast:
        best = max(facts.forecast, key=lambda line: line.tokens_per_s)
        speculation = (
            f"at {facts.acceptance_rate:.0%} of drafts accepted, drafts of {best.num_draft_tokens} give"
            f" {best.tokens_per_s:.1f} tokens/s and the cloud's own stream {best.stream_tokens_per_s:.1f}"
        )
        taken = "drafts" if best.speed_up > 1 else "the stream"
        lines.append(f"{speculation}: the speed controller will take {taken}, unless it measures otherwise")
    return lines


def _why(decision: Decision) -> str:
    return ", and ".join(reason.partition("; ")[0] for reason in decision.reasons)
