"""Classes of a script, as pickled values name them: where the receiver runs the same script, its own class is meant.

Pickles name the functions of this module, and wait in Redis for the next version of qserve: these functions keep their
names and parameters.
"""

import inspect
import io
import pickle
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import cloudpickle
import msgspec

from qserve.wire.user_classes import find_class

_MAIN = "__main__"
_KEPT_SETTINGS = (
    *("frozen", "eq", "order", "array_like", "gc", "repr_omit_defaults", "omit_defaults", "forbid_unknown_fields"),
    *("weakref", "dict", "cache_hash", "tag", "tag_field"),
)


def dumps_value(value: object, buffer_callback: Callable[[pickle.PickleBuffer], Any] | None = None) -> bytes:
    """Pickle a value, with what it needs of the script that this process runs."""
    buffer = io.BytesIO()
    _ValuePickler(buffer, protocol=5, buffer_callback=buffer_callback).dump(value)
    return buffer.getvalue()


class _ClassPickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        reduced = super().reducer_override(obj)
        return reduce_struct(obj, reduced) if is_struct(obj) and isinstance(reduced, tuple) else reduced


class _ValuePickler(_ClassPickler):
    """Names the classes of the script, and carries them for processes that do not run it."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and obj.__module__ == _MAIN and find_class(_MAIN, obj.__qualname__) is obj:
            script = _script_in(_MAIN)
            if script is not None:
                buffer = io.BytesIO()
                _ClassPickler(buffer, protocol=5).dump(obj)
                spec = sys.modules[_MAIN].__spec__
                module = _MAIN if spec is None else spec.name
                return class_of_script, (script, module, obj.__qualname__, buffer.getvalue())
        return super().reducer_override(obj)


def _script_in(module: str) -> str | None:
    """The file that was run as this module of the process; None where the module was made of pickles."""
    attributes = vars(sys.modules[module]) if module in sys.modules else {}
    file = attributes.get("__file__")
    return None if file is None or attributes.get("__loader__") is None else _resolved(file)


@cache
def _resolved(file: str) -> str:
    return str(Path(file).resolve())


def class_of_script(script: str, module: str, qualname: str, pickled: bytes) -> type:
    """The class that this process has defined under that name, if it runs that script; otherwise the pickled one.

    Args:
        module: What replicas import the script as, if `python -m` has run it.
    """
    found = next((find_class(name, qualname) for name in (_MAIN, module) if _script_in(name) == script), None)
    made: type = found or pickle.loads(pickled)  # noqa: S301  it is part of a pickle
    return made


# msgspec.Struct: its fields count when the class is made, and cloudpickle adds them later


def is_struct(value: object) -> bool:
    """Whether it is a class of msgspec's."""
    return isinstance(value, msgspec.StructMeta)


def reduce_struct(cls: Any, reduced: tuple[Any, ...]) -> tuple[Any, ...]:
    """What cloudpickle makes of a class, with what msgspec has to know when it makes the class again."""
    make, (meta, name, bases, namespace, *rest), *others = reduced
    declared = {*vars(cls).get("__slots__", ()), *vars(cls).get("__annotations__", ())}
    own = [field for field in cls.__struct_fields__ if field in declared]
    wire_names = dict(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True))
    settings = {setting: getattr(cls.__struct_config__, setting) for setting in _KEPT_SETTINGS}
    settings["rename"] = {field: wire_names[field] for field in own if wire_names[field] != field}
    settings["kw_only"] = any(_is_keyword_only(cls, field) for field in own)
    count = len(cls.__struct_defaults__)
    defaults = dict(
        zip(cls.__struct_fields__[len(cls.__struct_fields__) - count :], cls.__struct_defaults__, strict=True)
    )
    fields = {}
    for field in own:
        default = defaults.get(field, msgspec.NODEFAULT)
        if default is not msgspec.NODEFAULT:
            is_made = type(default).__name__ == "Factory"
            fields[field] = (is_made, default.factory if is_made else default)
    # Their names are enough: the annotations themselves, which may mention the class, follow with its state.
    namespace = {**namespace, "__annotations__": dict.fromkeys(own, object)}
    return make, (partial(make_struct, meta, settings, fields), name, bases, namespace, *rest), *others


def make_struct(
    meta: Callable[..., type],
    settings: Mapping[str, Any],
    fields: Mapping[str, tuple[bool, Any]],
    name: str,
    bases: tuple[type, ...],
    namespace: dict[str, Any],
) -> type:
    """A class of msgspec's.

    Args:
        fields: The defaults of its own fields, each with whether a function makes it.
    """
    for field, (is_made, default) in fields.items():
        namespace[field] = msgspec.field(default_factory=default) if is_made else msgspec.field(default=default)
    return meta(name, bases, namespace, **settings)


def _is_keyword_only(cls: Any, field: str) -> bool:
    try:
        return inspect.signature(cls).parameters[field].kind is inspect.Parameter.KEYWORD_ONLY
    except (NameError, ValueError):  # its annotations name what is not there
        return False
