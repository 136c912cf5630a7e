"""Who may ask `duet serve` through a browser."""

from __future__ import annotations

import pytest

from edge_agent.http.cross_origin import check_host, check_same_site
from edge_agent.http.errors import ApiError

HOST = {"host": "127.0.0.1:8080"}
OWN = "http://127.0.0.1:8080"
OTHER = "https://evil.example"


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        pytest.param("POST", {}, id="a program that is no browser"),
        pytest.param("POST", {"sec-fetch-site": "same-origin", "origin": OWN}, id="the server's own page"),
        pytest.param("POST", {"sec-fetch-site": "none"}, id="the user, by the browser itself"),
        pytest.param("POST", {"origin": OWN}, id="its own page in an older browser"),
        pytest.param(
            "POST", {"sec-fetch-site": "same-origin", "origin": "https://duet.example"},
            id="its own page through a proxy that renames it",
        ),
        pytest.param("GET", {"sec-fetch-site": "cross-site", "origin": OTHER}, id="a link that leads here"),
    ],
)  # fmt: skip
def test_served(method, headers):
    check_same_site(method, HOST | headers)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"sec-fetch-site": "cross-site", "origin": OTHER}, id="another site's page"),
        pytest.param(
            {"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"}, id="another port's page"
        ),
        pytest.param({"sec-fetch-site": "cross-site"}, id="one that hides its name"),
        pytest.param({"origin": OTHER}, id="another site's page in an older browser"),
        pytest.param({"origin": "http://127.0.0.1:3000"}, id="another port's page in an older browser"),
        pytest.param({"origin": "null"}, id="a file, or a sandboxed frame"),
    ],
)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_refused(method, headers):
    with pytest.raises(ApiError) as caught:
        check_same_site(method, HOST | headers)
    assert (caught.value.status, caught.value.code) == (403, "cross_origin_request")
    assert headers.get("origin", "another site") in str(caught.value)


@pytest.mark.parametrize(
    "host", ["localhost:8080", "localhost", "127.0.0.1:8080", "127.0.0.1", "127.1.2.3", "[::1]:8080", "[::1]"]
)
def test_this_machine_answers_to_its_own_names(host):
    check_host("127.0.0.1", {"host": host})


@pytest.mark.parametrize(
    "host", ["evil.example:8080", "evil.example", "localhost.evil.example", "10.0.0.1", ""]
)
@pytest.mark.parametrize("connected_to", ["127.0.0.1", "::1"])
def test_and_to_no_other_one(connected_to, host):
    with pytest.raises(ApiError) as caught:
        check_host(connected_to, {"host": host})
    assert (caught.value.status, caught.value.code) == (403, "unknown_host")
    assert repr(host) in str(caught.value)


def test_under_an_address_that_others_reach_any_name_may_be_its_own():
    check_host("192.0.2.7", {"host": "duet.example"})
