"""The console over HTTP: who may look, who may act, what pages say, and what becomes of nonsense."""

import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from qserve import serve
from qserve.broker.instance.state import State
from qserve.broker.server import redis_clients
from qserve.testing import TestInstance
from qserve.wire.messages import Signer
from tests.instance.console.served import EVIL, OPERATOR, PAGES, VIEWER, act, console_of, visitor
from tests.support.chosen_server import needs_one_server
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until


@pytest.fixture
def operator(console: str) -> Iterator[httpx.Client]:
    with visitor(console, OPERATOR) as client:
        yield client


@pytest.fixture
def viewer(console: str) -> Iterator[httpx.Client]:
    with visitor(console, VIEWER) as client:
        yield client


def test_strangers_see_the_way_in_and_nothing_else(console: str) -> None:
    with visitor(console) as stranger:
        for path in (*PAGES, "/deployments/shop", "/calls/x", "/live?of=/", "/act", "/nothing"):
            answer = stranger.get(path)
            assert answer.status_code == 401
            assert not any(word in answer.text for word in ("Cluster", "replicas", "Set bound"))
        assert stranger.post("/act", data={"action": "pause", "about": "shop"}).status_code == 401


def test_a_wrong_token_opens_nothing(console: str) -> None:
    with visitor(console) as stranger:
        answer = stranger.post("/login", data={"token": "wrong"})
        assert (answer.status_code, stranger.cookies) == (401, httpx.Cookies())
        stranger.cookies.set("qserve_console", f"operator.{int(time.time()) + 999}.x.{'0' * 64}")
        assert stranger.get("").status_code == 401
        for broken in ("x", "a.b.c", "operator.1.x.\u00e9", "...."):
            assert stranger.get("", headers=[(b"cookie", f"qserve_console={broken}".encode())]).status_code == 401


def test_the_cookie_is_for_this_site_and_not_for_scripts(console: str) -> None:
    with visitor(console) as client:
        cookie = client.post("/login", data={"token": VIEWER}).headers["set-cookie"].lower()
    assert {"httponly", "samesite=strict", "path=/-/console"} <= {part.strip() for part in cookie.split(";")}
    assert VIEWER not in cookie


def test_every_page_shows_and_is_safe_to_show(shop: Any, operator: httpx.Client) -> None:
    for path in (*PAGES, "/deployments/shop"):
        answer = operator.get(path)
        assert answer.status_code == 200, answer.text
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["cache-control"] == "no-store"
        assert re.findall(r"<script(?![^>]* src=)|<[^>]*\s(?:on\w+|style)=|javascript:", answer.text) == []
        assert OPERATOR not in answer.text
        assert re.findall(r'(?:src|action)="https?://[^"/]+', answer.text) == []


def test_a_call_is_found_and_shown(shop: Any, operator: httpx.Client, viewer: httpx.Client) -> None:
    failed = shop.remote(f"bad {EVIL}", password="hunter2")
    with pytest.raises(ValueError, match="bad"):
        failed.result(patience(LIMIT_S))
    done = shop.remote("good")
    done.result(patience(LIMIT_S))

    page = operator.get("/calls", params={"deployment": "shop", "state": "failed", "error": "BAD"}).text
    assert failed.id in page
    assert done.id not in page
    page = operator.get("/calls/go", params={"id": f" {failed.id} "}).text  # as the form does without JavaScript
    assert "raise ValueError" in page
    page = operator.get(f"/calls/{failed.id}").text
    assert "raise ValueError" in page
    assert "runs, attempt 1" in page
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert "hunter2" not in page
    assert "(hidden)" in page
    assert "&lt;b&gt;good&lt;/b&gt;" in operator.get(f"/calls/{done.id}").text
    for path in (f"/calls/{failed.id}", f"/calls/{done.id}"):
        seen = viewer.get(path).text
        assert "shown to operators only" in seen
        assert not any(word in seen for word in ("hunter2", "raise ValueError", "good"))


