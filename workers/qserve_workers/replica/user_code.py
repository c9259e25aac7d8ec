"""User code inside a replica: constructed once, then called for as long as the replica lives."""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial, partialmethod
from inspect import Parameter
from types import AsyncGeneratorType, GeneratorType, new_class
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request

import qserve.serve  # noqa: F401  tells deployments that user code may deploy where the instance is
from qserve.context import ReplicaContext, current_call, set_replica_context
from qserve.deployments.ingress import bind_app
from qserve.deployments.loading import importing
from qserve.errors import MethodNotFound
from qserve.wire.channel import Channel
from qserve.wire.messages import HttpRequest, HttpResponse, WebSocketEvent, encode
from qserve.wire.spec import DeploymentSpec
from qserve_workers.replica.asgi import ASGIApp, Lifespan, Socket, run_asgi
from qserve_workers.replica.plain_responses import make_request, make_response, stream_chunks, text_response

logger = logging.getLogger(__name__)

_METHOD_HEADER = b"x-serve-call-method"
_CALL = "__call__"
_EXHAUSTED = object()
_SERVICE_RESTART = 1012


class Codec(Protocol):
    """The part of `qserve.wire.codec.Codec` that is needed here."""

    def pack(self, value: object, what: str = "value") -> bytes: ...

    def unpack(self, data: bytes) -> Any: ...

    def unpack_call(self, data: bytes) -> tuple[Any, dict[str, Any]]: ...


@dataclass(frozen=True, slots=True)
class _Method:
    """A method with all that is found out about it once, so that no call has to."""

    function: Callable[..., Any]
    is_async: bool
    takes_request: bool
    is_method: bool


