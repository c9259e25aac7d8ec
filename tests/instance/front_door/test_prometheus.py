"""A real Prometheus scrapes two gateways with the configuration, alerts and board of deploy/observability."""

import shutil
from collections.abc import Iterator
from functools import partial

import pytest

from qserve.testing import TestInstance
from tests.support.gateways import Gateway, gateway
from tests.support.prometheus import Prometheus, board_expressions, prometheus
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus here")
TOKEN = "a-token-for-tests"


@pytest.fixture(scope="module")
def gateways(impatient: TestInstance) -> Iterator[tuple[Gateway, Gateway]]:
    admin = {"QSERVE_ADMIN_PORT": 0, "QSERVE_ADMIN_TOKEN": TOKEN}
    traced = {"QSERVE_TRACES": 1, "OTEL_TRACES_EXPORTER": "none"}
    with gateway(impatient.settings, **admin, **traced) as one, gateway(impatient.settings, **admin) as other:
        yield one, other


@pytest.fixture(scope="module")
def scraping(gateways: tuple[Gateway, Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = [each.admin.removeprefix("http://") for each in gateways]
    with prometheus(tmp_path_factory.mktemp("prometheus"), TOKEN, targets) as running:
        wait_until(lambda: len(running.query('up{job="qserve"} == 1')) == 2, 20, shows=partial(running.get, "targets"))
        yield running


def test_what_both_gateways_know_is_counted_once(scraping: Prometheus) -> None:
    once = """sum(qserve_nodes) + count(qserve_queue_limit{deployment="tell"})"""
    wait_until(
        lambda: [it["value"][1] for it in scraping.query(once)] == ["2"], 20, shows=partial(scraping.get, "targets")
    )
    assert len(scraping.query("qserve_build_info")) == 2


def test_every_alert_is_loaded_and_none_fires(scraping: Prometheus) -> None:
    def rules() -> list[dict[str, str]]:
        return [rule for group in scraping.get("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] == "ok" for rule in rules()), 20, shows=rules)
    assert len(rules()) > 10
    assert [rule["name"] for rule in rules() if rule["state"] == "firing"] == []


def test_every_expression_of_the_board_has_data(gateways: tuple[Gateway, Gateway], scraping: Prometheus) -> None:
    one, _ = gateways

    def without_data() -> list[str]:
        one.address.ask(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        one.address.ask(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
        return [each for each in board_expressions() if not scraping.query(each)]

    wait_until(lambda: not without_data(), 30, shows=without_data)


def test_a_slow_request_leads_to_its_trace(gateways: tuple[Gateway, Gateway], scraping: Prometheus) -> None:
    """By the exemplars, for which Prometheus asks in OpenMetrics."""
    one, _ = gateways
    answer = one.address.ask(
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 200")

    def traces() -> set[str]:
        asked = {"query": "qserve_http_request_duration_seconds_bucket", "start": "0", "end": "4000000000"}
        found = scraping.get("query_exemplars", **asked)
        return {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}

    wait_until(lambda: "0af7651916cd43dd8448eb211c80319c" in traces(), 20, shows=traces)
