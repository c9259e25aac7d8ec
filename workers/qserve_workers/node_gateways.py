"""The gateways of a node."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from qserve.settings import Settings
from qserve_workers.children import Start, program
from qserve_workers.node_options import NodeOptions
from qserve_workers.node_template import Template
from qserve_workers.supervise import KeptProcess

logger = logging.getLogger("qserve.node")

_POLL_S = 0.02
_LAST_WORD_S = 2.0
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class GatewayReady(msgspec.Struct):
    """What a gateway writes into its ready file, as far as it matters here."""

    pid: int
    port: int = 0
    url: str = ""
    admin_url: str = ""
    error: str = ""


class NodeGateways:
    """Keeps as many gateways as there are to be, all on one port.

    Args:
        folder: For their ready files.
        environment: What they find in their environment beside that of the node.
        template: What they are forked from if it has what they need; None: each is started from nothing.
        descriptor: A socket that they listen on; None: on one of their own.
        shares_port: Gateways of other nodes may listen on the same port.
        on_failure: Called with the reason when they cannot start.

    Attributes:
        console_url: The URL of the console of the first of them; "" as long as there is none.
    """

    def __init__(
        self,
        options: NodeOptions,
        settings: Settings,
        folder: Path,
        environment: Mapping[str, str],
        template: Template | None,
        *,
        descriptor: int | None,
        shares_port: bool,
        on_failure: Callable[[str], None],
    ) -> None:
        self._options = options
        self._settings = settings
        self._folder = folder
        self._environment = environment
        self._template = template
        self._descriptor = descriptor
        self._shares_port = shares_port or options.gateway_workers > 1
        self._on_failure = on_failure
        self._port = options.port
        self._running: list[KeptProcess] = []
        self.console_url = ""

    async def start(self) -> str:
        """Start them; returns the URL on which they listen, "" if they cannot."""
        url = await self._start(0)  # alone, because it may have to find a port first
        others = range(1, self._options.gateway_workers if url else 0)
        await asyncio.gather(*map(self._start, others))
        return url

    async def stop(self, grace_s: float, force: asyncio.Event) -> None:
        """Let all of them finish their requests and end; who waits longer is told to come again."""
        await asyncio.gather(*(each.stop(grace_s, force, last_word_s=_LAST_WORD_S) for each in self._running))

    async def _start(self, number: int) -> str:
        ready_file = self._folder / f"gateway-{number}.json"
        environment = dict(self._environment)
        if self._settings.admin_port:
            # An admin listener each: what they count is their own.
            environment["QSERVE_ADMIN_PORT"] = str(self._settings.admin_port + number)
        if self._options.log_file is not None and self._options.host in _LOCAL:  # strangers need not know its path
            environment["QSERVE_LOG_FILE"] = str(self._options.log_file)
        name = f"gateway {number}" if self._options.gateway_workers > 1 else "gateway"
        ready_file.unlink(missing_ok=True)  # of a node before this one
        gateway = KeptProcess(name, self._program(ready_file, environment))
        self._running.append(gateway)
        gateway.start()
        while True:
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
                ready = msgspec.json.decode(ready_file.read_bytes(), type=GatewayReady)
                if ready.error:
                    self._on_failure(ready.error)
                    return ""
                self.console_url = self.console_url or (f"{ready.admin_url}/-/console" if ready.admin_url else "")
                self._port = ready.port  # the one to take again after a restart
                return ready.url
            await asyncio.sleep(_POLL_S)

    def _program(self, ready_file: Path, environment: Mapping[str, str]) -> Start:
        descriptor = self._descriptor
        if self._template is not None and self._template.has_gateway:
            return self._template.gateway(lambda: self._arguments(ready_file), environment, descriptor)

        def command() -> list[str]:
            inherited = () if descriptor is None else ("--fd", str(descriptor))
            return [sys.executable, "-m", "qserve_gateway", *self._arguments(ready_file), *inherited]

        return program(command, os.environ | environment, descriptors=() if descriptor is None else (descriptor,))

    def _arguments(self, ready_file: Path) -> list[str]:
        return [
            *("--host", self._options.host, "--port", str(self._port)),
            *("--ready-file", str(ready_file)),
            *(("--reuse-port",) if self._shares_port else ()),
            *self._options.gateway_arguments,
        ]
