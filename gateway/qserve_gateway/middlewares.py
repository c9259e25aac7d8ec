"""The middlewares of `http_options`, which the state holds as import paths, around the gateway."""

from collections.abc import Iterable, Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qserve.deployments.loading import load_target
from qserve.errors import ConfigurationError, FrameRejected
from qserve.wire.codec import Codec
from qserve.wire.spec import MiddlewareSpec
from qserve_gateway.door.limits import CLIENT_LEFT

_FAILED = "failed"
"""Where a request's state keeps the error that has ended its response half-way."""


def wrapped(app: ASGIApp, middlewares: Sequence[Middleware]) -> ASGIApp:
    """Put an application inside middlewares, the first one outermost; without any it stays what it is.

    Raises:
        ConfigurationError: A middleware refuses its arguments.
    """
    if not middlewares:
        return app
    stack = _answering(app)
    for middleware in reversed(middlewares):
        try:
            stack = middleware.cls(stack, *middleware.args, **middleware.kwargs)
        except Exception as exc:
            raise ConfigurationError(f"{middleware!r} cannot be set up: {type(exc).__name__}: {exc}") from exc
    return _cutting(stack)


def _answering(app: ASGIApp) -> ASGIApp:
    """Make an application whose responses all have an end, and that says which one an error has ended half-way.

    Starlette's BaseHTTPMiddleware fails where there is no whole response, though its client has left.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        has_begun = is_whole = False

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun, is_whole
            has_begun = True
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await app(scope, receive, send_and_note)
        except Exception as exc:
            if has_begun:
                scope["state"][_FAILED] = exc
            raise
        if not has_begun:
            await send({"type": "http.response.start", "status": CLIENT_LEFT, "headers": []})
        if not is_whole:
            await send({"type": "http.response.body", "body": b""})

    return serve


def _cutting(stack: ASGIApp) -> ASGIApp:
    """Make an application whose responses do not look whole where the one inside the middlewares has ended half-way.

    BaseHTTPMiddleware sends the end of a response before it raises what has broken it off.
    """

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})

        async def send_unless_failed(message: Message) -> None:
            if _FAILED in state:
                raise state.pop(_FAILED)
            await send(message)

        try:
            await stack(scope, receive, send_unless_failed)
        finally:
            state.pop(_FAILED, None)  # it refers to all of this

    return serve


def load_middlewares(specs: Iterable[MiddlewareSpec], codec: Codec) -> list[Middleware]:
    """Import middlewares, in the order listed.

    Raises:
        ConfigurationError: One cannot be imported here or is no class.
    """
    return [_load(spec, codec) for spec in specs]


def _load(spec: MiddlewareSpec, codec: Codec) -> Middleware:
    cls = load_target(spec.target)
    if not callable(cls):
        raise ConfigurationError(f"the middleware {spec.target.import_path!r} is not a class")
    try:
        args, kwargs = codec.unpack_call(spec.arguments) if spec.arguments else ((), {})
    except FrameRejected as exc:
        raise ConfigurationError(f"the arguments of middleware {spec.target.import_path!r}: {exc}") from exc
    return Middleware(cls, *args, **kwargs)
