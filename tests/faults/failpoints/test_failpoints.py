"""Processes that die at every point there is: what becomes of the call is the row of the failure table, each time."""

import asyncio
import re

import pytest

from qserve.broker.keys import Keys
from qserve.failpoints import POINTS, Armed
from qserve.settings import Settings
from tests.faults.failpoints.rows import ROWS, Row
from tests.faults.failpoints.sweep import sweep
from tests.support.calling import calling, deploy, serving
from tests.support.chosen_server import IS_CLUSTER
from tests.support.serving import ROOT
from tests.support.sources import SOURCES, table_column

Outcomes = dict[Row, Exception | None]
PLAYED = [row for row in ROWS if not (IS_CLUSTER and row.point.startswith("celery"))]
"""Calls of Celery clients are not possible on a cluster."""


@pytest.fixture(scope="module")
def outcomes(redis_server: str) -> Outcomes:
    """What is wrong with each row."""
    return dict(zip(PLAYED, asyncio.run(sweep(redis_server, PLAYED)), strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("row", PLAYED, ids=lambda row: row.name)
def test_a_death_at_this_point_has_the_outcome_of_the_failure_table(row: Row, outcomes: Outcomes) -> None:
    problem = outcomes[row]
    if problem is not None:
        raise problem


def test_there_is_a_row_for_every_point() -> None:
    assert {row.point for row in ROWS} == set(POINTS)


def test_every_point_is_in_the_code_once_and_the_code_has_no_others() -> None:
    used = [
        point
        for path in SOURCES.values()
        if path.name != "failpoints.py"
        for point in re.findall(r"\breach\(\"([^\"]+)\"\)", path.read_text())
    ]
    assert sorted(used) == sorted(POINTS)


@pytest.mark.parametrize("wrong", ["nowhere:1", "taken", "taken:", "taken:0", "taken:x", "taken:1:explode", "run:1,"])
def test_a_point_that_does_not_exist_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is not NAME:NTH"):
        Armed(wrong)


async def test_a_replica_is_known_to_its_neighbours_before_it_takes_a_call(settings: Settings, keys: Keys) -> None:
    """Else nobody would look for its calls soon, should it die together with its worker."""
    async with serving(settings, deploy(settings)), calling(settings) as caller:
        assert await caller.client.sender.call("HLEN", keys.heartbeats("Echo")) == 1


def test_the_page_lists_every_point() -> None:
    assert table_column("failpoints.md", "Points") >= set(POINTS)
    assert len(re.findall(r"^\| `[a-z-]+` \|", (ROOT / "docs/failpoints.md").read_text(), re.MULTILINE)) == len(POINTS)
