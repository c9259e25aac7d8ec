"""`@serve.multiplexed`: one replica holds several models, and lets go of those that were not used for longest."""

import asyncio
import inspect
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import wraps
from types import FunctionType
from typing import Any, Final, Protocol, TypeVar, overload

from qserve.context import model_here, model_watcher
from qserve.telemetry.user_metrics import OwnCounter

R = TypeVar("R")

_UNLIMITED: Final = -1
_MOST: Final = "_qserve_most_models"
"""The attribute of a loader that says how many models it keeps."""
_asked: Final = OwnCounter("qserve_models_asked_for", "Times that a call asked for a model.")
_loaded: Final = OwnCounter("qserve_models_loaded", "Times that a model was loaded, because the replica had it not.")
_let_go: Final = OwnCounter("qserve_models_let_go", "Times that a model left, because there was no room for another.")


def get_multiplexed_model_id() -> str:
    """The model that the running call is for: `handle.options(multiplexed_model_id=...)`, or the header
    `serve_multiplexed_model_id`; "" if the caller named none. In a batch, that of all its calls."""
    return model_here()


class LoaderDecorator(Protocol):
    """The decorator that `@serve.multiplexed(...)` returns."""

    def __call__(self, function: Callable[..., Coroutine[Any, Any, R]], /) -> Callable[..., Coroutine[Any, Any, R]]: ...


@overload
def multiplexed(function: Callable[..., Coroutine[Any, Any, R]], /) -> Callable[..., Coroutine[Any, Any, R]]: ...
@overload
def multiplexed(*, max_num_models_per_replica: int = 3) -> LoaderDecorator: ...
def multiplexed(function: Any = None, /, *, max_num_models_per_replica: int = 3) -> Any:
    """Keep what an `async def` loader returns, for so many models; the least recently used one leaves first.

    The loader takes the id of a model (and `self`, if it is a method). A model is loaded once, however many calls wait
    for it; an error of the loader is raised in each of them. An `async def __del__` of a model is awaited when it
    leaves; an ordinary one runs when nobody uses the model any more.

    Args:
        max_num_models_per_replica: How many models a replica keeps; -1: all.

    Raises:
        TypeError, ValueError: No such function, or an impossible number.
    """
    if not isinstance(max_num_models_per_replica, int):
        raise TypeError("max_num_models_per_replica must be an integer.")
    if max_num_models_per_replica != _UNLIMITED and max_num_models_per_replica < 1:
        raise ValueError("max_num_models_per_replica must be positive, or -1 for no limit.")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError("@serve.multiplexed expects an `async def` function or method, which loads a model.")
        names = list(inspect.signature(function).parameters)
        takes_self = names[:1] == ["self"]
        if len(names) != 1 + takes_self:
            raise TypeError("@serve.multiplexed expects a function with one parameter besides `self`: the model's id.")
        return _loading(function, max_num_models_per_replica, takes_self=takes_self)

    return decorate if function is None else decorate(function)


def room_for_models(code: object) -> int | None:
    """How many models a replica of a class or function keeps; None where it has no loader."""
    named: list[Any] = []
    for each in inspect.getmro(code) if isinstance(code, type) else ():
        named += vars(each).values()
    if isinstance(code, FunctionType):
        named += code.__globals__.values()
    rooms = [vars(each)[_MOST] for each in named if isinstance(each, FunctionType) and _MOST in vars(each)]
    return min(rooms, default=None)


def _loading(function: Callable[..., Any], most: int, *, takes_self: bool) -> Callable[..., Any]:
    key = f"_qserve_models_of_{function.__name__}"
    shared: dict[str, _Models] = {}

    @wraps(function)
    async def load(*args: Any) -> Any:
        owner = args[:1] if takes_self else ()
        ids = args[len(owner) :] or (get_multiplexed_model_id(),)
        if len(ids) != 1 or not isinstance(ids[0], str):
            raise TypeError(f"{function.__name__}() takes the id of a model, a string.")
        if not ids[0]:
            raise ValueError("The id of a model cannot be empty: did the caller name one?")
        holder = vars(owner[0]) if owner else shared
        models = holder.get(key)
        if models is None:
            models = holder[key] = _Models(most)
        return await models.get(ids[0], lambda: function(*owner, ids[0]))

    setattr(load, _MOST, sys.maxsize if most == _UNLIMITED else most)
    return load


class _Models:
    """The models of one loader. Belongs to an event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._loaded: OrderedDict[str, asyncio.Future[Any]] = OrderedDict()
        self._watcher = model_watcher()

    def __contains__(self, model_id: object) -> bool:
        return model_id in self._loaded

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    @property
    def room(self) -> int:
        """How many more models there may be before one leaves."""
        return sys.maxsize if self._most == _UNLIMITED else self._most - len(self._loaded)

    def _changed(self, model_id: str) -> None:
        if self._watcher is not None:
            self._watcher.changed(self, model_id)

    async def get(self, model_id: str, load: Callable[[], Awaitable[Any]]) -> Any:
        _asked.count()
        return await self._find(model_id, load)

    async def _find(self, model_id: str, load: Callable[[], Awaitable[Any]]) -> Any:
        found = self._loaded.get(model_id)
        if found is not None:
            self._loaded.move_to_end(model_id)
            return await asyncio.shield(found)
        while self._most != _UNLIMITED and len(self._loaded) >= self._most:
            await self._let_go()
            if model_id in self._loaded:  # another call was quicker
                return await self._find(model_id, load)
        # A task of its own: the first call that wanted it may be withdrawn, and others wait for it.
        _loaded.count()
        loading = asyncio.ensure_future(load())
        self._loaded[model_id] = loading
        self._changed(model_id)
        try:
            return await asyncio.shield(loading)
        except BaseException:
            failed = loading.done() and (loading.cancelled() or loading.exception() is not None)
            if failed and self._loaded.get(model_id) is loading:
                del self._loaded[model_id]
                self._changed(model_id)
            raise

    async def _let_go(self) -> None:
        model_id, oldest = self._loaded.popitem(last=False)
        _let_go.count()
        self._changed(model_id)
        if not oldest.done():
            await asyncio.wait([oldest])
        if oldest.cancelled() or oldest.exception() is not None:
            return
        destructor = getattr(oldest.result(), "__del__", None)
        if inspect.iscoroutinefunction(destructor):
            await destructor()
