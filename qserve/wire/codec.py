"""Values <-> msgpack, with their types.

Most calls carry plain data: exactly None, bool, int, float, str, bytes, and lists and dicts of them. That is proven by
looking at exact types (msgspec by itself would write tuples, dates, enums and the like as something else, silently)
and encoded in one go. Anything else is first turned into extensions, see `wire_types` and `wire_classes`.

Measured with timeit: a call with two scalars and a flag packs in 0.4 us and unpacks in 0.25, one with small nested
dicts in 1.3 and 0.5, 10,000 floats in 150 us, the empty call in 0.05.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec.msgpack import Decoder, Encoder

from qserve.errors import (
    FrameRejected,
    PayloadTooLarge,
    QServeError,
    ResultNotSerializable,
    ResultTooLarge,
    ValueNotSerializable,
)
from qserve.wire import arrays
from qserve.wire import extension_types as kinds
from qserve.wire import user_classes as classes
from qserve.wire.exceptions import describe_error, revive_error
from qserve.wire.messages import ErrorInfo
from qserve.wire.packing import ALWAYS_PLAIN, MAX_DEPTH, PLAIN, SCALARS, CannotTravelError, ToWire, is_plain
from qserve.wire.parts import LARGE, Parts, Payload, Source, flat

EMPTY_CALL = b"\x92\x90\x80"
"""A call without arguments."""

_COLLECTIONS: dict[int, Callable[[list[Any]], object]] = {
    kinds.TUPLE: tuple,
    kinds.SET: set,
    kinds.FROZENSET: frozenset,
    kinds.PAIRS: dict,
}
_BUILDERS: dict[int, Callable[..., object]] = _COLLECTIONS | {
    kinds.ENUM: classes.rebuild_enum,
    kinds.DATACLASS: classes.rebuild_dataclass,
    kinds.MODEL: classes.rebuild_model,
}
_encode = Encoder().encode
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_decode_large_pickle = Decoder(tuple[memoryview, list[int]]).decode
_decode_number = Decoder(int).decode


class Codec:
    """Packs arguments, results and errors, and unpacks them. Thread-safe.

    Args:
        allow_pickle: Carry what has no form of its own as a pickle; only where frames are signed.
        max_bytes: Largest packed value, either way.
        make_handle: Makes a handle from the data of its `__qserve_wire__()`; without it handles are rejected.
        large: Bytes from which on a buffer among arguments or in a result stands beside what is packed.
    """

    def __init__(
        self,
        *,
        allow_pickle: bool,
        max_bytes: int,
        make_handle: Callable[[dict[str, Any]], object] | None = None,
        large: int = LARGE,
    ) -> None:
        self.allow_pickle = allow_pickle
        self.max_bytes = max_bytes
        self._make_handle = make_handle
        self._large = large
        self._decoders: dict[int, Callable[[memoryview], Any]] = {}
        self._decode = Decoder(ext_hook=self._reader(1)).decode
        self._decode_call = Decoder(_Arguments, ext_hook=self._reader(1)).decode

    def pack(self, value: object, what: str = "value") -> bytes:
        """The packed value.

        Args:
            what: How errors call the value.

        Raises:
            ValueNotSerializable: It, or something in it, cannot be sent; the text says what and where.
            PayloadTooLarge: It is over the limit.
        """
        return flat(self._pack(value, what, None))

    def _pack(self, value: object, what: str, large: int | None) -> Payload:
        data: Payload | None = _encode_plain((value,), value)
        if data is None:
            data = self._encode_any(lambda wire: wire.value(value), what, large)
        if len(data) > self.max_bytes:
            raise self._too_large(len(data), what)
        return data

    def pack_result(self, value: object, *, whole: bool = False) -> Payload:
        """What a call has returned, packed; large buffers in it stay where they are, unless it is packed as a whole.

        Raises:
            ResultNotSerializable, ResultTooLarge: It cannot be sent.
        """
        try:
            return self._pack(value, "the result", None if whole else self._large)
        except PayloadTooLarge as exc:
            raise ResultTooLarge(str(exc)) from exc
        except ValueNotSerializable as exc:
            raise ResultNotSerializable(str(exc)) from exc

    def pack_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], what: str = "the call") -> bytes:
        """The packed arguments, to be stored; raises like `pack`."""
        return flat(self._pack_call(args, kwargs, what, None))

    def pack_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], what: str = "the call") -> Payload:
        """Like `pack_call`, to be sent; large buffers among them stay where they are."""
        return self._pack_call(args, kwargs, what, self._large)

    def _pack_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], what: str, large: int | None) -> Payload:
        data: Payload | None = self.pack_plain_call(args, kwargs)
        if data is None:
            data = self._encode_any(lambda wire: wire.call(args, kwargs), what, large)
        if len(data) > self.max_bytes:
            raise self._too_large(len(data), f"the argument list of {what}")
        return data

    def pack_plain_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
        """The packed arguments if they are plain data within the limit; None if `pack_call` has to look closer.

        Plain arguments hold no refs, so nothing else needs to look for them.
        """
        if not args and not kwargs:
            return EMPTY_CALL
        data = _encode_plain((*args, *kwargs.values()), (args, kwargs))
        return data if data is None or len(data) <= self.max_bytes else None

    def unpack(self, data: bytes | Source) -> object:
        """The value.

        Raises:
            FrameRejected: Not a packed value, nested too deeply, too large, or a pickle where none is allowed.
            ValueNotSerializable: A pickled value or an array that cannot be rebuilt in this process.
        """
        self._check_size(data)
        try:
            return self._decode(data) if type(data) is bytes else self._decode_large(Any, data)
        except QServeError:
            raise
        except Exception as exc:
            raise _rejected(exc) from exc

    def unpack_call(self, data: bytes | Source) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of a packed call; raises like `unpack`."""
        if data == EMPTY_CALL or not data:
            return (), {}
        self._check_size(data)
        try:
            found: _Arguments = self._decode_call(data) if type(data) is bytes else self._decode_large(_Arguments, data)
            return found
        except QServeError:
            raise
        except Exception as exc:
            raise _rejected(exc) from exc

    def _decode_large(self, kind: Any, data: Any, level: int = 1) -> Any:
        """What a source holds; nothing of it is used unless the source says that it is whole."""
        value = Decoder(kind, ext_hook=self._reader(level, data)).decode(data.head)
        data.finish()
        return value

    def pack_error(self, exc: BaseException) -> ErrorInfo:
        """An exception as data; never raises, whatever the exception."""
        return describe_error(exc, _error_codec.pack)

    def rebuild_error(self, info: ErrorInfo) -> QServeError:
        """A `TaskError` that is also an instance of the original class where that is known here; qserve's own as is."""
        return revive_error(info, _error_codec.unpack)

    def _encode_any(self, to_wire: Callable[[ToWire], object], what: str, large: int | None) -> Payload:
        try:
            try:
                return self._encode_with(ToWire(PLAIN, self.allow_pickle, self.max_bytes, large), to_wire)
            except (OverflowError, UnicodeEncodeError):
                return self._encode_with(ToWire(ALWAYS_PLAIN, self.allow_pickle, self.max_bytes, large), to_wire)
        except CannotTravelError as exc:
            raise ValueNotSerializable(exc.text(what)) from exc.__cause__
        except PayloadTooLarge:
            raise
        except Exception as exc:
            raise ValueNotSerializable(f"{what} cannot be packed ({type(exc).__name__}: {exc})") from exc

    @staticmethod
    def _encode_with(wire: ToWire, to_wire: Callable[[ToWire], object]) -> Payload:
        head = _encode(to_wire(wire))
        return Parts(head, *wire.beside, passed=wire.passed) if wire.beside or wire.passed else head

    def _too_large(self, size: int, what: str) -> PayloadTooLarge:
        return PayloadTooLarge(
            f"{what} takes {size:,} bytes when packed, and the limit is {self.max_bytes:,}: "
            "send less at a time, or raise QSERVE_MAX_VALUE_BYTES"
        )

    def _check_size(self, data: bytes | Source) -> None:
        if len(data) > self.max_bytes:
            raise FrameRejected(f"a value of {len(data):,} bytes, the limit is {self.max_bytes:,}")

    def _reader(self, level: int, source: Source | None = None) -> Callable[[int, memoryview], object]:
        def read(code: int, data: memoryview) -> object:
            leaf = kinds.READERS.get(code)
            if leaf is not None:
                return leaf(data)
            reader = arrays.READERS.get(code)
            return self._rebuild(code, data, level, source) if reader is None else reader(data, source)

        return read

    def _inner(self, data: memoryview, level: int, source: Source | None) -> Any:
        """What stands inside an extension; each level has a decoder of its own, and there is an end to them."""
        if level > MAX_DEPTH:
            raise FrameRejected("a value nested too deeply")
        if source is not None:
            return Decoder(ext_hook=self._reader(level + 1, source)).decode(data)
        decode = self._decoders.get(level)
        if decode is None:
            decode = self._decoders[level] = Decoder(ext_hook=self._reader(level + 1)).decode
        return decode(data)

    def _rebuild(self, code: int, data: memoryview, level: int, source: Source | None) -> object:
        if code == kinds.PICKLED:
            return self._unpickle(data, ())
        if code == kinds.LARGE_PICKLED and source is not None:
            pickled, numbers = _decode_large_pickle(data)
            return self._unpickle(pickled, map(source.take, numbers))
        if code == kinds.PASSED and source is not None:
            passed = source.passed_on(_decode_number(data))
            self._check_size(passed)
            return self._decode_large(Any, passed, level + 1)
        build: Callable[..., object] | None = self._make_handle if code == kinds.HANDLE else _BUILDERS.get(code)
        if build is None:
            raise FrameRejected(f"an extension of kind {code}, which means nothing here")
        parts = self._inner(data, level, source)
        if not isinstance(parts, list):
            raise FrameRejected(f"an extension of kind {code} without its parts")
        return build(parts) if code in _COLLECTIONS else build(*parts)

    def _unpickle(self, data: memoryview, buffers: Iterable[memoryview]) -> object:
        if not self.allow_pickle:
            raise FrameRejected("a pickled value in a frame that is not signed")
        try:
            return pickle.loads(data, buffers=buffers)  # noqa: S301  only from frames signed with our key
        except QServeError:
            raise
        except Exception as exc:
            raise ValueNotSerializable(
                f"a value that came pickled cannot be rebuilt here ({type(exc).__name__}: {exc})"
            ) from exc