class UserCode:
    """The class or function of one deployment. All methods belong to the replica's event loop.

    `async def` code runs on that loop; `def` code (constructors and `__del__` too) on threads of its own, one unless
    `max_threads` says more, so that it needs no locks and may use things that stick to their thread.

    Args:
        target: The class or function, as `load_target` gives it.
        tag: Tag of the replica.
    """

    def __init__(self, spec: DeploymentSpec, target: object, tag: str, codec: Codec) -> None:
        self._spec = spec
        self._target: Any = target
        self._tag = tag
        self._codec = codec
        self._instance: Any = None
        self._methods: dict[str, _Method] = {}
        self._app: ASGIApp | None = None
        self._lifespan: Lifespan | None = None
        self._sockets: set[Socket] = set()
        self._threads = ThreadPoolExecutor(spec.max_threads, thread_name_prefix=f"qserve-{spec.name}")

    async def construct(self) -> None:
        """Build the instance, give it its user_config, run the startup hooks of its application.

        Raises:
            Exception: What user code raised.
        """
        if self._spec.is_class:
            await self._construct_instance()
        else:
            self._instance = self._target
            set_replica_context(ReplicaContext(self._spec.name, self._tag, self._instance))
            self._methods = {_CALL: _describe(self._target)}
        if self._spec.user_config is not None:
            await self.reconfigure(self._spec.user_config)
        if self._spec.is_ingress:
            self._app = bind_app(self._instance)
            self._lifespan = Lifespan(self._app)
            await self._lifespan.startup()

    async def reconfigure(self, packed: bytes) -> None:
        """Hand the instance a user_config.

        Raises:
            ValueError: A function, or a class without `reconfigure`.
            Exception: What `reconfigure` raised.
        """
        if not self._spec.is_class:
            raise ValueError(f"Deployment {self._spec.name!r} is a function: user_config needs a class.")
        reconfigure = getattr(self._instance, "reconfigure", None)
        if reconfigure is None:
            raise ValueError(f"user_config specified but deployment {self._spec.name!r} is missing reconfigure method.")
        config = self._codec.unpack(packed)
        if inspect.iscoroutinefunction(reconfigure):
            await reconfigure(config)
        else:
            await self._in_thread(reconfigure, (config,), {})
        self._methods = _class_methods(self._instance)

    @property
    def available_methods(self) -> list[str]:
        """What a handle may call by name."""
        if not self._spec.is_class:
            return []
        public = (name for name in dir(self._instance) if not name.startswith("__"))
        return [name for name in public if _callable_attribute(self._instance, name) is not None]

    @property
    def only_sync(self) -> bool:
        """Whether every call waits for a thread of the replica."""
        return self._app is None and not any(method.is_async for method in self._methods.values())

    def needs_thread(self, method: str) -> bool:
        """Whether a call of this method waits for a thread of the replica."""
        found = self._methods.get(method or _CALL)
        return found is not None and not found.is_async

    async def call(self, method: str, args: Any, kwargs: dict[str, Any]) -> object:
        """Run a call that came from Python.

        Raises:
            MethodNotFound: There is no such method.
            Exception: What user code raised.
        """
        found = self._methods.get(method or _CALL) or self._own_method(method)
        try:
            if found.is_async:
                result = await found.function(*args, **kwargs)
            else:
                result = await self._in_thread(found.function, args, kwargs)
        except (SystemExit, KeyboardInterrupt) as exc:
            raise _not_an_exit(exc) from exc
        if isinstance(result, GeneratorType | AsyncGeneratorType):
            on_chunk = getattr(current_call.get(), "on_chunk", None)
            chunks = []
            async with contextlib.aclosing(self._iterate(result)) as iterated:
                async for chunk in iterated:
                    chunks.append(chunk)
                    if on_chunk is not None:
                        await on_chunk(chunk)
            return chunks
        return result

    async def stream(self, method: str, args: Any, kwargs: dict[str, Any], channel: Channel) -> None:
        """Run a call whose result is a generator, and send what it yields; any other result is sent as the only chunk.

        Raises:
            MethodNotFound: There is no such method.
            StreamBroken: The caller has left; the generator is closed.
            Exception: What user code raised.
        """
        found = self._methods.get(method or _CALL) or self._own_method(method)
        if found.is_async:
            result = await found.function(*args, **kwargs)
        else:
            result = await self._in_thread(found.function, args, kwargs)
        if not isinstance(result, GeneratorType | AsyncGeneratorType):
            await channel.send(self._codec.pack(result, "the result"))
            return
        async with contextlib.aclosing(self._iterate(result)) as chunks:
            async for chunk in chunks:
                await channel.send(self._codec.pack(chunk, "a chunk of the result"))

    async def websocket(self, request: HttpRequest, channel: Channel) -> None:
        """Serve a WebSocket; a deployment without an application denies it.

        Raises:
            StreamBroken: The application failed.
        """
        if self._app is None or self._lifespan is None:
            await channel.send(encode(WebSocketEvent("close", code=1008, reason="not a WebSocket")))
        else:
            socket = Socket(request, channel)
            self._sockets.add(socket)
            try:
                await socket.run(self._app, self._lifespan.state)
            finally:
                self._sockets.discard(socket)

    async def close_websockets(self) -> None:
        """Send the clients of open WebSockets elsewhere: they last for as long as they please."""
        await asyncio.gather(*(socket.close(_SERVICE_RESTART, "the replica is leaving") for socket in self._sockets))

    async def http(self, request: HttpRequest, open_channel: Callable[[], Channel]) -> HttpResponse | None:
        """Answer a request; None when the response was streamed over the call's channel.

        Only plain deployments raise; an application answers with status 500 itself.

        Raises:
            MethodNotFound: X-Serve-Call-Method names no public method.
            ResultNotSerializable: The result is neither a response nor JSON.
            StreamBroken: The client has left, or the response failed after its beginning was sent.
            Exception: What user code raised.
        """
        if self._app is not None and self._lifespan is not None:
            return await run_asgi(self._app, request, open_channel, self._lifespan.state)
        found = self._http_method(request)
        args: tuple[Request, ...] = ()
        if found.takes_request:
            args = (make_request(request, open_channel),)
            if request.body_follows and not found.is_async:
                await args[0].body()  # sync code cannot wait for it
        try:
            if found.is_async:
                result = await found.function(*args)
            else:
                result = await self._in_thread(found.function, args, {})
        except HTTPException as exc:
            return text_response(exc.status_code, exc.detail, dict(exc.headers or {}))
        except (SystemExit, KeyboardInterrupt) as exc:
            raise _not_an_exit(exc) from exc
        if isinstance(result, GeneratorType | AsyncGeneratorType):
            async with contextlib.aclosing(self._iterate(result)) as chunks:
                return await make_response(await stream_chunks(chunks), request, open_channel)
        return await make_response(result, request, open_channel)

    async def close(self) -> None:
        """Run the shutdown hooks, then `__del__` once. What they raise is logged: the replica goes all the same."""
        if self._lifespan is not None:
            try:
                await self._lifespan.shutdown()
            except Exception:
                logger.exception("Exception in a shutdown hook of deployment %r", self._spec.name)
        destructor = getattr(self._instance, "__del__", None) if self._spec.is_class else None
        if destructor is not None:
            try:
                if inspect.iscoroutinefunction(destructor):
                    await destructor()
                else:
                    await self._in_thread(destructor, (), {})
            except Exception:
                logger.exception("Exception in __del__ of deployment %r", self._spec.name)
            _forget_destructor(self._instance)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _construct_instance(self) -> None:
        cls = self._target
        with importing():  # unpacking may import modules of the user's
            args, kwargs = self._codec.unpack_call(self._spec.init_args) if self._spec.init_args else ((), {})
        # Not cls(*args): the result of __init__ does not matter, and it may be a coroutine.
        allocate = (args, kwargs) if cls.__new__ is not object.__new__ else ((), {})
        self._instance = cls.__new__(cls, *allocate[0], **allocate[1])
        set_replica_context(ReplicaContext(self._spec.name, self._tag, self._instance))
        if inspect.iscoroutinefunction(cls.__init__):
            await self._instance.__init__(*args, **kwargs)
        else:
            await self._in_thread(self._instance.__init__, args, kwargs)
        self._methods = _class_methods(self._instance)

    def _http_method(self, request: HttpRequest) -> _Method:
        name = _CALL
        if self._spec.http_method_header:
            for header, value in request.headers:
                if header == _METHOD_HEADER:
                    name = value.decode("latin-1")
                    break
        found = self._methods.get(name)
        if found is None or (name != _CALL and (name.startswith("_") or not found.is_method)):
            raise self._no_method(name)
        return found

    def _own_method(self, name: str) -> _Method:
        """A method that only the instance has, set in its constructor or later."""
        function = None if name.startswith("__") else _callable_attribute(self._instance, name)
        if not name or function is None:
            raise self._no_method(name or _CALL)
        return _describe(function)

    def _no_method(self, name: str) -> MethodNotFound:
        return MethodNotFound(
            f"Tried to call a method {name!r} that does not exist. Available methods: {self.available_methods}."
        )

    async def _in_thread(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._threads, copy_context().run, _run_sync, function, args, kwargs)
        return await result if inspect.isawaitable(result) else result

    async def _iterate(self, generator: Any) -> AsyncGenerator[Any, None]:
        """What a generator yields; a sync one advances on the replica's thread, and both are closed at the end."""
        if isinstance(generator, AsyncGeneratorType):
            async with contextlib.aclosing(generator):
                async for chunk in generator:
                    yield chunk
            return
        try:
            while (chunk := await self._in_thread(next, (generator, _EXHAUSTED), {})) is not _EXHAUSTED:
                yield chunk
        finally:
            await self._in_thread(generator.close, (), {})


