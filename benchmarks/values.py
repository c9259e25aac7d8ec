"""Large values through a handle, beside a bare Unix socket: `python -m benchmarks.values 1 15 64` prints figures."""

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy

from benchmarks.rows import Row
from qserve import serve

MIB = 2**20
SIZES = (1, 15, 64)


class Values:
    """Takes arrays."""

    def size(self, array: Any) -> int:
        return int(array.nbytes)

    def echo(self, array: Any) -> Any:
        return array


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


def measure(sizes: tuple[int, ...] = SIZES) -> list[Row]:
    """Measure arrays of so many MiB; an instance runs meanwhile."""
    bare = {size: socket_ms(size * MIB, 15) for size in sizes}  # before there are threads: it forks
    serve.start()
    serve.deployment(Values).deploy()
    handle: Any = serve.get_deployment("Values").get_handle()
    rows = []
    try:
        for size in sizes:
            array = numpy.random.default_rng(1).integers(0, 255, size * MIB, dtype=numpy.uint8)
            times = 30 if size < 50 else 9
            into = median_ms(lambda array=array: handle.size.remote(array).result(), times)  # type: ignore[misc]
            echo = median_ms(lambda array=array: handle.echo.remote(array).result(), times)  # type: ignore[misc]
            rows += [
                Row(f"array of {size} MiB through a bare socket (median)", f"{bare[size]:.2f} ms"),
                Row(f"array of {size} MiB through a handle, in (median)", f"{into:.2f} ms"),
                Row(f"array of {size} MiB through a handle, in and out (median)", f"{echo:.2f} ms"),
            ]
    finally:
        serve.shutdown()
    return rows


if __name__ == "__main__":
    for row in measure(tuple(map(int, sys.argv[1:])) or SIZES):
        print(f"{row.what}: {row.measured}")
