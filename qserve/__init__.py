"""Serve Python classes and functions over a message queue: `from qserve import serve`."""

from qserve import serve
from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    CallCancelled,
    ConfigurationError,
    DeploymentNotFound,
    DeploymentUnavailable,
    FrameRejected,
    GetTimeoutError,
    MethodNotFound,
    NoInstanceError,
    PayloadTooLarge,
    PoisonCall,
    QServeError,
    ReplicaDied,
    ResultNotSerializable,
    ResultTooLarge,
    TaskError,
    ValueNotSerializable,
)
from qserve.ref import Ref, get, wait

__all__ = [
    "BackPressureError",
    "BrokerUnavailable",
    "CallCancelled",
    "ConfigurationError",
    "DeploymentNotFound",
    "DeploymentUnavailable",
    "FrameRejected",
    "GetTimeoutError",
    "MethodNotFound",
    "NoInstanceError",
    "PayloadTooLarge",
    "PoisonCall",
    "QServeError",
    "Ref",
    "ReplicaDied",
    "ResultNotSerializable",
    "ResultTooLarge",
    "TaskError",
    "ValueNotSerializable",
    "get",
    "serve",
    "wait",
]
