"""User code inside a replica: constructed once, then called for as long as the replica lives."""

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from types import AsyncGeneratorType, GeneratorType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

import qserve.serve  # noqa: F401  tells deployments that user code may deploy where the instance is
from qserve.applications.graph import own_name
from qserve.context import ReplicaContext, ReplicaRank, current_call, set_replica_context
from qserve.deployments.ingress import bind_app, contents_of
from qserve.deployments.loading import importing, load_target
from qserve.errors import MethodNotFound
from qserve.multiplexing import unload_models
from qserve.user_code.user_objects import forget_destructor
from qserve.wire.channel import Channel
from qserve.wire.codec import Codec
from qserve.wire.messages import HttpRequest, HttpResponse, WebSocketEvent, encode
from qserve.wire.spec import DeploymentSpec, Target
from qserve_workers.user.asgi import ASGIApp, Lifespan, OnComplete, Socket, run_asgi
from qserve_workers.user.constructor_loop import lend_loop
from qserve_workers.user.last_words import LastWords
from qserve_workers.user.ordinary_process import adopt_celery_app, settle_log_level
from qserve_workers.user.plain_responses import error_response, make_request, make_response, stream_chunks
from qserve_workers.user.user_entry import enter
from qserve_workers.user.user_methods import (
    CALL,
    HEALTH_CHECK,
    UserMethod,
    available_methods,
    class_methods,
    describe_method,
    has_health_check,
    is_computed,
)
from qserve_workers.user.user_threads import UserThreads

logger = logging.getLogger(__name__)

_METHOD_HEADER = b"x-serve-call-method"
_SERVICE_RESTART = 1012


def load_user_code(target: Target) -> object:
    """Import user code; raises whatever it raises. Blocks."""
    code = load_target(target, as_main=True)
    adopt_celery_app()
    return code


