"""Hooks of a gateway that tests name in QSERVE_HOOKS: one writes down what it sees, the other always raises."""

import os
from pathlib import Path

from qserve.hooks import GatewayHook, GatewayRequest
from tests.support.gates import Notes

HOOKS = "tests.support.recording_hooks:Failing, tests.support.recording_hooks:Recording"
NOTES = "RECORDING_HOOKS_NOTES"
"""Environment variable with the path of the notes."""


class Recording(GatewayHook):
    """Notes every event of a request in one line, and hands its path on as meta."""

    def __init__(self) -> None:
        self.notes = Notes(Path(os.environ[NOTES]))

    def before(self, request: GatewayRequest) -> str:
        path = str(request.scope["path"])
        request.meta["path"] = path
        self.notes.add(f"before {request.deployment} {path}{' durable' if request.durable else ''}")
        return path

    def after(self, request: GatewayRequest, state: str, status: int) -> None:
        self.notes.add(f"after {state} {status}")

    def error(self, request: GatewayRequest, state: str, error: BaseException) -> None:
        self.notes.add(f"error {state} {type(error).__name__}")


class Failing(GatewayHook):
    """Never does what it should."""

    def before(self, request: GatewayRequest) -> None:
        raise RuntimeError("before")

    def after(self, request: GatewayRequest, state: None, status: int) -> None:
        raise SystemExit("after")

    def error(self, request: GatewayRequest, state: None, error: BaseException) -> None:
        raise KeyboardInterrupt("error")
