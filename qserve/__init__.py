"""Serve Python classes and functions over a message queue: `from qserve import serve`."""

import importlib
from typing import TYPE_CHECKING

from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    CallCancelled,
    CallNotFound,
    ConfigurationError,
    DeploymentNotFound,
    DeploymentUnavailable,
    FrameRejected,
    GetTimeoutError,
    IdempotencyConflict,
    Indeterminate,
    MethodNotFound,
    NoInstanceError,
    PayloadTooLarge,
    PoisonCall,
    QServeError,
    ReplicaDied,
    ResultNotSerializable,
    ResultTooLarge,
    StreamBroken,
    TaskError,
    ValueNotSerializable,
)

if TYPE_CHECKING:
    from qserve import serve
    from qserve.calls.ref import Ref, get, wait

    __version__: str

__all__ = [
    "BackPressureError",
    "BrokerUnavailable",
    "CallCancelled",
    "CallNotFound",
    "ConfigurationError",
    "DeploymentNotFound",
    "DeploymentUnavailable",
    "FrameRejected",
    "GetTimeoutError",
    "IdempotencyConflict",
    "Indeterminate",
    "MethodNotFound",
    "NoInstanceError",
    "PayloadTooLarge",
    "PoisonCall",
    "QServeError",
    "Ref",
    "ReplicaDied",
    "ResultNotSerializable",
    "ResultTooLarge",
    "StreamBroken",
    "TaskError",
    "ValueNotSerializable",
    "get",
    "serve",
    "wait",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Every process imports this package first, and most need none of these. `serve` brings the whole library
        # along: without it, nodes, gateways and `qserve --help` are imported in 0.07 s instead of 0.3 s.
        if name == "serve":
            return importlib.import_module("qserve.serve")
        if name in ("Ref", "get", "wait"):
            found = globals()[name] = getattr(importlib.import_module("qserve.calls.ref"), name)
            return found
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("qserve")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
