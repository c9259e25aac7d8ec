"""What FastAPI makes JSON of."""

from collections import deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address
from pathlib import PurePosixPath
from typing import Any
from uuid import UUID

from fastapi import FastAPI
from pydantic import BaseModel, SecretStr

from qserve import serve
from tests.instance.differential.case import Case


class Color(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    y: float = 0.5


class Model(BaseModel):
    when: datetime
    secret: SecretStr
    point: Point


app = FastAPI()


@app.get("/all")
def everything() -> dict[str, Any]:
    return {
        "datetime": datetime(2024, 2, 29, 12, 30, 1, 5, UTC),
        "date": date(2024, 2, 29),
        "time": time(1, 2, 3),
        "timedelta": timedelta(days=1, seconds=1.5),
        "decimals": [Decimal("1.10"), Decimal("3")],
        "uuid": UUID(int=7),
        "enum": Color.RED,
        "set": {1},
        "frozenset": frozenset(),
        "tuple": (1, "2"),
        "deque": deque([1]),
        "bytes": b"text",
        "path": PurePosixPath("/a/b"),
        "ip": IPv4Address("127.0.0.1"),
        "dataclass": Point(1),
        "model": Model(when=datetime(2024, 1, 1, tzinfo=UTC), secret=SecretStr("x"), point=Point(2)),
        "keys": {1: "int", None: "none"},
        "numbers": [1e100, -0.0, 10**20],
        "text": '\u20ac\u2028\U0001f600"\\\x00',
    }


@app.get("/nan")
def nan() -> float:
    return float("nan")


@app.get("/dataclass")
def get_dataclass() -> Point:
    return Point(3)


@app.get("/model")
def get_model() -> Model:
    return Model(when=datetime(2024, 1, 1, tzinfo=UTC), secret=SecretStr("x"), point=Point(2))


@serve.ingress(app)
class Served: ...


CASES = [
    Case("all kinds", "GET", "/all"),
    Case("not a number", "GET", "/nan"),
    Case("a dataclass", "GET", "/dataclass"),
    Case("a model", "GET", "/model"),
]
