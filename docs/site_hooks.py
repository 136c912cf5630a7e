"""What the site changes on pages that are written to be read in the repository, too."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to sources lead out of the site: their text stays."""
    return _OUTSIDE.sub(r"\1", markdown)
