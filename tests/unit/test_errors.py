"""The tree of errors, and what each becomes at the two boundaries."""

from __future__ import annotations

import re

import grpc
import pytest

from shared import errors
from shared.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    TABLE,
    CloudFailed,
    CloudUnavailable,
    DuetError,
    InvalidDraft,
    InvalidRequest,
    from_status,
    outcome,
)

LEAVES = sorted(TABLE, key=lambda leaf: leaf.__name__)


def classes() -> list[type[DuetError]]:
    """Those of the module; other packages may refine a leaf."""
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, DuetError)]


def leaves() -> set[type[DuetError]]:
    parents = {base for cls in classes() for base in cls.__bases__}
    return {cls for cls in classes() if cls not in parents}


def drawn_tree() -> dict[str, str]:
    """Class -> parent, as the module's docstring draws it."""
    parents, path = {}, ["DuetError"]
    for indent, name in re.findall(r"^([│ ]*)[├└]── (\w+)", errors.__doc__, re.MULTILINE):
        depth = len(indent) // 4 + 1
        path = [*path[:depth], name]
        parents[name] = path[-2]
    return parents


def test_every_leaf_of_the_tree_has_a_row_and_every_row_is_a_leaf():
    assert set(TABLE) == leaves()


def test_the_tree_in_the_docstring_is_the_tree_of_classes():
    assert drawn_tree() == {
        cls.__name__: base.__name__ for cls in classes() if cls is not DuetError for base in cls.__bases__
    }


def test_every_status_exists_in_grpc():
    assert {row.grpc_status for row in TABLE.values()} <= set(grpc.StatusCode.__members__)


def test_exit_codes_tell_the_groups_apart_and_never_mean_success():
    codes = {row.exit_code for row in TABLE.values()}
    assert not codes & {0, 1, EXIT_INTERNAL, EXIT_INTERRUPTED}
    for leaf in LEAVES:
        shared_with = {other.__bases__ for other in LEAVES if TABLE[other].exit_code == TABLE[leaf].exit_code}
        assert shared_with == {leaf.__bases__}


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_an_error_that_crosses_the_wire_comes_back_as_itself(leaf):
    error = leaf("what happened")
    back = from_status(outcome(error).grpc_status, str(error), leaf.__name__)
    assert (type(back), str(back)) == (leaf, "what happened")


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        pytest.param("UNAVAILABLE", None, CloudUnavailable, id="a proxy's own status"),
        pytest.param("INVALID_ARGUMENT", None, InvalidRequest, id="a status that several leaves share"),
        pytest.param("INVALID_ARGUMENT", "InvalidDraft", InvalidDraft, id="the kind tells them apart"),
        pytest.param("UNAVAILABLE", "ErrorOfTheFuture", CloudUnavailable, id="a kind of a newer service"),
        pytest.param("UNAVAILABLE", "DuetError", CloudUnavailable, id="a kind that is no leaf"),
        pytest.param("DATA_LOSS", None, CloudFailed, id="a status that we never send"),
        pytest.param("UNKNOWN", "", CloudFailed, id="nothing known at all"),
    ],
)
def test_an_error_of_somebody_elses_is_read_by_its_status(status, kind, expected):
    assert type(from_status(status, "m", kind)) is expected


def test_a_refined_leaf_shares_the_row():
    class Refined(InvalidDraft):
        pass

    assert outcome(Refined("m")) == TABLE[InvalidDraft]


def test_a_group_is_not_raised_itself():
    with pytest.raises(KeyError, match="DuetError has no row"):
        outcome(DuetError("m"))
