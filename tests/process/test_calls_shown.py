"""What operators are shown of calls, and what they do to calls and deployments while others change them."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from click.testing import CliRunner, Result

from qserve.applications.serve_status import serve_status
from qserve.broker.history.call_index import ABOVE_ALL, Entry
from qserve.broker.history.troubles import Trouble, note_troubles
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.cli.command_line import main
from qserve.durable.dead_letters import DeadLetters
from qserve.errors import BrokerUnavailable, CallNotFound, DeploymentNotFound
from qserve.operating import controls
from qserve.operating.call_contents import contents_of
from qserve.operating.call_search import CallFilter, find_call, find_calls
from qserve.settings import Settings
from qserve.wire.autoscaling import Autoscaling
from qserve.wire.call_record import DurableCall, Part, Terms, new_call_id
from qserve.wire.codec import Codec
from qserve.wire.messages import (
    ERROR,
    HTTP,
    HTTP_RESPONSE,
    PYTHON,
    VALUE,
    ErrorInfo,
    HttpRequest,
    HttpResponse,
    Reply,
    Signer,
    encode,
)
from qserve.wire.spec import Deployed, DeploymentSpec, NodeInfo, WorkerInfo
from tests.support.calling import deploy

CODEC = Codec(allow_pickle=True, max_bytes=1_000_000)
CANNOT = "cannot be shown: "


class Record:
    """The record of a durable call, written as the scripts write it."""

    def __init__(self, at: State, **fields: Any) -> None:
        self.state, self.id = at, new_call_id(at.keys.of("Echo").shard)
        given = {"state": "done", "deployment": "Echo", "kind": PYTHON, "attempts": 1, "submitted": 1000}
        self.put(**given | fields)

    def put(self, **fields: Any) -> None:
        mapping: Any = fields
        self.state.redis.hset(self.state.keys.call(self.id), mapping=mapping)

    def sealed(self, kind: int, payload: bytes, *, out_of_line: bool = False) -> bytes:
        return self.state.signer.seal(encode(Reply(self.id, "", kind, payload, out_of_line=out_of_line)))

    def shown(self, *hidden: str) -> Any:
        return contents_of(self.state, find_call(self.state, self.id), hidden)


class Opaque:
    """Comes only as a pickle."""


def test_what_a_call_returned_is_shown_whatever_it_is(state: State) -> None:
    record = Record(state)
    assert record.shown() == (None, None, "", None, [])
    for kind, payload, result, error in (
        (VALUE, CODEC.pack([1, {"a": "b"}]), [1, {"a": "b"}], ""),
        (HTTP_RESPONSE, encode(HttpResponse(201, [], b"made")), {"status": 201, "body": "made"}, ""),
        (ERROR, encode(ErrorInfo("", "KeyError", "builtins", "'x'")), None, "KeyError: 'x'"),
    ):
        record.put(result=record.sealed(kind, payload))
        assert record.shown()[1:3] == (result, error)


def test_what_cannot_be_shown_says_so_and_runs_no_code(state: State) -> None:
    record = Record(state, result=b"not ours", progress=b"not ours", frame=b"not ours")
    shown = record.shown()
    assert shown.result.startswith(CANNOT)
    assert shown.progress.startswith(CANNOT)
    assert "contents" in shown.arguments
    record.put(result=record.sealed(VALUE, CODEC.pack(Opaque())))
    assert record.shown().result.startswith(CANNOT)
    record.put(result=record.sealed(VALUE, b"", out_of_line=True))
    assert record.shown().result == "the result is not kept any more"


def test_arguments_progress_and_parts_are_shown(state: State, signer: Signer) -> None:
    record = Record(state, state="running", part=3)
    payload = CODEC.pack_call(({(1, 2): 3},), {"key": "k"})
    call = DurableCall(record.id, "Echo", "", 1000, PYTHON, "", True, payload, terms=Terms())
    record.put(frame=signer.seal(encode(call)), progress=record.sealed(VALUE, CODEC.pack(0.5)))
    parts = [Part(1, 1, True, CODEC.pack("a")), Part(1, 2, False, b"raw")]
    frames = [record.sealed(VALUE, encode(part)) for part in parts]
    for number, frame in enumerate([*frames, b"not ours"], 1):
        state.redis.xadd(state.keys.parts(record.id), {"d": frame}, id=f"1-{number}")

    shown = record.shown("key")

    assert shown.arguments == {"args": "({(1, 2): 3},)", "kwargs": {"key": "(hidden)"}}
    assert shown.progress == 0.5
    assert shown.parts[:2] == ["a", "raw"]
    assert shown.parts[2].startswith(CANNOT)


def test_text_that_no_terminal_and_no_browser_takes_is_spelled_out(
    state: State, signer: Signer, calls: Callable[..., Result]
) -> None:
    """The names of some files have half a surrogate pair in them."""
    record = Record(state)
    payload = CODEC.pack_call(("caf\udce9",), {"key": {"name": "caf\udce9"}})
    call = DurableCall(record.id, "Echo", "", 1000, PYTHON, "", True, payload, terms=Terms())
    record.put(frame=signer.seal(encode(call)), result=record.sealed(VALUE, CODEC.pack("caf\udce9")))

    assert record.shown().arguments == {"args": "('caf\\udce9',)", "kwargs": "{'key': {'name': 'caf\\udce9'}}"}
    msgspec.json.encode(record.shown())
    for words in (["show"], ["show", "--json"]):
        shown = calls(*words, record.id)
        assert (shown.exit_code, "udce9" in shown.output) == (0, True)


@pytest.mark.parametrize("before", [0, 3_900], ids=["whole", "cut"])
def test_hidden_fields_are_hidden_in_long_values_too(state: State, before: int) -> None:
    secret = 'x"SECRET ' * 20
    value = {"first": "-" * before, "token": secret, "tokens": ["SECRET"], "last": "-" * 4_000}
    record = Record(state)
    record.put(result=record.sealed(VALUE, CODEC.pack(value)))
    assert "SECRET" in str(record.shown().result)
    assert "SECRET" not in str(record.shown("token").result)
    for body in (json.dumps(value), json.dumps({"token": 'x"SECRET'}), json.dumps({"token": 12345})):
        record.put(result=record.sealed(HTTP_RESPONSE, encode(HttpResponse(200, [], body.encode()))))
        shown = record.shown("token").result["body"]
        assert '"token": "(hidden)"' in shown
        assert 'x\\"SECRET' not in shown
        assert "12345" not in shown


@pytest.mark.parametrize(
    "body",
    [
        b"first=1&password=SECRET&last=2",
        b'--x\r\nContent-Disposition: form-data; name="password"\r\nContent-Type: a/b\r\n\r\nSECRET\r\n--x--\r\n',
        b'--x\nContent-Disposition: form-data; name="password"\n\nSECRET\nSECRET',  # cut
    ],
    ids=["form", "parts", "cut"],
)
def test_hidden_fields_of_queries_and_forms_are_hidden(state: State, signer: Signer, body: bytes) -> None:
    query = b"token=SECRET&page=7&api%5Fkey=SECRET&access_token=SECRET"
    request = HttpRequest("POST", "/Echo", b"/Echo", query, [], "", "http", None, None, "1.1", "r", body)
    record = Record(state, state="queued")
    call = DurableCall(record.id, "Echo", "", 1000, HTTP, "", True, encode(request), terms=Terms())
    record.put(frame=signer.seal(encode(call)))
    assert str(record.shown().arguments).count("SECRET") > 3
    shown = record.shown("password", "token", "api_key").arguments
    assert "SECRET" not in str(shown)
    assert shown["request"] == "POST /Echo?token=(hidden)&page=7&api%5Fkey=(hidden)&access_token=(hidden)"
    assert ("last=2" in shown["body"]) == (b"last" in body)


# What is done to them


def test_a_change_that_meets_another_one_is_made_on_top_of_it(
    state: State, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = deploy(settings)
    state.deploy(
        msgspec.structs.replace(spec, revision="r2"),
        expected=state.generation("Echo"),
        former=state.get("Echo"),
    )
    put, others = state.deploy, [7]

    def deploy_late(*args: Any, **kwargs: Any) -> Any:
        if others:
            current = present()
            changed = msgspec.structs.replace(current.spec, max_queued_requests=others.pop())
            put(changed, expected=current.generation)
        return put(*args, **kwargs)

    def present() -> Deployed:
        found = state.get("Echo")
        assert found is not None
        return found

    monkeypatch.setattr(state, "deploy", deploy_late)
    controls.scale(state, "Echo", 3)
    assert (present().spec.num_replicas, present().spec.max_queued_requests) == (3, 7)
    others.append(8)
    controls.roll_back(state, "Echo")
    assert present().spec == spec
    controls.roll_back(state, "Echo")
    assert (present().spec.num_replicas, present().spec.max_queued_requests) == (3, 8)


def test_a_roll_back_says_what_it_could_not_compare_and_does_nothing_where_files_are_others(
    state: State, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "shop.py"
    file.write_text("good")
    spec = deploy(settings)
    known = msgspec.structs.replace(spec, sources=((str(file), hashlib.sha256(b"good").hexdigest()[:16]),))

    def deploy_over(former: DeploymentSpec) -> Deployed:
        changed = msgspec.structs.replace(spec, revision="newer")
        return state.deploy(changed, expected=state.generation("Echo"), former=Deployed(former, 1))

    deploy_over(spec)
    assert "cannot be done from here: replicas import" in controls.roll_back(state, "Echo").caveat
    deploy_over(known)
    assert controls.roll_back(state, "Echo").caveat == ""
    deploy_over(known)
    put_node(state, "n1")
    assert "Replicas on host-n1 import the files there" in controls.roll_back(state, "Echo").caveat
    file.write_text("worse")
    newer = deploy_over(known)
    with pytest.raises(ValueError, match=r"these have changed: \S+shop\.py\. Nothing was done"):
        controls.roll_back(state, "Echo")
    assert state.generation("Echo") == newer.generation
    state.deploy(known, expected=newer.generation, former=Deployed(known, 1))
    assert f"Its replicas stay, but others that start will import what is in the files now: {file} changed" in (
        controls.roll_back(state, "Echo").caveat
    )


def test_what_is_changed_is_a_new_generation_and_what_holds_already_is_none(state: State, settings: Settings) -> None:
    spec = deploy(settings)
    before = state.generation("Echo")
    assert controls.scale(state, "Echo", spec.num_replicas) is None
    assert state.generation("Echo") == before
    assert controls.set_bound(state, "Echo", 7) is not None
    found = state.get("Echo")
    assert found is not None
    assert (found.generation, found.spec.max_queued_requests) == (before + 1, 7)
    with pytest.raises(ValueError, match="'Echo' does not follow the load: give it one number"):
        controls.scale_between(state, "Echo", 1, 2)


def put_node(state: State, id_: str, **fields: Any) -> None:
    """A node that lives, as it describes itself."""
    state.redis.hset(state.keys.nodes, id_, encode(NodeInfo(id=id_, host=f"host-{id_}", pid=1, **fields)))
    for each in {state.keys, *state.keys.all()}:
        state.redis.set(each.alive(id_), 1)


def test_a_number_that_no_node_follows_is_refused(state: State, settings: Settings) -> None:
    deploy(settings)
    generation = state.generation("Echo")
    put_node(state, "n1", replicas_per_node=2)
    put_node(state, "n2", replicas_per_node=1)
    put_node(state, "n3", only=("Other",))
    with pytest.raises(
        ValueError, match=r"does not get 5 replicas by this: .* \(1 on host-n2, 2 on host-n1\)\. Nothing"
    ):
        controls.scale(state, "Echo", 5)
    assert state.generation("Echo") == generation
    put_node(state, "n4")
    assert controls.scale(state, "Echo", 5) is not None


def test_bounds_that_hold_already_change_nothing(state: State, settings: Settings) -> None:
    spec = msgspec.structs.replace(deploy(settings), autoscaling=Autoscaling(min_replicas=1, max_replicas=4))
    state.deploy(spec, expected=state.generation("Echo"))
    generation = state.generation("Echo")
    assert controls.scale_between(state, "Echo", 1, None).max_replicas == 4
    assert controls.set_bound(state, "Echo", spec.max_queued_requests) is None
    assert state.generation("Echo") == generation
    with pytest.raises(ValueError, match="follows the load, from 1 to 4"):
        controls.scale(state, "Echo", 2)
    with pytest.raises(ValueError, match="min_replicas"):
        controls.scale_between(state, "Echo", 5, None)


@pytest.mark.parametrize(
    "act",
    [
        lambda state: controls.pause(state, "Echo", ""),
        lambda state: controls.resume(state, "Echo"),
        lambda state: controls.scale(state, "Echo", 2),
        lambda state: controls.send_again(state, find_call(state, Record(state, state="failed", again=b"x").id), 1000),
    ],
    ids=["pause", "resume", "scale", "send_again"],
)
def test_what_does_not_exist_is_said(state: State, act: Callable[[State], object]) -> None:
    with pytest.raises(DeploymentNotFound, match="no deployment 'Echo': `qserve status`"):
        act(state)


def test_only_calls_that_failed_run_again_and_only_replicas_that_live_are_told(
    state: State, settings: Settings
) -> None:
    deploy(settings)
    with pytest.raises(CallNotFound, match="cannot run again, it is done"):
        controls.send_again(state, find_call(state, Record(state).id), 1000)
    with pytest.raises(CallNotFound, match="its arguments are not kept"):
        controls.send_again(state, find_call(state, Record(state, state="failed").id), 1000)
    with pytest.raises(ValueError, match="no version of 'Echo' before"):
        controls.roll_back(state, "Echo")
    assert not controls.stop_replica(state, "gone")
    keys = state.keys.of("Echo")
    state.redis.set(keys.alive("here"), 1)
    assert controls.dump_stacks(state, "here")
    assert state.redis.xlen(keys.inbox("here")) == 1


# The commands


@pytest.fixture
def qs(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `qserve` against the instance of the test's Redis."""
    monkeypatch.setenv("QSERVE_REDIS_URL", settings.redis_url)
    monkeypatch.setenv("QSERVE_NAMESPACE", settings.namespace)
    monkeypatch.setenv("QSERVE_SECRET", settings.secret)
    return lambda *words: CliRunner().invoke(main, list(words))


