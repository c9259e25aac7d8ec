"""A function, and a class with state, a method for handles and settings that change while it runs.

qserve run examples.hello
curl 'http://127.0.0.1:8000/hello?name=Ada'
curl http://127.0.0.1:8000/counter
qserve call Counter add 5
"""

import os
import socket
from typing import TypedDict

from starlette.requests import Request

from qserve import serve


@serve.deployment(name="Hello", route_prefix="/hello")
def hello(request: Request) -> str:
    return f"Hello {request.query_params.get('name', 'world')}!"


class Count(TypedDict):
    count: int
    host: str
    pid: int


class Step(TypedDict):
    step: int


@serve.deployment(route_prefix="/counter", user_config={"step": 1})
class Counter:
    """Counts per replica: each reply names the process that counted."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.step = 1

    def reconfigure(self, config: Step) -> None:
        self.step = config["step"]

    def __call__(self) -> Count:
        return {"count": self.add(self.step), "host": socket.gethostname(), "pid": os.getpid()}

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count