def test_progress_is_shown_to_operators(shop: Any, operator: httpx.Client, viewer: httpx.Client) -> None:
    ref = shop.remote("far")
    ref.result(patience(LIMIT_S))
    assert "&#34;done&#34;: 41" in operator.get(f"/calls/{ref.id}").text
    assert "Progress" not in viewer.get(f"/calls/{ref.id}").text


def test_a_call_shows_its_family_and_its_parts(shop: Any, operator: httpx.Client, viewer: httpx.Client) -> None:
    @serve.deployment(name="trunk")
    async def trunk(word: str) -> AsyncIterator[str]:
        handle = serve.get_deployment("shop").get_handle(sync=False).options(durable=True)
        yield word + (await handle.remote(word)).id

    trunk.deploy()
    ref = trunk.get_handle().options(durable=True).remote(EVIL)
    [made] = [part.removeprefix(EVIL) for part in ref]
    page = operator.get(f"/calls/{ref.id}").text
    assert f'href="/-/console/calls/{made}"' in page
    assert "<h2>Parts" in page
    assert EVIL not in page
    assert f'href="/-/console/calls/{ref.id}"' in operator.get(f"/calls/{made}").text
    page = viewer.get(f"/calls/{ref.id}").text
    assert f'href="/-/console/calls/{made}"' in page
    assert "<h2>Parts" not in page
    trunk.delete()


def test_a_call_is_found_by_its_idempotency_key(
    running: TestInstance, operator: httpx.Client, viewer: httpx.Client
) -> None:
    @serve.deployment(name="paid", route_prefix="/paid")
    def paid() -> str:
        return "paid"

    paid.deploy()
    headers = {"Idempotency-Key": f"order {EVIL}"}
    assert httpx.post(f"{running.url}/paid", headers=headers, timeout=patience(LIMIT_S)).text == "paid"
    page = operator.get("/calls", params={"key": f"order {EVIL}"}).text
    [call_id] = re.findall(r'name="id" value="(d[0-9a-f]{32})"', page)
    assert EVIL not in page
    shown = operator.get(f"/calls/{call_id}").text
    assert "order &lt;script&gt;" in shown
    assert EVIL not in shown
    assert "order" not in viewer.get(f"/calls/{call_id}").text
    paid.delete()


def test_operators_act_and_the_audit_says_so(shop: Any, operator: httpx.Client) -> None:
    for action in ("pause", "resume"):
        answer = act(operator, action, "shop")
        assert answer.status_code == 200
        assert "shop" in answer.text
    assert "is to have 2 replicas" in act(operator, "scale", "shop", replicas="2").text
    wait_until(lambda: "2<span" in operator.get("").text)
    assert "77 calls at most" in act(operator, "bound", "shop", bound="77").text
    answer = act(operator, "call", "shop", args='["word"]', kwargs='{"password": "x"}')
    call_id = answer.url.path.rsplit("/", 1)[-1]
    assert serve.get_ref(call_id).result(patience(LIMIT_S)) == "<b>word</b>"
    failed = shop.remote("bad")
    with pytest.raises(ValueError, match="bad"):
        failed.result(patience(LIMIT_S))
    assert "1 call sent again." in act(operator, "retry", id=failed.id).text
    act(operator, "pause", "shop")
    queued = shop.remote("waits")
    wait_until(lambda: "waits in the queue" in operator.get(f"/calls/{queued.id}").text)
    act(operator, "resume", "shop")
    waiting = serve.get_deployment("shop").get_handle().options(durable=True, delay=3600).remote()
    assert "1 call cancelled." in act(operator, "cancel", id=waiting.id).text
    audit = operator.get("/audit").text
    for action in ("pause", "resume", "scale", "bound", "call", "retry", "cancel"):
        assert f"<b>{action}</b>" in audit
    assert "operator from 127.0.0.1" in audit


