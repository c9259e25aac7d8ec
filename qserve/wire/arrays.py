"""Values that are mostly one buffer: numpy arrays, torch tensors, bytes, memoryviews. Large ones stand beside the
packed value, see `qserve.wire.parts`.

Neither numpy nor torch is imported before the first array or tensor is there.
"""

import importlib
import sys
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.msgpack import Ext

from qserve.errors import FrameRejected, ValueNotSerializable
from qserve.wire.parts import Part, Source, Strided, byte_view

if TYPE_CHECKING:
    import numpy

BYTEARRAY = 19
ARRAY, NUMPY_SCALAR = 32, 33
BYTES, MEMORYVIEW, TENSOR, LARGE_BYTEARRAY = 35, 36, 37, 38

Raw = memoryview | int
"""The bytes themselves, or the number of the part that they are."""
Beside = Callable[[Part, int], int | None]
"""Puts a buffer of so many bytes beside the packed value, and returns its number; None if it is too small for that."""

_encode = msgspec.msgpack.Encoder().encode
_decode_raw = msgspec.msgpack.Decoder(int).decode
_decode_view = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], Raw]).decode
_decode_array = msgspec.msgpack.Decoder(tuple[str | list[Any], tuple[int, ...], bool, Raw]).decode
_decode_tensor = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], bool, Raw]).decode
_NUMBERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}
"""By size: the type that numpy sees instead of a tensor's own, which it may not have."""
_TEXTS = {"<U": "utf-32-le", ">U": "utf-32-be"}
"""How numpy writes the text of a scalar, by the beginning of its type."""


def bytes_to_wire(value: bytes, beside: Beside) -> object:
    """Bytes as they are, or an extension that says where they stand."""
    number = beside(value, len(value))
    return value if number is None else Ext(BYTES, _encode(number))


def bytearray_to_wire(value: bytearray, beside: Beside) -> object:
    """An extension with the bytes, or with where they stand."""
    number = beside(value, len(value))
    return Ext(BYTEARRAY, bytes(value)) if number is None else Ext(LARGE_BYTEARRAY, _encode(number))


def memoryview_to_wire(value: memoryview, beside: Beside) -> object:
    """An extension with format, shape and bytes; None where no memoryview can be made from these."""
    view = byte_view(value) if value.c_contiguous and value.nbytes else memoryview(value.tobytes())
    if view is None or _shaped(view, value.format, value.shape or ()) is None:
        return None
    number = beside(view, view.nbytes)
    return Ext(MEMORYVIEW, _encode((value.format, value.shape, view if number is None else number)))


def array_to_wire(value: "numpy.ndarray[Any, Any] | numpy.generic", beside: Beside) -> object:
    """An extension with dtype, shape, order and bytes; None where the dtype cannot be written down."""
    described = _describe(value.dtype)
    if described is None:
        return None
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.generic):
        raw = value.tobytes()[: value.dtype.itemsize]  # numpy gives an empty text a character
        return Ext(NUMPY_SCALAR, _encode((described, value.shape, False, raw)))
    fortran = value.flags.fnc
    number = None
    if value.nbytes:
        whole = value.flags.c_contiguous or fortran
        number = beside(memoryview(value.ravel("K").view(numpy.uint8)) if whole else Strided(value), value.nbytes)
    raw = value.tobytes("F" if fortran else "C") if number is None else number
    return Ext(ARRAY, _encode((described, value.shape, fortran, raw)))


def _describe(dtype: "numpy.dtype[Any]") -> object:
    if dtype.hasobject:
        return None
    numpy = sys.modules["numpy"]
    try:
        if dtype.names is not None:
            described = numpy.lib.format.dtype_to_descr(dtype)
            return described if numpy.lib.format.descr_to_dtype(described) == dtype else None
        return dtype.str if numpy.dtype(dtype.str) == dtype else None
    except ValueError:
        return None  # fields that overlap, or do not stand in their order
    except TypeError:
        return None  # a dtype of another library, or numpy's variable-width strings


def tensor_to_wire(value: Any, beside: Beside) -> object:
    """An extension with dtype, shape and bytes of a torch tensor; None if it is more than numbers in this memory.

    Whether it requires a gradient is said, and how it was computed is not, as in a pickle. A pickle would have all of
    the memory that it is a view of, such as that of a whole batch.
    """
    torch = sys.modules["torch"]
    plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided
    if not plain or value.is_quantized or value.is_nested or value.is_conj() or value.is_neg():
        return None
    size = value.element_size()
    numbers = value.detach().contiguous().reshape(-1).view(getattr(torch, _NUMBERS[size]))
    data = memoryview(numbers.numpy().view("uint8"))
    number = beside(data, data.nbytes)
    name = str(value.dtype).removeprefix("torch.")
    raw = data if number is None else number
    return Ext(TENSOR, _encode((name, tuple(value.shape), value.requires_grad, raw)))


# The way back