@pytest.fixture
def calls(qs: Callable[..., Result]) -> Callable[..., Result]:
    """Run `qserve calls` against it."""
    return lambda *words: qs("calls", *words)


def test_a_name_that_is_misspelled_is_told_where_nothing_is_found(
    qs: Callable[..., Result], settings: Settings
) -> None:
    deploy(settings)
    for words in (["calls", "ls"], ["calls", "ls", "--troubled"], ["calls", "retry", "--all"], ["dead", "ls"]):
        assert "There is no deployment 'Eco'. Did you mean 'Echo'?" in qs(*words, "Eco").output
        assert "Did you mean" not in qs(*words, "Echo").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["call", "Echo", "--timeout", "0"], "0.0 is not in the range"),
        (["call", "Echo", "--timeout", "1e9"], "1000000000.0 is not in the range"),
        (["call", "Echo", "[" * 50_000], "is nested too deep"),
        (["schedule", "put", "tick", "every 30s", "Echo", "hello"], "The argument 'hello' is no JSON"),
        (["schedule", "put", "tick", "every 30s", "Echo", "[" * 50_000], "is no JSON"),
        (["schedule", "put", "tick", "every 30s", "Echo", "--expires", "1e9"], "is not in the range"),
        (["calls", "ls", "--troubled", "--state", "failed"], "--troubled takes neither --state nor --key"),
        (["calls", "ls", "--troubled", "--key", "k"], "--troubled takes neither --state nor --key"),
    ],
)
def test_what_cannot_be_asked_for_is_a_usage_error(
    qs: Callable[..., Result], settings: Settings, words: list[str], said: str
) -> None:
    deploy(settings)
    result = qs(*words)
    assert (result.exit_code, said in result.output) == (2, True), result.output