def test_calls_that_cannot_be_changed_are_counted_and_keep_no_other_from_it(shop: Any, operator: httpx.Client) -> None:
    @serve.deployment(name="gone", route_prefix=None)
    def gone() -> None:
        raise ValueError("bad")

    gone.deploy()
    refs = [shop.remote("bad"), gone.get_handle().options(durable=True).remote(), shop.remote("bad")]
    for ref in refs:
        with pytest.raises(ValueError, match="bad"):
            ref.result(patience(LIMIT_S))
    gone.delete()
    retried = act(operator, "retry", id=[ref.id for ref in refs]).text
    assert "2 calls sent again. 1 left as they are: there is no deployment" in retried
    wait_until(lambda: all(serve.get_ref(ref.id).status().attempts == 2 for ref in (refs[0], refs[2])))
    done = shop.remote("word")
    done.result(patience(LIMIT_S))
    cancelled = act(operator, "cancel", id=done.id)
    assert cancelled.status_code == 409
    assert f"call {done.id} has ended already" in cancelled.text


def test_all_that_match_are_those_that_the_page_shows(shop: Any, running: TestInstance, operator: httpx.Client) -> None:
    refs = [shop.remote(f"bad {word}") for word in ("old", "young")]
    for ref in refs:
        with pytest.raises(ValueError, match="bad"):
            ref.result(patience(LIMIT_S))
    settings = running.settings
    with closing(State(settings.redis_url, settings.keys, Signer(settings.secrets))) as state:
        long_ago = (time.time() - 7200) * 1000
        state.redis.zadd(state.keys.index("shop", "failed"), {refs[0].id: long_ago})
    chosen = {"filter-deployment": "shop", "filter-state": "failed", "filter-since": "1h"}
    page = operator.get("/calls", params={name.removeprefix("filter-"): value for name, value in chosen.items()}).text
    assert all(f'name="{name}" value="{value}"' in page for name, value in chosen.items())
    count = len(re.findall(r'name="id" value="(d[0-9a-f]{32})"', page))
    assert refs[0].id not in page
    assert refs[1].id in page
    assert act(operator, "retry-matching", **chosen | {"filter-since": "ever"}).status_code == 409
    assert f"{count} call" in act(operator, "retry-matching", **chosen).text
    wait_until(lambda: serve.get_ref(refs[1].id).status().attempts == 2)
    assert serve.get_ref(refs[0].id).status().attempts == 1


def test_dead_letters_are_grouped_sent_again_and_dropped(shop: Any, operator: httpx.Client) -> None:
    act(operator, "drop-letters", "shop")
    handle = serve.get_deployment("shop").get_handle().options(durable=True, retries=1, backoff=0.01)
    refs = [handle.remote(f"bad {number}") for number in range(3)]
    for ref in refs:
        with pytest.raises(ValueError, match="bad"):
            ref.result(patience(LIMIT_S))
    page = operator.get("/dead", params={"deployment": "shop"}).text
    assert "ValueError: bad #" in page
    letters = re.findall(r'name="id" value="([\d-]+)"', page)
    assert len(letters) >= 3
    assert "1 dead letter sent again." in act(operator, "retry-letters", "shop", id=letters[0]).text
    assert "dropped" in act(operator, "drop-letters", "shop", id=letters[1:3]).text
    assert "Nothing was done" in act(operator, "drop-letters", "shop", id=letters[1]).text


def test_a_schedule_is_run_now_and_removed(shop: Any, operator: httpx.Client) -> None:
    serve.schedule("nightly", "every 1h", serve.get_deployment("shop").get_handle(), "now")
    assert "nightly" in operator.get("/schedules").text
    assert "is paused" in act(operator, "pause-schedule", "nightly").text
    assert "by operator from 127.0.0.1" in operator.get("/schedules").text
    assert "submits calls again" in act(operator, "resume-schedule", "nightly").text
    assert "by operator from" not in operator.get("/schedules").text
    answer = act(operator, "run-schedule", "nightly")
    ref = serve.get_ref(answer.url.path.rsplit("/", 1)[-1])
    assert ref.result(patience(LIMIT_S)) == "<b>now</b>"
    assert "is removed" in act(operator, "remove-schedule", "nightly").text
    for action in ("run-schedule", "pause-schedule", "resume-schedule"):
        assert act(operator, action, "nightly").status_code == 409


def test_what_a_schedule_has_submitted_is_linked(shop: Any, running: TestInstance, operator: httpx.Client) -> None:
    serve.schedule("ticking", "every 1s", serve.get_deployment("shop").get_handle(), "tick")
    wait_until(lambda: re.search(r'/calls/d[0-9a-f]{32}"', operator.get("/schedules").text))
    assert "is removed" in act(operator, "remove-schedule", "ticking").text


