"""What operators do from the shell: finding calls, pausing, scaling, going back to the former version."""

import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from qserve import serve
from qserve.broker.history.audit import read_deeds
from qserve.broker.instance.state import State
from qserve.cli.command_line import main
from qserve.errors import GetTimeoutError
from qserve.operating.operators import user_of_this_machine
from qserve.testing import TestInstance
from qserve.wire.messages import Signer
from tests.support.gates import Gate
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = pytest.mark.usefixtures("qserve_instance")


def qs(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def rows(*arguments: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def serving(name: str) -> set[int]:
    [found] = [row for row in json.loads(qs("status", "--json").stdout)["deployments"] if row["name"] == name]
    return {each["pid"] for each in found["replicas"] if each["state"] == "SERVING"}


@pytest.fixture
def picky(gate: Gate) -> Any:
    """Fails for words that are short, until the gate is open."""
    path = str(gate._path)

    @serve.deployment(name="picky")
    def picky(word: str, token: str = "") -> str:
        import pathlib

        if len(word) < 3 and not pathlib.Path(path).exists():
            raise ValueError(f"too short: {word}")
        return word.upper()

    picky.deploy()
    return picky.get_handle().options(durable=True)


def test_calls_are_found_shown_and_run_again(picky: Any, gate: Gate) -> None:
    good, bad = picky.remote("long enough"), picky.remote("x", token="t")
    assert good.result(patience(LIMIT_S)) == "LONG ENOUGH"
    with pytest.raises(ValueError, match="too short"):
        bad.result(patience(LIMIT_S))

    assert [row["id"] for row in rows("calls", "ls", "picky", "--state", "failed", "--since", "5m")][:1] == [bad.id]
    assert good.id in [row["id"] for row in rows("calls", "ls", "picky", "--state", "done")]
    assert [row["id"] for row in rows("calls", "ls", "picky", "--error", "TOO SHORT", "--limit", "1")] == [bad.id]
    assert good.id in qs("calls", "ls").stdout
    assert "There are no such calls." in qs("calls", "ls", "picky", "--method", "other").output
    assert qs("calls", "ls", "--since", "soon").exit_code == 2
    [shown] = rows("calls", "show", bad.id)
    assert shown["arguments"] == {"args": ["x"], "kwargs": {"token": "t"}}
    assert "raise ValueError" in shown["traceback"]
    [shown] = rows("calls", "show", good.id)
    assert (shown["state"], shown["result"], shown["arguments"]) == ("done", "LONG ENOUGH", None)
    assert "LONG ENOUGH" in qs("calls", "show", good.id).stdout

    gate.open()
    assert rows("calls", "retry", bad.id) == [{"id": bad.id, "outcome": "queued"}]
    assert serve.get_ref(bad.id).result(patience(LIMIT_S)) == "X"
    refused = qs("calls", "retry", good.id)
    assert refused.exit_code == 1
    assert "only failed and dead calls can" in refused.output
    assert qs("calls", "show", "nonsense").exit_code == 1


def test_a_call_shows_the_calls_that_it_has_made_and_what_it_gives() -> None:
    @serve.deployment(name="leaf")
    def leaf(word: str) -> str:
        return word

    @serve.deployment(name="trunk")
    async def trunk(count: int) -> AsyncIterator[str]:
        handle = serve.get_deployment("leaf").get_handle(sync=False).options(durable=True)
        for number in range(count):
            yield (await handle.remote(f"leaf {number}")).id

    leaf.deploy()
    trunk.deploy()
    ref = trunk.get_handle().options(durable=True).remote(25)
    made = list(ref)
    [shown] = rows("calls", "show", ref.id)
    assert [(each["id"], each["depth"]) for each in shown["family"]] == [(ref.id, 0), *((each, 1) for each in made)]
    assert (shown["given"], shown["parts"]) == (25, made[5:])
    [shown] = rows("calls", "show", made[0])
    assert (shown["made_by"], [each["id"] for each in shown["family"]]) == (ref.id, [ref.id, made[0]])
    text = qs("calls", "show", made[0]).stdout
    assert f"\n  {ref.id}" in text
    assert f"\n>   {made[0]}" in text


def test_a_call_is_found_by_its_idempotency_key(qserve_instance: TestInstance) -> None:
    @serve.deployment(name="paid", route_prefix="/paid")
    def paid() -> str:
        return "paid"

    paid.deploy()
    url = f"{qserve_instance.url}/paid"
    for user in ("ada", "bob"):
        headers = {"Idempotency-Key": "order 17", "Authorization": user}
        assert httpx.post(url, headers=headers, timeout=patience(LIMIT_S)).text == "paid"
    found = rows("calls", "ls", "--key", "order 17")
    assert [(row["deployment"], row["state"]) for row in found] == [("paid", "done")] * 2
    assert rows("calls", "show", found[0]["id"])[0]["key"] == "order 17"
    assert "There are no such calls." in qs("calls", "ls", "--key", "order 1").output
    assert "There are no such calls." in qs("calls", "ls", "--key", "order 17", "--state", "failed").output


def test_a_call_is_cancelled(picky: Any) -> None:
    serve.get_deployment("picky")
    waiting = serve.get_deployment("picky").get_handle().options(durable=True, delay=3600).remote("later")
    wait_until(lambda: rows("calls", "ls", "picky", "--state", "scheduled"))

    assert rows("calls", "cancel", waiting.id) == [{"id": waiting.id, "outcome": "cancelled"}]
    assert rows("calls", "cancel", waiting.id) == [{"id": waiting.id, "outcome": "ended"}]


def test_a_paused_deployment_accepts_calls_and_does_not_run_them(qserve_instance: TestInstance) -> None:
    @serve.deployment(name="steady", num_replicas=2)
    def steady(word: str) -> str:
        return word

    steady.deploy()
    handle = steady.get_handle()
    assert qs("pause", "steady").exit_code == 0
    # Both replicas have stopped reading once calls stay in the queue.
    settled: list[Any] = []

    def stays() -> bool:
        settled.append(handle.options(durable=True).remote("wait"))
        time.sleep(0.3)
        return all(ref.status().state == "queued" for ref in settled[-2:]) and len(settled) > 2

    wait_until(stays)
    assert "PAUSED" in qs("top").output
    steady.deploy()  # still so for new replicas, and for those that take the place of dead ones
    pids = serving("steady")
    os.kill(min(pids), signal.SIGKILL)
    wait_until(lambda: len(serving("steady") - pids) == 1)
    last = handle.options(durable=True).remote("wait")
    ordinary = handle.remote("now")
    with pytest.raises(GetTimeoutError, match=r"'steady' is paused since \d\d:\d\d: calls are accepted, but wait"):
        handle.options(timeout_s=0.5).remote("in a hurry").result(patience(LIMIT_S))
    [row] = json.loads(qs("status", "--json").stdout)["deployments"]
    assert (row["paused"], row["paused_by"]) == (True, user_of_this_machine())
    assert f"by {user_of_this_machine()}" in " ".join(qs("status").stdout.split())
    assert last.status().state == "queued"

    assert qs("resume", "steady").exit_code == 0

    assert ordinary.result(patience(LIMIT_S)) == "now"
    assert last.result(patience(LIMIT_S)) == "wait"
    settings = qserve_instance.settings
    with closing(State(settings.redis_url, settings.keys, Signer(settings.secrets))) as state:
        deeds = [(deed.action, deed.about) for _, deed in read_deeds(state.redis, state.keys, 2)]
    assert deeds == [("resume", "steady"), ("pause", "steady")]
    assert qs("pause", "nobody").exit_code == 1


def test_replicas_are_added_and_the_former_version_comes_back() -> None:
    def deploy(said: str) -> None:
        @serve.deployment(name="versioned", version=said)
        def versioned() -> str:
            return said

        versioned.deploy()

    deploy("one")
    assert qs("rollback", "versioned").exit_code == 1
    deploy("two")
    handle = serve.get_deployment("versioned").get_handle()
    assert handle.remote().result(patience(LIMIT_S)) == "two"

    assert rows("rollback", "versioned")[0]["version"] == "one"
    assert handle.remote().result(patience(LIMIT_S)) == "one"
    assert rows("rollback", "versioned")[0]["version"] == "two"
    assert handle.remote().result(patience(LIMIT_S)) == "two"

    assert qs("scale", "versioned", "2").exit_code == 0
    [row] = json.loads(qs("top", "--json").stdout)
    assert (row["name"], row["serving"], row["wanted"]) == ("versioned", 2, 2)
    assert "has 2 replicas already" in qs("scale", "versioned", "2").output


def test_a_paused_schedule_leaves_out_what_is_due() -> None:
    @serve.deployment(name="ticked")
    def ticked() -> None: ...

    ticked.deploy()
    assert qs("schedule", "pause", "tick").exit_code == 1
    serve.schedule("tick", "every 1s", ticked.get_handle())
    assert json.loads(qs("schedule", "pause", "tick", "--json").stdout) == {"schedule": "tick", "paused": True}
    wait_until(lambda: "left out, because the schedule is paused" in qs("schedule", "ls").stdout)
    count = len(rows("calls", "ls", "ticked"))
    assert f"by {user_of_this_machine()}  last" in qs("schedule", "ls").stdout
    serve.schedule("tick", "every 1s", ticked.get_handle(), "put anew")
    assert "paused since" in qs("schedule", "ls").stdout
    before = json.loads(qs("schedule", "show", "tick").stdout)["last"]
    wait_until(lambda: json.loads(qs("schedule", "show", "tick").stdout)["last"] not in (None, before))
    assert len(rows("calls", "ls", "ticked")) == count
    assert qs("schedule", "resume", "tick").exit_code == 0
    wait_until(lambda: len(rows("calls", "ls", "ticked")) > count)
    assert qs("schedule", "rm", "tick").exit_code == 0


def test_the_range_of_replicas_is_changed_where_it_follows_the_load() -> None:
    @serve.deployment(name="elastic", autoscaling_config={"min_replicas": 1, "max_replicas": 2})
    def elastic() -> None: ...

    elastic.deploy()
    assert "qserve scale elastic --min N --max N" in qs("scale", "elastic", "2").output
    assert rows("scale", "elastic", "--max", "3")[0] == {"deployment": "elastic", "min_replicas": 1, "max_replicas": 3}
    config = serve.get_deployment("elastic").autoscaling_config
    assert config is not None
    assert config.max_replicas == 3
    assert "max_replicas (3) is below min_replicas (4).\n" in qs("scale", "elastic", "--min", "4").output
    assert qs("scale", "elastic").exit_code == 2


def test_the_number_of_replicas_at_first_keeps_nobody_from_another_range() -> None:
    @serve.deployment(autoscaling_config={"min_replicas": 1, "max_replicas": 3, "initial_replicas": 1})
    def begins_small() -> None: ...

    begins_small.deploy()
    assert rows("scale", "begins_small", "--min", "2")[0]["min_replicas"] == 2
    wait_until(lambda: len(serving("begins_small")) == 2)
    begins_small.delete()


def test_a_deployment_whose_replicas_come_up_no_more_says_why(tmp_path: Path) -> None:
    broken = str(tmp_path / "broken")

    @serve.deployment(name="leaning")
    class Leaning:
        def __init__(self) -> None:
            if os.path.exists(broken):  # noqa: PTH110
                raise ConnectionError("the database is away")

        def __call__(self) -> None: ...

    Leaning.deploy()
    (tmp_path / "broken").touch()
    [pid] = serving("leaning")
    os.kill(pid, signal.SIGKILL)
    found: Any = wait_until(lambda: (it := serve.status()["leaning"]).error and it)
    assert found.state == "DEPLOYING"
    assert "ConnectionError: the database is away" in qs("status", "leaning").output
    [row] = [row for row in json.loads(qs("top", "--json").stdout) if row["name"] == "leaning"]
    assert (row["state"], "the database is away" in row["error"]) == ("DEPLOYING", True)

    (tmp_path / "broken").unlink()
    wait_until(lambda: (it := serve.status()["leaning"]).state == "HEALTHY" and not it.error)
    Leaning.delete()


def test_lists_that_are_empty_say_so() -> None:
    assert "There are no dead letters" in qs("dead", "ls", "nobody").output
    assert "There are no schedules" in qs("schedule", "ls").output
    assert "Nothing is deployed" in qs("top").output