class UserCode:
    """The class or function of one deployment. All methods belong to the replica's event loop.

    `async def` code runs on that loop; `def` code (constructors and `__del__` too) on threads of its own, one unless
    `max_threads` says more, so that it needs no locks and may use things that stick to their thread.

    Args:
        target: The class or function, as `load_target` gives it.
        tag: Tag of the replica.
        rank: Its number among the replicas of its worker.
        context: The context in which it was imported; that of the caller where it is not given.
        threads: Those of its `def` code, on one of which it was imported; where none are given, it gets some.

    Attributes:
        context: The context variables as importing and constructing have left them, `decimal.getcontext()` and
            `numpy.seterr()` among them. Each call runs in a copy of it.
        only_sync: Whether every call waits for a thread of the replica.
    """

    def __init__(
        self,
        spec: DeploymentSpec,
        target: object,
        tag: str,
        codec: Codec,
        rank: int = 0,
        *,
        context: Context | None = None,
        threads: UserThreads | None = None,
    ) -> None:
        self.context = copy_context() if context is None else context  # an empty one is false
        self._spec = spec
        self._rank = ReplicaRank(rank, local_rank=rank)
        self._target: Any = target
        self._tag = tag
        self._codec = codec
        self._instance: Any = None
        self._methods: dict[str, UserMethod] = {}
        self.only_sync = True
        self._app: ASGIApp | None = None
        self._lifespan: Lifespan | None = None
        self._sockets: set[Socket] = set()
        self._threads = threads or UserThreads(f"qserve-{spec.name}", spec.max_threads)

    async def construct(self) -> None:
        """Build the instance, give it its user_config, run the startup hooks of its application.

        Raises:
            Exception: What user code raised.
        """
        await self._in_context(enter(self._construct))

    async def _construct(self) -> None:
        before = contents_of(self._target) if self._spec.is_ingress else None
        if self._spec.is_class:
            await self._construct_instance()
        else:
            self._instance = self._target
            self._set_context()
            self._know({CALL: describe_method(self._target, self._threads.run)})
        if self._spec.user_config is not None:
            await self._reconfigure(self._spec.user_config)
        if self._spec.is_ingress:
            self._app = bind_app(self._instance, before, self._threads.endpoint)
            self.only_sync = False
            self._lifespan = Lifespan(self._app)
            await self._lifespan.startup()
        adopt_celery_app()
        await self._threads.run(adopt_celery_app)
        settle_log_level()

    async def _in_context(self, work: Coroutine[Any, Any, None]) -> None:
        await asyncio.get_running_loop().create_task(work, context=self.context)

    def _set_context(self) -> None:
        spec = self._spec
        name = own_name(spec.application, spec.name)
        replicas = spec.num_replicas
        here = ReplicaContext(name, self._tag, self._instance, spec.application, replicas, self._rank)
        set_replica_context(here, self.context)

    async def reconfigure(self, packed: bytes) -> None:
        """Hand the instance a user_config.

        Raises:
            ValueError: A function, or a class without `reconfigure`.
            Exception: What `reconfigure` raised.
        """
        await self._in_context(enter(self._reconfigure, packed))

    async def _reconfigure(self, packed: bytes) -> None:
        if not self._spec.is_class:
            raise ValueError(f"Deployment {self._spec.name!r} is a function: user_config needs a class.")
        reconfigure = getattr(self._instance, "reconfigure", None)
        if reconfigure is None:
            raise ValueError(f"user_config specified but deployment {self._spec.name!r} is missing reconfigure method.")
        config = self._codec.unpack(packed)
        ranked = {"rank": self._rank} if "rank" in inspect.signature(reconfigure).parameters else {}
        await describe_method(reconfigure, self._threads.run_and_keep).run(config, **ranked)
        self._know(class_methods(self._instance, self._threads.run))

    def _know(self, methods: dict[str, UserMethod]) -> None:
        self._methods = methods
        self.only_sync = self._app is None and not any(method.is_async for method in methods.values())

    @property
    def has_health_check(self) -> bool:
        """Whether the class has a method `check_health` that takes no arguments."""
        return self._spec.is_class and has_health_check(self._instance)

    async def check_health(self, on_start: Callable[[], None]) -> None:
        """Ask the instance whether it is well.

        Args:
            on_start: Called when the check begins to run; a `def` method may have to wait for its thread.

        Raises:
            Exception: What the check raised.
        """
        check = getattr(self._instance, HEALTH_CHECK)

        def begin() -> Any:
            on_start()
            return check()

        if describe_method(check, self._threads.run).is_async:
            on_start()
            await self._in_context(enter(check))
        else:
            await self._in_context(enter(self._threads.run, begin))

    @property
    def available_methods(self) -> list[str]:
        """What a handle may call by name."""
        if not self._spec.is_class:
            return []
        return available_methods(self._instance)

    def needs_thread(self, method: str) -> bool:
        """Whether a call of this method waits for a thread of the replica."""
        found = self._methods.get(method or CALL)
        return found is not None and not found.is_async

    async def call(self, method: str, args: Any, kwargs: dict[str, Any]) -> object:
        """Run a call that came from Python.

        Raises:
            MethodNotFound: There is no such method.
            Exception: What user code raised.
        """
        found = self._methods.get(method or CALL) or await self._own_method(method)
        result = await enter(found.run, *args, **kwargs)
        if isinstance(result, GeneratorType | AsyncGeneratorType):
            on_chunk = getattr(current_call.get(), "on_chunk", None)
            chunks = []
            async with contextlib.aclosing(self._threads.iterate(result)) as iterated:
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
        found = self._methods.get(method or CALL) or await self._own_method(method)
        result = await enter(found.run, *args, **kwargs)
        if not isinstance(result, GeneratorType | AsyncGeneratorType):
            await channel.send(self._codec.pack(result, "the result"))
            return
        async with contextlib.aclosing(self._threads.iterate(result)) as chunks:
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

    async def http(
        self, request: HttpRequest, open_channel: Callable[[], Channel], on_complete: OnComplete | None = None
    ) -> HttpResponse | None:
        """Answer a request; None when the response was streamed over the call's channel.

        Only plain deployments raise; an application answers with status 500 itself.

        Args:
            on_complete: Called with what will be returned once it is known; background tasks may run after that.

        Raises:
            MethodNotFound: X-Serve-Call-Method names no public method.
            ResultNotSerializable: The result is neither a response nor JSON.
            StreamBroken: The client has left, or the response failed after its beginning was sent.
            Exception: What user code raised.
        """
        if self._app is not None and self._lifespan is not None:
            return await run_asgi(self._app, request, open_channel, self._lifespan.state, on_complete)
        found = self._http_method(request)
        args: tuple[Request, ...] = ()
        if found.takes_request:
            args = (make_request(request, open_channel),)
            if request.body_follows and not found.is_async:
                await args[0].body()  # sync code cannot wait for it
        try:
            result = await enter(found.run, *args)
        except HTTPException as exc:
            return error_response(exc)
        if isinstance(result, GeneratorType | AsyncGeneratorType):
            async with contextlib.aclosing(self._threads.iterate(result)) as chunks:
                try:
                    streamed = await stream_chunks(chunks)
                except HTTPException as exc:  # before its first chunk
                    return error_response(exc)
                return await make_response(streamed, request, open_channel, on_complete)
        return await make_response(result, request, open_channel, on_complete)

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application of an ingress answer a request or a WebSocket by itself; raises what it raises."""
        assert self._app is not None
        assert self._lifespan is not None
        await enter(self._app, {**scope, "state": self._lifespan.state.copy()}, receive, send)

    async def close(self, within_s: float | None = None) -> None:
        """Run the shutdown hooks, then `__del__` once, and let go of the models. What they raise is logged.

        Args:
            within_s: How long they may take together; None: as long as they please. What takes longer is cancelled.
        """
        words = LastWords(self._spec.name, within_s)
        if self._lifespan is not None:
            await words.of("a shutdown hook", self._lifespan.shutdown())
        destructor = getattr(self._instance, "__del__", None) if self._spec.is_class else None
        await words.of("__del__", _destroy(self._instance, destructor, self._threads, self.context), is_last=True)
        if destructor is not None:
            forget_destructor(self._instance)
        self._threads.close()

    async def _construct_instance(self) -> None:
        cls = self._target
        with importing():  # unpacking may import modules of the user's
            args, kwargs = self._codec.unpack_call(self._spec.init_args) if self._spec.init_args else ((), {})
        # Not cls(*args): the result of __init__ does not matter, and it may be a coroutine.
        allocate = (args, kwargs) if cls.__new__ is not object.__new__ else ((), {})
        self._instance = cls.__new__(cls, *allocate[0], **allocate[1])
        self._set_context()
        if inspect.iscoroutinefunction(cls.__init__):
            await self._instance.__init__(*args, **kwargs)
        else:
            await lend_loop(self._threads.run_and_keep, self._instance.__init__, args, kwargs)
        self._know(class_methods(self._instance, self._threads.run))

    def _http_method(self, request: HttpRequest) -> UserMethod:
        name = CALL
        if self._spec.http_method_header:
            for header, value in request.headers:
                if header == _METHOD_HEADER:
                    name = value.decode("latin-1")
                    break
        found = self._methods.get(name)
        if found is None or (name != CALL and (name.startswith("_") or not found.is_method)):
            raise self._no_method(name)
        return found

    async def _own_method(self, name: str) -> UserMethod:
        """A callable that only the instance has: set at any time, or what a property or `__getattr__` of it gives."""
        function = None
        if name and not name.startswith("__"):
            if is_computed(self._instance, name):
                function = await enter(self._threads.run, getattr, self._instance, name, None)
            else:
                function = getattr(self._instance, name, None)
        if not callable(function):
            raise self._no_method(name or CALL)
        return describe_method(function, self._threads.run)

    def _no_method(self, name: str) -> MethodNotFound:
        return MethodNotFound(
            f"Tried to call a method {name!r} that does not exist. Available methods: {self.available_methods}."
        )


async def _destroy(
    instance: object, destructor: Callable[[], object] | None, threads: UserThreads, context: Context
) -> None:
    if instance is None:  # it has not come into being, and holds no models
        return
    try:
        if destructor is not None:
            await enter(describe_method(destructor, threads.run).run)
    finally:
        await asyncio.get_running_loop().create_task(unload_models(), context=context.copy())
