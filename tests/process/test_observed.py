"""What is told of the processes of an instance, and of dead letters that cannot be sent again."""

import os
import socket
from typing import Any

import msgspec
import pytest
import redis

from qserve.broker.instance.observed import Observed
from qserve.broker.instance.reports import report_replica
from qserve.broker.instance.state import State
from qserve.broker.keys import GROUP, Keys
from qserve.broker.server import redis_clients
from qserve.durable.dead_letters import DeadLetters
from qserve.errors import BrokerUnavailable, CallNotFound, DeploymentNotFound, FrameRejected
from qserve.this_machine import this_host
from qserve.wire.call_record import DurableCall, Terms, new_call_id
from qserve.wire.codec import Codec
from qserve.wire.messages import DURABLE, PYTHON, Call, Signer, encode
from qserve.wire.spec import SERVING, GatewayInfo, ReplicaInfo
from tests.support.calling import deploy

NOBODY = 2**22 + 1
"""No process has this pid: Linux gives lower ones only."""
CODEC = Codec(allow_pickle=False, max_bytes=1000)


@pytest.mark.parametrize(
    ("machine", "pid", "is_there"),
    [
        ("elsewhere", NOBODY, True),
        (None, NOBODY, True),
        (this_host(), os.getpid(), True),
        (this_host(), NOBODY, False),
    ],
    ids=["in a container with this host name", "of a version that does not say where", "here", "gone from here"],
)
def test_a_gateway_that_has_ended_on_this_machine_is_not_told_of(
    redis_client: "redis.Redis", keys: Keys, machine: str | None, pid: int, is_there: bool
) -> None:
    fields = {field.name for field in msgspec.structs.fields(GatewayInfo) if field.required}
    facts: dict[str, Any] = {"host": socket.gethostname(), "pid": pid, "url": "http://x", "applied": "0-0"}
    facts |= {"id": "g"} if machine is None else {"id": "g", "machine": machine}
    redis_client.hset(keys.gateways, "g", msgspec.msgpack.encode({"id": "g"} | facts))
    assert fields <= facts.keys()
    assert Observed(redis_client, keys).gateways() == {}  # it has not said that it lives
    redis_client.set(keys.alive("g"), 1)

    assert bool(Observed(redis_client, keys).gateways()) is is_there


@pytest.mark.parametrize(
    ("lives", "is_there"),
    [((), False), (("node",), True), (("replica",), True)],
    ids=["its machine has vanished", "it stands still", "its node was killed"],
)
def test_a_replica_is_told_of_while_its_node_or_itself_says_that_it_lives(
    redis_client: "redis.Redis", keys: Keys, lives: tuple[str, ...], is_there: bool
) -> None:
    info = ReplicaInfo(
        id="replica",
        tag="Echo#1",
        worker="worker",
        node="node",
        host="h",
        pid=1,
        generation=1,
        revision="1",
        state=SERVING,
        started_at=0.0,
    )
    report_replica(redis_client, keys, "Echo", info)
    for process in lives:
        redis_client.set(keys.alive(process), 1)

    assert bool(Observed(redis_client, keys).replicas("Echo")) is is_there


def test_how_many_calls_wait_and_for_how_long(redis_client: "redis.Redis", state: State, keys: Keys) -> None:
    observed, stream = Observed(state.redis, keys), keys.calls("Echo")
    assert observed.waiting("Echo") == (0, 0.0)
    redis_client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    assert observed.waiting("Echo") == (0, 0.0)
    for _ in range(3):
        redis_client.xadd(stream, {"d": b""})
    redis_client.xreadgroup(GROUP, "me", {stream: ">"}, count=1)

    waiting, seconds = observed.waiting("Echo")

    assert waiting == 2
    assert 0 <= seconds < 60
    assert observed.queued("Echo") == 3


def test_a_server_that_is_gone_is_an_error_of_ours(keys: Keys, tmp_path: Any) -> None:
    with redis_clients.client(f"unix://{tmp_path}/nothing", 1.0) as client, pytest.raises(BrokerUnavailable):
        Observed(client, keys).counters()


