"""Pages of the console about more deployments than are on one of them."""

from typing import Any

import msgspec
import pytest

from qserve.broker.history.buckets import add_counts
from qserve.broker.instance.state import State
from qserve.settings import Settings
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
