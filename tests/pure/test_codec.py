"""What may travel in a call, a result and an error, and how it arrives."""

import asyncio
import contextlib
import enum
import pickle
import socket
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from msgspec.msgpack import Ext
from starlette.requests import Request

from qserve.errors import (
    FrameRejected,
    PayloadTooLarge,
    ValueNotSerializable,
)
from qserve.wire import arrays, extension_types
from qserve.wire.codec import EMPTY_CALL, Codec, collect_refs, substitute
from qserve.wire.messages import encode
from qserve.wire.packing import MAX_DEPTH

LIMIT = 1024 * 1024
unsigned = Codec(allow_pickle=False, max_bytes=LIMIT, make_handle=lambda data: Handle(data["name"]))
signed = Codec(allow_pickle=True, max_bytes=LIMIT)


def travel(value: object, codec: Codec = unsigned) -> Any:
    return codec.unpack(codec.pack(value))


def traits(value: Any) -> Any:
    """Something that is equal for equal values of the same types only; NaN equals NaN."""
    match value:
        case dict():
            content: Any = [(traits(key), traits(item)) for key, item in value.items()]
        case list() | tuple():
            content = [traits(item) for item in value]
        case np.ndarray() | np.generic():
            content = value.dtype, value.shape, value.tobytes()
        case Frozen():
            content = traits(value.when), traits(value.inner)
        case Decimal():
            content = value.as_tuple()
        case datetime() | time():
            content = value, value.tzinfo, value.fold
        case float() | complex():
            content = repr(value)
        case _:
            content = value
    return type(value), content


def same(one: object, other: object) -> bool:
    return bool(traits(one) == traits(other))


class Color(enum.Enum):
    RED = 1
    MIXED = (1, "two")


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    YES = "yes"


class Bits(enum.Flag):
    A = 1
    B = 2


@dataclass
class Point:
    x: float
    tags: tuple[str, ...] = ()
    length: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.x *= 2


@dataclass(frozen=True, slots=True)
class Frozen:
    when: datetime
    inner: Any = None


class Item(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    name: str
    price: Decimal = Decimal(1)
    seen: set[int] = set()
    pixels: np.ndarray[Any, Any] | None = None
    note: str = pydantic.Field(default="", alias="remark")
    _cache: dict[str, int] = pydantic.PrivateAttr(default_factory=dict)


class Open(pydantic.BaseModel, extra="allow"):
    a: int


class Handle:
    def __init__(self, name: str) -> None:
        self.name = name

    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        return "handle", {"name": self.name}


class Ref:
    def __qserve_wire__(self) -> tuple[str, dict[str, Any]]:
        return "ref", {}


# --- values ---------------------------------------------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs", "L"]))
    | st.binary()
    | st.complex_numbers()
    | st.decimals()
    | st.uuids()
    | st.dates()
    | st.timedeltas()
    | st.times(timezones=st.just(UTC) | st.none())
    | st.datetimes(timezones=st.none() | st.timezones() | st.just(timezone(timedelta(hours=-3, microseconds=7))))
    | st.sampled_from([*Color, *Level, *Word, *Bits, Bits.A | Bits.B])
)
keys = st.integers() | st.text() | st.tuples(st.integers(), st.text()) | st.dates() | st.booleans() | st.none()
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner)
        | st.frozensets(keys)
        | st.sets(keys)
        | inner.map(lambda value: Frozen(datetime(2024, 1, 1), value))
    ),
    max_leaves=20,
)


@given(values)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_supported_value_arrives_as_it_was_sent(value: object) -> None:
    assert same(travel(value), value)


