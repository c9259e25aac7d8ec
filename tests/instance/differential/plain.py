"""Plain uvicorn with all applications: `python -m tests.instance.differential.plain FILE` writes its port to the file.

Each application runs as with `uvicorn --root-path /prefix` behind a proxy that takes the prefix away: `root_path` is
the prefix and `path` begins with it, as a gateway must hand it on too. Nothing else is between it and uvicorn.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.lifespan.on import LifespanOn

from tests.instance.differential.catalogue import Topic, load_topics


class Prefixes:
    """Hands each request to the application whose prefix its path has; runs the lifespans of all."""

    def __init__(self, topics: list[Topic]) -> None:
        self._apps = {topic.prefix.rstrip("/"): topic.app for topic in topics}
        self._lifespans: dict[str, LifespanOn] = {}

    async def startup(self) -> None:
        """Start all lifespans."""
        for prefix, app in self._apps.items():
            self._lifespans[prefix] = LifespanOn(uvicorn.Config(app, log_config=None))
        await asyncio.gather(*(lifespan.startup() for lifespan in self._lifespans.values()))
        failed = [prefix for prefix, lifespan in self._lifespans.items() if lifespan.should_exit]
        assert not failed, f"startup failed: {failed}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        first = "/" + scope["path"][1:].partition("/")[0]
        prefix = first if first in self._apps else ""
        scope["root_path"] = prefix
        scope["state"] = self._lifespans[prefix].state.copy()
        await self._apps[prefix](scope, receive, send)


async def main(port_file: Path) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    apps = Prefixes(load_topics())
    await apps.startup()
    config = uvicorn.Config(apps, port=0, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    sock = config.bind_socket()
    draft = port_file.with_suffix(".draft")
    draft.write_text(str(sock.getsockname()[1]))
    sock.listen(128)
    draft.replace(port_file)
    await server.serve(sockets=[sock])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
