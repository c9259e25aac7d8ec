"""Values with large buffers, as they are taken apart for a message and put together again, tensors too."""

import pickle
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from msgspec.msgpack import Ext

from qserve.errors import FrameRejected, ResultNotSerializable, ValueNotSerializable
from qserve.wire import arrays
from qserve.wire.codec import Codec
from qserve.wire.messages import encode
from qserve.wire.parts import Parts, Strided, byte_view, copy, flat, fresh, size_of
from tests.support.stand_in_torch import torch_or_stand_in

LARGE = 1000
codec = Codec(allow_pickle=True, max_bytes=2**22, large=LARGE)
unsigned = Codec(allow_pickle=False, max_bytes=2**22, large=LARGE)


class Arrived:
    """Parts at their receiver."""

    def __init__(self, parts: Parts, *, views: bool = False) -> None:
        self.parts = [laid_out(part) for part in parts.parts]
        self.views = views
        self.finished = False

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def head(self) -> bytes:
        return bytes(self.parts[0])

    def take_bytes(self, number: int) -> bytes:
        return bytes(self.parts[number])

    def take(self, number: int, *, writable: bool = False) -> memoryview:
        if self.views and not writable:
            return self.parts[number].toreadonly()
        place = fresh(len(self.parts[number]))
        copy(place, self.parts[number])
        return place

    view = take

    def size_of(self, number: int) -> int:
        return len(self.parts[number]) if number < len(self.parts) else 0

    def hold(self) -> None: ...

    def keep(self) -> None: ...

    def drop(self) -> None: ...

    def passed_on(self, number: int) -> "Arrived":
        raise AssertionError("nothing is handed on here")

    def finish(self) -> None:
        self.finished = True


def laid_out(part: Any) -> memoryview:
    place = memoryview(bytearray(size_of(part)))
    if isinstance(part, Strided):
        part.write_into(place)
    else:
        copy(place, part)
    return place


def travel(value: object, using: Codec = codec) -> tuple[Any, int]:
    """What arrives, and how many parts it came in."""
    packed = using.pack_result(value)
    if isinstance(packed, bytes):
        return using.unpack(packed), 1
    arrived = Arrived(packed)
    value = using.unpack(arrived)
    assert arrived.finished
    return value, len(packed.parts)


@pytest.fixture
def torch() -> Iterator[Any]:
    with torch_or_stand_in() as torch:
        yield torch


NUMBERS = np.arange(1200, dtype="f4").reshape(30, 40)


