"""What qserve keeps in objects of user classes, and destructors that have had their run."""

import logging
from types import new_class
from typing import Any, Final

logger = logging.getLogger(__name__)

_KEPT: Final = "_qserve_kept"


class _Kept(dict[Any, Any]):
    """Belongs to one object: its copies and pickles begin with nothing."""

    def __init__(self, owner: int = 0) -> None:
        super().__init__()
        self.owner = owner

    def __reduce__(self) -> tuple[type["_Kept"], tuple[()]]:
        return _Kept, ()


def kept_in(instance: Any, keeper: str) -> dict[Any, Any]:
    """What is kept in an object for as long as it is there: the same dictionary each time.

    Args:
        keeper: Who keeps it, for the error.

    Raises:
        TypeError: The object has no room for it.
    """
    attributes = getattr(instance, "__dict__", None)
    if attributes is None:
        name = type(instance).__name__
        raise TypeError(
            f"{keeper} keeps its state in the instance, and those of {name} have no room for it, because the class has "
            f"__slots__. Add '__dict__' to the __slots__ of {name}, or leave them out."
        )
    kept: _Kept | None = attributes.get(_KEPT)
    if kept is None or kept.owner != id(instance):
        kept = attributes[_KEPT] = _Kept(id(instance))
    return kept


def forget_destructor(instance: Any) -> None:
    """Keep Python from running `__del__`, which has run, once more."""
    cls = type(instance)

    def without_destructor(namespace: dict[str, Any]) -> None:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
        namespace |= {"__slots__": (), "__del__": _nothing, **names}

    try:
        object.__setattr__(instance, "__class__", new_class(cls.__name__, (cls,), exec_body=without_destructor))
    except Exception:  # a layout Python does not let us exchange, or a metaclass of its own; then it runs once more
        logger.debug("__del__ of %r may run again", cls.__name__)


def _nothing(self: object) -> None:
    """In place of a `__del__` that has run."""