@given(st.lists(values).map(tuple), st.dictionaries(st.text(), values))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_call_arrives_as_it_was_made(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    assert same(unsigned.unpack_call(unsigned.pack_call(args, kwargs)), (args, kwargs))


@given(hnp.arrays(hnp.scalar_dtypes() | hnp.array_dtypes(), hnp.array_shapes(min_dims=0, min_side=0)), st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_numpy_arrays_keep_dtype_shape_and_content(array: "np.ndarray[Any, Any]", fortran: bool) -> None:
    sent = np.asfortranarray(array) if fortran else array
    got = travel(sent)
    assert same(got, sent)
    assert got.flags.f_contiguous == sent.flags.f_contiguous
    assert got.flags.writeable
    assert got.flags.owndata


@given(hnp.from_dtype(np.dtype("f4")) | hnp.from_dtype(np.dtype("M8[ns]")) | hnp.from_dtype(np.dtype("?")))
def test_numpy_scalars_keep_their_type(scalar: np.generic) -> None:
    assert same(travel(scalar), scalar)


@pytest.mark.parametrize("text", ["", "zeros\0\0", "\ud800", b"", b"zeros\0"])
def test_text_of_numpy_arrives_whole(text: str | bytes) -> None:
    scalar = np.str_(text) if isinstance(text, str) else np.bytes_(text)
    assert same(travel([scalar]), [scalar])


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.5),
        np.str_("text"),
        np.arange(12).reshape(3, 4)[::2, ::-1],
        np.zeros((0, 3), ">i2"),
        np.array([("a", 1)], dtype=[("name", "U3"), ("n", "<i8")]),
        np.zeros(2, dtype={"names": ["a", "b"], "formats": ["i1", "<f8"], "offsets": [0, 8]}),
        datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        {1: "one", "1": "other", 1.5: None, None: 2, b"k": 3, (1, "t"): {2: 3}},
        [float("-0.0"), 2**64 - 1, -(2**63), 2**64, -(2**63) - 1, 10**400],
        bytearray(b"mutable"),
        (),
        [(1, [2, (3,)])],
        Decimal("sNaN"),
        "\ud800 alone",
        {"\udfff": Color.MIXED},
    ],
    ids=repr,
)
def test_values_at_the_edges_arrive_as_they_were_sent(value: object) -> None:
    assert repr(travel(value)) == repr(value)


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype="i4").reshape(2, 3), np.array(5.0), np.array([], "f8"), np.array([True]), np.arange(9)[::2]],
    ids=repr,
)
def test_memoryviews_keep_format_shape_and_content(array: "np.ndarray[Any, Any]") -> None:
    sent = array.data
    got = travel(sent)
    assert (got.format, got.shape, got.tobytes()) == (sent.format, sent.shape, sent.tobytes())


@pytest.mark.parametrize(
    "array",
    [np.array([1], ">i4"), np.array([1j]), np.zeros((0, 3)), np.zeros(0, "?"), np.array([b"ab"])],
    ids=repr,
)
def test_memoryviews_that_python_cannot_make_are_refused(array: "np.ndarray[Any, Any]") -> None:
    for codec in (unsigned, signed):
        with pytest.raises(ValueNotSerializable, match=r"a memoryview of format '.*' and shape \(.*\) cannot be sent"):
            codec.pack(array.data)


def test_a_zone_only_the_sender_knows_keeps_the_moment() -> None:
    class Odd(tzinfo):
        def tzname(self, when: datetime | None) -> str:
            return "odd"

        def utcoffset(self, when: datetime | None) -> timedelta:
            return timedelta(hours=1)

        def dst(self, when: datetime | None) -> None:
            return None

    sent = datetime(2024, 1, 1, tzinfo=Odd())
    got = travel(sent)
    assert got == sent
    assert got.utcoffset() == timedelta(hours=1)


