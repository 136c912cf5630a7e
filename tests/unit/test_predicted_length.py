"""What the edge says of a length is a number of tokens that the answer can have, whatever was read."""

from __future__ import annotations

import math

import pytest

from edge_agent.routing.probes import Reading, default_probes
from edge_agent.routing.router import Router
from shared.config import EdgeConfig


@pytest.mark.parametrize(
    ("read", "predicted"),
    [
        pytest.param(37.4, 37, id="a reading"),
        pytest.param(None, 512, id="none: as long as it may be"),
        pytest.param(math.nan, 512, id="no number"),
        pytest.param(math.inf, 512, id="infinite"),
        pytest.param(1e12, 512, id="huge"),
        pytest.param(-4.0, 1, id="negative"),
        pytest.param(0.2, 1, id="less than a token"),
    ],
)
def test_a_reading_becomes_a_length(read: float | None, predicted: int) -> None:
    router = Router(None, None, EdgeConfig(max_tokens=512), probes=default_probes(), calibration=None)  # type: ignore[arg-type]
    assert router._predicted_tokens({}, [Reading("bins", read, {})]) == predicted
