"""More calls than a deployment can take: two gateways and handles meet one bound, and nobody else suffers."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from benchmarks.openloop import Phase
from benchmarks.overload import Stage, exact, second_gateway
from benchmarks.slots import Slots
from qserve import BackPressureError, serve
from qserve.testing import TestInstance
from tests.support.chosen_server import client_of
from tests.support.deployed import GatedCode
from tests.support.slowness import patience
from tests.support.waiting import LIMIT_S, wait_until

BOUND = 30
REPLICAS, PLACES = 2, 6


@dataclass(frozen=True)
class Answer:
    """What one call came to, whichever way it went."""

    number: str
    accepted: bool
    echoed: str = ""
    retry_after: float = 0.0


class Crowd:
    """Callers of a deployment whose calls end when the test says so, over two gateways and through a handle."""

    def __init__(self, instance: TestInstance, gateways: list[str], folder: Path) -> None:
        self.instance = instance
        self.gate, self.ledger = folder / "gate", folder / "ledger"
        self.answers: list[Answer] = []
        self._numbers = map(str, itertools.count())
        self._pool = ThreadPoolExecutor(4 * BOUND)
        self._http = httpx.Client(limits=httpx.Limits(max_connections=None), timeout=patience(LIMIT_S))
        deployment = serve.deployment(
            name="Gated",
            num_replicas=REPLICAS,
            max_concurrent_queries=PLACES // REPLICAS,
            max_queued_requests=BOUND,
            init_args=(str(self.gate), str(self.ledger)),
        )(GatedCode)
        deployment.deploy()
        self.handle = deployment.get_handle().hold
        self.ways: list[Callable[[str], Answer]] = [
            *(lambda number, url=url: self._over_http(url, number) for url in gateways),
            self._by_handle,
        ]

    def call(self, way: Callable[[str], Answer]) -> Answer:
        """Make a call and wait for what it comes to."""
        answer = way(next(self._numbers))
        self.answers.append(answer)
        return answer

    def rush(self, count: int) -> None:
        """Make so many calls at once, every way alike, and wait for none."""
        for way in itertools.islice(itertools.cycle(self.ways), count):
            self._pool.submit(self.call, way)

    def open(self) -> None:
        """Let the calls end."""
        self.gate.touch()

    def wait_for(self, count: int) -> list[Answer]:
        """The answers, once there are so many."""
        wait_until(lambda: len(self.answers) >= count)
        return self.answers

    def depth(self) -> int:
        """Calls queued and running."""
        with client_of(self.instance.settings.redis_url) as client:
            return int(client.xlen(self.instance.settings.keys.calls("Gated")))

    def ran(self) -> list[str]:
        """Numbers of the calls that a replica has begun."""
        return self.ledger.read_text().split() if self.ledger.exists() else []

    def close(self) -> None:
        self.open()
        self._pool.shutdown()
        self._http.close()

    def _over_http(self, url: str, number: str) -> Answer:
        response = self._http.get(f"{url}/Gated", params={"n": number})
        if response.status_code == 503:
            return Answer(number, accepted=False, retry_after=float(response.headers["retry-after"]))
        assert response.status_code == 200, response.text
        return Answer(number, accepted=True, echoed=response.text)

    def _by_handle(self, number: str) -> Answer:
        try:
            return Answer(number, accepted=True, echoed=self.handle.remote(number).result(patience(LIMIT_S)))
        except BackPressureError as error:
            return Answer(number, accepted=False, retry_after=error.retry_after)


@pytest.fixture
def gateways(qserve_instance: TestInstance) -> Iterator[list[str]]:
    """URLs of two gateways of one instance."""
    with second_gateway() as url:
        yield [qserve_instance.url, url]


@pytest.fixture
def crowd(qserve_instance: TestInstance, gateways: list[str], tmp_path: Path) -> Iterator[Crowd]:
    """A crowd before a closed gate."""
    crowd = Crowd(qserve_instance, gateways, tmp_path)
    yield crowd
    crowd.close()


def test_gateways_and_handles_share_one_exact_bound(crowd: Crowd) -> None:
    crowd.rush(3 * BOUND)
    refused = list(crowd.wait_for(2 * BOUND))

    assert not any(answer.accepted for answer in refused)
    assert all(1 <= answer.retry_after <= 30 for answer in refused)
    assert crowd.depth() == BOUND

    crowd.open()
    answers = crowd.wait_for(3 * BOUND)

    accepted = [answer for answer in answers if answer.accepted]
    assert len(accepted) == BOUND
    assert all(answer.echoed.strip('"') == answer.number for answer in accepted)
    assert sorted(crowd.ran()) == sorted(answer.number for answer in accepted)
    assert crowd.depth() == 0
    assert all(crowd.call(way).accepted for way in crowd.ways)


def test_refusals_do_not_wait_for_anything(crowd: Crowd) -> None:
    crowd.rush(BOUND + 1)
    crowd.wait_for(1)

    for way in crowd.ways:
        times = []
        for _ in range(40):
            began = time.monotonic()
            assert not crowd.call(way).accepted
            times.append(time.monotonic() - began)
        assert statistics.median(times) < patience(0.05)


def test_one_more_is_let_in_for_each_that_is_withdrawn(crowd: Crowd) -> None:
    crowd.rush(BOUND - 1)
    wait_until(lambda: crowd.depth() == BOUND - 1 and len(crowd.ran()) == PLACES)
    waiting = crowd.handle.remote("waiting")
    wait_until(lambda: crowd.depth() == BOUND)
    assert not crowd.call(crowd.ways[0]).accepted

    waiting.cancel()
    wait_until(lambda: crowd.depth() == BOUND - 1)
    crowd.rush(4)
    crowd.wait_for(1 + 3)

    assert crowd.depth() == BOUND
    assert "waiting" not in crowd.ran()


def test_a_flood_loses_nothing_and_leaves_the_neighbour_alone(
    qserve_instance: TestInstance, gateways: list[str]
) -> None:
    """Half of a neighbour's capacity all the time, five times of what it can do for the other deployment meanwhile."""
    for name in ("Flooded", "Neighbour"):
        serve.deployment(name=name, max_concurrent_queries=1, max_queued_requests=BOUND)(Slots).deploy()
    stage = Stage(gateways, qserve_instance.settings)
    capacity = 40.0  # of one place in which a call takes 20 ms, and a little
    calm = stage.load("Neighbour", [Phase(0.5 * capacity, 5)])
    flood = stage.load("Flooded", [Phase(0, 1.5), Phase(5 * capacity, 1.5), Phase(0.2 * capacity, 2)])
    with stage.depths("Flooded") as depths:
        seen, start = stage.run({"Neighbour": calm, "Flooded": flood})

    verdicts = [*exact(stage, "Flooded", seen["Flooded"]), *exact(stage, "Neighbour", seen["Neighbour"])]
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    assert max(depth for _, depth in depths) == BOUND
    assert [call for call in seen["Neighbour"] if call.status != 200] == []
    assert [call for call in seen["Flooded"] if call.status != 200 and call.due > start + 4.5] == []
    before = statistics.median(call.seconds for call in seen["Neighbour"] if call.due < start + 1.5)
    beside = statistics.median(call.seconds for call in seen["Neighbour"] if start + 1.5 <= call.due < start + 3)
    assert beside < 3 * before