def test_plain_data_is_plain_msgpack() -> None:
    value = {"a": [1, 2.5, None, True, "x", b"y"], "b": {}}
    assert unsigned.pack(value) == msgspec.msgpack.encode(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("d5019101", (1,)),
        ("d5029101", {1}),
        ("d5039101", frozenset({1})),
        ("c707049192d501910102", {(1,): 2}),
        ("c7170594aa746573745f636f646563a5436f6c6f72a352454401", Color.RED),
        (
            "c73b0693aa746573745f636f646563a646726f7a656e82a47768656ec7181494b3323032342d30312d30325430303a30303a303000a"
            "0c0a5696e6e657203",
            Frozen(datetime(2024, 1, 2), 3),
        ),
        ("c7180794aa746573745f636f646563a44f70656e81a1610191a161", Open.model_validate({"a": 1})),
        ("c70310eda080", "\ud800"),
        ("c70911000000000000000001", 2**64),
        ("d812000000000000f03f0000000000000040", 1 + 2j),
        ("d41378", bytearray(b"x")),
        (
            "c7221494ba323032342d30312d30325430333a30343a30352e30303030303600a355544300",
            datetime(2024, 1, 2, 3, 4, 5, 6, ZoneInfo("UTC")),
        ),
        (
            "c71c1494b3323032342d30312d30325430303a30303a303000a0ced693a400",
            datetime(2024, 1, 2, tzinfo=timezone(timedelta(hours=1))),
        ),
        ("c70a15323032342d30312d3032", date(2024, 1, 2)),
        ("c70d1694a830313a30323a303301a0c0", time(1, 2, 3, fold=1)),
        ("d61793010203", timedelta(1, 2, 3)),
        ("d81800000000000000000000000000000005", UUID(int=5)),
        ("d619312e3530", Decimal("1.50")),
        ("c70f2094a33c6932920102c2c40401000200", np.array([[1, 2]], "<i2")),
        ("c70d2194a33c663490c2c4040000c03f", np.float32(1.5)),
    ],
)
def test_wire_bytes_of_version_1_still_decode(text: str, value: object) -> None:
    assert same(unsigned.unpack(bytes.fromhex(text)), value)


def test_a_call_without_arguments_costs_nothing() -> None:
    assert unsigned.pack_call((), {}) is EMPTY_CALL
    assert unsigned.unpack_call(EMPTY_CALL) == ((), {})
    assert unsigned.unpack_call(b"") == ((), {})


def test_a_plain_call_is_told_from_one_that_needs_a_closer_look() -> None:
    assert unsigned.pack_plain_call((1, [{"a": 2.5}]), {"k": "v"}) == unsigned.pack_call((1, [{"a": 2.5}]), {"k": "v"})
    for exotic in ((1,), Color.RED, Level.HIGH, Word.YES, np.float64(1), Ref(), {1: {2, 3}}, 2**70, {(1,): 2}):
        assert unsigned.pack_plain_call(([exotic],), {}) is None


# --- classes --------------------------------------------------------------------------------------------------------


def test_dataclasses_arrive_as_they_were_without_running_their_constructor() -> None:
    sent = Point(1.0, ("a",))
    sent.length = 7
    sent.__dict__["extra"] = {1}
    got = travel(sent)
    assert isinstance(got, Point)
    assert vars(got) == vars(sent) == {"x": 2.0, "tags": ("a",), "length": 7, "extra": {1}}


@dataclass
class Row(list[int]):
    tag: str = ""


@dataclass
class Refused(Exception):
    code: int


@dataclass
class Made:
    """Has a field that its constructor does not set, and a `__new__` of its own."""

    given: int
    later: int = field(init=False)

    def __new__(cls, *_: object) -> "Made":
        return super().__new__(cls)


ROW = Row("tag")
ROW.extend([1, 2])
WITHOUT_ITS_FIELDS = [ROW, Refused(5), Made(1), Item.model_construct(tags=set())]


@pytest.mark.parametrize("value", WITHOUT_ITS_FIELDS, ids=lambda value: type(value).__name__)
def test_what_cannot_be_made_from_its_fields_is_pickled_or_refused(value: Any) -> None:
    found = travel(value, signed)
    assert type(found) is type(value)
    assert vars(found) == vars(value)
    assert not isinstance(value, list) or list(found) == [1, 2]
    with pytest.raises(
        ValueNotSerializable, match=r"based on (list|Exception), cannot be|field is not set, cannot be sent"
    ):
        unsigned.pack(value)


def test_a_constructor_of_its_own_makes_no_dataclass_another() -> None:
    made = Made(1)
    made.later = 2
    assert vars(travel(made)) == {"given": 1, "later": 2}


def test_pydantic_models_arrive_as_they_were() -> None:
    sent = Item(name="n", seen={1, 2}, pixels=np.arange(3), remark="r")
    got = travel(sent)
    assert isinstance(got, Item)
    assert got.model_dump(exclude={"pixels"}) == sent.model_dump(exclude={"pixels"})
    assert same(got.pixels, sent.pixels)
    assert got.model_fields_set == sent.model_fields_set
    assert got._cache == {}
    assert travel(Open.model_validate({"a": 1, "b": (2,)})) == Open.model_validate({"a": 1, "b": (2,)})


