"""`duet-cloud serve` over a scripted target, as a process: `python -m tests.scripted_service '{"slots": 4}'`.

Not a model: for tests and figures of the service itself, whose target costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import sys

from cloud_service.server import serve
from shared.config import CloudConfig
from shared.logs import configure_logging
from tests.mortal import ForgetfulTarget


def main() -> None:
    """The argument is JSON of settings by name."""
    settings = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    config = CloudConfig(
        **{"listen": "127.0.0.1:0", "log_level": "warning", "max_draft_tokens": 64, **settings}
    )
    configure_logging(config.log_format, config.log_level)
    target = ForgetfulTarget()
    asyncio.run(serve(config, lambda: target, on_ready=lambda a: print(f"listening on {a}", flush=True)))


if __name__ == "__main__":
    main()