@pytest.mark.parametrize("size", [0, LARGE // 2, LARGE, 2_500_000])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_of_every_kind_arrive_small_and_large(kind: Any, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    arrived, parts = travel({"data": kind(data)})
    assert type(arrived["data"]) is kind
    assert arrived["data"] == data
    least = 256 * 1024 if kind is bytes else LARGE  # what is plain is packed as it is
    assert parts == (2 if size >= least else 1)


@pytest.mark.parametrize(
    "array",
    [
        NUMBERS,
        np.asfortranarray(NUMBERS),
        NUMBERS[::2, 1:],
        NUMBERS.T[3:],
        NUMBERS.astype("f8") * 1j,
        np.zeros(500, [("a", "i4"), ("b", "f4")]),
        np.array([np.datetime64("2026-01-02")] * 500),
    ],
    ids=["C", "Fortran", "strided", "transposed", "complex", "records", "dates"],
)
def test_large_arrays_arrive_in_memory_of_their_own(array: Any) -> None:
    [arrived], parts = travel([array])
    assert parts == 2
    assert (arrived.dtype, arrived.shape) == (array.dtype, array.shape)
    assert np.array_equal(arrived, array)
    arrived[:] = arrived[0]  # it may be written to


def test_buffers_of_other_libraries_stand_beside_their_pickle() -> None:
    class Frame:
        def __init__(self, column: Any) -> None:
            self.column = column

        def __reduce_ex__(self, protocol: Any) -> Any:
            return Frame, (pickle.PickleBuffer(self.column),)

    arrived, parts = travel(Frame(np.arange(1000)))
    assert parts == 2
    assert np.array_equal(np.frombuffer(arrived.column, "i8"), np.arange(1000))
    with pytest.raises(ResultNotSerializable):
        travel(Frame(np.arange(1000)), unsigned)


@pytest.mark.parametrize("count", [0, 6, 1200])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int64", "bool", "uint8", "complex128"])
def test_tensors_arrive_small_and_large(torch: Any, kind: str, count: int) -> None:
    make = torch.ones if kind in ("bool", "complex128") else torch.arange
    tensor = make(count, dtype=getattr(torch, "int16" if kind == "bfloat16" else kind))
    if kind == "bfloat16":
        tensor = tensor.view(torch.bfloat16)
    [arrived], parts = travel([tensor], unsigned)
    assert type(arrived) is torch.Tensor
    assert arrived.dtype is tensor.dtype
    assert (tuple(arrived.shape), arrived.tolist()) == ((count,), tensor.tolist()) or kind == "bfloat16"
    if kind == "bfloat16" and count:
        assert arrived.view(torch.int16).tolist() == tensor.view(torch.int16).tolist()
    assert parts == (2 if count * tensor.element_size() >= LARGE else 1)


def test_a_transposed_tensor_and_one_of_no_dimension_keep_their_shape(torch: Any) -> None:
    matrix = torch.arange(1200, dtype=torch.int64).reshape(30, 40).t()
    (arrived, single), _ = travel(
        (matrix, torch.ones(dtype=torch.float32) if is_stand_in(torch) else torch.tensor(1.0))
    )
    assert tuple(arrived.shape) == (40, 30)
    assert arrived.tolist() == matrix.tolist()
    assert (tuple(single.shape), single.tolist()) == ((), 1.0)


def test_a_tensor_is_no_view_of_the_memory_of_its_sender(torch: Any) -> None:
    packed = unsigned.pack_result([torch.ones(LARGE, dtype=torch.float32)])
    assert isinstance(packed, Parts)
    sent = Arrived(packed, views=True)
    before = bytes(sent.parts[1])
    arrived: Any = unsigned.unpack(sent)
    arrived[0].numpy()[:] = 2
    assert bytes(sent.parts[1]) == before


def is_stand_in(torch: Any) -> bool:
    return not hasattr(torch, "tensor")


@pytest.mark.parametrize("count", [0, 3, LARGE])
def test_a_tensor_that_requires_a_gradient_does_so_where_it_arrives(torch: Any, count: int) -> None:
    [arrived], parts = travel([torch.ones(count, dtype=torch.float32).requires_grad_()], unsigned)
    assert arrived.requires_grad
    assert arrived.tolist() == [1.0] * count
    assert parts == (2 if count == LARGE else 1)


def test_of_a_view_of_a_large_tensor_only_the_view_is_sent(torch: Any) -> None:
    table = torch.ones(100, LARGE, dtype=torch.float32).requires_grad_()
    assert len(codec.pack([table[0, :3]])) < 100


def test_a_tensor_that_is_more_than_numbers_has_no_form_of_its_own(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = torch.ones(3, dtype=torch.float32)
    monkeypatch.setattr(torch.Tensor, "is_quantized", True)
    with pytest.raises(ResultNotSerializable, match="Tensor"):
        travel([quantized], unsigned)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_nested_tensor_has_no_form_of_its_own(torch: Any) -> None:
    if is_stand_in(torch):
        nested = torch.ones(3, dtype=torch.float32)
        nested.is_nested = True
        nested.contiguous = None
    else:
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    with pytest.raises(ResultNotSerializable, match="Tensor cannot be sent: convert it"):
        travel([nested], unsigned)


def test_a_tensor_that_this_process_cannot_make_is_named(torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = unsigned.pack([torch.ones(3, dtype=torch.float32)])
    with pytest.raises(ValueNotSerializable, match="of dtype float3 was received"):
        unsigned.unpack(encode([Ext(arrays.TENSOR, encode(("float3", (3,), False, bytes(12))))]))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueNotSerializable, match="torch is not installed here: install it, or send a numpy array"):
        unsigned.unpack(packed)


def test_an_array_where_numpy_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = unsigned.pack([np.arange(3)])
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ValueNotSerializable, match="numpy is not installed here: install it, or send a list"):
        unsigned.unpack(packed)


@pytest.mark.parametrize("shape", [(5,), (2,), (-1,)])
def test_bytes_that_do_not_fill_their_array_are_refused(shape: tuple[int, ...]) -> None:
    packed = encode([Ext(arrays.ARRAY, encode(("<i4", shape, False, bytes(12))))])
    with pytest.raises(FrameRejected):
        unsigned.unpack(packed)


def test_a_part_that_is_not_there_is_refused() -> None:
    for kind in (arrays.BYTES, arrays.LARGE_BYTEARRAY):
        with pytest.raises(FrameRejected):
            unsigned.unpack(encode([Ext(kind, encode(1))]))


def test_a_payload_of_one_part_is_flat_and_one_that_refers_to_others_is_not() -> None:
    assert flat(b"small") == b"small"
    assert flat(Parts(b"only")) == b"only"
    for refers in (Parts(b"head", b"part"), Parts(bytearray(b"head"))):
        with pytest.raises(TypeError, match="several parts"):
            flat(refers)


def test_bytes_are_seen_where_they_stand_one_after_the_other() -> None:
    seen = byte_view(np.arange(4, dtype=np.uint16))
    assert seen is not None
    assert seen.nbytes == len(seen) == 8
    assert byte_view(np.arange(8)[::2]) is None
    assert byte_view("text") is None
