"""Processes of neighbouring versions share queues and records: what one adds, the other overlooks."""

import msgspec
import pytest

from qserve.wire import call_record, messages, spec

MESSAGES = [
    kind
    for module in (messages, call_record, spec)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__
]


def value_of(kind: type[msgspec.Struct]) -> msgspec.Struct:
    """Some value of it, every field with its default or something empty."""
    empty = {"Str": "", "Bytes": b"", "Int": 0, "Float": 0.0, "Bool": False, "List": [], "Dict": {}}

    def make(field: msgspec.inspect.Field) -> object:
        found = field.type
        if isinstance(found, msgspec.inspect.StructType):
            return value_of(found.cls)
        if isinstance(found, msgspec.inspect.LiteralType):
            return found.values[0]
        if isinstance(found, msgspec.inspect.UnionType):
            return None if any(isinstance(it, msgspec.inspect.NoneType) for it in found.types) else ""
        return empty.get(type(found).__name__.removesuffix("Type"), ())

    description = msgspec.inspect.type_info(kind)
    assert isinstance(description, msgspec.inspect.StructType)
    required = {field.name: make(field) for field in description.fields if field.required}
    return kind(**required)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_what_a_newer_version_adds_is_overlooked(kind: type[msgspec.Struct]) -> None:
    value = value_of(kind)
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    newer = [*plain, "new"] if isinstance(plain, list | tuple) else {**plain, "new": 1}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(newer), type=kind) == value


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_what_an_older_version_does_not_send_has_a_default(kind: type[msgspec.Struct]) -> None:
    """What was added last: required fields are as old as their message."""
    description = msgspec.inspect.type_info(kind)
    assert isinstance(description, msgspec.inspect.StructType)
    fields = list(description.fields)
    while fields and not fields[-1].required:
        fields.pop()
    value = value_of(kind)
    plain = msgspec.to_builtins(value, builtin_types=(bytes,))
    older = (
        {field.name: plain[field.encode_name] for field in fields} if isinstance(plain, dict) else plain[: len(fields)]
    )
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=kind) == value