class Counted(pydantic.BaseModel):
    names: list[str] = []
    _count: int = pydantic.PrivateAttr(default=0)
    _later: int = pydantic.PrivateAttr()

    def model_post_init(self, _context: object) -> None:
        self.names.append("made")
        self._count = len(self.names)


class Connected(pydantic.BaseModel):
    name: str
    _lock: Any = pydantic.PrivateAttr(default_factory=threading.Lock)
    _calls: int = 0

    def model_post_init(self, _context: object) -> None:
        self.name += "!"


def test_private_attributes_of_models_arrive_and_a_model_is_not_set_up_a_second_time() -> None:
    sent = Counted(names=["a"])
    sent._count = 7
    for got in (travel(sent), travel(travel(sent, signed), signed)):
        assert got == sent
        assert got.names == ["a", "made"]
        assert got._count == 7
        assert not hasattr(got, "_later")


def test_private_attributes_that_cannot_be_sent_are_those_of_a_new_model() -> None:
    sent = Connected(name="n")
    sent._calls = 3
    got = travel(sent, signed)
    assert (got.name, got._calls) == ("n!", 3)
    assert got._lock is not sent._lock
    assert got._lock.acquire(blocking=False)


@dataclass
class Cached:
    key: int
    lock: Any = field(default_factory=threading.Lock, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return {"key": self.key}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.key, self.lock = state["key"], threading.Lock()


@dataclass(frozen=True)
class Reduced:
    key: int
    lock: Any = field(default_factory=threading.Lock, compare=False)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Reduced, (self.key,)


class Dumped(pydantic.BaseModel):
    key: int

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__dict__": {"key": self.key + 1}}


def test_what_a_class_says_of_its_pickles_counts() -> None:
    assert travel(Cached(1), signed) == Cached(1)
    assert travel([Reduced(1)], signed) == [Reduced(1)]
    assert travel(Dumped(key=1), signed) == Dumped(key=2)
    with pytest.raises(ValueNotSerializable, match="lock cannot be sent"):
        unsigned.pack(Cached(1))
    frozen = Frozen(datetime.now(UTC))  # whose `__getstate__` is that of `dataclass`
    assert signed.pack(frozen) == unsigned.pack(frozen)


@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        (Point(1.0), {"x": 2.0, "tags": (), "length": 0}),
        (Open.model_validate({"a": 1, "b": 2}), {"a": 1, "b": 2}),
        (Color.MIXED, (1, "two")),
        (Word.YES, "yes"),
    ],
    ids=repr,
)
def test_instances_of_classes_the_receiver_has_not_imported_arrive_as_plain_data(
    sent: object, arrives: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = unsigned.pack([sent])
    monkeypatch.delattr(sys.modules[__name__], type(sent).__name__)
    assert same(unsigned.unpack(data), [arrives])


def test_nothing_is_imported_because_a_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    assert travel_as("wave", "Wave_read", {"x": 1}) == {"x": 1}
    assert "wave" not in sys.modules


@pytest.mark.parametrize(
    ("module", "qualname"),
    [
        ("subprocess", "Popen"),
        ("builtins", "dict"),
        (__name__, "Point.__class__"),
        (__name__, "Point.__init__"),
        (__name__, "travel"),
        (__name__, "unsigned"),
        (__name__, "Point.x.y"),
        (__name__, ""),
        ("", ""),
        ("os", "path"),
    ],
)
def test_a_name_that_is_no_dataclass_makes_a_plain_dict(module: str, qualname: str) -> None:
    assert travel_as(module, qualname, {"x": 1}) == {"x": 1}


def test_a_dataclass_with_other_fields_here_than_there_arrives_as_a_plain_dict() -> None:
    assert travel_as(__name__, "Point", {"x": 1}) == {"x": 1}
    assert travel_as(__name__, "Frozen", {"when": 1, "inner": 2, "more": 3}) == {"when": 1, "inner": 2, "more": 3}


def travel_as(module: str, qualname: str, state: dict[str, Any]) -> object:
    return unsigned.unpack(encode(Ext(extension_types.DATACLASS, encode([module, qualname, state]))))


def test_local_classes_travel_by_value_in_signed_frames() -> None:
    @dataclass
    class Local:
        x: int

    got = travel([Local(1)], signed)[0]
    assert type(got).__name__ == "Local"
    assert got.x == 1
    assert travel([Local(1)]) == [{"x": 1}]


def test_handles_are_made_anew_by_the_receiver() -> None:
    got = travel({"h": (Handle("Echo"),)})["h"][0]
    assert isinstance(got, Handle)
    assert got.name == "Echo"
    with pytest.raises(FrameRejected, match="means nothing here"):
        signed.unpack(unsigned.pack(Handle("Echo")))


async def test_a_request_arrives_as_a_request_with_its_body() -> None:
    sent = make_request(b'{"a": 1}')
    await sent.body()
    got = travel({"r": sent})["r"]
    assert type(got) is Request
    assert (got.method, got.url.path, got.query_params["q"], got.headers["x-a"]) == ("POST", "/p/x", "1", "b")
    assert got.client is not None
    assert got.client.host == "1.2.3.4"
    assert await got.json() == {"a": 1}
    assert await got.body() == b'{"a": 1}'
    assert not await got.is_disconnected()
    again = travel(got)
    assert await anext(again.stream()) == b'{"a": 1}'


def test_a_request_whose_body_was_not_read_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueNotSerializable, match=r"argument 'req' of Echo: .*`await request.body\(\)` first"):
        unsigned.pack_call((), {"req": make_request(b"x")}, "Echo")


