"""Pages of the console: about more deployments than are on one of them, and what became of the calls of schedules."""

from typing import Any

import msgspec
import pytest

from qserve.broker.history.buckets import add_counts
from qserve.broker.instance.state import State
from qserve.broker.instance.stored_schedules import note_fired
from qserve.durable.schedules import Fired, Plan, Schedules
from qserve.settings import Settings
from qserve.wire.call_record import DurableOptions, new_call_id
from qserve.wire.codec import Codec
from qserve_gateway.console.actions import ACTIONS
from qserve_gateway.console.pages import ROWS, Asked, Pages
from qserve_gateway.console.rendering import Rendering
from qserve_gateway.console.sessions import Visitor
from tests.support.calling import deploy

MANY = 201
LAST = f"d{MANY - 1:03}"


@pytest.fixture
def pages(state: State, settings: Settings) -> Pages:
    spec = deploy(settings, "d000")
    for number in range(1, MANY):
        state.deploy(msgspec.structs.replace(spec, name=f"d{number:03}"), expected=0)
    add_counts(state.redis, state.keys, LAST, {"failed": 7}, [], [])
    return Pages(state, settings)


def shown(pages: Pages, path: str, **query: str) -> tuple[dict[str, Any], str]:
    """What a page is about, and its text."""
    found = pages.find(Asked(path, query, Visitor("somebody", True)))
    assert found is not None
    text = Rendering({"namespace": "test", "label": "", "actions": ACTIONS}).page(found[0], **found[1]).body
    return found[1], bytes(text).decode()


def test_of_all_deployments_those_come_first_that_are_asked_for(pages: Pages) -> None:
    facts, text = shown(pages, "")
    assert [row["name"] for row in facts["rows"]] == [f"d{number:03}" for number in range(ROWS)]
    assert "in the last 10 minutes · on this page" in text
    assert shown(pages, "", sort="failed")[0]["rows"][0]["name"] == LAST
    last = shown(pages, "", sort="failed", page=str(MANY // ROWS))[0]["rows"]
    assert [row["name"] for row in last] == [f"d{MANY - 2:03}"]
    assert "on this page" not in shown(pages, "", q=LAST)[1]


def test_pages_about_many_deployments_say_that_they_are_not_about_all(pages: Pages) -> None:
    for path in ("/calls", "/troubles", "/dead"):
        assert "f the first 200 deployments" in shown(pages, path)[1]
        assert "the first 200 deployments" not in shown(pages, path, deployment=LAST)[1]


def test_a_schedule_shows_how_its_last_call_ended_as_long_as_that_is_known(state: State, settings: Settings) -> None:
    deploy(settings)
    schedules, call_id = Schedules(state), new_call_id(state.keys.of("Echo").shard)
    plan = Plan("nightly", "every 1h", "Echo", "", DurableOptions(), (), {})
    schedules.put(plan, Codec(allow_pickle=False, max_bytes=1000))
    fired = msgspec.msgpack.encode(Fired(int(schedules.now() * 1000), call_id, ""))
    note_fired(state.redis, state.keys, "nightly", fired)
    record: dict[Any, Any] = {"state": "failed", "deployment": "Echo", "error": "ValueError: bad"}
    state.redis.hset(state.keys.call(call_id), mapping=record)

    text = shown(Pages(state, settings), "/schedules")[1]
    assert ">failed</span>" in text
    assert "ValueError: bad" in text
    state.redis.delete(state.keys.call(call_id))
    text = shown(Pages(state, settings), "/schedules")[1]
    assert call_id in text
    assert "failed" not in text
