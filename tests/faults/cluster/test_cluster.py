"""One instance over a cluster of six servers: its deployments lie on all of them, and slots move and primaries die."""

import json
import re
import time

import httpx
import pytest

import qserve
from qserve import serve
from qserve.broker.server import redis_clients
from qserve.broker.server.memory import read_memory
from qserve.calls import process_client
from tests.faults.cluster.conftest import another_primary, slot_of_deployment, slot_of_home
from tests.faults.failover.load import Load
from tests.support.cluster import PASSWORD, Cluster
from tests.support.shell import Shell
from tests.support.slowness import patience
from tests.support.started import StartedInstance, assert_control_works
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.usefixtures("own_calls"), pytest.mark.timeout(150)]

KINDS = {"handle", "http", "durable"}
HONEST = {"503", "502", "BrokerUnavailable", "Indeterminate", "CallNotFound"}
"""What a call may end as while its server is away, or has lost what it had acknowledged."""


def test_calls_of_every_kind_go_from_shard_to_shard(served: StartedInstance, cluster: Cluster) -> None:
    assert cluster.primary_of(slot_of_deployment("echo")) is not cluster.primary_of(slot_of_deployment("Echo2"))
    chain = serve.get_deployment("Chain").get_handle()
    assert qserve.get(chain.remote(5)) == 5
    assert list(chain.options(stream=True).count.remote(3)) == [0, 1, 2]
    large = b"x" * 3_000_000
    assert qserve.get(chain.same.remote(large)) == large
    ref = serve.get_deployment("Echo2").get_handle().options(durable=True).remote(7)
    assert (qserve.get(ref), qserve.get(serve.get_ref(ref.id))) == (7, 7)
    asked = httpx.get(f"{served.url}/echo?value=8", headers={"Prefer": "respond-async"})
    record = httpx.get(f"{served.url}{asked.json()['location']}?wait=10", timeout=patience(20)).json()
    assert (record["state"], record["response"]["body"]) == ("done", "8")
    assert httpx.get(f"{served.url}/echo?value=9").text == "9"


def test_what_is_asked_about_a_call_waits_for_the_first_connection_to_its_shard(
    served: StartedInstance, cluster: Cluster
) -> None:
    ref = serve.get_deployment("Echo2").get_handle().options(durable=True).remote(7)
    assert qserve.get(ref) == 7
    delayed = serve.get_deployment("Echo2").get_handle().options(durable=True, delay=60).remote(7)
    ids = ref.id, delayed.id
    process_client.close_current_client()
    assert serve.get_ref(ids[0]).status().state == "done"
    process_client.close_current_client()
    serve.get_ref(ids[1]).cancel()
    wait_until(lambda: serve.get_ref(ids[1]).status().state == "cancelled")


def test_a_call_shows_what_it_has_made_in_another_shard(served: StartedInstance) -> None:
    ref = serve.get_deployment("Chain").get_handle().options(durable=True).orders.remote(7)
    made = qserve.get(ref)
    assert qserve.get(serve.get_ref(made)) == 7
    assert slot_of_deployment("Chain") != slot_of_deployment("echo")

    def family(of: str) -> list[str]:
        return [each["id"] for each in json.loads(served.shell.run("calls", "show", of, "--json").stdout)["family"]]

    wait_until(lambda: family(ref.id) == [ref.id, made])
    assert family(made) == [ref.id, made]


def test_operators_see_all_shards(served: StartedInstance, cluster: Cluster) -> None:
    shown = served.shell.run("status")
    assert all(name in shown.stdout for name in ("echo", "Echo2", "Chain")), shown.stdout
    for name in ("echo", "Echo2"):
        assert qserve.get(serve.get_deployment(name).get_handle().options(durable=True).remote(7)) == 7
    listed = served.shell.run("calls", "ls").stdout
    assert all(re.search(rf"\b{name}\b.*\bdone\b|\bdone\b.*\b{name}\b", listed) for name in ("echo", "Echo2")), listed
    assert_control_works(served.shell)
    with redis_clients.client(cluster.url, patience(5)) as redis:
        assert {memory.server for memory in read_memory(redis)} == {
            f"127.0.0.1:{node.port}" for node in cluster.nodes[:3]
        }


