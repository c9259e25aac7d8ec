"""Desired state in Redis: who may change it, what is written, who hears of it."""

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis

from qserve.broker import records
from qserve.broker.instance.change_log import Change, connect_asyncio, follow, read_changes, read_snapshot
from qserve.broker.instance.state import GenerationChanged, State
from qserve.broker.keys import Keys
from qserve.broker.payloads import Payloads
from qserve.broker.records import submit_now
from qserve.broker.scripts import END_CALL
from qserve.broker.server import embedded
from qserve.errors import BrokerUnavailable, FrameRejected, PayloadTooLarge
from qserve.settings import Settings
from qserve.this_machine import this_host
from qserve.wire.call_record import NEVER_MS, DurableCall, DurableOptions, Terms, new_call_id
from qserve.wire.messages import PYTHON, Signer, encode
from qserve.wire.spec import (
    DEPLOY_FAILED,
    DEPLOYING,
    HEALTHY,
    DeploymentSpec,
    GatewayInfo,
    HttpSettings,
    NodeInfo,
    Target,
)
from tests.support.chosen_server import needs_one_server
from tests.support.slowness import patience
from tests.support.waiting import wait_until


def spec(name: str = "Echo", *, route: str | None = None, max_queued: int = 10) -> DeploymentSpec:
    return DeploymentSpec(
        name=name, target=Target("m:C"), revision="r", route_prefix=route, max_queued_requests=max_queued
    )


