"""The application of the admin listener: metrics, status and actions, for those who have the token."""

import asyncio
import contextlib
import hmac
import ipaddress
import os
import re
import secrets
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, unquote

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from qserve.broker.instance.state import State
from qserve.calls.client import Client
from qserve.errors import ConfigurationError, QServeError
from qserve.settings import LOOPBACK_HOSTS, Settings
from qserve.this_machine import runtime_folder
from qserve.wire.messages import HttpResponse
from qserve_gateway.admin import dead_letter_pages
from qserve_gateway.admin.metrics import metrics, status
from qserve_gateway.door.limits import Door, request_ids, same_host
from qserve_gateway.respond import json_response, local_error_response, send_response, text_response

_is_deployment = re.compile(r"/-/deployments/([^/]+)").fullmatch
_SCRAPER = b"x-prometheus-scrape-timeout-seconds"
"""A header of Prometheus and of what scrapes in its place."""
_CONSOLE = "/-/console"
_LOCAL = LOOPBACK_HOSTS


class Admin:
    """The ASGI application of the admin listener.

    Every request, whatever its method, has to name a host that is allowed, must not come from a page of another site,
    and has to bring the token. The first of these keeps out pages whose host name was made to point at this address.

    Args:
        state: The state of the instance.
        door: The door of the public listener, whose requests the metrics count.
        client: The client with which the gateway puts its calls.
        token: What requests have to bring; see `admin_token`.
        drain: Makes the gateway stop as SIGTERM does.
    """

    def __init__(
        self, settings: Settings, state: State, door: Door, client: Client, token: str, drain: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._state = state
        self._door = door
        self._client = client
        self._token = token.encode()
        self._drain = drain
        self._hosts = frozenset(name.strip().lower() for name in settings.admin_allowed_hosts.split(",")) | _LOCAL
        self._ids = request_ids()
        self._pages: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        named = dict(scope["headers"])
        if scope["path"].startswith(_CONSOLE):
            response = self._refusal_of_page(named, scope["method"])
            if response is None:
                await self._console(scope, receive, send)
                return
        else:
            response = self._refusal(named)
        if response is None:
            try:
                response = await self._respond(scope, named)
            except QServeError as exc:
                response = local_error_response(exc)
        await send_response(send, response, scope["method"], next(self._ids))

    def _console(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if self._pages is None:
            # By the first who looks: templates and their library cost time and memory that most gateways never need.
            from qserve_gateway.console.console_app import Console  # noqa: PLC0415

            self._pages = Console(self._settings, self._state, self._token.decode())
        return self._pages(scope, receive, send)

    def _refusal_of_page(self, named: dict[bytes, bytes], method: str) -> HttpResponse | None:
        # A link on a page of another site may lead here: that only shows something, and only to who may see it.
        follows = named.get(b"sec-fetch-mode") == b"navigate" and named.get(b"sec-fetch-dest") == b"document"
        if method in ("GET", "HEAD") and follows and b"origin" not in named:
            named = named | {b"sec-fetch-site": b"none"}
        return self._refusal_of_origin(named)

    def _refusal(self, named: dict[bytes, bytes]) -> HttpResponse | None:
        refusal = self._refusal_of_origin(named)
        if refusal is not None:
            return refusal
        scheme, _, token = named.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            return text_response(401, "A bearer token is needed.", (b"www-authenticate", b"Bearer"))
        return None

    def _refusal_of_origin(self, named: dict[bytes, bytes]) -> HttpResponse | None:
        host = named.get(b"host", b"").decode("latin-1").lower()
        name = re.sub(r":\d+$", "", host).strip("[]")
        if name not in self._hosts and not (self._settings.admin_host not in _LOCAL and _is_address(name)):
            return text_response(403, "This host name is not one of ours (QSERVE_ADMIN_ALLOWED_HOSTS).")
        origin = named.get(b"origin")
        foreign = origin is not None and not same_host(origin.decode("latin-1").lower(), host)
        if foreign or named.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            return text_response(403, "Pages of other sites may not ask here.")
        return None

    async def _respond(self, scope: Scope, named: dict[bytes, bytes]) -> HttpResponse:
        method, path = scope["method"], scope["path"]
        deployment = _is_deployment(path)
        if deployment is not None:
            return await self._delete(unquote(deployment[1])) if method == "DELETE" else _not_allowed("DELETE")
        if path.startswith("/-/dead"):
            limit = self._settings.out_of_line_bytes
            return await asyncio.to_thread(dead_letter_pages.answer, self._state, limit, method, path)
        if path == "/-/drain":
            return self._leave() if method == "POST" else _not_allowed("POST")
        if path not in ("/-/metrics", "/-/status"):
            text = "There are /-/console, /-/metrics, /-/status, /-/deployments/NAME, /-/dead and /-/drain."
            return text_response(404, text)
        return await self._tell(path, scope, named) if method in ("GET", "HEAD") else _not_allowed("GET, HEAD")

    async def _tell(self, path: str, scope: Scope, named: dict[bytes, bytes]) -> HttpResponse:
        if path == "/-/metrics":
            return await self._metrics(parse_qs(scope["query_string"].decode("latin-1")), named)
        return json_response(await asyncio.to_thread(status, self._state, self._settings.namespace, self._client.id))

    async def _metrics(self, query: dict[str, list[str]], named: dict[bytes, bytes]) -> HttpResponse:
        share = query.get("share", [""])[-1]
        if share not in ("", "gateway", "instance"):
            return text_response(400, "?share= takes gateway or instance.")
        scraped = _SCRAPER in named
        accept = named.get(b"accept", b"").decode("latin-1")
        read = partial(metrics, self._state, self._door, self._client, accept, share, scraped=scraped)
        text, content_type = await asyncio.to_thread(read)
        return HttpResponse(200, [(b"content-type", content_type.encode())], text)

    def _leave(self) -> HttpResponse:
        asyncio.get_running_loop().call_later(0.05, self._drain)  # the answer leaves first
        return text_response(202, "draining")

    async def _delete(self, name: str) -> HttpResponse:
        deleted = await asyncio.to_thread(self._state.delete, name)
        if deleted is None:
            return text_response(404, f"There is no deployment {name!r}.")
        return HttpResponse(200, [(b"content-type", b"application/json")], msgspec.json.encode({"deleted": name}))


def _not_allowed(methods: str) -> HttpResponse:
    return text_response(405, f"Only {methods}.", (b"allow", methods.encode()))


def _is_address(name: str) -> bool:
    # No name that somebody else could point at us.
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def admin_token(settings: Settings) -> str:
    """Find the token: `QSERVE_ADMIN_TOKEN`, or the one in this user's runtime folder, which is made if there is none.

    Raises:
        ConfigurationError: No token is set, and the listener can be reached by users who cannot read that file.
    """
    token = settings.admin_token.strip()  # what mounts secrets often leaves a line end behind it
    if token:
        return token
    if settings.admin_host not in _LOCAL:
        raise ConfigurationError(
            f"QSERVE_ADMIN_HOST={settings.admin_host} makes the admin listener reachable from other machines: set "
            "QSERVE_ADMIN_TOKEN too."
        )
    return _read_or_make(token_path(settings.namespace))


def token_path(namespace: str) -> Path:
    """The file with the token of a namespace for which none is set."""
    return runtime_folder() / f"{namespace}.admin-token"


def _read_or_make(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        if token := path.read_text().strip():
            return token
        path.unlink()  # a power failure may leave it empty, and nothing would open every door
    descriptor, draft = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        pass  # another gateway was faster
    finally:
        Path(draft).unlink()
    return path.read_text().strip()
