"""The instance as drivers and replicas see it."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import qserve
from qserve import serve
from qserve.testing import TestInstance
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S


@pytest.mark.usefixtures("qserve_instance")
def test_starting_again_in_any_way_keeps_what_is_deployed(http: httpx.Client) -> None:
    @serve.deployment
    def kept() -> str:
        return str(os.getpid())

    kept.deploy()
    before = http.get("/kept").text

    for detached in (True, False):
        serve.start(detached=detached)

    assert http.get("/kept").text == before


@pytest.mark.usefixtures("qserve_instance")
def test_a_deployment_that_was_got_can_be_called_changed_and_deployed_again(http: httpx.Client) -> None:
    @serve.deployment(name="original", version="1", init_args=("kept",), user_config={"a": 1})
    class Original:
        def __init__(self, argument: str) -> None:
            self.argument = argument

        def reconfigure(self, config: object) -> None:
            self.config = config

        def __call__(self) -> object:
            return [self.argument, self.config, os.getpid()]

    Original.deploy()
    assert serve.list_deployments() == {"original": Original}

    found = serve.get_deployment(name="original")
    assert found == Original
    argument, config, first = qserve.get(found.get_handle().remote(), timeout=patience(LIMIT_S))
    assert (argument, config) == ("kept", {"a": 1})
    found.options(version="2", num_replicas=2).deploy()
    assert http.get("/original").json()[2] != first
    assert serve.get_deployment("original").num_replicas == 2
    assert serve.get_deployment("original").init_args == ("kept",)
    found.delete()
    with pytest.raises(KeyError):
        serve.get_deployment("original")
    assert serve.list_deployments() == {}


@pytest.mark.usefixtures("qserve_instance")
def test_the_replica_context_is_there_in_the_constructor_and_in_calls_and_nowhere_else() -> None:
    @serve.deployment
    class InContext:
        def __init__(self) -> None:
            context = serve.get_replica_context()
            self.early = context.deployment, context.replica_tag, context.servable_object is self

        def __call__(self) -> tuple[tuple[str, str, bool], tuple[str, str, bool]]:
            context = serve.get_replica_context()
            return self.early, (context.deployment, context.replica_tag, context.servable_object is self)

    InContext.deploy()

    early, late = qserve.get(InContext.get_handle().remote(), timeout=patience(LIMIT_S))

    assert early == late
    assert early[0] == "InContext"
    assert early[1].startswith("InContext#")
    assert early[2] is True
    with pytest.raises(qserve.QServeError, match="only be called from within a replica"):
        serve.get_replica_context()


def test_namespaces_on_one_redis_do_not_see_each_other(
    qserve_instance: TestInstance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @serve.deployment
    def here() -> str:
        return "here"

    here.deploy()
    script = tmp_path / "other.py"
    script.write_text("from qserve import serve\nprint(sorted(serve.list_deployments()))\n")

    def listed(namespace: str) -> str:
        settings = qserve_instance.settings
        environment = os.environ | {
            "QSERVE_REDIS_URL": settings.redis_url,
            "QSERVE_SECRET": settings.secret,
            "QSERVE_NAMESPACE": namespace,
        }
        done = subprocess.run(
            [sys.executable, script],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=patience(LIMIT_S),
        )
        return done.stdout.strip()

    assert listed(qserve_instance.settings.namespace) == "['here']"
    assert listed("another") == "[]"


@pytest.mark.usefixtures("qserve_instance")
def test_a_replica_may_deploy_and_call_what_it_deployed() -> None:
    @serve.deployment
    def made() -> str:
        return "made"

    @serve.deployment
    async def maker() -> object:
        await asyncio.to_thread(made.deploy)
        return await made.get_handle().remote()

    maker.deploy()

    assert qserve.get(maker.get_handle().remote(), timeout=patience(LIMIT_S)) == "made"
    assert sorted(serve.list_deployments()) == ["made", "maker"]
