"""What the metrics of an instance say, and that docs, alerts and board name no others."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from qserve.testing import TestInstance
from tests.support.gateways import Gateway, gateway
from tests.support.serving import ROOT
from tests.support.slowness import patience
from tests.support.waiting import wait_until

TOKEN = "a-token-for-tests"
OBSERVABILITY = ROOT / "deploy/observability"
SCRAPER = {"X-Prometheus-Scrape-Timeout-Seconds": "10"}


@pytest.fixture(scope="module")
def gateways(impatient: TestInstance) -> Iterator[tuple[Gateway, Gateway]]:
    admin = {"QSERVE_ADMIN_PORT": 0, "QSERVE_ADMIN_TOKEN": TOKEN}
    with gateway(impatient.settings, **admin) as one, gateway(impatient.settings, **admin) as other:
        yield one, other


def scrape(of: Gateway, query: str = "", **headers: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"} | headers
    return httpx.get(f"{of.admin}/-/metrics{query}", headers=headers, timeout=patience(10))


def samples(text: str) -> dict[str, list[dict[str, str]]]:
    """Name of a sample -> the labels of each."""
    found: dict[str, list[dict[str, str]]] = {}
    for sample in chain.from_iterable(family.samples for family in text_string_to_metric_families(text)):
        found.setdefault(sample.name, []).append(sample.labels)
    return found


def expressions() -> list[str]:
    """Every expression of the alerts and the board."""
    rules = re.findall(r"expr: (?:>-\n)?((?:.|\n +)*?)\n +(?:for|labels):", (OBSERVABILITY / "rules.yml").read_text())
    board: dict[str, Any] = json.loads((OBSERVABILITY / "grafana/qserve.json").read_text())
    return rules + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def exported(gateways: tuple[Gateway, Gateway]) -> dict[str, list[dict[str, str]]]:
    """What is exported after a request, a refusal at the door, and what replicas count."""
    one, _ = gateways
    one.address.ask(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    one.address.ask(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n")
    ran = re.compile(r'^qserve_calls_run_total\{deployment="tell",outcome="done"\} [1-9]', re.MULTILINE)
    wait_until(lambda: ran.search(scrape(one).text) is not None, 20)
    return samples(scrape(one).text)


def test_the_table_has_every_metric(gateways: tuple[Gateway, Gateway]) -> None:
    page = (ROOT / "docs/telemetry.md").read_text().partition("<!-- table of metrics -->")[2].partition("\n\n")[0]
    listed = set(re.findall(r"`(qserve_\w+)`", "\n".join(row.split("|")[1] for row in page.strip().splitlines())))
    assert listed == set(re.findall(r"^# TYPE (qserve_\w+)", scrape(gateways[0]).text, re.MULTILINE))


def test_alerts_and_board_name_what_is_exported(exported: dict[str, list[dict[str, str]]]) -> None:
    found = expressions()
    assert len(found) > 30
    for expression in found:
        assert re.search("qserve", expression)
        for name, selector in re.findall(r"\b(qserve_\w+)(?:\{([^}]*)\})?", expression):
            assert name in exported, expression
            labels = set().union(*(each.keys() for each in exported[name]))
            for label, is_equal, value in re.findall(r'(\w+)(=~?)"([^"]*)"', selector):
                assert label in labels, expression
                if is_equal == "=":
                    assert value in {each[label] for each in exported[name]}, expression


def test_openmetrics_for_whoever_asks_for_it(gateways: tuple[Gateway, Gateway]) -> None:
    answer = scrape(gateways[0], Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = parse_openmetrics(answer.text)  # type: ignore[no-untyped-call]
    assert "qserve_nodes" in {family.name for family in families}
    assert scrape(gateways[0]).headers["content-type"].startswith("text/plain; version=")


def test_of_all_that_are_scraped_one_shows_the_instance(impatient: TestInstance) -> None:
    admin = {"QSERVE_ADMIN_PORT": 0, "QSERVE_ADMIN_TOKEN": TOKEN}

    def shows(of: Gateway) -> tuple[bool, bool]:
        """Its own, and those of the instance."""
        text = scrape(of, **SCRAPER).text
        return "\nqserve_http_connections " in text, "\nqserve_nodes " in text

    with gateway(impatient.settings, **admin) as other:
        with gateway(impatient.settings, **admin) as one:
            # Those of other tests may have been it before; they are not asked as Prometheus asks.
            assert [shows(one), shows(other), shows(one), shows(other)] == [(True, True), (True, False)] * 2
            for each in (one, other):
                assert "\nqserve_nodes " in scrape(each).text
                assert "\nqserve_nodes " in scrape(each, "?share=instance", **SCRAPER).text
                assert "\nqserve_nodes " not in scrape(each, "?share=gateway").text
            assert scrape(one, "?share=all").status_code == 400
        assert shows(other) == (True, True)
