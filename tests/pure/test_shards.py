"""In which slot of a cluster each key lies, and where a command goes."""

import pytest

from qserve.broker.keys import Keys
from qserve.broker.server.address import SLOTS, parse, slot_of
from qserve.broker.server.cluster_clients import ANY_SLOT, primary_of_slot, slot_of_command
from qserve.wire.call_record import is_call_id, new_call_id

ONE, MANY = Keys("ns"), Keys("ns", 16)


def tag_of(key: str) -> str:
    return key[key.index("{") + 1 : key.index("}")]


def test_on_one_server_all_keys_have_the_tag_of_the_namespace() -> None:
    names = (ONE.calls("a"), ONE.of("a").inbox("p"), ONE.log, ONE.nodes, ONE.call("d" + "f" * 32), *map(str, ONE.all()))
    assert {tag_of(name) for name in names if name.startswith("qs:")} == {"ns"}
    assert ONE.of("a") is ONE
    assert ONE.address("redis://host") == "redis://host"


def test_what_belongs_to_a_deployment_lies_in_its_shard() -> None:
    its = MANY.of("a")
    call_id = new_call_id(its.shard)
    names = (MANY.calls("a"), its.meta("a"), its.inbox("p"), its.log, its.instance, MANY.call(call_id), its.base)
    assert {tag_of(name) for name in names} == {tag_of(its.base)}
    assert is_call_id(call_id)
    assert {tag_of(name) for name in (its.nodes, MANY.log, its.celery_prefix)} == {"ns"}


@pytest.mark.parametrize("shards", [2, 16, 64, 255])
def test_the_slots_of_shards_lie_evenly_over_a_cluster(shards: int) -> None:
    slots = [slot_of(tag_of(keys.base)) for keys in Keys("ns", shards).all()]
    assert [slot * shards // SLOTS for slot in slots] == list(range(shards))


def test_deployments_spread_over_the_shards() -> None:
    found = {MANY.of(f"deployment-{number}").shard for number in range(200)}
    assert found == set(range(1, 17))


def test_the_address_of_a_shard_names_its_slot() -> None:
    its = MANY.of("a")
    assert parse(its.address("redis+cluster://h")).slot == slot_of(tag_of(its.base))
    assert parse(its.address("redis+cluster://h/?shards=16")).slot == slot_of(tag_of(its.base))


@pytest.mark.parametrize(
    "command", [("GET", "qs:{t}:x"), ("EVALSHA", "abc", 1, "qs:{t}:x"), ("XREAD", "STREAMS", b"qs:{t}:x", "0")]
)
def test_a_command_goes_where_its_keys_are(command: tuple[object, ...]) -> None:
    assert slot_of_command(command) == slot_of("t")


def test_a_command_without_keys_goes_anywhere() -> None:
    assert slot_of_command(("PING",)) == ANY_SLOT


def test_a_node_that_does_not_know_its_name_is_where_it_was_asked() -> None:
    answer = [[0, 99, [b"", 7, b"id"]], [100, 199, [b"b", 8, b"id"], [b"c", 9, b"id"]]]
    assert primary_of_slot(answer, ("a", 1), 5) == (("a", 7), [("a", 7), ("b", 8), ("c", 9)])
    assert primary_of_slot(answer, ("a", 1), 150)[0] == ("b", 8)
    assert primary_of_slot(answer, ("a", 1), 200)[0] is None


def test_a_script_that_finds_keys_in_a_record_waits_while_its_slot_is_divided() -> None:
    its = MANY.of("a")
    assert its.whole(its.calls("a")) == (its.calls("a"), its.base)
    assert ONE.whole("x", "y") == ("x", "y")
