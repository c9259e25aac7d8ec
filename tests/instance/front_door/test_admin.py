"""The admin listener: who may ask, and what it tells and does."""

import re
import stat
from collections.abc import Iterator

import httpx
import psutil
import pytest

from qserve.broker.instance.state import State
from qserve.testing import TestInstance
from qserve.wire.messages import Signer
from qserve.wire.spec import DeploymentSpec, Target
from qserve_gateway.admin.admin_app import token_path
from tests.instance.front_door.cases import get
from tests.support.gateways import Gateway, gateway
from tests.support.raw_http import Address, read_response, statuses
from tests.support.slowness import patience
from tests.support.waiting import wait_until

TOKEN = "a-token-for-tests"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PAGES = [("GET", "/-/metrics"), ("GET", "/-/status"), ("DELETE", "/-/deployments/none"), ("POST", "/-/drain")]
PAGES += [("GET", "/-/dead"), ("POST", "/-/dead/tell/1-1/retry"), ("DELETE", "/-/dead/tell/1-1")]
ALL_METHODS = [*PAGES, ("PUT", "/-/drain"), ("HEAD", "/-/status"), ("OPTIONS", "/-/status"), ("PATCH", "/-/x")]


@pytest.fixture(scope="module")
def served(impatient: TestInstance) -> Iterator[Gateway]:
    with gateway(impatient.settings, QSERVE_ADMIN_PORT=0, QSERVE_ADMIN_TOKEN=TOKEN) as running:
        yield running


def ask(served: Gateway, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    return httpx.request(method, served.admin + path, headers=headers, timeout=patience(10))


@pytest.mark.parametrize(("method", "path"), ALL_METHODS)
def test_nothing_is_told_without_the_token(served: Gateway, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"X-API-Key": TOKEN}):
        answer = ask(served, method, path, headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(("method", "path"), ALL_METHODS)
@pytest.mark.parametrize(
    "foreign",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": "10.0.0.1"},
    ],
)
def test_pages_of_other_sites_are_refused_even_with_the_token(
    served: Gateway, method: str, path: str, foreign: dict[str, str]
) -> None:
    assert ask(served, method, path, BEARER | foreign).status_code == 403