class Letters:
    """The dead letters of a deployment, and how one comes to be there."""

    def __init__(self, state: State, keys: Keys, signer: Signer) -> None:
        self.state, self.keys, self.signer = state, keys, signer
        self.all = DeadLetters(state, 100_000)

    def put(self, frame: bytes, flags: str = "") -> None:
        name = self.keys.dead_letters("Echo")
        self.state.redis.xadd(name, {"r": "x", "f": flags, "d": frame, "err": "why"})

    def ordinary(self, **changes: Any) -> Call:
        payload = CODEC.pack_call((3,), {})
        call = Call("c" * 32, "Echo", "me", 1000, PYTHON, "", False, payload)
        call = msgspec.structs.replace(call, **changes)
        self.put(self.signer.seal(encode(call)))
        return call

    def durable(self) -> DurableCall:
        payload = CODEC.pack_call((3,), {})
        call = DurableCall(
            new_call_id(self.state.keys.of("Echo").shard), "Echo", "", 1000, PYTHON, "", True, payload, terms=Terms()
        )
        self.put(self.signer.seal(encode(call)), DURABLE)
        return call


@pytest.fixture
def dead(state: State, keys: Keys, signer: Signer) -> Letters:
    """Those of Echo."""
    return Letters(state, keys, signer)


def test_a_letter_is_found_by_its_id_or_its_calls(dead: Letters) -> None:
    call = dead.ordinary()
    (letter,) = dead.all.of("Echo")
    assert dead.all.get("Echo", call.id) == dead.all.get("Echo", letter.id) == letter
    assert letter.facts()["method"] == "__call__"
    assert dead.all.contents(letter)
    with pytest.raises(CallNotFound, match="no dead letter 'other' of 'Echo'"):
        dead.all.get("Echo", "other")


def test_the_letter_of_a_durable_call_is_found_without_reading_all_others(
    dead: Letters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else to send thousands of them again would take hours."""
    calls = [dead.durable() for _ in range(3)]
    found = list(dead.all.of("Echo"))
    for call, letter in zip(calls, found, strict=True):
        dead.state.redis.hset(dead.keys.call(call.id), mapping={"letter": letter.id, "attempts": 2})

    monkeypatch.setattr(dead.all, "of", None)
    for call, letter in zip(calls, found, strict=True):
        assert dead.all.get("Echo", call.id) == dead.all.get("Echo", letter.id) == letter._replace(attempts=2)


def test_what_nobody_of_ours_has_signed_is_shown_and_not_sent_again(dead: Letters) -> None:
    dead.put(Signer((b"x",)).seal(b"\x90"))
    (letter,) = dead.all.of("Echo")
    assert letter.facts() | {"letter": ""} == {
        "letter": "",
        "call": None,
        "deployment": "Echo",
        "method": None,
        "durable": False,
        "attempts": None,
        "reason": "why",
    }
    assert dead.all.contents(letter) == {}
    for use in (dead.all.payload, dead.all.retry):
        with pytest.raises(FrameRejected, match="no key of ours signed this frame"):
            use(letter)


def test_large_arguments_of_an_ordinary_call_are_not_kept(dead: Letters) -> None:
    dead.ordinary(out_of_line=True, payload=b"")
    (letter,) = dead.all.of("Echo")
    with pytest.raises(CallNotFound, match="its large arguments were in the memory of its caller"):
        dead.all.retry(letter)
    assert "its large arguments were in the memory of its caller" in dead.all.contents(letter)["contents"]


def test_an_ordinary_call_becomes_a_durable_one_and_its_letter_goes(dead: Letters, settings: Any) -> None:
    dead.ordinary()
    (letter,) = dead.all.of("Echo")
    with pytest.raises(DeploymentNotFound):
        dead.all.retry(letter)
    deploy(settings)

    call_id = dead.all.retry(letter)

    assert dead.state.redis.hget(dead.keys.call(call_id), "state") == b"queued"
    assert list(dead.all.all()) == []


def test_a_durable_call_that_is_gone_or_has_nobody_to_go_to_says_so(dead: Letters, settings: Any) -> None:
    call = dead.durable()
    (letter,) = dead.all.of("Echo")
    with pytest.raises(CallNotFound, match="cannot be sent again: its record has expired"):
        dead.all.retry(letter)
    dead.state.redis.hset(dead.keys.call(call.id), mapping={"state": "dead", "attempts": 3, "deployment": "Echo"})
    with pytest.raises(DeploymentNotFound, match="no deployment 'Echo'"):
        dead.all.retry(letter)
    deploy(settings)
    assert dead.all.retry(letter) == call.id
