"""Settings: which source wins, and what is refused in whose name."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from shared.config import CloudConfig, EdgeConfig, resolve
from shared.controller import Way
from shared.errors import InvalidSetting, UnknownSetting


def test_nothing_set_gives_the_defaults():
    config, origin = resolve(EdgeConfig, {})
    assert config == EdgeConfig()
    assert set(origin) == set(EdgeConfig.model_fields)
    assert set(origin.values()) == {"default"}


def test_a_later_layer_wins_and_every_setting_knows_its_source():
    config, origin = resolve(
        EdgeConfig,
        {
            "duet.yaml": {"top_k": 10, "top_p": 0.5, "min_p": 0.1},
            "environment": {"top_k": "20", "top_p": "0.6"},
            "flags": {"top_k": 30},
        },
    )
    assert (config.top_k, config.top_p, config.min_p) == (30, 0.6, 0.1)
    assert {name: source for name, source in origin.items() if source != "default"} == {
        "top_k": "flags",
        "top_p": "environment",
        "min_p": "duet.yaml",
    }


def test_the_pace_of_speculation_is_a_window_or_stop_and_wait():
    assert EdgeConfig(max_draft_tokens=3, max_in_flight_tokens=9).pace.max_in_flight_tokens == 9
    assert EdgeConfig(proactive=False).pace.max_in_flight_tokens is None


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        pytest.param({}, {Way.CLOUD, Way.STOP_AND_WAIT, Way.PROACTIVE}, id="nothing is set"),
        pytest.param({"proactive": True}, {Way.CLOUD, Way.PROACTIVE}, id="proactive is set"),
        pytest.param({"proactive": False}, {Way.CLOUD, Way.STOP_AND_WAIT}, id="stop-and-wait is set"),
        pytest.param({"policy": "bild"}, {Way.STOP_AND_WAIT, Way.PROACTIVE}, id="bild asks for drafts"),
    ],
)
def test_the_speed_controller_chooses_from_what_is_not_set(settings, ways):
    config = EdgeConfig(**settings)
    assert config.choices(stream=True).ways == ways
    assert config.choices(stream=False).ways == ways - {Way.CLOUD}
    assert EdgeConfig(max_draft_tokens=5, **settings).choices(stream=True).draft_lengths == (5,)
    assert len(config.choices(stream=False, fixed=True).ways) == 1


def test_a_bad_value_that_is_overridden_does_no_harm():
    config, _ = resolve(EdgeConfig, {"duet.yaml": {"top_k": 0}, "flags": {"top_k": 5}})
    assert config.top_k == 5


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("temprature", "temperature"), ("max-tokens", "max_tokens"), (1, None), ("zzz", None)],
)
def test_an_unknown_setting_is_refused_with_its_source_and_the_nearest_known_one(name, nearest):
    with pytest.raises(UnknownSetting) as caught:
        resolve(EdgeConfig, {"duet.yaml": {name: 1}})
    assert str(caught.value).startswith(f"unknown setting {name!r} in duet.yaml; did you mean '")
    if nearest:
        assert str(caught.value).endswith(f"'{nearest}'?")


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        pytest.param(EdgeConfig, "mode", "fast", id="not one of the choices"),
        pytest.param(EdgeConfig, "max_tokens", "many", id="words for a number"),
        pytest.param(EdgeConfig, "max_tokens", 0, id="too small"),
        pytest.param(EdgeConfig, "max_in_flight_tokens", 0, id="a window of nothing"),
        pytest.param(EdgeConfig, "acceptance_threshold", 1.01, id="more than certain"),
        pytest.param(EdgeConfig, "max_tokens", 1.5, id="half a token"),
        pytest.param(EdgeConfig, "max_tokens", None, id="empty"),
        pytest.param(EdgeConfig, "temperature", -1, id="below zero"),
        pytest.param(EdgeConfig, "temperature", math.inf, id="infinite"),
        pytest.param(EdgeConfig, "temperature", math.nan, id="not a number"),
        pytest.param(EdgeConfig, "top_k", 65, id="too large"),
        pytest.param(EdgeConfig, "top_p", 0.0, id="at an open end"),
        pytest.param(EdgeConfig, "policy", "lossy", id="an unknown policy"),
        pytest.param(EdgeConfig, "fallback_threshold", 1.1, id="a probability above one"),
        pytest.param(EdgeConfig, "fallback_threshold", math.nan, id="a probability that is no number"),
        pytest.param(EdgeConfig, "rollback_threshold", 0.0, id="a distance of zero"),
        pytest.param(EdgeConfig, "rollback_threshold", math.inf, id="an endless distance"),
        pytest.param(EdgeConfig, "seed", 2**64, id="a seed of 65 bits"),
        pytest.param(EdgeConfig, "seed", -1, id="a negative seed"),
        pytest.param(EdgeConfig, "stop", [1], id="a number for a text"),
        pytest.param(EdgeConfig, "stop", "", id="an empty stop string, which every text holds"),
        pytest.param(EdgeConfig, "stop", ["a", ""], id="an empty stop string among others"),
        pytest.param(EdgeConfig, "cloud", "localhost", id="an address without a port"),
        pytest.param(EdgeConfig, "cloud", "http://localhost:1", id="a URL for an address"),
        pytest.param(CloudConfig, "listen", "::1:50151", id="an IPv6 address without brackets"),
        pytest.param(CloudConfig, "slots", 0, id="no slots"),
        pytest.param(CloudConfig, "cache_type", "q2", id="an unknown cache type"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_name_and_source(cls, name, value):
    with pytest.raises(InvalidSetting) as caught:
        resolve(cls, {"duet.yaml": {}, "environment": {name: value}})
    assert str(caught.value).startswith(f"{name} = {value!r} in environment cannot be used: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "localhost:50151", "gpu-1.example.com:443", "[::1]:50151"]
)
def test_an_address_is_a_host_and_a_port(address):
    assert resolve(EdgeConfig, {"flags": {"cloud": address}})[0].cloud == address


@pytest.mark.parametrize(
    ("value", "stop"),
    [("END", ("END",)), (["a", "b"], ("a", "b")), ((), ())],
    ids=["one text", "a list", "none"],
)
def test_stop_is_one_text_or_several(value, stop):
    assert resolve(EdgeConfig, {"flags": {"stop": value}})[0].stop == stop


def test_the_largest_and_the_smallest_seed_are_legal():
    for seed in (0, 2**64 - 1):
        assert resolve(EdgeConfig, {"environment": {"seed": str(seed)}})[0].seed == seed


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        EdgeConfig().top_k = 3


@pytest.mark.parametrize("cls", [EdgeConfig, CloudConfig])
def test_every_setting_is_described(cls):
    assert [name for name, field in cls.model_fields.items() if not field.description] == []