def test_our_own_page_and_localhost_are_not_foreign(served: Gateway) -> None:
    port = served.admin.rpartition(":")[2]
    for headers in ({"Origin": served.admin}, {"Host": f"localhost:{port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert ask(served, "GET", "/-/status", BEARER | headers).status_code == 200


def test_the_admin_listener_has_the_same_gate(served: Gateway) -> None:
    assert statuses(Address.of(served.admin).ask(get(b"Content-Length: 1", b"Content-Length: 2"))) == [400]


def test_admin_pages_are_not_on_the_public_port(served: Gateway) -> None:
    for _, path in PAGES:
        assert httpx.get(served.ready["url"] + path, headers=BEARER).status_code == 404


def test_status_shows_deployments_replicas_and_gateways(served: Gateway) -> None:
    told = ask(served, "GET", "/-/status", BEARER).json()
    assert {it["name"]: it["state"] for it in told["deployments"]}["tell"] == "HEALTHY"
    assert [it["state"] for it in told["deployments"][0]["replicas"]] == ["SERVING"]
    assert told["pid"] in [it["pid"] for it in told["gateways"]]


def test_metrics_count_what_happened(served: Gateway) -> None:
    def value(name: str) -> float:
        text = ask(served, "GET", "/-/metrics", BEARER).text
        found = re.search(rf"^{re.escape(name)} ([\d.e+]+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    good = 'qserve_http_requests_total{deployment="tell",status="2xx"}'
    names = [
        good,
        'qserve_http_requests_total{deployment="fail",status="5xx"}',
        'qserve_http_refused_total{reason="framing"}',
        "qserve_calls_accepted_total",
        'qserve_calls_ended_total{outcome="result"}',
        'qserve_calls_ended_total{outcome="error"}',
        'qserve_http_request_duration_seconds_count{deployment="tell"}',
        'qserve_http_request_duration_seconds_bucket{deployment="tell",le="+Inf"}',
    ]
    before = {name: value(name) for name in names}
    with served.address.connect() as connection:
        for _ in range(3):
            connection.sendall(get())
            assert read_response(connection)[0] == 200
        connection.sendall(get(target=b"/fail"))
        assert read_response(connection)[0] == 500
        assert value("qserve_http_connections") >= 1
    served.address.ask(get(b"Content-Length: 1", b"Content-Length: 2"))
    awaited = dict(zip(names, (3, 1, 1, 4, 3, 1, 3, 3), strict=True))  # what is counted is so after its response
    wait_until(lambda: {name: value(name) - before[name] for name in names} == awaited)
    assert value('qserve_replicas{deployment="tell",state="SERVING"}') == 1
    wait_until(lambda: value('qserve_queue_depth{deployment="tell"}') == 0)
    assert value('qserve_queue_waiting{deployment="tell"}') == 0


def test_metrics_are_in_prometheus_format(served: Gateway) -> None:
    answer = ask(served, "GET", "/-/metrics", BEARER)
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for line in answer.text.splitlines():
        assert re.fullmatch(r"# (HELP|TYPE) \w+ .*|\w+(\{[^{}\n]*\})? [-+\d.eE]+", line), line


def test_a_deployment_can_be_deleted(served: Gateway, impatient: TestInstance) -> None:
    settings = impatient.settings
    state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
    state.deploy(DeploymentSpec(name="gone", target=Target("no.such:thing"), revision="1"), expected=0)
    assert ask(served, "GET", "/-/deployments/gone", BEARER).status_code == 405
    assert ask(served, "DELETE", "/-/deployments/gone", BEARER).json() == {"deleted": "gone"}
    assert "gone" not in state.list()
    state.close()
    assert ask(served, "DELETE", "/-/deployments/none", BEARER).status_code == 404


def test_a_gateway_can_be_told_to_leave(impatient: TestInstance) -> None:
    with gateway(impatient.settings, QSERVE_ADMIN_PORT=0, QSERVE_ADMIN_TOKEN=TOKEN) as leaving:
        assert ask(leaving, "GET", "/-/drain", BEARER).status_code == 405
        assert ask(leaving, "POST", "/-/drain", BEARER).status_code == 202
        assert leaving.process.wait(patience(10)) == 0


def test_without_a_token_one_is_made_that_only_its_user_can_read(impatient: TestInstance) -> None:
    with (
        gateway(impatient.settings, QSERVE_ADMIN_PORT=0) as first,
        gateway(impatient.settings, QSERVE_ADMIN_PORT=0) as second,
    ):
        path = token_path(impatient.settings.namespace)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        bearer = {"Authorization": f"Bearer {path.read_text().strip()}"}
        assert [ask(each, "GET", "/-/status", bearer).status_code for each in (first, second)] == [200, 200]
    assert len(path.read_text()) > 32


def test_it_is_not_opened_to_other_machines_without_a_token(impatient: TestInstance) -> None:
    with gateway(impatient.settings, QSERVE_ADMIN_PORT=0, QSERVE_ADMIN_HOST="0.0.0.0") as failed:
        assert "QSERVE_ADMIN_TOKEN" in failed.ready["error"]
        assert failed.process.wait(patience(10)) == 1


def test_other_machines_ask_by_address_or_by_a_name_that_is_allowed(impatient: TestInstance) -> None:
    variables = {"QSERVE_ADMIN_HOST": "0.0.0.0", "QSERVE_ADMIN_TOKEN": TOKEN, "QSERVE_ADMIN_ALLOWED_HOSTS": "metrics"}
    with gateway(impatient.settings, QSERVE_ADMIN_PORT=0, **variables) as open_:
        for host, status in (("metrics:9000", 200), ("10.0.0.1", 200), ("evil.example", 403)):
            assert ask(open_, "GET", "/-/status", BEARER | {"Host": host}).status_code == status


def test_there_is_none_unless_asked_for(impatient: TestInstance) -> None:
    with gateway(impatient.settings) as usual:
        assert "admin_url" not in usual.ready
        listening = [it for it in psutil.Process(usual.process.pid).net_connections() if it.status == "LISTEN"]
        assert len(listening) == 1
