"""`python -m qserve_workers.template`: the process of a node that its workers are forked from.

It has one thread, no event loop and no connection, and imports no code of users. A node says what to fork, on the
standard input of this program; see `qserve_workers.node_template`.
"""

import contextlib
import gc
import hmac
import importlib
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from types import ModuleType
from typing import Final

import msgspec
from celery import platforms as celery_platforms
from celery.bin.base import CLIContext
from celery.bin.worker import worker

from qserve.broker.server import redis_clients
from qserve.deployments.head_start import FOR_SOME
from qserve_workers.celery_app import celery, settings_found
from qserve_workers.children import die_with_parent, set_death_signal
from qserve_workers.node_template import WITH_GATEWAY, FirstTemplate, Forked, ForkOrder
from qserve_workers.titles import set_title

_IMPORTED = (
    "billiard.heap",
    "billiard.popen_fork",
    "billiard.sharedctypes",
    "billiard.synchronize",
    "celery.app.amqp",
    "celery.app.control",
    "celery.app.events",
    "celery.app.log",
    "celery.events",
    "celery.events.receiver",
    "celery.worker.consumer.delayed_delivery",
    "kombu.mixins",
    "kombu.transport.redis",
    "qserve_workers.pool.autoscaler",
    "qserve_workers.pool.celery_worker",
    "qserve_workers.pool.prefork",
    "qserve_workers.replica.replica_process",
    "uvloop",
)
"""What a worker or a replica would import by itself, when it is there."""
_IDLE_S = 1.0
"""After this time without an order there is time to import what only some need."""
_GATEWAY = "qserve_gateway.__main__"
"""Imported by this name alone: what is in there is none of our business."""


def import_everything(more: Iterable[str] = (), *, gateway: bool = False) -> None:
    """Import what workers and replicas need, and let the garbage collector never look at it again.

    Looking writes to the memory of every object, which then is shared no more.

    Args:
        more: What else to import.
        gateway: What a gateway needs, too.
    """
    gc.disable()
    for name in (*_IMPORTED, *((_GATEWAY,) if gateway else ()), *more):
        importlib.import_module(name)
    celery.finalize()
    celery_platforms._set_pdeathsig = set_death_signal  # else each child parses C for it, where there is a parser
    redis_clients.prepare_forks()
    _rehearse()
    gc.collect()
    gc.freeze()


def _rehearse() -> None:
    """Do once what each worker does as it starts, where that fills caches or writes to many objects."""
    context = CLIContext(app=celery, no_color=True, workdir=None, quiet=False)
    worker.make_context("celery worker", [], obj=context, resilient_parsing=True)
    for kind in (list, tuple, str, Generator, int):
        issubclass(kind, Mapping)  # which asks all its subclasses the first time
    hmac.digest(b"key", b"message", "sha256")  # for which OpenSSL reads its settings


def import_for_some() -> None:
    """Import what many replicas need besides, where it is installed."""
    for name in FOR_SOME:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _rehearse()  # again, because a new class may be a subclass of one that was asked
    gc.freeze()


def wait_for_birth(node: socket.socket) -> ForkOrder | None:
    """Fork what the node asks for, until it is gone; then None. In what was forked: what it is to be."""
    is_complete = False
    with node.makefile("rb", buffering=0) as orders:  # the descriptor that comes with the next order stays where it is
        while True:
            if not is_complete and not select.select([node], [], [], _IDLE_S)[0]:
                import_for_some()
                is_complete = True
            begun, descriptors, _, _ = socket.recv_fds(node, 1, 1)
            if not begun:
                return None
            order = msgspec.json.decode(begun + orders.readline(), type=ForkOrder)
            try:
                born = _fork(node)
            except OSError as exc:
                for descriptor in descriptors:
                    os.close(descriptor)
                node.sendall(msgspec.json.encode(Forked(error=str(exc))) + b"\n")
                continue
            if born is None:
                order.arguments += [f"--fd={descriptor}" for descriptor in descriptors]
                return order
            for descriptor in descriptors:
                os.close(descriptor)
            pid, permission = born
            node.sendall(msgspec.json.encode(Forked(pid)) + b"\n")
            os.write(permission, b"\n")
            os.close(permission)


