"""A gateway with one listener more: `python -m tests.support.third_listener FD READY_FILE`; FD is its bound socket."""

import asyncio
import sys
from pathlib import Path

from starlette.types import Receive, Scope, Send

from qserve.settings import Settings
from qserve_gateway.door.limits import Door
from qserve_gateway.listener import ListenAddress, Listener
from qserve_gateway.server import GatewayOptions, GatewayProcess


async def wait_for_file(scope: Scope, _receive: Receive, send: Send) -> None:
    """Answer once the file exists that the path names; a file beside it, `.asked`, tells that the request is here."""
    Path(f"{scope['path']}.asked").touch()  # noqa: ASYNC240 read by another process
    while not Path(scope["path"]).exists():  # noqa: ASYNC110, ASYNC240 written by another process
        await asyncio.sleep(0.005)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"third"})


async def main() -> None:
    """Serve on the public address and on the third one."""
    settings = Settings()
    options = GatewayOptions(ListenAddress(port=0), ready_file=Path(sys.argv[2]))
    process = GatewayProcess(options, settings)
    address = ListenAddress(fd=int(sys.argv[1]))
    third = Listener(wait_for_file, address, Door(settings, has_log=False), graceful_shutdown_timeout_s=60)
    process.listeners = (*process.listeners, third)
    await process.run()


asyncio.run(main())
