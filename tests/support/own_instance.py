"""The processes of an instance on this machine."""

import psutil

from qserve.deployments.local_instance import InstanceRecord, find_record
from tests.support.processes import command_line
from tests.support.waiting import wait_until


def record_of(namespace: str) -> InstanceRecord:
    """What its file says."""
    record = find_record(namespace)
    assert record is not None
    return record


def node_of(namespace: str) -> psutil.Process:
    """Its node."""
    return part_of(namespace, "qserve: node")


def part_of(namespace: str, text: str) -> psutil.Process:
    """The process of it on whose command line a text stands, as soon as there is one."""

    def look() -> psutil.Process | None:
        for process in psutil.Process(record_of(namespace).pid).children(recursive=True):
            if text in command_line(process):
                return process
        return None

    return wait_until(look)