def test_the_range_of_replicas_is_changed_where_it_follows_the_load(shop: Any, operator: httpx.Client) -> None:
    @serve.deployment(name="elastic", autoscaling_config={"min_replicas": 1, "max_replicas": 2})
    def elastic() -> None: ...

    elastic.deploy()
    assert 'value="scale-between"' in operator.get("/deployments/elastic").text
    assert "follows the load" in act(operator, "scale", "elastic", replicas="2").text
    assert "from 1 to 7" in act(operator, "scale-between", "elastic", least="1", most="7").text
    assert 'name="most" min="1" max="1000" value="7"' in operator.get("/deployments/elastic").text
    assert act(operator, "scale-between", "elastic", least="8", most="7").status_code == 409
    assert act(operator, "scale-between", "shop", least="1", most="7").status_code == 409
    elastic.delete()


def test_no_page_tells_the_values_of_variables(running: TestInstance, operator: httpx.Client) -> None:
    variables = {"runtime_env": {"env_vars": {"DB_URL": "hunter3"}}}

    @serve.deployment(name="secretive", ray_actor_options=variables, user_config={"key": "hunter4"})
    class Secretive:
        def __init__(self, key: str) -> None: ...

        def reconfigure(self, config: dict[str, str]) -> None: ...

    Secretive.deploy("hunter5")
    page = operator.get("/deployments/secretive").text
    assert "DB_URL" in page
    assert "hunter" not in page
    Secretive.delete()


def test_a_replica_tells_its_stacks_and_leaves(shop: Any, operator: httpx.Client) -> None:
    shop.remote("x").result(patience(LIMIT_S))
    page = operator.get("/deployments/shop").text
    replica = re.findall(r'name="replica" value="(\w+)"', page)[0]
    assert act(operator, "stacks", "shop", replica=replica).status_code == 200
    wait_until(lambda: "where its threads stand" in operator.get("/troubles?what=stacks&deployment=shop").text)
    assert "leaves" in act(operator, "stop-replica", "shop", replica=replica).text
    wait_until(lambda: replica not in operator.get("/deployments/shop").text)
    assert act(operator, "stacks", "shop", replica="0" * 32).status_code == 409


def test_a_deployment_says_how_many_of_its_replicas_have_died_and_how(shop: Any, operator: httpx.Client) -> None:
    shop.remote("x").result(patience(LIMIT_S))
    found = re.search(r"pid (\d+)", operator.get("/deployments/shop").text)
    assert found is not None
    os.kill(int(found[1]), signal.SIGKILL)
    wait_until(lambda: "1 died so far" in operator.get("/deployments/shop").text)
    wait_until(lambda: "killed by SIGKILL" in operator.get("/troubles", params={"what": "died"}).text)
    assert shop.remote("x").result(patience(LIMIT_S))


def test_the_former_version_comes_back(shop: Any, operator: httpx.Client) -> None:
    @serve.deployment(name="shop", version="second")
    def other() -> str:
        return "other"

    other.deploy()
    assert "being rolled out" in act(operator, "rollback", "shop").text
    wait_until(lambda: serve.get_deployment("shop").version == "first")


@needs_one_server
def test_the_overview_warns_of_a_redis_that_is_nearly_full(running: TestInstance, operator: httpx.Client) -> None:
    assert "At the limit" not in operator.get("").text
    with closing(redis_clients.client(running.settings.redis_url, patience(5))) as server:
        server.set("ballast", bytes(32 << 20))  # so that what the instance's own connections hold changes no percent
        used = server.info("memory")["used_memory"]
        server.config_set("maxmemory", int(used * 1.2))
        try:
            assert re.search(r"Redis uses 8\d% of its memory\. At the limit", operator.get("").text)
        finally:
            server.config_set("maxmemory", 0)
            server.delete("ballast")


