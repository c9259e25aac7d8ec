"""The two ledgers: what clients sent and were answered, and what replicas started and ended.

A client writes `> id kind via t0 timeout seconds nonce fate` when it sends, `= id t durable-id` when a durable call is
accepted, and `< id t1 outcome digest detail` at each answer. A replica writes `id START|END t attempt pid version`.
Times are those of the machine's monotonic clock, which all processes share. The right answer of a call follows from
its id and a nonce that nobody else has, so an answer that was meant for another call shows.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote, unquote

START, END = "START", "END"
PARTS = 5
"""Of a streamed answer."""

OK = "ok"
RESET, BROKEN = "reset", "broken"
"""The connection broke before an answer; in the middle of one."""
INDETERMINATE = "indeterminate"
"""The caller was told that it may have run or not. Other outcomes are HTTP statuses, of handles as well."""


class Order(NamedTuple):
    """What a call asks for."""

    id: str
    nonce: str
    seconds: float
    fate: str = ""
    size: int = 0
    """Bytes of the value that goes there and back with it."""


class Answer(NamedTuple):
    """One answer that reached a client."""

    at: float
    outcome: str
    digest: str
    detail: str


class Run(NamedTuple):
    """One start of a call in a replica."""

    at: float
    attempt: int
    pid: int
    version: str


@dataclass
class Call:
    """A call as its client saw it; `kind` is one of `load.KINDS`."""

    id: str
    kind: str
    via: str
    sent: float
    timeout_s: float
    seconds: float
    nonce: str
    fate: str
    accepted: str = ""
    answers: list[Answer] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    ends: list[Run] = field(default_factory=list)

    @property
    def nature(self) -> str:
        """What may happen to it: "safe", "once", "stream" or "durable"."""
        return self.kind.partition("-")[2]

    @property
    def expected(self) -> str:
        """Digest of the right answer."""
        if self.nature == "stream":
            return digest("".join(proof(self.id, self.nonce, part) for part in range(PARTS)))
        return digest(proof(self.id, self.nonce))

    @property
    def deadline(self) -> float:
        """When its client gives up."""
        return self.sent + self.timeout_s


def proof(call_id: str, nonce: str, part: int = -1) -> str:
    """The answer that only this call can have."""
    return hashlib.sha256(f"{call_id} {nonce} {part}".encode()).hexdigest()


def value_of(call_id: str, nonce: str, size: int) -> bytes:
    """The value that only this call carries."""
    block = hashlib.shake_256(f"{call_id} {nonce}".encode()).digest(4093)  # no divisor of anybody's buffer
    return (block * (size // len(block) + 1))[:size]


def digest(body: str | bytes) -> str:
    """What stands in the ledger for a body."""
    return hashlib.sha256(body.encode() if isinstance(body, str) else body).hexdigest()[:16]


def run_line(call_id: str, what: str, at: float, attempt: int, pid: int, version: str) -> bytes:
    """A line of a replica's ledger."""
    return f"{call_id} {what} {at:.6f} {attempt} {pid} {version}\n".encode()


class ClientLedger:
    """The ledger of one client process."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def sent(self, order: Order, kind: str, via: str, at: float, timeout_s: float) -> None:
        """A call is about to be sent."""
        self._file.write(f"> {order.id} {kind} {via} {at:.6f} {timeout_s} {order.seconds} {order.nonce} {order.fate}\n")

    def accepted(self, call_id: str, at: float, durable_id: str) -> None:
        """A durable call has been accepted under an id of its own."""
        self._file.write(f"= {call_id} {at:.6f} {durable_id}\n")

    def answered(self, call_id: str, at: float, outcome: str, body: str | bytes = b"", detail: str = "") -> None:
        """An answer has come."""
        self._file.write(f"< {call_id} {at:.6f} {outcome} {digest(body) if body else '-'} {quote(detail[:300])}\n")


def read(folder: Path, clients: str = "*") -> tuple[dict[str, Call], dict[str, list[Run]]]:
    """The calls of these clients, with their runs; and the runs of calls that none of them has sent."""
    calls: dict[str, Call] = {}
    for line in _lines(folder, f"client-{clients}"):
        mark, call_id, *rest = line.split(" ")
        if mark == ">":
            kind, via, at, timeout_s, seconds, nonce, fate = rest
            calls[call_id] = Call(call_id, kind, via, float(at), float(timeout_s), float(seconds), nonce, fate)
        elif mark == "=":
            calls[call_id].accepted = rest[1]
        else:
            at, outcome, body, detail = rest
            calls[call_id].answers.append(Answer(float(at), outcome, body, unquote(detail)))
    strange: dict[str, list[Run]] = {}
    for line in _lines(folder, "replica-*"):
        call_id, what, at, attempt, pid, version = line.split(" ")
        run = Run(float(at), int(attempt), int(pid), version)
        call = calls.get(call_id)
        if call is None:
            strange.setdefault(call_id, []).append(run)
        else:
            (call.runs if what == START else call.ends).append(run)
    return calls, strange


def _lines(folder: Path, pattern: str) -> Iterator[str]:
    for path in sorted(folder.glob(pattern)):
        yield from path.read_text().splitlines()
