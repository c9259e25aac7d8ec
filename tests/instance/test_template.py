"""Workers are forked from a template, and user code finds a process in them that has just begun."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from qserve import serve
from qserve.testing import TestInstance
from tests.support import template_code
from tests.support.chosen_server import IS_CLUSTER
from tests.support.own_instance import node_of
from tests.support.processes import command_line
from tests.support.serving import ROOT
from tests.support.template_code import files_of
from tests.support.waiting import LIMIT_S, wait_until

IMPORTS = """
import encodings.idna, json, sys
from qserve_workers import instance_process, template
template.import_everything(gateway=True)
template.import_for_some()
print(json.dumps(list(sys.modules)))
"""


@pytest.fixture
def node(qserve_instance: TestInstance) -> psutil.Process:
    """The node of the instance."""
    return node_of(qserve_instance.settings.namespace)


@pytest.fixture
def fresh(qserve_instance: TestInstance) -> Iterator[Any]:
    """A handle of a deployment that tells of its process."""
    deployment = serve.deployment(name="fresh", route_prefix=None)(template_code.Fresh)
    deployment.deploy()
    yield deployment.get_handle()
    deployment.delete()


def template_of(node: psutil.Process) -> psutil.Process:
    """The template of a node."""
    return part_of_node(node, "qserve: template")


def part_of_node(node: psutil.Process, title: str) -> psutil.Process:
    """A child of it that runs, as soon as it has this title."""

    def look() -> psutil.Process | None:
        return next((child for child in node.children() if title in command_line(child)), None)

    return wait_until(look)


def gateway_of(instance: TestInstance) -> psutil.Process:
    """The gateway of an instance."""
    return part_of_node(node_of(instance.settings.namespace), "qserve: gateway")


class TestAFork:
    def test_is_a_process_that_has_just_begun(self, fresh: Any, node: psutil.Process) -> None:
        other = serve.deployment(name="other", route_prefix=None)(template_code.Fresh)
        other.deploy()
        here, there = fresh.remote().result(LIMIT_S), other.get_handle().remote().result(LIMIT_S)

        assert here["draws"] != there["draws"]
        assert here["argv"][:6] == ["celery", "-A", "qserve_workers", "worker", "-Q", "fresh"]
        assert (here["directory"], here["stdin"]) == (node.cwd(), "null")
        assert all(name.startswith("__") for name in here["main"])
        assert not {name for name in here["threads"] if not name.startswith(("MainThread", "qserve-", "uvloop_"))}
        begun_with = template_of(node).environ()
        added = {name for name in here["variables"] if here["variables"][name] != begun_with.get(name)}
        celery_calls = set() if IS_CLUSTER else {"QSERVE_CELERY_CALLS"}
        assert added == {"QSERVE_NODE", "QSERVE_REPLICAS_EXACT"} | celery_calls
        replica = psutil.Process(here["pid"])
        others = [node.pid, template_of(node).pid, replica.ppid()]
        sockets = {name for name in here["files"] if name.startswith("socket:")}
        assert sockets
        assert not sockets & {name for pid in others for name in files_of(pid)}

    def test_imports_nothing_that_others_import_too(self, fresh: Any) -> None:
        """What is imported after the fork takes time and memory in each worker."""
        template = subprocess.run(
            [sys.executable, "-c", IMPORTS],
            cwd=ROOT,
            env=os.environ | {"QSERVE_REDIS_URL": "redis://localhost"},
            check=True,
            capture_output=True,
        )

        later = set(fresh.remote().result(LIMIT_S)["modules"]) - set(json.loads(template.stdout))

        assert {name for name in later if not name.startswith(("tests", "numpy"))} <= {"runpy", "multiprocessing.pool"}

    def test_what_it_spawns_imports_nothing_of_the_template(self, fresh: Any) -> None:
        assert fresh.modules_of_a_spawned.remote().result(LIMIT_S) == []

    def test_is_named_after_its_deployment(self, fresh: Any, node: psutil.Process) -> None:
        replica = psutil.Process(fresh.remote().result(LIMIT_S)["pid"])
        worker = replica.parent()
        assert worker is not None
        assert (replica.cmdline()[0], worker.cmdline()[0]) == ("qserve: replica of fresh", "qserve: worker of fresh")

    def test_belongs_to_the_node(self, fresh: Any, node: psutil.Process) -> None:
        worker = psutil.Process(fresh.remote().result(LIMIT_S)["pid"]).parent()
        assert worker is not None
        assert worker.ppid() == node.pid
        assert os.getsid(worker.pid) == worker.pid

    def test_ends_with_its_worker(self, fresh: Any) -> None:
        replica = psutil.Process(fresh.remote().result(LIMIT_S)["pid"])
        worker = replica.parent()
        assert worker is not None
        worker.kill()
        replica.wait(LIMIT_S)
        assert fresh.remote().result(LIMIT_S)["pid"] != replica.pid


class TestAGateway:
    def test_is_forked_too_and_comes_back_at_its_port(self, fresh: Any, qserve_instance: TestInstance) -> None:
        before = gateway_of(qserve_instance)
        assert before.ppid() == node_of(qserve_instance.settings.namespace).pid
        assert os.getsid(before.pid) == before.pid
        with httpx.Client(base_url=qserve_instance.url) as client:
            assert client.get("/-/healthz").status_code == 200

            before.kill()
            wait_until(lambda: gateway_of(qserve_instance).pid != before.pid)

        with httpx.Client(base_url=qserve_instance.url) as client:
            assert client.get("/-/healthz", timeout=LIMIT_S).status_code == 200

    def test_of_a_template_that_was_started_again_is_forked_as_well(
        self, fresh: Any, node: psutil.Process, qserve_instance: TestInstance
    ) -> None:
        template, before = template_of(node), gateway_of(qserve_instance)
        template.kill()
        wait_until(lambda: template_of(node).pid != template.pid)

        before.kill()
        wait_until(lambda: gateway_of(qserve_instance).pid != before.pid)

        with httpx.Client(base_url=qserve_instance.url) as client:
            assert client.get("/-/healthz", timeout=LIMIT_S).status_code == 200
        assert command_line(gateway_of(qserve_instance)).startswith("qserve: gateway")


class TestATemplateThatDies:
    def test_takes_nothing_along_and_is_started_again(self, fresh: Any, node: psutil.Process) -> None:
        before, template = fresh.remote().result(LIMIT_S)["pid"], template_of(node)

        template.kill()
        deployment = serve.deployment(name="next", route_prefix=None)(template_code.Fresh)
        deployment.deploy()

        assert fresh.remote().result(LIMIT_S)["pid"] == before
        assert template_of(node).pid != template.pid

    def test_while_it_is_asked_is_asked_again(self, fresh: Any, node: psutil.Process) -> None:
        template = template_of(node)
        template.suspend()
        deployment = serve.deployment(name="asked", route_prefix=None)(template_code.Fresh)
        worker = psutil.Process(fresh.remote().result(LIMIT_S)["pid"]).parent()
        assert worker is not None

        worker.kill()
        wait_until(lambda: not worker.is_running())
        template.kill()
        deployment.deploy()

        assert fresh.remote().result(LIMIT_S)["pid"] != worker.pid
        names = [command_line(child) for child in node.children()]
        assert sum(name.startswith("qserve: worker of fresh") for name in names) == 1
