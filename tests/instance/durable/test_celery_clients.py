"""`send_task("qserve.call")` from a plain Celery client: results through Celery's own backend, messages never lost."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery, chain, group
from celery.exceptions import NotRegistered, TaskRevokedError
from redis import Redis

from qserve import serve
from qserve.broker.instance.state import State
from qserve.settings import Settings
from qserve.testing import TestInstance
from qserve.wire.spec import DeploymentSpec, Target
from qserve_workers.celery_calls.celery_tasks import Desk
from tests.support.chosen_server import needs_one_server
from tests.support.gates import Gate, Notes
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

pytestmark = needs_one_server

sent: list[Any] = []


@pytest.fixture
def client(qserve_instance: TestInstance) -> Iterator[Celery]:
    """As docs/durable-calls.md tells a Celery user to make it; it knows nothing of qserve."""
    path = qserve_instance.settings.redis_url.removeprefix("unix://")
    prefix = {"global_keyprefix": f"qs:{{{qserve_instance.settings.namespace}}}:celery:"}
    app = Celery(broker=f"redis+socket://{path}", backend=f"redis+socket://{path}", set_as_current=False)
    app.conf.update(
        broker_transport_options=prefix, result_backend_transport_options=prefix, task_default_queue="qserve"
    )
    yield app
    for task in sent:
        task.backend = None  # else it asks the backend once more when it is collected, whenever that is
    sent.clear()
    app.close()


@pytest.fixture
def calc(qserve_instance: TestInstance, notes: Notes, gate: Gate) -> serve.Deployment[Any]:
    @serve.deployment(name="calc")
    class Calc:
        def add(self, a: int, b: int = 1) -> int:
            notes.add(a + b)
            return a + b

        def fail(self) -> None:
            raise LookupError("nothing here")

        def odd(self) -> object:
            return 1j

        def held(self) -> str:
            notes.add("held")
            gate.pass_through()
            return "let go"

    Calc.deploy()
    return Calc


def send(client: Celery, *args: Any, **options: Any) -> Any:
    sent.append(client.send_task("qserve.call", args=args, **options))
    return sent[-1]


def test_a_celery_client_gets_the_result(calc: Any, client: Celery) -> None:
    tasks = [send(client, "calc", "add", [number], {"b": 10}) for number in range(20)]

    assert [task.get(patience(LIMIT_S)) for task in tasks] == list(range(10, 30))
    assert tasks[0].state == "SUCCESS"
    assert tasks[0].date_done is not None
    ref = serve.get_ref("d" + uuid.UUID(tasks[0].id).hex)
    assert ref.result(patience(LIMIT_S)) == 10


def test_errors_are_failures_of_their_type(calc: Any, client: Celery) -> None:
    with pytest.raises(LookupError, match="nothing here"):
        send(client, "calc", "fail").get(patience(LIMIT_S))
    for args, name, text in (
        (("calc", "odd"), "ResultNotSerializable", "JSON"),
        (("calc", "_private"), "MethodNotFound", "private"),
        (("nobody", ""), "DeploymentNotFound", "no deployment 'nobody'"),
        ((), "TypeError", "deployment"),
        (("calc", "add", 5), "TypeError", "args"),
    ):
        task = send(client, *args)
        with pytest.raises(Exception, match=text) as caught:
            task.get(patience(LIMIT_S))
        assert type(caught.value).__name__ == name
        assert task.state == "FAILURE"


def test_a_group_is_run_and_what_would_follow_a_task_is_refused(calc: Any, client: Celery, notes: Notes) -> None:
    def add(*numbers: int) -> Any:
        return client.signature("qserve.call", args=["calc", "add", [*numbers]], immutable=True)

    several = group([add(1, 1), add(2, 2)], app=client).apply_async()
    sent.extend(several.results)
    assert several.get(patience(LIMIT_S)) == [2, 4]
    chained = chain(add(3, 3), add(4, 4), app=client).apply_async()
    linked, on_error = add(5, 5).apply_async(link=add(6, 6)), add(7, 7).apply_async(link_error=add(8, 8))
    sent.extend([chained, chained.parent, linked, on_error])

    for task, why in ((chained, "chain"), (linked, "link"), (on_error, "link_error")):
        with pytest.raises(ValueError, match=rf"follow a task \({why}\)"):
            task.get(patience(LIMIT_S))
    assert sorted(notes.read()) == ["2", "4"]


def test_a_message_delivered_twice_is_one_call(calc: Any, client: Celery, notes: Notes) -> None:
    task_id = str(uuid.uuid4())

    for _ in range(3):
        assert send(client, "calc", "add", [1], task_id=task_id).get(patience(LIMIT_S)) == 2
    assert send(client, "calc", "add", [2], task_id="my own id").get(patience(LIMIT_S)) == 3

    assert notes.read() == ["2", "3"]


def test_eta_and_expiry_are_kept(calc: Any, client: Celery, gate: Gate, notes: Notes) -> None:
    begun = datetime.now(UTC)
    late = send(client, "calc", "add", [1], countdown=1)
    over = send(client, "calc", "add", [2], expires=datetime.now(UTC) - timedelta(seconds=5))

    with pytest.raises(TaskRevokedError, match="expired"):
        over.get(patience(LIMIT_S))
    assert over.state == "REVOKED"
    assert late.get(patience(LIMIT_S)) == 2
    assert (datetime.now(UTC) - begun).total_seconds() >= 1
    assert notes.read() == ["2"]


def test_waiting_calls_hold_no_worker_and_can_be_cancelled(calc: Any, client: Celery, gate: Gate, notes: Notes) -> None:
    @serve.deployment
    def quick() -> str:
        return "quick"

    quick.deploy()
    held = send(client, "calc", "held")
    notes.wait_for(1)
    waiting = [send(client, "calc", "add", [number]) for number in range(50)]

    assert send(client, "quick").get(patience(LIMIT_S)) == "quick"
    last = serve.get_ref("d" + uuid.UUID(waiting[-1].id).hex)
    wait_until(lambda: last.status().state == "queued")
    last.cancel()
    with pytest.raises(TaskRevokedError, match="cancelled"):
        waiting[-1].get(patience(LIMIT_S))
    gate.open()
    assert held.get(patience(LIMIT_S)) == "let go"
    assert [task.get(patience(LIMIT_S)) for task in waiting[:-1]] == list(range(1, 50))


def test_what_is_no_call_fails_and_nothing_is_left_in_celerys_queue(
    calc: Any, client: Celery, qserve_instance: TestInstance
) -> None:
    queue = f"{qserve_instance.settings.keys.celery_prefix}qserve"
    pickled = send(client, "calc", "add", [1], serializer="pickle")
    sent.append(client.send_task("os.system", args=["true"]))
    with Redis.from_url(qserve_instance.settings.redis_url) as redis:
        nameless = {"headers": {"id": "\ud800", "task": "qserve.call"}, "properties": {}, "body": "[[], {}, {}]"}
        nameless |= {"content-type": "application/json", "content-encoding": "utf-8"}
        redis.lpush(queue, b"no message", b"[]", b'{"headers": 1}', b"\xff", json.dumps(nameless))

        assert send(client, "calc", "add", [1], ignore_result=True).id
        assert send(client, "calc", "add", [2]).get(patience(LIMIT_S)) == 3
        with pytest.raises(Exception, match="untrusted content"):
            pickled.get(patience(LIMIT_S))
        with pytest.raises(NotRegistered, match=r"os\.system"):
            sent[1].get(patience(LIMIT_S))
        wait_until(lambda: not redis.exists(queue))


def test_messages_of_every_priority_are_read_the_most_urgent_first(
    calc: Any, client: Celery, qserve_instance: TestInstance, notes: Notes
) -> None:
    with Redis.from_url(qserve_instance.settings.redis_url) as redis:
        lease = f"{qserve_instance.settings.keys.celery_prefix}qserve.reader"
        redis.set(lease, "nobody")
        tasks = [send(client, "calc", "add", [priority], priority=priority) for priority in (9, 6, 0, 3)]
        redis.delete(lease)
        assert [task.get(patience(LIMIT_S)) for task in tasks] == [10, 7, 1, 4]
    assert notes.read() == ["1", "4", "7", "10"]


@pytest.mark.parametrize("over", ["its time", "its deployment"])
def test_a_message_that_is_read_again_later_changes_nothing_of_its_call(
    settings: Settings, state: State, over: str
) -> None:
    """As one is whose reader died, or was cut off from Redis, before it was taken off the list."""
    desk = Desk(settings.model_copy(update={"celery_calls": True}))
    generation = state.deploy(DeploymentSpec(name="x", target=Target("m:x"), revision="r"), expected=0).generation
    headers: dict[str, Any] = {"id": "t", "task": "qserve.call"}
    desk.take(headers, [["x", "", [1]], {}, {}])
    told = f"{settings.keys.celery_prefix}celery-task-meta-t"
    state.redis.set(told, "the end of the call")

    if over == "its time":
        headers["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    else:
        state.delete("x", expected=generation)
    desk.take(headers, [["x", "", [1]], {}, {}])

    assert state.redis.get(told) == b"the end of the call"
    desk.close()


@pytest.mark.parametrize(("allowed", "status"), [(None, "FAILURE"), (False, "FAILURE"), (True, None)])
def test_where_calls_are_signed_celery_clients_have_to_be_allowed(
    settings: Settings, state: State, allowed: bool | None, status: str | None
) -> None:
    desk = Desk(settings.model_copy(update={"celery_calls": allowed}))
    state.deploy(DeploymentSpec(name="x", target=Target("m:x"), revision="r"), expected=0)

    desk.take({"id": "t", "task": "qserve.call"}, [["x", "", [1]], {}, {}])

    told: Any = state.redis.get(f"{settings.keys.celery_prefix}celery-task-meta-t")
    assert state.observed.queued("x") == (1 if allowed else 0)
    assert (json.loads(told)["status"] if told else None) == status
    assert told is None or "QSERVE_CELERY_CALLS=1" in told.decode()