def test_dead_letters_that_are_not_there_or_stay_are_told(
    qs: Callable[..., Result], state: State, settings: Settings
) -> None:
    deploy(settings)
    for action in ("retry", "drop"):
        assert "There is no deployment 'Eco'. Did you mean 'Echo'?" in qs("dead", action, "--all", "Eco").output
        assert "There are no dead letters of Echo." in qs("dead", action, "--all", "Echo").output
    state.redis.xadd(state.keys.dead_letters("Echo"), {"d": b"not ours"})
    result = qs("dead", "retry", "--all", "Echo")
    assert (result.exit_code, "1 of 1 dead letters were left as they are." in result.output) == (1, True)


def test_shutdown_is_taken_in_the_form_of_ray_serve(qs: Callable[..., Result], settings: Settings) -> None:
    for yes in ("-y", "--yes"):
        deploy(settings)
        assert "Echo: deleted" in qs("shutdown", yes).output


def test_a_number_of_replicas_is_claimed_only_where_they_are(
    qs: Callable[..., Result], state: State, settings: Settings
) -> None:
    deploy(settings)
    said = qs("scale", "Echo", "3").output
    assert "Echo is to have 3 replicas. Nothing runs it at the moment." in said
    put_node(state, "n1", replicas_per_node=2)
    worker = WorkerInfo(id="n1", node="n1", host="h", pid=1, generation=9, state="HEALTHY", wanted=2, ready=2)
    state.redis.hset(state.keys.of("Echo").workers("Echo"), "n1", encode(worker))
    refused = qs("scale", "Echo", "5")
    assert refused.exit_code == 1
    assert "'Echo' does not get 5 replicas by this" in refused.output
    put_node(state, "n2", only=("Echo",))
    state.redis.hset(
        state.keys.of("Echo").workers("Echo"), "n2", encode(msgspec.structs.replace(worker, id="n2", node="n2"))
    )
    assert "Echo has 4 replicas in all: nodes of `qserve start` keep to" in qs("scale", "Echo", "5").output