def _fork(node: socket.socket) -> tuple[int, int] | None:
    """Fork a process whose parent is ours.

    Returns:
        Its pid, and a pipe: it begins when something is written, and ends if this process dies before. In the new
        process None, once it may begin.

    Raises:
        OSError: There cannot be another process.
    """
    pid_reader, pid_writer = os.pipe()
    may_begin, permission = os.pipe()
    try:
        between = os.fork()
    except OSError:
        for descriptor in (pid_reader, pid_writer, may_begin, permission):
            os.close(descriptor)
        raise
    if between == 0:  # ends at once, so that the node becomes the parent of what it forks  # pragma: no cover
        try:
            pid = os.fork()
        except OSError:
            os._exit(1)
        if pid:
            os.write(pid_writer, b"%d" % pid)
            os._exit(0)
        node.close()
        for descriptor in (pid_reader, pid_writer, permission):
            os.close(descriptor)
        if not os.read(may_begin, 1):
            os._exit(1)
        os.close(may_begin)
        return None
    os.close(pid_writer)
    os.close(may_begin)
    with open(pid_reader, "rb") as told:  # noqa: PTH123 (a descriptor)
        pid = int(told.read() or 0)
    os.waitpid(between, 0)
    if not pid:
        os.close(permission)
        raise OSError("there cannot be another process")
    return pid, permission


def run_worker(order: ForkOrder) -> None:
    """Be the worker that was asked for."""
    sys.argv = ["celery", "-A", "qserve_workers", "worker", *order.arguments]
    context = CLIContext(app=celery, no_color=True, workdir=None, quiet=False)
    worker.main(order.arguments, prog_name="celery worker", obj=context)


def run_gateway(order: ForkOrder) -> None:
    """Be the gateway that was asked for."""
    sys.argv = ["qserve_gateway", *order.arguments]
    importlib.import_module(_GATEWAY).main(order.arguments, prog_name="python -m qserve_gateway")


_PROGRAMS: Final[Mapping[str, Callable[[ForkOrder], None]]] = {"worker": run_worker, "gateway": run_gateway}


def serve(node: socket.socket) -> None:
    """Fork what the node asks for, until it is gone; in what was forked, be that."""
    set_title("qserve: template")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    order = wait_for_birth(node)
    if order is not None:
        _be(order)


def _be(order: ForkOrder) -> None:
    """Be the process that was asked for, in a fork of the template."""
    set_title(f"qserve: {order.program}")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    die_with_parent(order.node, order.death_signal)
    gc.enable()
    os.environ.update(order.environment)
    # User code is not to find this module under that name; `multiprocessing` would import it in processes it spawns.
    sys.modules["__main__"] = ModuleType("__main__")
    _PROGRAMS[order.program](order)


def fork_template(environment: Mapping[str, str], unwanted: int | None) -> FirstTemplate | socket.socket:
    """Fork the template of the node that this process will be, where everything has been imported.

    Args:
        environment: What workers find in their environment beside that of this process.
        unwanted: A descriptor that is none of its business.

    Returns:
        How to reach it; in the template, how the node reaches it: it is to `serve` there.
    """
    here, there = socket.socketpair()
    node = os.getpid()
    pid = os.fork()
    if pid:
        there.close()
        return FirstTemplate(pid, here.detach())
    here.close()
    if unwanted is not None:
        os.close(unwanted)
    _be_template(node, environment)
    return there


def _be_template(node: int, environment: Mapping[str, str]) -> None:
    """Be a template, in a fork of a process that will be a node."""
    os.setsid()
    die_with_parent(node, signal.SIGKILL)
    os.environ.update(environment)
    gc.disable()
    logging.getLogger().handlers.clear()  # each program sets up its own logging
    logging.getLogger().setLevel(logging.WARNING)
    celery.use(settings_found())
    gc.freeze()


def main() -> None:
    """Import, and fork what the node asks for."""
    node = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    import_everything(gateway=WITH_GATEWAY in sys.argv)
    import_for_some()
    serve(node)


if __name__ == "__main__":
    main()