class TestDeploying:
    @needs_one_server  # on a cluster it was logged twice, in its shard and at home
    def test_a_deployed_spec_is_read_back_with_its_generation(self, state: State) -> None:
        deployed = state.deploy(spec(), expected=0)

        assert deployed.generation == 1
        assert state.get("Echo") == deployed
        assert deployed.state == DEPLOYING
        assert state.list() == {"Echo": deployed}

    def test_of_two_deploys_with_the_same_expectation_one_wins(self, state: State) -> None:
        state.deploy(spec(), expected=0)

        with pytest.raises(GenerationChanged):
            state.deploy(spec(max_queued=99), expected=0)

        deployed = state.get("Echo")
        assert deployed is not None
        assert deployed.spec.max_queued_requests == 10

    def test_a_taken_route_is_refused_and_nothing_is_left_behind(
        self, state: State, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        state.deploy(spec("A", route="/x"), expected=0)
        before = sorted(redis_client.keys())

        with pytest.raises(ValueError, match=r"^route_prefix '/x' is already registered\.$"):
            state.deploy(spec("B", route="/x"), expected=0)

        assert sorted(redis_client.keys()) == before
        assert redis_client.xlen(keys.log) == 1

    def test_one_that_redis_cannot_keep_is_refused_before_it_is_sent(
        self, state: State, redis_client: "redis.Redis", keys: Keys, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qserve.broker.instance.state.LARGEST_STORED", 10_000)
        large = msgspec.structs.replace(spec(), init_args=bytes(20_000))

        with pytest.raises(PayloadTooLarge, match=r"'Echo' takes 20,\d+ bytes .* load it in the constructor"):
            state.deploy(large, expected=0)

        assert redis_client.xlen(keys.log) == 0
        assert state.deploy(spec(), expected=0).generation == 1

    def test_a_route_is_free_again_once_its_owner_changed_or_went(self, state: State) -> None:
        state.deploy(spec("A", route="/x"), expected=0)
        state.deploy(spec("A", route="/y"), expected=1)
        state.deploy(spec("B", route="/x"), expected=0)
        state.delete("A")
        state.deploy(spec("C", route="/y"), expected=0)

        assert state.routes() == {"/x": "B", "/y": "C"}

    def test_two_deployments_may_change_their_routes_with_each_other(self, state: State) -> None:
        state.deploy(spec("A", route="/x"), expected=0)
        state.deploy(spec("B", route="/y"), expected=0)
        with pytest.raises(ValueError, match="already registered"):
            state.deploy(spec("A", route="/y"), expected=1, moving={"BB", "A"})

        state.deploy(spec("A", route="/y"), expected=1, moving={"A", "B"})
        state.deploy(spec("B", route="/x"), expected=1, moving={"A", "B"})

        assert state.routes() == {"/x": "B", "/y": "A"}

    def test_calls_are_let_in_before_the_first_replica_comes(
        self, state: State, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        state.deploy(spec(max_queued=7), expected=0)

        assert redis_client.hget(keys.meta("Echo"), "max_queued") == b"7"
        groups = redis_client.xinfo_groups(keys.calls("Echo"))
        assert [group["name"] for group in groups] == [b"g"]

    def test_a_spec_signed_with_another_key_is_not_decoded(self, state: State, settings: Settings, keys: Keys) -> None:
        stranger = State(settings.redis_url, keys, Signer((b"another key",)))
        stranger.deploy(spec(), expected=0)
        stranger.close()

        with pytest.raises(FrameRejected):
            state.get("Echo")


class TestDeleting:
    def test_generations_rise_past_a_delete(self, state: State) -> None:
        state.deploy(spec(), expected=0)
        assert state.delete("Echo") is not None

        assert state.get("Echo") is None
        assert state.list() == {}
        assert state.deploy(spec(), expected=state.generation("Echo")).generation == 3

    def test_twice_is_harmless(self, state: State) -> None:
        state.deploy(spec(), expected=0)
        state.delete("Echo")

        assert state.delete("Echo") is None
        assert state.delete("Never") is None

    def test_only_the_expected_generation_if_one_is_named(self, state: State) -> None:
        state.deploy(spec(), expected=0)

        with pytest.raises(GenerationChanged):
            state.delete("Echo", expected=7)

    def test_new_calls_are_turned_away(self, state: State, redis_client: "redis.Redis", keys: Keys) -> None:
        state.deploy(spec(), expected=0)
        state.delete("Echo")

        assert redis_client.hget(keys.meta("Echo"), "max_queued") is None


class TestClearingUp:
    """What becomes of the durable calls of a deployment that is deleted."""

    @pytest.fixture
    def submit(self, state: State, signer: Signer, keys: Keys) -> Callable[[], str]:
        def submit() -> str:
            call_id = new_call_id(keys.of("Echo").shard)
            call = DurableCall(call_id, "Echo", "", NEVER_MS, PYTHON, "", True, b"", terms=Terms())
            submit_now(state.redis, keys, signer, Payloads(keys, signer, 1000), call, DurableOptions())
            return call_id

        return submit

    def test_a_call_of_whose_end_redis_could_not_be_told_ends_at_the_next_attempt(
        self, state: State, keys: Keys, submit: Callable[[], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state.deploy(spec(), expected=0)
        call_id = submit()
        state.delete("Echo")
        with monkeypatch.context() as broken:
            broken.setattr(records, "END_CALL", None)  # as if the process ended here
            with pytest.raises(AttributeError):
                state.clear_up("Echo", b"gone")

        state.clear_up("Echo", b"gone")

        assert state.redis.hget(keys.call(call_id), "state") == b"failed"
        assert not state.redis.exists(keys.calls("Echo"))

    def test_the_calls_of_another_deployment_of_that_name_are_left_alone(
        self, state: State, keys: Keys, submit: Callable[[], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state.deploy(spec(), expected=0)
        before, since = submit(), list[str]()
        state.delete("Echo")

        def deploy_again(*given: Any) -> object:
            state.deploy(spec(), expected=2)
            since.append(submit())
            return END_CALL.run(*given)

        monkeypatch.setattr(records, "END_CALL", SimpleNamespace(run=deploy_again))
        state.clear_up("Echo", b"gone")

        states = [state.redis.hget(keys.call(call_id), "state") for call_id in (before, *since)]
        assert states == [b"failed", b"queued"]
        assert state.redis.xlen(keys.calls("Echo")) == 1


class TestSettling:
    def test_a_verdict_about_an_older_generation_is_dropped(self, state: State) -> None:
        state.deploy(spec(), expected=0)
        state.deploy(spec(), expected=1)

        assert not state.set_state("Echo", 1, DEPLOY_FAILED, error="boom", refuse="failed")

        deployed = state.get("Echo")
        assert deployed is not None
        assert (deployed.state, deployed.error) == (DEPLOYING, "")

    def test_a_failed_deployment_refuses_calls_until_the_next_deploy(
        self, state: State, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        state.deploy(spec(), expected=0)
        state.set_state("Echo", 1, DEPLOY_FAILED, error="boom", refuse="it failed")
        assert redis_client.hget(keys.meta("Echo"), "refuse") == b"it failed"

        state.deploy(spec(), expected=1)
        assert redis_client.hget(keys.meta("Echo"), "refuse") is None

    def test_the_state_is_kept_with_the_deployment(self, state: State) -> None:
        state.deploy(spec(), expected=0)
        state.set_state("Echo", 1, HEALTHY)

        deployed = state.get("Echo")
        assert deployed is not None
        assert deployed.state == HEALTHY


class TestObserving:
    def test_only_live_nodes_count(self, state: State, redis_client: "redis.Redis", keys: Keys) -> None:
        for name in ("live", "dead"):
            redis_client.hset(keys.nodes, name, encode(NodeInfo(id=name, host="h", pid=1)))
        redis_client.set(keys.alive("live"), 1)

        assert set(state.observed.nodes()) == {"live"}

    def test_a_gateway_of_this_host_whose_process_has_ended_does_not_count(
        self, state: State, redis_client: "redis.Redis", keys: Keys
    ) -> None:
        ended = subprocess.Popen(["true"])
        ended.wait()
        info = GatewayInfo(id="gw", host="h", pid=ended.pid, url="http://h", machine=this_host())
        redis_client.hset(keys.gateways, "gw", encode(info))
        redis_client.set(keys.alive("gw"), 1)

        assert state.observed.gateways() == {}


class TestFollowing:
    async def test_every_change_arrives_in_order(self, state: State, settings: Settings) -> None:
        changes = follow(settings.redis_url, settings.keys, "0-0")
        state.deploy(spec(), expected=0)
        state.set_http(HttpSettings(root_path="/api"))
        state.delete("Echo")

        seen = [await anext(changes) for _ in range(3)]
        await changes.aclose()

        assert [(change.kind, change.name, change.generation) for change in seen] == [
            ("deploy", "Echo", 1),
            ("http", "", 0),
            ("delete", "Echo", 2),
        ]

    async def test_a_snapshot_has_everything_and_the_id_to_follow_from(
        self, state: State, settings: Settings, signer: Signer
    ) -> None:
        deployed = state.deploy(spec(), expected=0)
        state.set_http(HttpSettings(root_path="/api"))
        client = connect_asyncio(settings.redis_url)

        snapshot = await read_snapshot(client, settings.keys, signer)
        state.deploy(spec("Later"), expected=0)
        change = await anext(follow(settings.redis_url, settings.keys, snapshot.log_id))
        await client.aclose()

        assert snapshot.deployments == {"Echo": state.get("Echo")}
        assert deployed.generation == snapshot.deployments["Echo"].generation
        assert snapshot.http.root_path == "/api"
        assert change.name == "Later"

    @needs_one_server
    async def test_a_change_of_one_deployment_makes_the_state_that_a_snapshot_has(
        self, state: State, settings: Settings, signer: Signer
    ) -> None:
        state.deploy(spec(), expected=0)
        client = connect_asyncio(settings.redis_url)
        known = await read_snapshot(client, settings.keys, signer)
        changes = follow(settings.redis_url, settings.keys, known.log_id)

        def changed() -> None:
            state.deploy(spec("Later"), expected=0)
            state.deploy(spec(max_queued=99), expected=1)
            state.pause("Later", "ada")
            state.delete("Echo")

        changed()
        for _ in range(4):
            after = await read_changes(client, settings.keys, signer, known, [await anext(changes)])
            assert after is not None
            known = after
        assert known == await read_snapshot(client, settings.keys, signer)

        state.set_http(HttpSettings(root_path="/api"))
        assert await read_changes(client, settings.keys, signer, known, [await anext(changes)]) is None
        await changes.aclose()
        await client.aclose()

    @needs_one_server  # counts its commands
    @pytest.mark.parametrize("others", [1, 40])
    async def test_what_a_look_at_the_state_costs_does_not_depend_on_how_much_is_deployed(
        self, state: State, settings: Settings, signer: Signer, others: int
    ) -> None:
        for number in range(others):
            state.deploy(spec(f"other{number}"), expected=0)
        client = connect_asyncio(settings.redis_url)
        known = await read_snapshot(client, settings.keys, signer)
        deployed = state.deploy(spec("Later"), expected=0)
        state.set_state("other0", 1, HEALTHY)
        change = Change("deploy", deployed.log_id, "Later", 1)
        before: Any = state.redis.info("commandstats")

        after = await read_changes(client, settings.keys, signer, known, [change], ["other0"])
        same = await read_changes(client, settings.keys, signer, known, [])

        stats: Any = state.redis.info("commandstats")
        asked = {
            name: stats[f"cmdstat_{name}"]["calls"] - before[f"cmdstat_{name}"]["calls"] for name in ("get", "hmget")
        }
        assert asked == {"get": 2, "hmget": 2}
        assert after is not None
        assert after.deployments["other0"].state == HEALTHY
        assert after.deployments["Later"] == deployed
        assert same == known
        await client.aclose()

    async def test_many_changes_at_once_are_read_as_a_whole(self, state: State, settings: Settings) -> None:
        for number in range(120):
            state.deploy(spec(), expected=number)
        changes = follow(settings.redis_url, settings.keys, "0-0")

        assert [(await anext(changes)).kind for _ in range(2)] == ["resync", "deploy"]
        await changes.aclose()

    async def test_a_spec_with_a_bad_signature_is_left_out_of_a_snapshot(
        self, state: State, settings: Settings, signer: Signer, caplog: pytest.LogCaptureFixture
    ) -> None:
        stranger = State(settings.redis_url, settings.keys, Signer((b"another key",)))
        stranger.deploy(spec("Forged"), expected=0)
        stranger.close()
        state.deploy(spec(), expected=0)
        client = connect_asyncio(settings.redis_url)

        snapshot = await read_snapshot(client, settings.keys, signer)
        await client.aclose()

        assert set(snapshot.deployments) == {"Echo"}
        assert "Forged" in caplog.text

    async def test_after_redis_was_away_followers_are_told_to_read_again(self, keys: Keys) -> None:
        with tempfile.TemporaryDirectory(prefix="qs-") as name:
            folder = Path(name)
            with valkey(folder):
                state = State(embedded.redis_url(folder), keys, Signer())
                state.deploy(spec(), expected=0)
                changes = follow(embedded.redis_url(folder), keys, "0-0")
                assert (await anext(changes)).kind == "deploy"
                waiting = asyncio.create_task(next_change(changes))
                await asyncio.sleep(0)
            with valkey(folder):
                change = await asyncio.wait_for(waiting, patience(10))
                assert change.kind == "resync"
                state.deploy(spec("New"), expected=0)
                assert (await asyncio.wait_for(anext(changes), patience(10))).name == "New"
                state.close()
                await changes.aclose()


def test_an_unreachable_redis_is_our_error() -> None:
    state = State("unix:///nowhere/at/all.sock", Keys("test"), Signer())

    with pytest.raises(BrokerUnavailable, match="cannot be reached"):
        state.list()
    assert not state.ping()


async def next_change(changes: AsyncGenerator[Change, None]) -> Change:
    return await anext(changes)


@contextlib.contextmanager
def valkey(folder: Path) -> Iterator[None]:
    """A server in a folder, for the length of the block."""
    process = subprocess.Popen(embedded.command(folder))
    probe = State(embedded.redis_url(folder), Keys("test"), Signer())
    wait_until(probe.ping)
    probe.close()
    yield
    process.kill()
    process.wait()
