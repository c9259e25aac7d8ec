"""Several deploy the same name at once: one of them is there in the end, whole, and every one of them gets to know."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from qserve.broker.instance.state import State
from qserve.deployments import deploying
from qserve.settings import Settings
from tests.instance.scaling.load import Load
from tests.instance.scaling.loaded import Loaded
from tests.support.nodes import StartNode, spec
from tests.support.slowness import patience
from tests.support.waiting import joined

pytestmark = pytest.mark.timeout(120)
CLIENTS, ROUNDS = 4, 8


def version(notes: Path, client: int, number: int) -> Any:
    """A version whose options and configuration tell who made it."""
    mark = client * 100 + number
    return Loaded.options(
        init_args=(str(notes),), version=f"v{mark}", user_config={"mark": mark}, max_concurrent_queries=1000 + mark
    )


def test_the_last_one_wins_whole_and_the_others_end_by_themselves(
    start_node: StartNode, settings: Settings, state: State, notes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="qserve.deployments.deploying")
    start_node("--exact")
    deploying.deploy(state, spec(version(notes, 9, 0))).wait(patience(60))
    ended: list[deploying.Goal] = []

    def client(number: int) -> None:
        mine = State(settings.redis_url, settings.keys, state.signer)
        generations = [0]
        for turn in range(ROUNDS):
            goal = deploying.deploy(mine, spec(version(notes, number, turn)))
            generations.append(goal.deployed.generation)
            assert goal.wait(patience(60))
            ended.append(goal)
        assert generations == sorted(set(generations))
        mine.close()

    with Load("Loaded", notes, handles=2, durable=1) as load:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        joined(*threads, limit_s=100)
        load.more(5)
    load.check()

    assert len(ended) == CLIENTS * ROUNDS
    generations = [goal.deployed.generation for goal in ended]
    assert len(set(generations)) == len(ended)
    last = max(ended, key=lambda goal: goal.deployed.generation)
    assert not last.superseded_by
    assert all(goal.superseded_by > goal.deployed.generation for goal in ended if goal.superseded_by)
    warnings = [record.message for record in caplog.records if "SUPERSEDED" in record.message]
    assert len(warnings) == sum(goal.superseded_by > 0 for goal in ended) > 0
    now = state.get("Loaded")
    assert now is not None
    assert (now.spec, now.generation) == (last.deployed.spec, max(generations))
    (replica,) = state.observed.replicas("Loaded").values()
    assert (replica.revision, replica.generation) == (now.spec.revision, now.generation)
    assert load.ended[-1].result["config"] == {"mark": int(str(now.spec.version)[1:])}


def test_a_deploy_that_expects_another_version_changes_nothing(state: State, notes: Path) -> None:
    deploying.deploy(state, spec(version(notes, 1, 0))).wait()
    before = state.get("Loaded")

    with pytest.raises(ValueError, match="does not match with the existing version 'v100'"):
        deploying.deploy(state, spec(version(notes, 2, 0).options(prev_version="v300")))

    assert state.get("Loaded") == before


def test_a_deploy_is_superseded_though_the_newer_one_fails(start_node: StartNode, state: State, notes: Path) -> None:
    start_node("--exact")
    deploying.deploy(state, spec(version(notes, 1, 0))).wait(patience(60))
    older = deploying.deploy(state, spec(version(notes, 2, 0).options(init_args=(str(notes), 0, "2"))))
    broken = deploying.deploy(state, spec(version(notes, 3, 0).options(init_args=(str(notes), 0, "raise"))))

    assert older.wait(patience(60))
    assert older.superseded_by == broken.deployed.generation
    with pytest.raises(RuntimeError, match="this version cannot start"):
        broken.wait(patience(60))
    now = state.get("Loaded")
    assert now is not None
    assert now.spec.version == "v200"  # what was deployed before the broken one, though it had no time to serve
