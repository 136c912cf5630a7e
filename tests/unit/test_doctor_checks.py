"""What the doctor makes of facts: a finding's status, and that it says what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.bench import DraftSpeed, LinkSpeed, forecast
from edge_agent.doctor import checks
from edge_agent.doctor.checks import Status, examine, exit_code, outlook
from edge_agent.doctor.facts import CloudFacts, EngineFacts, Facts, ModelFacts, TlsFacts, TlsFault
from edge_agent.replica import ReplicaStatus
from shared.breaker import BreakerState
from shared.config import EdgeConfig
from shared.routing import Decision, Route

ENGINE = EngineFacts("0.3.36", {"AVX2": True, "FMA": True, "F16C": True}, False, frozenset({"avx2", "fma"}))
MODEL = ModelFacts("qwen", "/models/qwen.gguf", 500_000_000, "a" * 64, "a" * 64, None)
CLOUD = CloudFacts("127.0.0.1:50151", None, (), "qwen-large", "vllm", 4096, clock_ahead_s=0.5, num_masked=0)
DRAFT = DraftSpeed(prefill_tokens_per_s=90.0, draft_tokens_per_s=25.0)
LINK = LinkSpeed(0.003, 0.09, {4: 0.1})


def decision(route: Route, why: str = "it is so") -> Decision:
    return Decision(route=route, p_cloud=0.5, predicted_tokens=64, reasons=(why,))


GOOD = Facts(
    settings=EdgeConfig(),
    python=(3, 11, 7),
    system="Linux x86_64",
    engine=ENGINE,
    available_bytes=8_000_000_000,
    model=MODEL,
    cache_bytes=50_000_000,
    tls=(),
    cloud=CLOUD,
    unix_time=1_760_000_000.0,
    calibration="844 questions",
    threshold=0.32,
    easy=decision(Route.LOCAL),
    hard=decision(Route.SPECULATE, "the cloud is needed with probability 1.00"),
    draft=DRAFT,
    link=LINK,
    measure_error=None,
    forecast=tuple(forecast(DRAFT, LINK, 0.8)),
    acceptance_rate=0.8,
)


def test_where_all_is_well_nothing_is_to_do():
    findings = examine(GOOD)
    assert {finding.status for finding in findings} == {Status.OK}
    assert all(finding.do == "" for finding in findings)
    assert exit_code(findings) == 0


def with_settings(**settings: object) -> EdgeConfig:
    return EdgeConfig.model_validate(settings)


def cloud(**changes: object) -> dict[str, CloudFacts]:
    return {"cloud": replace(CLOUD, **changes)}


REFUSED = "the cloud at 127.0.0.1:9 refuses connections; start one with `duet-cloud serve`"
AWAY = ReplicaStatus("b:1", BreakerState.OPEN, 3.0, "refuses connections")
HERE = ReplicaStatus("a:1", BreakerState.CLOSED, 0.0, None)
VALID = TlsFacts("far:1", expires_in_s=90 * 86_400.0)
TLS = {"settings": with_settings(cloud="far:1")}


@pytest.mark.parametrize(
    ("changes", "check", "status"),
    [
        pytest.param({"python": (3, 14, 0)}, "python", "warn", id="a Python that nobody tested"),
        pytest.param({"engine": None}, "llama.cpp", "fail", id="no llama.cpp"),
        pytest.param(
            {"engine": None, "settings": with_settings(mode="cloud")},
            "llama.cpp", "warn", id="no llama.cpp, which mode cloud does without",
        ),
        pytest.param(
            {"engine": replace(ENGINE, cpu_flags=frozenset({"avx2", "avx512f"}))},
            "llama.cpp", "warn", id="a CPU with faster kernels than were compiled",
        ),
        pytest.param(
            {"settings": with_settings(gpu_layers=-1)}, "gpu", "fail", id="a GPU is asked for, not compiled",
        ),
        pytest.param({"engine": replace(ENGINE, offloads=True)}, "gpu", "warn", id="a GPU lies idle"),
        pytest.param(
            {"model": replace(MODEL, path=None, sha256=None)}, "model", "warn", id="a model not pulled yet",
        ),
        pytest.param(
            {"model": replace(MODEL, path=None, error="'x' is neither")}, "model", "fail", id="unknown model",
        ),
        pytest.param({"model": replace(MODEL, sha256="b" * 64)}, "model", "fail", id="a damaged file"),
        pytest.param(
            {"model": replace(MODEL, error="cannot be read")}, "model", "fail", id="a file that fails to load"
        ),
        pytest.param({"available_bytes": 100_000_000}, "memory", "fail", id="too little memory"),
        pytest.param({"available_bytes": 600_000_000}, "memory", "warn", id="just enough memory"),
        pytest.param({"unix_time": 0.0}, "clock", "fail", id="a clock that was never set"),
        pytest.param(cloud(clock_ahead_s=-90.0), "clock", "warn", id="clocks that disagree"),
        pytest.param(cloud(error=REFUSED), "cloud", "warn", id="no cloud, which auto does without"),
        pytest.param(
            cloud(error=REFUSED) | {"settings": with_settings(mode="speculate")},
            "cloud", "fail", id="no cloud, which mode speculate needs",
        ),
        pytest.param(cloud(context_tokens=1024), "cloud", "warn", id="a short context in the cloud"),
        pytest.param(cloud(replicas=(HERE, AWAY)), "replicas", "warn", id="one replica of two is away"),
        *(
            pytest.param(
                TLS | {"tls": (TlsFacts("far:1", fault, "it is so"),)}, "tls", "fail", id=f"tls: {fault.name}"
            )
            for fault in TlsFault
        ),
        pytest.param(
            TLS | {"tls": (VALID, TlsFacts("far:2", TlsFault.EXPIRED, "it has expired"))},
            "tls", "fail", id="a certificate of the second replica that has expired",
        ),
        pytest.param(
            TLS | {"tls": (VALID, TlsFacts("far:2", expires_in_s=3 * 86_400.0))},
            "tls", "warn", id="a certificate that ends in three days",
        ),
        pytest.param(TLS | {"tls": (TlsFacts("far:1"),)}, "tls", "warn", id="no certificate was seen"),
        pytest.param(
            {"settings": with_settings(cloud="far:1", insecure=True)}, "tls", "warn", id="plain text outside",
        ),
        pytest.param(
            cloud(vocabulary_error="they do not share a vocabulary", num_masked=None),
            "vocabulary", "warn", id="another vocabulary",
        ),
        pytest.param(
            {"draft": DraftSpeed(90.0, 5.0)}, "draft speed", "warn", id="a draft slower than the target",
        ),
        pytest.param(
            {"link": None, "measure_error": "the cloud went away; try"}, "link", "warn", id="a lost link",
        ),
        pytest.param({"calibration": None}, "calibration", "warn", id="no calibration"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found_and_has_something_to_do(changes, check, status):
    findings = examine(replace(GOOD, **changes))
    [finding] = [finding for finding in findings if finding.check == check]
    assert finding.status.value == status
    assert finding.do
    assert "\n" not in finding.found + finding.do
    assert exit_code(findings) == (status == "fail")


def test_a_valid_certificate_is_told_with_its_days():
    [finding] = [found for found in examine(replace(GOOD, **TLS, tls=(VALID,))) if found.check == "tls"]
    assert (finding.status, finding.found) == (Status.OK, "the cloud's certificate is valid for 90 days")


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"mode": "local"}, "mode local"), ({"private": True}, "keep all prompts here")],
)
def test_a_cloud_that_is_not_asked_is_no_fault(settings, why):
    facts = replace(GOOD, settings=with_settings(**settings), cloud=None, link=None)
    findings = examine(facts)
    assert exit_code(findings) == 0
    assert why in checks.check_cloud(facts).found
    assert {"tls", "vocabulary", "replicas"}.isdisjoint(finding.check for finding in findings)


def test_the_outlook_tells_the_threshold_the_route_and_the_faster_way():
    local, other, way = outlook(GOOD)
    assert local == "auto answers here where the cloud is needed with a probability below 0.32"
    assert other == "auto answers other questions by speculate: the cloud is needed with probability 1.00"
    assert "the cloud's own stream 11.1" in way
    assert "will take drafts" in way


def test_the_outlook_without_a_cloud_is_that_all_is_answered_here():
    here = decision(Route.LOCAL, "no cloud: it is away; start one")
    assert outlook(replace(GOOD, easy=here, hard=here)) == [
        "auto answers every question here: no cloud: it is away"
    ]
