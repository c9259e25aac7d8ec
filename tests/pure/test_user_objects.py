"""What qserve keeps in objects of user classes, and destructors that have had their run."""

import copy
import gc
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from qserve.user_code.user_objects import forget_destructor, kept_in


class Holder:
    value = 7


class Narrow:
    __slots__ = ("value",)


class WithRoom(Narrow):
    __slots__ = ("__dict__",)


def test_what_is_kept_belongs_to_one_object_and_not_to_its_copies() -> None:
    holder = Holder()
    kept_in(holder, "me")["key"] = lambda: "cannot be pickled"
    assert list(kept_in(holder, "me")) == ["key"]
    for other in (copy.copy(holder), copy.deepcopy(holder), pickle.loads(pickle.dumps(holder)), Holder()):
        assert kept_in(other, "me") == {}
    assert list(kept_in(holder, "me")) == ["key"]


def test_a_class_with_slots_needs_room_for_it_and_is_told_so() -> None:
    with pytest.raises(TypeError, match="me keeps its state in the instance, and those of Narrow have no room for it"):
        kept_in(Narrow(), "me")
    assert kept_in(WithRoom(), "me") == {}


class Counted:
    runs: ClassVar[list[str]] = []

    def __del__(self) -> None:
        Counted.runs.append(type(self).__qualname__)


@dataclass(frozen=True)
class Frozen(Counted):
    size: int = 1


@pytest.mark.parametrize("cls", [Counted, Frozen])
def test_a_destructor_that_has_run_does_not_run_again(cls: type[Any]) -> None:
    Counted.runs.clear()
    found = cls()
    found.__del__()
    forget_destructor(found)
    assert isinstance(found, cls)
    assert repr(type(found)) == repr(cls)
    del found
    gc.collect()
    assert Counted.runs == [cls.__qualname__]


def test_a_class_that_takes_no_subclass_keeps_its_destructor() -> None:
    class Final:
        def __init_subclass__(cls) -> None:
            raise RuntimeError("this class has no subclasses")

        def __del__(self) -> None: ...

    found = Final()
    forget_destructor(found)
    assert type(found) is Final