def test_whoever_cannot_log_in_is_told_so_and_need_not_wait(served: StartedInstance, cluster: Cluster) -> None:
    wrong = cluster.url.replace(PASSWORD, "guess")
    for command in (["deploy", "app"], ["start"], ["status"]):
        said = served.shell.error(*command, "--redis-url", wrong)
        assert "does not accept the user name and password" in said
        assert "guess" not in said


def test_a_call_wakes_a_deployment_without_replicas(served: StartedInstance) -> None:
    wait_until(lambda: "asleep" in served.shell.run("status").stdout)
    answer = wait_until(
        lambda: (found := httpx.get(f"{served.url}/Drowsy?value=7")).headers.get("server-timing") and found
    )
    assert answer.text == "7"


def test_no_call_notices_that_slots_move(served: StartedInstance, cluster: Cluster) -> None:
    slot = slot_of_deployment("echo")
    with Load(served.url) as load:
        wait_until(lambda: load.answered_since(0) == KINDS)
        for each in (slot, slot_of_home(), slot):
            cluster.move(each, another_primary(cluster, each))
            moved_at = time.monotonic()
            wait_until(lambda moved_at=moved_at: load.answered_since(moved_at) == KINDS)  # type: ignore[misc]
    assert [call for call in load.ended if call.error] == []


def test_no_call_notices_that_a_slot_moves_key_by_key(served: StartedInstance, cluster: Cluster) -> None:
    slot = slot_of_deployment("echo")
    with Load(served.url) as load:
        wait_until(lambda: load.answered_since(0) == KINDS)
        cluster.move_key_by_key(slot, another_primary(cluster, slot))
        moved_at = time.monotonic()
        wait_until(lambda: load.answered_since(moved_at) == KINDS)
    assert [call for call in load.ended if call.error] == []


def test_a_user_with_the_rights_of_a_worker_was_refused_nothing(served: StartedInstance, cluster: Cluster) -> None:
    denied = [
        dict(zip(entry[::2], entry[1::2], strict=True)) for node in cluster.nodes for entry in node.raw("ACL LOG")
    ]
    assert {entry[b"object"] for entry in denied} - {b"AUTH", b"config|get", b"client|setinfo"} == set()


def test_a_primary_that_dies_stops_nobody_elses_calls(served: StartedInstance, cluster: Cluster, shell: Shell) -> None:
    slot = slot_of_deployment("echo")
    dead = cluster.primary_of(slot)
    if cluster.primary_of(slot_of_deployment("Echo2")) is dead:
        cluster.move(slot_of_deployment("Echo2"), another_primary(cluster, slot))
    with Load(served.url) as load, Load(served.url, "Echo2") as others:
        wait_until(lambda: load.answered_since(0) == others.answered_since(0) == KINDS)
        killed_at = time.monotonic()
        dead.kill()
        wait_until(lambda: cluster.primary_of(slot) is not dead)
        failed_over_at = time.monotonic()
        wait_until(lambda: load.answered_since(failed_over_at) == KINDS)
        back_at = time.monotonic()
    errors = [call for call in load.ended if call.error]
    assert [call for call in errors if call.error not in HONEST] == []
    assert [call for call in errors if call.started > back_at or call.started + call.took_s < killed_at] == []
    assert [call for call in others.ended if call.error] == []
    dead.start()
    cluster.wait_until_whole()


def test_calls_whose_server_is_down_are_refused_at_once(served: StartedInstance, cluster: Cluster) -> None:
    slot = slot_of_deployment("echo")
    primary = cluster.primary_of(slot)
    replica = cluster.replica_of(primary)
    replica.kill()
    primary.kill()
    try:
        wait_until(lambda: httpx.get(f"{served.url}/echo?value=1", timeout=patience(30)).status_code == 503)
        for _ in range(5):
            began = time.monotonic()
            assert httpx.get(f"{served.url}/echo?value=1", timeout=patience(30)).status_code == 503
            assert time.monotonic() - began < patience(0.5)
            assert httpx.get(f"{served.url}/Echo2?value=2").text == "2"
    finally:
        primary.start()
        replica.start()
    wait_until(lambda: httpx.get(f"{served.url}/echo?value=3", timeout=patience(30)).text == "3")
