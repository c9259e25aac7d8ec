"""User code run in this process, the way a replica runs it."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

import msgspec

from qserve.context import set_replica_context
from qserve.deployments.deployment import Deployment, deployment
from qserve.deployments.loading import load_target
from qserve.wire.channel import DATA, Channel, Chunk
from qserve.wire.codec import Codec
from qserve.wire.messages import HttpRequest, HttpResponse, decode_http_response
from qserve_workers.user.user_code import UserCode

CODEC = Codec(allow_pickle=True, max_bytes=16 * 1024 * 1024)


class Answer:
    """A response with what tests ask of it."""

    def __init__(self, response: HttpResponse) -> None:
        self.status = response.status
        self.body = response.body
        self.headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers]

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def header(self, name: str) -> str:
        """The only header of that name."""
        (value,) = (value for key, value in self.headers if key == name)
        return value


class Running:
    """A constructed replica of one deployment."""

    def __init__(self, code: UserCode, prefix: str) -> None:
        self.code = code
        self._prefix = prefix

    async def call(self, method: str = "", *args: Any, **kwargs: Any) -> Any:
        return await self.code.call(method, args, kwargs)

    async def get(self, path: str = "", **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def request(
        self,
        method: str,
        path: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        json: Any = None,
    ) -> Answer:
        """Answer a request to `path` below the deployment's route."""
        sent = {"host": "test", **(headers or {})}
        if json is not None:
            body, sent["content-type"] = msgspec.json.encode(json), "application/json"
        path, _, query = (self._prefix + path).partition("?")
        request = HttpRequest(
            method=method,
            path=unquote(path) or "/",
            raw_path=path.encode() or b"/",
            query_string=query.encode(),
            headers=[(name.encode(), value.encode()) for name, value in sent.items()],
            root_path=self._prefix,
            scheme="http",
            client=("127.0.0.1", 1234),
            server=("test", 80),
            http_version="1.1",
            request_id="r1",
            body=body,
        )
        response = await self.code.http(request, self._open_channel)
        return Answer(response or self._streamed())

    def _open_channel(self) -> Channel:
        self._parts: list[bytes] = []

        def collect(_peer: str, chunk: Chunk) -> None:
            if chunk.kind == DATA:
                self._parts.append(chunk.data)

        return Channel("replica", collect, peer="caller")

    def _streamed(self) -> HttpResponse:
        head = decode_http_response(self._parts[0])
        return HttpResponse(head.status, head.headers, b"".join(self._parts[1:]))


@asynccontextmanager
async def running(code: Any, *init_args: Any, travel: bool = False, **options: Any) -> AsyncIterator[Running]:
    """A replica of a class, function or deployment, from its spec as it is written to the state.

    Args:
        travel: The code comes out of the spec too, as in another process; else it is the very same object.
    """
    deployed = code if isinstance(code, Deployment) else deployment(**options)(code)
    spec = deployed.to_spec(CODEC, init_args=init_args, init_kwargs={}) if init_args else deployed.to_spec(CODEC)
    target = load_target(spec.target) if travel else deployed.func_or_class
    user_code = UserCode(spec, target, f"{spec.name}#1", CODEC)
    await user_code.construct()
    try:
        yield Running(user_code, "" if spec.route_prefix in (None, "/") else spec.route_prefix or "")
    finally:
        await user_code.close()
        set_replica_context(None)
