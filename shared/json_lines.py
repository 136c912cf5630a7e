"""JSON lines, parted where JSON parts them."""

from __future__ import annotations

from collections.abc import Iterator


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Each line's number, from 1, and content; blank ones are left out.

    Not `str.splitlines`: JSON's strings may hold what that takes for ends of lines.

    >>> list(numbered_lines('{"text": "a\\u2028b"}\\n\\n{}\\n'))
    [(1, '{"text": "a\\u2028b"}'), (3, '{}')]
    """
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