def make_request(body: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/p/x",
        "raw_path": b"/p/x",
        "root_path": "/p",
        "query_string": b"q=1",
        "headers": [(b"x-a", b"b"), (b"host", b"h")],
        "scheme": "http",
        "http_version": "1.1",
        "client": ("1.2.3.4", 5),
        "server": ("h", 80),
        "state": {"not": socket.socket},
    }
    return Request(scope, receive)


# --- what cannot travel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [object(), deque([1]), OrderedDict(a=1), len, int, slice(1), np.array([object()]), 1j.__class__]
)
def test_a_value_that_cannot_travel_is_named_with_its_type_and_the_two_ways_out(value: object) -> None:
    with pytest.raises(ValueNotSerializable) as refused:
        unsigned.pack({"a": [1, (2, value)]}, "the result of Echo.go")
    text = str(refused.value)
    assert text.startswith("the result of Echo.go, at ['a'][1][1]: ")
    assert type(value).__name__ in text or "numpy array of dtype object" in text
    assert "convert it" in text
    assert "QSERVE_SECRET" in text


def test_the_argument_and_the_attribute_are_named() -> None:
    with pytest.raises(ValueNotSerializable, match=r"^argument 2 of Echo, at \.inner\[0\]: a value of type object "):
        unsigned.pack_call((1, Frozen(datetime(2024, 1, 1), [object()])), {}, "Echo")
    with pytest.raises(ValueNotSerializable, match=r"^argument 'k' of the call: a value of type _thread\.lock "):
        unsigned.pack_call((1,), {"k": threading.Lock()})


RECORD = np.zeros(3, [("a", "i4"), ("b", "f8")])
UNION = np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 0]})


@pytest.mark.parametrize("array", [RECORD[["b", "a"]], np.ones(3, UNION), np.ones(3, [("inner", UNION)])])
def test_records_whose_fields_overlap_or_stand_in_another_order_travel_pickled(array: "np.ndarray[Any, Any]") -> None:
    got = travel(array, signed)
    assert (got.dtype, got.tobytes()) == (array.dtype, array.tobytes())
    with pytest.raises(ValueNotSerializable, match=r"a numpy array of dtype .* cannot be sent: convert it"):
        unsigned.pack(array)


