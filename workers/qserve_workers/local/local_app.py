"""The HTTP side of deployments in this process: an ASGI application that finds the deployment for a path."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from qserve_workers.local.local_calls import LocalCalls
from qserve_workers.local.local_client import LocalClient
from qserve_workers.local.local_replica import LocalReplica
from qserve_workers.local.local_state import LocalState

T = TypeVar("T")


class LocalApp:
    """Hands requests to deployments by their routes, the longest first; may be called on any event loop.

    Attributes:
        calls: The durable calls behind them.
    """

    def __init__(self, client: LocalClient, state: LocalState, calls: LocalCalls) -> None:
        self.calls = calls
        self._client = client
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the lifespans of the deployments have begun already
            await _without_lifespan(receive, send)
            return
        route = self._find(scope["path"])
        if route is None:
            await PlainTextResponse(f"Path '{scope['path']}' not found.", 404)(scope, receive, send)
            return
        prefix, replica = route
        told = {**scope, "root_path": scope.get("root_path", "") + prefix.rstrip("/")}
        told.setdefault("raw_path", scope["path"].encode())
        there = self._client.loop
        here = asyncio.get_running_loop()
        respond = replica.respond(told, _calling(receive, here), _calling(send, here), uuid.uuid4().hex)
        tasks: list[asyncio.Task[None]] = []

        def begin() -> None:
            task = there.create_task(respond, context=replica.context.copy())
            task.add_done_callback(lambda task: here.call_soon_threadsafe(_pass_on, task, done))
            tasks.append(task)

        def end() -> None:
            tasks[0].cancel()

        done: asyncio.Future[None] = here.create_future()
        there.call_soon_threadsafe(begin)
        try:
            await done
        except asyncio.CancelledError:  # the client has left, or the user's code was cancelled
            there.call_soon_threadsafe(end)
            raise

    def _find(self, path: str) -> tuple[str, LocalReplica] | None:
        routes = self._state.routes()
        fitting = [prefix for prefix in routes if path == prefix or path.startswith(prefix.rstrip("/") + "/")]
        best = max(fitting, key=len, default=None)
        return None if best is None else (best, self._client.replicas[routes[best]])


def _calling(function: Callable[..., Awaitable[T]], loop: asyncio.AbstractEventLoop) -> Callable[..., Awaitable[T]]:
    """The function, for use on another event loop than its own."""

    async def run(*args: Message) -> T:
        return await function(*args)

    async def call(*args: Message) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(run(*args), loop))

    return call


def _pass_on(task: "asyncio.Task[None]", done: "asyncio.Future[None]") -> None:
    if done.done():
        return
    if task.cancelled():
        done.cancel()
    elif (error := task.exception()) is not None:
        done.set_exception(error)
    else:
        done.set_result(None)


async def _without_lifespan(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})
