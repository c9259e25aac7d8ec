"""As much of torch as the way of a tensor into a message and out of it needs, on numpy, for machines without torch.

`pip install torch` where the tests run, and they use the real one.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

_NUMPY = {
    "float32": "<f4",
    "float64": "<f8",
    "bfloat16": "<i2",  # numpy has none of its own
    "uint8": "|u1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "complex128": "<c16",
    "bool": "|b1",
}


class dtype:  # noqa: N801  torch's name
    """The type of a tensor's elements."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"torch.{self.name}"


_STRIDED = object()
_TYPES = {name: dtype(name) for name in _NUMPY}


class Tensor:
    """Numbers in the memory of this process."""

    device = SimpleNamespace(type="cpu")
    layout = _STRIDED
    is_quantized = False
    is_nested = False

    def __init__(self, numbers: "np.ndarray[Any, Any]", kind: dtype) -> None:
        self._numbers = numbers
        self.dtype = kind
        self.shape = numbers.shape
        self.requires_grad = False

    def is_conj(self) -> bool:
        return False

    def is_neg(self) -> bool:
        return False

    def element_size(self) -> int:
        return int(self._numbers.itemsize)

    def __getitem__(self, where: Any) -> "Tensor":
        made = Tensor(self._numbers[where], self.dtype)
        made.requires_grad = self.requires_grad
        return made

    def detach(self) -> "Tensor":
        return Tensor(self._numbers, self.dtype)

    def contiguous(self) -> "Tensor":
        assert not self.requires_grad, "torch gives the numbers of what requires a gradient only when it is detached"
        return Tensor(np.ascontiguousarray(self._numbers).reshape(self.shape), self.dtype)

    def reshape(self, *shape: Any) -> "Tensor":
        return Tensor(self._numbers.reshape(*shape), self.dtype)

    def view(self, kind: dtype) -> "Tensor":
        return Tensor(self._numbers.view(_NUMPY[kind.name]), kind)

    def t(self) -> "Tensor":
        return Tensor(self._numbers.T, self.dtype)

    def numpy(self) -> "np.ndarray[Any, Any]":
        return self._numbers

    def tolist(self) -> Any:
        return self._numbers.tolist()

    def requires_grad_(self) -> "Tensor":
        self.requires_grad = True
        return self


def _module() -> ModuleType:
    made: Any = ModuleType("torch")
    made.Tensor, made.dtype, made.strided = Tensor, dtype, _STRIDED
    for name, kind in _TYPES.items():
        setattr(made, name, kind)

    def arange(count: int, *, dtype: dtype) -> Tensor:
        return Tensor(np.arange(count).astype(_NUMPY[dtype.name]), dtype)

    def empty(shape: Any, *, dtype: dtype) -> Tensor:
        return Tensor(np.empty(shape, _NUMPY[dtype.name]), dtype)

    def frombuffer(data: Any, *, dtype: dtype) -> Tensor:
        assert not memoryview(data).readonly, "torch warns of memory that may not be written"
        return Tensor(np.frombuffer(data, _NUMPY[dtype.name]), dtype)

    made.arange, made.empty, made.frombuffer = arange, empty, frombuffer
    made.ones = lambda *shape, dtype: Tensor(np.ones(math.prod(shape)).astype(_NUMPY[dtype.name]).reshape(shape), dtype)
    return made  # type: ignore[no-any-return]


@contextmanager
def torch_or_stand_in() -> Iterator[Any]:
    """The torch that is installed, or the stand-in in its place."""
    if importlib.util.find_spec("torch") is not None:
        yield importlib.import_module("torch")
        return
    with pytest.MonkeyPatch.context() as patch:
        module = _module()
        patch.setitem(sys.modules, "torch", module)
        yield module