def read_bytes(data: memoryview, source: Source | None) -> bytes:
    """Bytes that stood beside the packed value."""
    return _source(source).take_bytes(_decode_raw(data))


def read_bytearray(data: memoryview, source: Source | None) -> bytearray:
    """A bytearray that stood beside the packed value."""
    return bytearray(_source(source).take(_decode_raw(data), writable=True))


def read_memoryview(data: memoryview, source: Source | None) -> memoryview:
    """A memoryview of the same format and shape."""
    kind, shape, raw = _decode_view(data)
    taken = bytes(raw) if isinstance(raw, memoryview) else _source(source).take_bytes(raw)
    view = _shaped(memoryview(taken), kind, shape)
    if view is None:
        raise FrameRejected(f"a memoryview of format {kind!r} and shape {shape}")
    return view


def _shaped(view: memoryview, kind: str, shape: tuple[int, ...]) -> memoryview | None:
    """Bytes as a memoryview of that format and shape; None where Python makes none, such as of complex numbers."""
    try:
        if view.nbytes:
            return view.cast(kind, shape)  # type: ignore[call-overload, no-any-return]
        # Nothing that is empty can be cast.
        return memoryview(array(kind)).toreadonly() if len(shape) == 1 else None
    except (TypeError, ValueError):
        return None


def _numpy() -> Any:
    try:
        import numpy  # noqa: PLC0415  optional and heavy
    except ImportError as exc:
        raise ValueNotSerializable(
            "a numpy array was received, but numpy is not installed here: install it, or send a list"
        ) from exc
    return numpy


def read_array(data: memoryview, source: Source | None) -> "numpy.ndarray[Any, Any]":
    """A numpy array, in memory of its own."""
    np = _numpy()
    described, shape, fortran, raw = _decode_array(data)
    dtype = _without_objects(np.lib.format.descr_to_dtype(_with_tuples(described)))
    taken = _taken(raw, source)
    view: numpy.ndarray[Any, Any] = np.ndarray(shape, dtype, taken, order="F" if fortran else "C")
    if view.nbytes != len(taken) or any(length < 0 for length in shape):  # numpy takes -1 for "as many as there are"
        raise FrameRejected("an array whose bytes do not fill its shape")
    return view.copy("K") if isinstance(raw, memoryview) else view


def read_scalar(data: memoryview, source: Source | None) -> Any:
    """A numpy scalar."""
    described, _, _, raw = _decode_array(data)
    # An array has no empty text, and takes the zeros off the end of any other.
    kind = described[:2] if isinstance(described, str) else ""
    if kind == "|S":
        return _numpy().bytes_(bytes(_taken(raw, source)))
    if kind in _TEXTS:
        return _numpy().str_(str(_taken(raw, source), _TEXTS[kind], "surrogatepass"))
    return read_array(data, source)[()]


def read_tensor(data: memoryview, source: Source | None) -> Any:
    """A torch tensor, in memory of its own."""
    name, shape, requires_grad, raw = _decode_tensor(data)
    try:
        torch: Any = importlib.import_module("torch")  # optional and heavy
    except ImportError as exc:
        raise ValueNotSerializable(
            "a torch tensor was received, but torch is not installed here: install it, or send a numpy array"
        ) from exc
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueNotSerializable(f"a torch tensor of dtype {name} was received, which torch does not know here")
    # torch knows no memory that may not be written to.
    taken = memoryview(bytearray(raw)) if isinstance(raw, memoryview) else _source(source).take(raw, writable=True)
    made = torch.frombuffer(taken, dtype=dtype).reshape(shape) if taken else torch.empty(shape, dtype=dtype)
    return made.requires_grad_() if requires_grad else made


def _taken(raw: Raw, source: Source | None) -> memoryview:
    return raw if isinstance(raw, memoryview) else _source(source).take(raw)


def _source(source: Source | None) -> Source:
    if source is None:
        raise FrameRejected("a value that refers to buffers which are not there")
    return source


def _without_objects(dtype: "numpy.dtype[Any]") -> "numpy.dtype[Any]":
    if dtype.hasobject:  # its bytes would be taken for addresses
        raise FrameRejected("an array of Python objects")
    return dtype


def _with_tuples(described: Any) -> Any:
    """The description of a dtype as numpy wrote it: msgpack turned its tuples into lists."""
    if isinstance(described, str):
        return described
    return [
        (tuple(name) if isinstance(name, list) else name, _with_tuples(of), *map(tuple, shape))
        for name, of, *shape in described
    ]


READERS: dict[int, Callable[[memoryview, Source | None], object]] = {
    BYTES: read_bytes,
    LARGE_BYTEARRAY: read_bytearray,
    MEMORYVIEW: read_memoryview,
    ARRAY: read_array,
    NUMPY_SCALAR: read_scalar,
    TENSOR: read_tensor,
}
"""By kind: how a value is made from its extension and, where it is large, from what stands beside it."""