def test_a_node_is_drained_and_runs_again(shop: Any, operator: httpx.Client) -> None:
    [place] = re.findall(
        r'value="drain"><input type="hidden" name="about" value="([^"]+)"', operator.get("/cluster").text
    )
    assert "No other node serves shop" in act(operator, "drain", place).text
    wait_until(lambda: "drained" in operator.get("/cluster").text)
    wait_until(lambda: '<div class="tile-value">waiting</div>' in operator.get("/deployments/shop").text)
    queued = shop.remote("waits")
    assert "runs what is deployed again" in act(operator, "undrain", place).text
    assert queued.result(patience(LIMIT_S)) == "<b>waits</b>"
    assert act(operator, "drain", "nowhere:1").status_code == 409


def test_whatever_acts_asks_first(shop: Any, operator: httpx.Client) -> None:
    answer = operator.post("/act", data={"action": "delete", "about": "shop", "back": "/-/console"})
    assert "Delete shop?" in answer.text
    assert "shop" in serve.list_deployments()
    act(operator, "delete", "shop")
    assert "shop" not in serve.list_deployments()
    again = act(operator, "delete", "shop")
    assert (again.status_code, "there is no deployment" in again.text) == (409, True)
    assert operator.get("/deployments/shop").status_code == 404


def test_viewers_cannot_act(shop: Any, viewer: httpx.Client) -> None:
    from qserve_gateway.console.actions import ACTIONS

    for action in ACTIONS:
        answer = act(viewer, action, "shop", id="x", replicas="3", bound="3", replica="x")
        assert answer.status_code == 403
    page = viewer.get("/deployments/shop").text
    assert 'action="/-/console/act"' not in page
    assert "shop" in serve.list_deployments()