def _run_sync(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    try:
        return function(*args, **kwargs)
    except StopIteration as exc:
        # A future cannot carry it, and whoever awaited that future would wait for ever.
        raise RuntimeError("user code raised StopIteration") from exc


def _not_an_exit(exc: BaseException) -> RuntimeError:
    # In a task these two would end the event loop and with it every other call of the replica.
    return RuntimeError(f"user code raised {type(exc).__name__}({exc}); a call cannot end its replica that way")


def _class_methods(instance: Any) -> dict[str, _Method]:
    """Methods of the class, except those that the instance has replaced: these may be replaced again at any time."""
    own = getattr(instance, "__dict__", {})
    names = (name for name in dir(type(instance)) if name not in own and (name == _CALL or not name.startswith("__")))
    found = ((name, _callable_attribute(instance, name)) for name in names)
    return {name: _describe(function) for name, function in found if function is not None}


def _callable_attribute(instance: Any, name: str) -> Callable[..., Any] | None:
    # Statically first: looking at a property would run it.
    static = inspect.getattr_static(instance, name, None)
    if not callable(static) and not isinstance(static, staticmethod | classmethod | partialmethod):
        return None
    found = getattr(instance, name, None)
    return found if callable(found) else None


def _describe(function: Callable[..., Any]) -> _Method:
    called = function.func if isinstance(function, partial) else function
    is_method = inspect.isroutine(called)
    if not is_method:
        called = getattr(called, _CALL, called)
    if inspect.isasyncgenfunction(called):
        return _Method(_deferred(function), True, _takes_request(function), is_method)
    return _Method(function, inspect.iscoroutinefunction(called), _takes_request(function), is_method)


def _deferred(function: Callable[..., Any]) -> Callable[..., Any]:
    """An async generator function as a coroutine function that gives the generator."""

    async def start(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return start


def _takes_request(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins tell no signature
        return True
    return any(parameter.kind not in (Parameter.KEYWORD_ONLY, Parameter.VAR_KEYWORD) for parameter in parameters)


def _nothing(self: object) -> None:
    """In place of a `__del__` that has run."""


def _without_destructor(namespace: dict[str, Any]) -> None:
    namespace |= {"__slots__": (), "__del__": _nothing}


def _forget_destructor(instance: Any) -> None:
    cls = type(instance)
    try:
        instance.__class__ = new_class(cls.__name__, (cls,), exec_body=_without_destructor)
    except TypeError:  # a layout Python does not let us exchange; then the collector calls __del__ once more
        logger.debug("__del__ of %r may run again", cls.__name__)