def test_why_replicas_are_missing_is_shown_though_the_deploy_went_well(
    qs: Callable[..., Result], state: State, settings: Settings
) -> None:
    """One that has died, and whose successors cannot be constructed any more."""
    deploy(settings)
    put_node(state, "n1")
    name = state.keys.of("Echo").workers("Echo")
    worker = WorkerInfo(
        id="n1", node="n1", host="h", pid=1, generation=1, state="DEPLOYING", wanted=1, ready=0, error="no licence left"
    )
    state.redis.hset(name, "n1", encode(worker))

    assert "Echo: no licence left" in qs("status").output
    assert serve_status(state)["Echo"].error == "no licence left"

    state.redis.hset(name, "n1", encode(msgspec.structs.replace(worker, state="HEALTHY", ready=1)))
    assert "no licence left" not in qs("status").output
    state.redis.hset(name, "n2", encode(msgspec.structs.replace(worker, id="n2", node="n2")))  # a node that has died
    assert "no licence left" not in qs("status").output


def test_troubled_calls_are_listed_with_what_is_known_of_each(
    calls: Callable[..., Result], redis_client: "redis.Redis", keys: Keys, settings: Settings
) -> None:
    assert "There are no such calls." in calls("ls", "--troubled").output
    deploy(settings)
    note_troubles(redis_client, keys, "Echo", [Trouble("slow", "c1", "req", "run", ran_ms=1500.0)])
    note_troubles(redis_client, keys, "Echo", [Trouble("failed", "c2", times=3, error="KeyError: 'x'")])
    note_troubles(redis_client, keys, "Echo", [Trouble("died", replica="Echo#1", error="killed")])
    text = calls("ls", "--troubled", "Echo").output
    assert "slow  1500 ms  Echo.run  req" in text
    assert "failed x3  Echo.__call__  c2  KeyError: 'x'" in text
    assert "died  Echo  Echo#1  killed" in text
    (line,) = calls("ls", "--troubled", "--json", "--error", "keyerror", "--since", "1h").output.splitlines()
    assert json.loads(line)["times"] == 3
    assert "slow" in calls("ls", "--troubled", "--method", "run").output
    assert calls("ls", "--troubled", "--method", "__call__").output.count("\n") == 1
    assert "There are no such calls." in calls("ls", "--troubled", "--method", "walk").output
    assert len(calls("ls", "--troubled", "--limit", "2").output.splitlines()) == 2


