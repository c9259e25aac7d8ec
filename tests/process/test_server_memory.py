"""What servers say of their memory."""

from typing import Any

import pytest
import redis

from qserve.broker.history.totals import become_exporter
from qserve.broker.instance.state import State
from qserve.broker.server.memory import read_memory
from tests.support.chosen_server import needs_one_server


def test_every_server_says_what_it_uses_and_may_use(state: State) -> None:
    found = list(read_memory(state.redis))
    assert len({memory.server for memory in found}) == len(found) > 0
    assert all(0 < memory.used < memory.limit for memory in found)


@needs_one_server
def test_a_limit_that_is_set_counts(state: State, redis_client: "redis.Redis") -> None:
    before: Any = redis_client.config_get("maxmemory")
    redis_client.config_set("maxmemory", 1 << 30)
    try:
        (memory,) = read_memory(state.redis)
    finally:
        redis_client.config_set("maxmemory", before["maxmemory"])
    assert memory.limit == 1 << 30


@needs_one_server
@pytest.mark.parametrize("answer", [{}, {"used_memory": 5}, redis.exceptions.ConnectionError("lost")])
def test_a_server_that_does_not_tell_is_left_out(state: State, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    def info(_section: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(state.redis, "info", info)
    assert list(read_memory(state.redis)) == []


@needs_one_server
def test_one_gateway_shows_the_instance_while_the_server_takes_no_writes(
    state: State, redis_client: "redis.Redis"
) -> None:
    """Or its alert would end as soon as the memory is used up."""
    alive = {"one": 1, "other": 2}

    def shown() -> list[str]:
        return [each for each in alive if become_exporter(state.redis, state.keys, each, alive)]

    assert become_exporter(state.redis, state.keys, "other", alive)
    redis_client.config_set("maxmemory", 1)
    try:
        assert shown() == ["other"]
        state.redis.delete(state.keys.exporter)  # as when its time is over
        assert shown() == ["one"]
        assert become_exporter(state.redis, state.keys, "other", {})
    finally:
        redis_client.config_set("maxmemory", 0)
    assert shown() == ["one"]