def _encode_plain(items: Iterable[object], value: object) -> bytes | None:
    """The packed `value` if its `items` are plain data, else None."""
    if not is_plain(items):
        return None
    try:
        return _encode(value)
    except (OverflowError, UnicodeEncodeError):
        return None  # a large int, a lone surrogate


def _rejected(exc: Exception) -> QServeError:
    if isinstance(exc, MemoryError):  # nothing is wrong with the message
        return ValueNotSerializable("a packed value needs more memory than this process can get")
    if isinstance(exc, RecursionError):
        return FrameRejected("a value nested too deeply")
    return FrameRejected(f"not a packed value ({type(exc).__name__}: {exc})")


_error_codec = Codec(allow_pickle=False, max_bytes=64 * 1024)
"""For the arguments of exceptions: never pickled, and small."""


def collect_refs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The refs among the arguments and in the lists, tuples and dicts in them, each once, in order."""
    found: dict[Any, None] = {}
    if not is_plain(args) or not is_plain(kwargs.values()):
        _find_refs((*args, *kwargs.values()), found, MAX_DEPTH)
    return list(found)


def _find_refs(items: Iterable[Any], found: dict[Any, None], room: int) -> None:
    for item in items:
        kind = type(item)
        if kind in SCALARS:
            continue
        if kind is list or kind is tuple or kind is dict:
            if room:  # too deep for refs is too deep to be packed, and the codec says so
                _find_refs(item.values() if kind is dict else item, found, room - 1)
        elif _is_ref(item, kind):
            found[item] = None


def _is_ref(value: Any, kind: type) -> bool:
    return hasattr(kind, "__qserve_wire__") and value.__qserve_wire__()[0] == "ref"


def substitute(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[Any, object]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with each ref replaced by its value, in copies of the lists, tuples and dicts that hold it."""
    done = [_with_values(value, values, MAX_DEPTH) for value in (*args, *kwargs.values())]
    return tuple(done[: len(args)]), dict(zip(kwargs, done[len(args) :], strict=True))


def _with_values(item: Any, values: Mapping[Any, object], room: int) -> Any:
    kind = type(item)
    if kind in SCALARS or not room:
        return item
    if kind is list or kind is tuple:
        return kind([_with_values(part, values, room - 1) for part in item])
    if kind is dict:
        return {key: _with_values(part, values, room - 1) for key, part in item.items()}
    return values[item] if _is_ref(item, kind) else item
