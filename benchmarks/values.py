"""Large values through a handle, beside a bare Unix socket: `python -m benchmarks.values 1 15 64` prints figures."""

import asyncio
import mmap
import multiprocessing
import os
import re
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from benchmarks.rows import Row
from qserve import serve
from qserve.broker.large.transfers import Transfers
from qserve.deployments.local_instance import find_settings
from qserve.settings import Settings
from qserve.wire.messages import Signer

MIB = 2**20
SIZES = (1, 15, 64, 256)


class Values:
    """Takes arrays."""

    def __init__(self) -> None:
        self._worst = 0.0
        self._watching: asyncio.Task[None] | None = None

    def size(self, array: Any) -> int:
        return int(array.nbytes)

    def echo(self, array: Any) -> Any:
        return array

    def pid(self) -> int:
        return os.getpid()

    def size_of(self, value: bytes) -> int:
        return len(value)

    async def worst_stall_ms(self) -> float:
        """The longest time that the event loop was late since this was asked last."""
        worst, self._worst = self._worst, 0.0
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return worst

    async def _watch(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self._worst = max(self._worst, (time.perf_counter() - began) * 1000 - 1)


def median_ms(work: Callable[[], object], times: int) -> float:
    """Median of `work` after one that warms it up."""
    work()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


def socket_ms(size: int, times: int) -> float:
    """The same bytes into another process, through a socket and into memory of its own."""
    here, there = socket.socketpair()
    child = os.fork()
    if not child:
        here.close()
        while True:
            place, got = memoryview(bytearray(size)), 0
            while got < size:
                more = there.recv_into(place[got:])
                if not more:
                    os._exit(0)
                got += more
            there.sendall(b"k")
    there.close()
    data = bytes(size)

    def send() -> None:
        here.sendall(data)
        here.recv(1)

    try:
        return median_ms(send, times)
    finally:
        here.close()
        os.waitpid(child, 0)


def new_memory_ms(size: int) -> float:
    """The same bytes into a new memory file and out of it into other new memory, in one process that does nothing else:
    what no first value of a size can do without."""
    readable, writable = os.pipe()
    child = os.fork()  # so that no memory is there that was used before
    if not child:
        data = memoryview(bytes(size))
        began = time.perf_counter()
        file, done = os.memfd_create("new"), 0
        while done < size:
            done += os.pwrite(file, data[done:], done)
        place = memoryview(mmap.mmap(-1, size))
        while done:
            done -= os.preadv(file, [place[size - done :]], size - done)
        os.write(writable, b"%f" % ((time.perf_counter() - began) * 1000))
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as told:
        taken = float(told.read())
    os.waitpid(child, 0)
    return taken


class Bare(NamedTuple):
    """What a size takes without qserve, in ms."""

    socket: float
    new_memory: float


def measure(sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Measure arrays of so many MiB; an instance runs meanwhile."""
    # Before there are threads, because both fork.
    bare = {size: Bare(socket_ms(size * MIB, 15), new_memory_ms(size * MIB)) for size in sizes}
    serve.start()
    try:
        serve.deployment(Values).deploy()
        serve.deployment(name="Next")(Values).deploy()
        handle: Any = serve.get_deployment("Values").get_handle()
        following: Any = serve.get_deployment("Next").get_handle()
        rows = [row for size in sizes for row in size_rows(handle, size, bare[size])]
        return [*rows, *passing_rows(handle, following), *memory_rows(handle), *beside_rows(handle), *chunk_rows()]
    finally:
        serve.shutdown()


def array_of(size: int) -> Any:
    """An array of so many MiB."""
    return numpy.random.default_rng(1).integers(0, 255, size * MIB, dtype=numpy.uint8)


def size_rows(handle: Any, size: int, bare: Bare) -> list[Row]:
    """How long a value takes, and the first of its size."""
    handle.size.remote(numpy.zeros(1)).result()  # so that nothing else happens for the first time
    array = array_of(size)
    began = time.perf_counter()
    handle.size.remote(array).result()
    first = (time.perf_counter() - began) * 1000
    times = 30 if size < 50 else 9
    into = median_ms(lambda: handle.size.remote(array).result(), times)
    echo = median_ms(lambda: handle.echo.remote(array).result(), times)
    most = (1.0, 1.5) if size == 1 else (1.5 * bare.socket, 3 * bare.socket)
    limits = ("<= 1 ms", "<= 1.5 ms") if size == 1 else ("<= 1.5 x the socket's", "<= 3 x the socket's")
    name = f"array of {size} MiB"
    return [
        Row(f"{name} through a bare socket (median)", f"{bare.socket:.2f} ms"),
        Row(f"{name} through a handle, in (median)", f"{into:.2f} ms", limits[0], into <= most[0]),
        Row(f"{name} through a handle, in and out (median)", f"{echo:.2f} ms", limits[1], echo <= most[1]),
        Row(f"- {size} MiB into and out of new memory, in one process", f"{bare.new_memory:.2f} ms"),
        Row(
            f"- the first of that size, in: {size} MiB",
            f"{first:.2f} ms",
            "<= 3 x the median, or 1.2 x the new memory",
            first <= max(3 * into, 1.2 * bare.new_memory),
        ),
    ]


def passing_rows(first: Any, second: Any) -> list[Row]:
    """How long a value takes through two deployments, handed on and through the caller."""
    array = array_of(64)
    on = median_ms(lambda: second.size.remote(first.echo.remote(array)).result(), 9)
    through = median_ms(lambda: second.size.remote(first.echo.remote(array).result()).result(), 9)
    what = "64 MiB through two deployments"
    return [Row(f"{what}, as a ref (median)", f"{on:.1f} ms (through the caller {through:.1f})")]


def memory_rows(handle: Any) -> list[Row]:
    """How far the memory of caller and replica rises while a value goes there and back."""
    array, pids = array_of(64), {"caller": os.getpid(), "replica": handle.pid.remote().result()}
    time.sleep(12)  # what was kept for the next value is given up
    before = {name: memory_mib(pid, "VmRSS") for name, pid in pids.items()}
    for pid in pids.values():
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak is now
    handle.echo.remote(array).result()
    peaks = {name: memory_mib(pid, "VmHWM") - before[name] for name, pid in pids.items()}
    most = max(peaks.values())
    named = ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items())
    return [Row("memory for 64 MiB, in and out, at its peak", f"{named} MiB", "<= 148 MiB", most <= 148)]


def memory_mib(pid: int, what: str) -> float:
    """A line of the status of a process."""
    [kib] = re.findall(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(kib) / 1024


def beside_rows(handle: Any) -> list[Row]:
    """What small calls, and the event loops, feel of a stream of large values."""
    array, going = array_of(64), threading.Event()

    def small_p99() -> float:
        took = []
        end = time.perf_counter() + 5
        while time.perf_counter() < end:
            began = time.perf_counter()
            handle.size_of.remote(b"x").result()
            took.append((time.perf_counter() - began) * 1000)
        return statistics.quantiles(took, n=100)[98]

    def stream() -> None:
        while going.is_set():
            handle.echo.remote(array).result()

    alone = small_p99()
    handle.worst_stall_ms.remote().result()
    going.set()
    streaming = threading.Thread(target=stream)
    streaming.start()
    beside = small_p99()
    stall = handle.worst_stall_ms.remote().result()
    going.clear()
    streaming.join()
    ratio = beside / alone
    return [
        Row("small calls, p99", f"{alone:.2f} ms"),
        Row("- beside a stream of 64 MiB values", f"{beside:.2f} ms = {ratio:.1f} x", "<= 3 x", ratio <= 3),
        Row("- longest stall of the replica's event loop", f"{stall:.1f} ms", "<= 10 ms", stall <= 10),
    ]


def chunk_rows() -> list[Row]:
    """How fast 64 MiB go through Redis in chunks, from one process to another."""
    settings = find_settings()
    rows = []
    for what, secrets, least in (("unsigned", (), 1.5), ("signed", (b"x" * 32,), 1.0)):
        got = statistics.median(chunks_gib_per_s(settings, secrets) for _ in range(5))
        rows.append(
            Row(f"64 MiB in {what} chunks through Redis", f"{got:.2f} GiB/s", f">= {least} GiB/s", got >= least)
        )
    return rows


def chunks_gib_per_s(settings: Settings, secrets: tuple[bytes, ...]) -> float:
    """Send 64 MiB from another process, and receive them here."""
    name, size = os.urandom(8).hex(), 64 * MIB
    sender = multiprocessing.get_context("spawn").Process(target=send_chunks, args=(settings, secrets, name, size))
    sender.start()
    transfers = Transfers(settings.redis_url, settings.keys, Signer(secrets))
    transfers.receive(f"{name}-ready", [1])
    began = time.perf_counter()
    transfers.receive(name, [size])
    took = time.perf_counter() - began
    sender.join()
    return size / 2**30 / took


def send_chunks(settings: Settings, secrets: tuple[bytes, ...], name: str, size: int) -> None:
    """Be the other process."""
    transfers = Transfers(settings.redis_url, settings.keys, Signer(secrets))
    data = memoryview(bytes(array_of(size // MIB)))
    transfers.send(f"{name}-ready", [memoryview(b"x")], lambda: True)
    transfers.send(name, [data], lambda: True)


if __name__ == "__main__":
    for row in measure(tuple(map(int, sys.argv[1:])) or SIZES):
        print(f"{row.what}: {row.measured}")