@pytest.mark.parametrize("value", [deque([1]), OrderedDict(a=1), slice(1, 2), len, Decimal])
def test_signed_frames_carry_anything_that_pickles(value: object) -> None:
    assert travel([value], signed) == [value]
    assert travel(lambda x: x + 1, signed)(1) == 2
    assert travel(np.array([None, "x"], dtype=object), signed).tolist() == [None, "x"]


def test_what_does_not_even_pickle_is_refused() -> None:
    with pytest.raises(ValueNotSerializable, match=r"argument 1 of the call: .*lock cannot be sent, not even pickled"):
        signed.pack_call((threading.Lock(),), {})


def test_a_pickle_in_an_unsigned_frame_is_never_loaded() -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return pytest.fail, ("loaded",)

    data = encode({"x": Ext(extension_types.PICKLED, pickle.dumps(Trap()))})
    with pytest.raises(FrameRejected, match="pickled value in a frame that is not signed"):
        unsigned.unpack(data)


def test_a_pickle_that_cannot_be_loaded_here_says_why() -> None:
    data = encode(Ext(extension_types.PICKLED, b"cno_such_module\nThing\n."))
    with pytest.raises(ValueNotSerializable, match="No module named 'no_such_module'"):
        signed.unpack(data)


def test_a_ref_where_it_is_not_resolved_is_refused() -> None:
    with pytest.raises(ValueNotSerializable, match="cannot be sent before its result is there: `await` it"):
        unsigned.pack({Ref()})


def test_values_over_the_limit_are_refused_on_both_sides() -> None:
    for value in (b"x" * (LIMIT + 1), np.zeros(LIMIT), [1.5] * LIMIT, {"x" * (LIMIT + 1): (1,)}):
        with pytest.raises(PayloadTooLarge, match=r"the limit is 1,048,576"):
            unsigned.pack(value)
        with pytest.raises(PayloadTooLarge):
            unsigned.pack_call((value,), {})
        assert unsigned.pack_plain_call((value,), {}) is None
    big = encode(b"x" * LIMIT)
    with pytest.raises(FrameRejected, match="the limit is"):
        unsigned.unpack(big)
    with pytest.raises(FrameRejected, match="the limit is"):
        unsigned.unpack_call(big)


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: {"k": x}, lambda x: (x,), lambda x: [(x,)]])
def test_nesting_has_a_limit_that_every_receiver_can_take(wrap: Callable[[Any], Any]) -> None:
    for codec in (unsigned, signed):
        deep = nested(MAX_DEPTH // 2, wrap)
        assert travel(deep, codec) == deep
        for over in (nested(MAX_DEPTH + 2, wrap), nested(100_000, wrap)):
            with pytest.raises(ValueNotSerializable, match="nested deeper than 100 levels") as refused:
                codec.pack(over)
            assert len(str(refused.value)) < 300


def test_dataclasses_may_be_nested_as_deep_whatever_is_in_them() -> None:
    for inmost in (1, 2**70, "\ud800"):
        deep: Any = Point(inmost)  # type: ignore[arg-type]
        for _ in range(MAX_DEPTH - 2):
            deep = Frozen(datetime(2024, 1, 1), deep)
        assert travel(deep) == deep


def test_a_list_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueNotSerializable, match="or contains itself"):
        unsigned.pack(loop)
    with pytest.raises(ValueNotSerializable, match="or contains itself"):
        unsigned.pack_call((loop,), {})
    assert collect_refs((loop,), {}) == []


