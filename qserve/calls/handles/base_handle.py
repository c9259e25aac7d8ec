"""What all handles share: how one is made from another, and how they travel in calls and in pickles."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

import msgspec

from qserve.calls.handles.call_options import CallOptions, changed_options
from qserve.wire.call_record import DurableOptions, Terms

_MAKERS: Final[dict[str, Callable[..., "BaseHandle"]]] = {}
"""What makes the handles of each kind. Pickles name the kinds."""

_PLAIN: Final = CallOptions()


class BaseHandle:
    """What handles of every kind share; immutable, thread-safe, not bound to any event loop."""

    _sync: bool
    _streams = False
    _terms: DurableOptions | None = None
    """Of the durable calls that it makes, if it makes such."""

    def __init__(self, deployment_name: str, options: CallOptions = _PLAIN) -> None:
        self._name = deployment_name
        self._options = options

    @property
    def deployment_name(self) -> str:
        """The name of the deployment that is called."""
        return self._name

    def __repr__(self) -> str:
        method = f", method {self._options.method_name!r}" if self._options.method_name else ""
        return f"<{type(self).__name__} of {self._name!r}{method}>"

    def __reduce__(self) -> tuple[Any, ...]:
        kind = kind_of(sync=self._sync, streams=self._streams, durable=self._terms is not None)
        data = (kind, self._name, self._options._asdict())
        if self._terms is None:
            return unpickle_handle, data
        terms = self._terms._asdict() | {"terms": msgspec.structs.asdict(self._terms.terms)}
        return unpickle_handle, (*data, terms)

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        return "handle", {"name": self._name, "sync": self._sync, "options": self._options._asdict()}

    def _changed(
        self, method_name: str | None, changes: dict[str, Any], *, stream: bool | None, durable: bool | None
    ) -> Any:
        """The handle that other options make of this one.

        Args:
            stream, durable: None: as this handle is, unless the other one is given.
        """
        stream = self._streams and not durable if stream is None else stream
        durable = self._terms is not None and not stream if durable is None else durable
        options, terms = changed_options(
            self._options, method_name, changes, stream=stream, durable=durable, terms=self._terms
        )
        return made_handle(kind_of(sync=self._sync, streams=stream, durable=durable), self._name, options, terms)


def refuse_private(handle: BaseHandle, name: str) -> None:
    """Raise AttributeError where a name is not that of a method that can be called."""
    if name.startswith("_"):  # copy, pickle and IPython ask for such names
        raise AttributeError(f"{type(handle).__name__} has no attribute {name!r}; private methods cannot be called")


def kind_of(*, sync: bool, streams: bool, durable: bool) -> str:
    """What pickles call a kind of handles."""
    name = "stream" if streams else "durable" if durable else ""
    return (name or "sync") if sync else f"async {name}".rstrip()


def made_by(kind: str, make: Callable[..., BaseHandle]) -> None:
    """Make handles of a kind with this from now on."""
    _MAKERS[kind] = make


def made_handle(kind: str, name: str, options: CallOptions, terms: DurableOptions | None = None) -> BaseHandle:
    """A handle of some kind."""
    if terms is not None:
        return _MAKERS[kind](name, options, terms)
    if options == _PLAIN:
        return plain_handle(kind, name)
    return _MAKERS[kind](name, options)


@lru_cache(maxsize=100)
def plain_handle(kind: str, name: str) -> BaseHandle:
    """A handle without options; the same object for the same name and kind."""
    return _MAKERS[kind](name)


def handle_from_wire(data: dict[str, Any]) -> BaseHandle:
    """The handle that another process has sent, from what `__qserve_wire__` gave there."""
    kind = kind_of(sync=data["sync"], streams=False, durable=False)
    return made_handle(kind, data["name"], _restored(data["options"]))


def unpickle_handle(kind: str, name: str, options: dict[str, Any], terms: dict[str, Any] | None = None) -> object:
    """The handle that was pickled.

    Every pickle of a handle names this function, as `qserve.serve.unpickle_handle`, and plain data: so a handle can
    be read by another version of qserve than the one that has pickled it.
    """
    durable = DurableOptions(**terms | {"terms": Terms(**terms["terms"])}) if terms is not None else None
    return made_handle(kind, name, _restored(options), durable)


def _restored(options: dict[str, Any]) -> CallOptions:
    known = {key: options[key] for key in CallOptions._fields if key in options}
    return CallOptions(**known | {"http_headers": tuple((key, value) for key, value in options["http_headers"])})