@pytest.mark.parametrize("age", ["5", "m", "5y", "nans", "infd", "-5m", "1e3s", "1.5.2h"])
def test_what_is_no_age_is_refused(calls: Callable[..., Result], age: str) -> None:
    result = calls("ls", f"--since={age}")
    assert result.exit_code == 2
    assert "is no age: write 30s, 5m, 2h or 3d" in result.output


def test_a_list_that_is_longer_says_so(calls: Callable[..., Result], state: State, settings: Settings) -> None:
    deploy(settings)
    for number in range(3):
        record = Record(state, error="KeyError: 'x'", ended=2000)
        state.redis.zadd(state.keys.index("Echo", "done"), {record.id: time.time() * 1000 + number})
    assert "There are more: --limit 4" in calls("ls", "--limit", "2").output
    assert len(calls("ls", "--json", "--since", "1.5h").output.splitlines()) == 3


def test_no_call_is_left_out_of_a_list_because_others_entered_at_the_same_moment(
    calls: Callable[..., Result], state: State, settings: Settings
) -> None:
    deploy(settings)
    moments = [1_700_000_000_000 + number // 450 for number in range(900)]
    records = {Record(state, state="failed", ended=moment).id: moment for moment in moments}
    state.redis.zadd(state.keys.index("Echo", "failed"), dict(records))  # more of a moment than are read at once
    ids = [json.loads(line)["id"] for line in calls("ls", "--json", "--limit", "1000").output.splitlines()]
    assert ids == sorted(records, key=lambda each: (records[each], each), reverse=True)
    paged = list[str]()
    before: Entry | None = ABOVE_ALL
    while before is not None:
        found = find_calls(state, CallFilter(("failed", "failed"), "Echo", before=before), 70)
        paged += [call.id for _, call in found.calls]
        before = found.next_before
    assert paged == ids


def test_all_means_all_however_many_have_failed(calls: Callable[..., Result], state: State, settings: Settings) -> None:
    deploy(settings)
    pipeline = state.redis.pipeline(transaction=False)
    made = [new_call_id(state.keys.of("Echo").shard) for _ in range(2_100)]
    for number, each in enumerate(made):
        pipeline.hset(state.keys.call(each), mapping={"state": "failed", "deployment": "Echo", "kind": PYTHON})
        pipeline.zadd(state.keys.index("Echo", "failed"), {each: 1_700_000_000_000 + number // 7})
    pipeline.execute()
    assert sorted(call.id for call in controls.failed_calls(state, "Echo")) == sorted(made)


def test_where_redis_is_away_no_further_call_is_tried(
    qs: Callable[..., Result], state: State, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(settings)
    tried = []

    def away(*given: Any) -> str:
        tried.append(given)
        raise BrokerUnavailable("Redis cannot be reached")

    monkeypatch.setattr(controls, "send_again", away)
    monkeypatch.setattr(DeadLetters, "retry", away)
    for words in (["calls", "retry", Record(state).id, Record(state).id], ["dead", "retry", "--all", "Echo"]):
        for _ in range(2):
            state.redis.xadd(state.keys.dead_letters("Echo"), {"d": b"not ours"})
        result = qs(*words)
        assert (result.exit_code, "Redis cannot be reached" in result.output) == (1, True)
    assert len(tried) == 2


def test_several_calls_are_tried_each_and_the_failures_counted(
    calls: Callable[..., Result], state: State, settings: Settings
) -> None:
    deploy(settings)
    done = Record(state)
    result = calls("retry", done.id, "nonsense")
    assert result.exit_code == 1
    assert f"{done.id}: call {done.id} cannot run again, it is done" in result.output
    assert "nonsense: there is no durable call 'nonsense'" in result.output
    assert "2 of 2 calls were left as they are." in result.output
    assert "There are no such calls." in calls("retry", "--all", "Echo").output
    assert calls("cancel", done.id).output.strip() == f"{done.id}: ended"
    child = Record(state, parent=done.id)
    state.redis.hset(state.keys.call(done.id), mapping={"children": 2, "c1": child.id, "c2": "d" + "0" * 32})
    shown = calls("show", done.id).output
    assert f"> {done.id}  done" in shown
    assert f"    {child.id}  done" in shown
    family = json.loads(calls("show", "--json", done.id).output)["family"]
    assert [each["id"] for each in family][:2] == [done.id, child.id]