def ext_bomb(code: int, depth: int) -> bytes:
    data = b"\x90"
    for _ in range(depth):
        data = encode([Ext(code, data)])
    return encode(Ext(code, data))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 100_000,
        b"\x81" * 100_000,
        b"\x81\xa1k" * 100_000,
        b"\xdd\xff\xff\xff\xff" * 10,
        b"\xdf\x7f\xff\xff\xff",
        b"\xc9\x7f\xff\xff\xff\x01",
        ext_bomb(extension_types.TUPLE, 1000),
        ext_bomb(extension_types.SET, 1000),
        b"\xc1",
        b"",
        b"\x01\x01",
        encode(Ext(99, b"")),
        encode(Ext(extension_types.TUPLE, b"\xa3abc")),
        encode(Ext(extension_types.PAIRS, encode([1]))),
        encode(Ext(extension_types.PAIRS, encode([[[], 1]]))),
        encode(Ext(extension_types.SET, encode([[]]))),
        encode(Ext(extension_types.ENUM, encode([]))),
        encode(Ext(extension_types.MODEL, encode([__name__, "Item", 1, 2]))),
        encode(Ext(extension_types.DATACLASS, encode([__name__, "Point", 5]))),
        encode(Ext(extension_types.UUID_, b"short")),
        encode(Ext(extension_types.DATETIME, b"\x90")),
        encode(Ext(extension_types.DATETIME, encode(("2024-01-01", 0, "../../etc/passwd", 2**62)))),
        encode(Ext(extension_types.DECIMAL, b"x")),
        encode(Ext(arrays.ARRAY, encode(("|O", (1,), False, b"12345678")))),
        encode(Ext(arrays.ARRAY, encode(([["a", "|O"]], (1,), False, b"12345678")))),
        encode(Ext(arrays.ARRAY, encode(("<f8", (2,), False, b"12345678")))),
        encode(Ext(arrays.ARRAY, encode(("<f8", (1,), False, b"123456789")))),
        encode(Ext(arrays.ARRAY, encode(("<f8", (-1,), False, b"12345678")))),
        encode(Ext(arrays.ARRAY, encode(("<f8", (2**40, 2**40), False, b"")))),
        encode(Ext(arrays.ARRAY, encode(("rubbish", (1,), False, b"")))),
        encode(Ext(extension_types.REQUEST, b"\x90")),
        encode(Ext(extension_types.HANDLE, encode([1, 2]))),
    ],
    ids=lambda bomb: bomb[:12].hex(),
)
def test_malformed_values_are_rejected(bomb: bytes) -> None:
    with pytest.raises(FrameRejected):
        unsigned.unpack(bomb)
    with pytest.raises(FrameRejected):
        unsigned.unpack_call(bomb or b"\x90")
    with pytest.raises(FrameRejected):
        unsigned.unpack_call(b"\x92\x91" + bomb + b"\x80")


@given(st.binary(max_size=200), st.sampled_from([*range(-2, 40)]))
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_random_bytes_give_a_value_or_a_rejection(data: bytes, code: int) -> None:
    for frame in (data, encode(Ext(code, data)), encode(Ext(code, encode([data, data])))):
        with contextlib.suppress(FrameRejected):
            unsigned.unpack(frame)


@pytest.mark.parametrize("call", [encode([1, {}]), encode([[], {1: 2}]), encode([[], {}, 3]), encode({})])
def test_what_is_no_call_is_rejected(call: bytes) -> None:
    with pytest.raises(FrameRejected):
        unsigned.unpack_call(call)


# --- refs -------------------------------------------------------------------------------------------------------------


def test_refs_are_found_and_replaced_in_arguments_lists_tuples_and_dicts() -> None:
    one, two = Ref(), Ref()
    args = (one, [1, {"a": (two, one)}], Handle("h"))
    kwargs = {"k": two, "other": [3]}
    assert collect_refs(args, kwargs) == [one, two]
    assert substitute(args, kwargs, {one: "1", two: None}) == (
        ("1", [1, {"a": (None, "1")}], args[2]),
        {"k": None, "other": [3]},
    )
    assert args[1] == [1, {"a": (two, one)}]


def test_plain_arguments_hold_no_refs() -> None:
    assert collect_refs((1, "a", {"b": [2.5]}), {"c": None}) == []
    assert collect_refs(((1, 2), {3}), {"h": Handle("x")}) == []


@pytest.mark.parametrize(("unpack", "decode"), [("unpack", "_decode"), ("unpack_call", "_decode_call")])
def test_a_value_for_which_there_is_no_memory_is_not_taken_for_a_damaged_one(
    unpack: str, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_no_room(_data: bytes) -> None:
        raise MemoryError

    codec = Codec(allow_pickle=True, max_bytes=LIMIT)
    monkeypatch.setattr(codec, decode, has_no_room)
    with pytest.raises(ValueNotSerializable, match="needs more memory than this process can get"):
        getattr(codec, unpack)(codec.pack_call((1,), {}))