def test_other_sites_can_neither_act_nor_read(shop: Any, console: str, operator: httpx.Client) -> None:
    form = {"action": "pause", "about": "shop", "confirmed": "yes"}
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    ):
        assert operator.post("/act", data=form, headers=headers).status_code == 403
    assert operator.get("", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert operator.get("", headers={"Host": "evil.example"}).status_code == 403
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert operator.get("", headers=link).status_code == 200


NONSENSE = [
    ("/calls?state=sleeping", 400, "There is no state"),
    ("/calls?colour=red", 400, "There is no filter"),
    ("/calls?since=soon", 400, "Since cannot be"),
    ("/calls?before=x", 400, "Before is a Unix time"),
    ("/?page=-1", 400, "Page is a number"),
    ("/?sort=beauty", 400, "Sort cannot be"),
    ("/troubles?what=joy", 400, "What cannot be"),
    ("/troubles?before=1", 400, "Before is the id"),
    ("/audit?before=%3Cb%3E", 400, "Before is the id"),
    ("/calls/nonsense", 404, "There is no durable call"),
    ("/calls/d" + "0" * 32, 404, "There is no durable call"),
    ("/deployments/%3Cb%3E", 404, "There is no deployment"),
    ("/deployments/shop/series?range=9y", 400, "Range cannot be"),
    ("/nothing", 404, "There is no such page"),
    ("/static/../console_app.py", 404, ""),
    ("/static/console_app.py", 404, "There is no such file"),
]


def test_nonsense_gets_a_clear_page(shop: Any, operator: httpx.Client) -> None:
    for path, status, said in NONSENSE:
        answer = operator.get(path)
        assert (path, answer.status_code) == (path, status)
        assert said in answer.text
        assert "<b>" not in answer.text


def test_forms_that_make_no_sense_are_refused(shop: Any, operator: httpx.Client) -> None:
    assert operator.post("/act", content=b"x" * 300_000, headers={"Content-Type": "text/plain"}).status_code == 415
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert operator.post("/act", content=b"a=" + b"x" * 300_000, headers=form).status_code == 413
    assert operator.post("/act", content=b"a=\xff", headers=form).status_code == 400
    assert operator.post("/act", data={"action": "dance"}).status_code == 400
    assert act(operator, "scale", "shop", replicas="many").status_code == 409
    assert act(operator, "bound", "shop", bound="0").status_code == 409
    assert act(operator, "scale", "shop", replicas="000000000001000").status_code == 409  # cut, it would be 1
    assert act(operator, "bound", "shop", bound="1" + "0" * 5_000).status_code == 409
    assert act(operator, "pause", "nobody").status_code == 404
    assert act(operator, "call", "shop", args="[").status_code == 409
    assert act(operator, "retry", id="nonsense").status_code == 409
    for method, path, allowed in (("PUT", "/", "GET, HEAD"), ("GET", "/act", "POST"), ("DELETE", "/login", "GET")):
        answer = operator.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"].startswith(allowed)
    assert act(operator, "pause", "nobody", back="https://evil.example/").status_code == 404
    answer = operator.post("/login", data={"token": OPERATOR, "back": "//evil.example"})
    assert answer.headers["location"] == "/-/console"


def test_the_stream_brings_what_has_changed(shop: Any, operator: httpx.Client) -> None:
    with operator.stream("GET", "/live", params={"of": "/-/console/deployments/shop?range=1h"}) as stream:
        lines = stream.iter_lines()
        wait_until(lambda: next(lines) == "event: live")
        with visitor(str(operator.base_url), OPERATOR) as another:
            act(another, "pause", "shop")
        wait_until(lambda: "resume" in next(lines))


def test_what_is_live_can_be_asked_for_once(shop: Any, operator: httpx.Client) -> None:
    """As tabs do that have no stream."""
    answer = operator.get("/live", params={"once": "1", "of": "/-/console/deployments/shop"})
    assert answer.status_code == 200
    assert "shop" in answer.text
    assert "<html" not in answer.text


def test_who_comes_through_a_trusted_proxy_is_who_it_says(running: TestInstance, console: str) -> None:
    variables = {"QSERVE_CONSOLE_USER_HEADER": "X-Forwarded-User", "QSERVE_CONSOLE_OPERATORS": "ada, grace"}
    with console_of(running.settings, **variables) as url:
        with visitor(url, **{"X-Forwarded-User": "ada"}) as ada:
            assert ">operator<" in ada.get("").text
        with visitor(url, **{"X-Forwarded-User": "bob"}) as bob:
            assert ">viewer<" in bob.get("").text
    with visitor(console, **{"X-Forwarded-User": "ada"}) as nobody:
        assert nobody.get("").status_code == 401


def test_a_proxy_shows_it_below_another_path(shop: Any, console: str) -> None:
    """Links, forms, what is led to, and the cookie's path have the prefix that the proxy has taken off."""
    with httpx.Client(headers={"X-Forwarded-Prefix": "/ops/qserve/"}, timeout=patience(10)) as browser:
        login = browser.post(f"{console}/login", data={"token": OPERATOR, "back": "/-/console/calls"})
        assert login.headers["location"] == "/ops/qserve/-/console/calls"
        assert "Path=/ops/qserve/-/console;" in login.headers["set-cookie"]
        bearer = {"Authorization": f"Bearer {OPERATOR}"}
        for path in ("", "/deployments/shop", "/calls", "/nowhere"):
            page = browser.get(f"{console}{path}", headers=bearer).text
            places = re.findall(r'(?:href|src|action|data-goto|data-base|data-series)="(/[^"]*)"', page)
            assert places
            assert [place for place in places if not place.startswith("/ops/qserve/-/console")] == []
        act = {"action": "pause", "about": "shop", "confirmed": "yes", "back": "/-/console/deployments/shop"}
        done = browser.post(f"{console}/act", data=act, headers=bearer)
        assert done.headers["location"].startswith("/ops/qserve/-/console/deployments/shop")
        browser.post(f"{console}/act", data=act | {"action": "resume"}, headers=bearer)
    for wrong in ("//evil.example", "/a\\b", "https://evil.example"):
        page = httpx.get(f"{console}/login", headers={"X-Forwarded-Prefix": wrong}).text
        assert 'href="/-/console/static/console.css"' in page


def test_it_is_open_only_where_it_is_told_to_be(running: TestInstance) -> None:
    with console_of(running.settings, QSERVE_CONSOLE_OPEN=1) as url, visitor(url) as somebody:
        assert ">operator<" in somebody.get("").text
        assert somebody.post("/act", headers={"Origin": "http://evil.example"}).status_code == 403
