"""The middlewares of `http_options`, which the state holds as import paths."""

from collections.abc import Iterable

from starlette.middleware import Middleware

from qserve.deployments.loading import load_target
from qserve.errors import ConfigurationError, FrameRejected
from qserve.wire.codec import Codec
from qserve.wire.spec import MiddlewareSpec


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
