"""The public verbs against a whole instance on this machine."""

import logging
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import qserve
from qserve import serve
from qserve.deployments.loading import importing
from qserve.errors import DeploymentNotFound, NoInstanceError
from qserve.testing import TestInstance
from tests.support.deployed import Broken, Deployer, LastWords, OtherPid, Pid, Slow
from tests.support.gates import is_alive
from tests.support.slowness import patience
from tests.support.waiting import wait_until


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=patience(20)) as response:
        return str(response.read().decode())


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=patience(20)) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


class TestVersions:
    def test_the_same_version_is_left_alone_even_if_the_code_differs(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy()
        handle = Pid.get_handle()
        first = handle.remote().result(patience(20))

        Pid.options(OtherPid.func_or_class, version="1").deploy()

        assert handle.remote().result(patience(20)) == first

    def test_a_new_version_replaces_the_replicas(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy()
        handle = Pid.get_handle()
        first = handle.remote().result(patience(20))

        Pid.options(OtherPid.func_or_class, version="2").deploy()

        assert handle.remote().result(patience(20)) < 0
        assert handle.remote().result(patience(20)) != -first

    def test_without_a_version_every_deploy_replaces_them(self, qserve_instance: TestInstance) -> None:
        Pid.deploy()
        first = Pid.get_handle().remote().result(patience(20))
        Pid.deploy()

        assert Pid.get_handle().remote().result(patience(20)) != first

    def test_init_args_only_count_with_a_new_version(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy("first")
        handle = Pid.get_handle()
        Pid.options(version="1").deploy("second")
        assert handle.describe.remote().result(patience(20))["made_with"] == "first"

        Pid.options(version="2").deploy("third")
        assert handle.describe.remote().result(patience(20))["made_with"] == "third"

    def test_prev_version_must_match(self, qserve_instance: TestInstance) -> None:
        with pytest.raises(ValueError, match="prev_version"):
            Pid.options(version="2", prev_version="1").deploy()
        Pid.options(version="1").deploy()
        with pytest.raises(ValueError, match="prev_version"):
            Pid.options(version="2", prev_version="0").deploy()

        Pid.options(version="2", prev_version="1").deploy()

        assert serve.get_deployment("Pid").version == "2"

    def test_a_new_user_config_reaches_the_same_process(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1", user_config="a").deploy()
        before = Pid.get_handle().describe.remote().result(patience(20))

        Pid.options(version="1", user_config="b").deploy()

        after = Pid.get_handle().describe.remote().result(patience(20))
        assert (before["config"], after["config"]) == ("a", "b")
        assert before["pid"] == after["pid"]

    def test_more_replicas_keep_those_that_run(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy()
        first = Pid.get_handle().remote().result(patience(20))

        Pid.options(version="1", num_replicas=2).deploy()

        pids = {replica.pid for replica in serve.status()["Pid"].replicas if replica.state == "SERVING"}
        assert len(pids) == 2
        assert first in pids


class TestRoutes:
    def test_a_route_is_there_when_deploy_returns_and_gone_when_delete_does(
        self, qserve_instance: TestInstance
    ) -> None:
        Pid.deploy()
        assert fetch(f"{qserve_instance.url}/-/routes") == '{"/Pid":"Pid"}'

        Pid.delete()
        assert fetch(f"{qserve_instance.url}/-/routes") == "{}"

    def test_a_changed_route_moves_without_a_new_process(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1", route_prefix="/old").deploy()
        first = fetch(f"{qserve_instance.url}/old")

        Pid.options(version="1", route_prefix="/new").deploy()

        assert fetch(f"{qserve_instance.url}/new") == first
        assert status_of(f"{qserve_instance.url}/old") == 404

    def test_a_route_can_be_taken_away_and_given_back(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy()
        Pid.options(version="1", route_prefix=None).deploy()
        assert status_of(f"{qserve_instance.url}/Pid") == 404
        assert Pid.get_handle().remote().result(patience(20)) > 0

        Pid.options(version="1", route_prefix="/Pid").deploy()
        assert status_of(f"{qserve_instance.url}/Pid") == 200

    def test_a_taken_route_is_refused(self, qserve_instance: TestInstance) -> None:
        Pid.options(route_prefix="/x").deploy()

        with pytest.raises(ValueError, match=r"route_prefix '/x' is already registered\."):
            OtherPid.options(route_prefix="/x").deploy()

        assert list(serve.list_deployments()) == ["Pid"]

    def test_url_names_the_gateway(self, qserve_instance: TestInstance) -> None:
        assert Pid.url == f"{qserve_instance.url}/Pid"
        assert Pid.options(route_prefix=None).url is None


class TestFailures:
    def test_a_constructor_that_always_raises_fails_the_deploy_and_leaves_nothing(
        self, qserve_instance: TestInstance
    ) -> None:
        expected = r"^Failed to reach deployment goal\. Check the serve logs for details\.(?s:.)*no model to load"
        with pytest.raises(RuntimeError, match=expected):
            Broken.deploy()

        assert serve.list_deployments() == {}
        with pytest.raises(DeploymentNotFound):
            Broken.get_handle().remote().result(patience(20))

    def test_a_broken_new_version_leaves_the_old_one_serving(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy()
        first = Pid.get_handle().remote().result(patience(20))

        with pytest.raises(RuntimeError, match="Failed to reach deployment goal"):
            Pid.options(Broken.func_or_class, version="2").deploy()

        assert Pid.get_handle().remote().result(patience(20)) == first
        assert serve.get_deployment("Pid").version == "1"

    def test_a_refused_user_config_is_rolled_back(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1", user_config="good").deploy()

        with pytest.raises(RuntimeError, match="Failed to reach deployment goal"):
            Pid.options(version="1", user_config="bad").deploy()

        assert Pid.get_handle().describe.remote().result(patience(20))["config"] == "good"


class TestDeleting:
    def test_calls_already_made_complete(self, qserve_instance: TestInstance) -> None:
        Slow.deploy()
        refs = [Slow.get_handle().remote() for _ in range(3)]
        wait_until(lambda: serve.status()["Slow"].queued + sum(ref.done() for ref in refs) >= len(refs))

        Slow.delete()

        assert qserve.get(refs, timeout=patience(5)) == ["slow"] * 3

    def test_a_stuck_replica_is_ended_after_its_grace(self, qserve_instance: TestInstance) -> None:
        Slow.options(graceful_shutdown_timeout_s=0.1).deploy()
        ref = Slow.get_handle().remote(1000)
        running = [replica.pid for replica in serve.status()["Slow"].replicas]

        Slow.delete()

        with pytest.raises(qserve.QServeError):
            ref.result(patience(20))
        wait_until(lambda: not any(map(is_alive, running)))

    def test_destructors_run_once(self, qserve_instance: TestInstance, tmp_path: Path) -> None:
        LastWords.deploy(str(tmp_path / "words"))
        LastWords.delete()

        words = tmp_path / "words"
        wait_until(words.exists)
        assert words.read_text() == "gone\n"

    def test_the_name_can_be_used_again_for_other_code(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="1").deploy()
        Pid.delete()
        Pid.delete()

        Pid.options(OtherPid.func_or_class, version="1").deploy()

        assert Pid.get_handle().remote().result(patience(20)) < 0


class TestLooking:
    def test_what_is_deployed_is_listed_and_can_be_deployed_again(self, qserve_instance: TestInstance) -> None:
        deployed = Pid.options(version="1", user_config={"a": 1}, init_args=("x",))
        deployed.deploy()

        assert serve.list_deployments() == {"Pid": deployed}
        found = serve.get_deployment(name="Pid")
        assert found == deployed
        found.options(version="2").deploy()
        assert found.get_handle().describe.remote().result(patience(20))["made_with"] == "x"

    def test_an_absent_one_is_a_key_error(self, qserve_instance: TestInstance) -> None:
        with pytest.raises(KeyError):
            serve.get_deployment("Nobody")

    def test_status_tells_state_and_replicas(self, qserve_instance: TestInstance) -> None:
        Pid.options(version="7").deploy()

        status = serve.status()["Pid"]

        assert (status.state, status.version, status.route_prefix) == ("HEALTHY", "7", "/Pid")
        assert [replica.pid for replica in status.replicas] == [Pid.get_handle().remote().result(patience(20))]
        assert re.fullmatch(r"Pid#\w+", status.replicas[0].tag)


class TestDeployingFromAReplica:
    def test_does_not_deadlock(self, qserve_instance: TestInstance) -> None:
        Pid.deploy()
        Deployer.deploy()

        assert Deployer.get_handle().remote().result(patience(30)) == "deployed"
        assert serve.get_deployment("Deployed").get_handle().remote().result(patience(20)) > 0


class TestStarting:
    def test_again_keeps_deployments_and_warns_of_other_options(
        self, qserve_instance: TestInstance, caplog: pytest.LogCaptureFixture
    ) -> None:
        Pid.deploy()
        serve.start(detached=True)
        assert not caplog.records

        serve.start(http_options={"port": 1, "root_path": "/elsewhere"})

        assert "port, root_path" in caplog.text
        assert list(serve.list_deployments()) == ["Pid"]

    def test_run_deploys_several_side_by_side_and_gives_the_handle_of_one(self, qserve_instance: TestInstance) -> None:
        assert serve.run([Pid, OtherPid]) is None
        assert serve.run(Pid).remote().result(patience(20)) > 0
        assert set(serve.list_deployments()) == {"Pid", "OtherPid"}

    @pytest.mark.parametrize("name", ["http_host", "http_port", "http_middlewares"])
    def test_old_keywords_point_at_http_options(self, name: str) -> None:
        with pytest.raises(ValueError, match="http_options"):
            serve.start(False, None, **{name: 1})  # type: ignore[arg-type]


class TestWithoutAnInstance:
    def test_verbs_say_how_to_start_one(self) -> None:
        for verb in (serve.list_deployments, serve.status, Pid.deploy, Pid.delete):
            with pytest.raises(NoInstanceError, match=r"There is no instance running.*serve\.start\(detached=True\)"):
                verb()

    def test_shutdown_does_nothing(self) -> None:
        serve.shutdown()

        with pytest.raises(NoInstanceError):
            serve.status()

    def test_while_code_is_imported_nothing_is_started_or_deployed(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        with importing():
            serve.start()
            serve.run(Pid)
            Pid.deploy()
            Pid.delete()
            serve.shutdown()

        assert caplog.text.count("Importing is not deploying") == 5
        with pytest.raises(NoInstanceError):
            serve.list_deployments()
