"""Runs over a bad line: a proxy between the server and one node, one gateway, or everybody."""

import itertools
import time
from collections.abc import Callable
from random import Random

from tests.faults.chaos.checks import recovery
from tests.faults.chaos.cluster import Cluster
from tests.faults.chaos.faults import Excuses, Fault, Injected
from tests.faults.chaos.play import Evidence, LoadRun, Run
from tests.support.faulty_link import FaultyLink

AWAY = Excuses.of(
    safe="503", once="503 indeterminate 502", stream="503 502 broken indeterminate", durable="503 indeterminate"
)
"""The server is away for everybody; a replica that is silent for too long counts as dead, too."""
NODE_AWAY = Excuses.of(once="502", stream="502 broken")
"""The others take over what the node has: safe calls run again, of the rest the callers are told."""
GATEWAY_AWAY = Excuses.of(safe="503", once="503 indeterminate", stream="503 broken indeterminate")
SHORT_S, LONG_S = 2.0, 9.0
"""Shorter than a replica may be silent, and longer."""
_LATENCY_S = 0.2
_RESET_SHARE = 0.01


class Line:
    """A proxy for the length of a run, before some of the processes of its cluster: all of them under "".

    Before a Redis cluster it is a proxy for each server, whose port that server announces. So it is before all
    processes, and between primaries and their replicas.
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._links: list[FaultyLink] = []

    def prepare(self, cluster: Cluster) -> None:
        """Put it before them."""
        for link in self._links:  # of a run before
            link.stop()
        nodes = cluster.shards.nodes if cluster.shards else []
        self._links = [FaultyLink(f"redis://127.0.0.1:{node.port}") for node in nodes] or [
            FaultyLink(cluster.server.url)
        ]
        for link in self._links:
            link.start()
        url = self._links[0].url
        if cluster.shards:
            for node, link in zip(nodes, self._links, strict=True):
                node.announce(link.port)
            cluster.shards.wait_until_announced()
            url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.announced}" for node in nodes)
        cluster.environment.setdefault(self._role, {})["QSERVE_REDIS_URL"] = url

    def fault(self, name: str, do: Callable[[FaultyLink], None], excuses: Excuses, *lasts_s: float) -> Fault:
        """The line is spoiled for some seconds, one time after the other."""
        turns = itertools.cycle(lasts_s)

        def act(cluster: Cluster, _dice: Random, event: Injected) -> None:
            if self._role.startswith("gateway-"):
                event.via = cluster.gateway_urls[int(self._role.removeprefix("gateway-"))]
            for link in self._links:
                do(link)
            time.sleep(next(turns))
            for link in self._links:
                link.heal()

        return Fault(name, act, excuses, grace_s=10)


def delay(link: FaultyLink) -> None:
    """Everything takes longer."""
    link.delay_s = _LATENCY_S


def reset_some(link: FaultyLink) -> None:
    """Some of the segments end their connection."""
    link.reset_share = _RESET_SHARE


def nothing_is_put_twice(evidence: Evidence) -> None:
    """No lost answer makes anybody put an unsafe call again: a queue never had more entries than there were calls."""
    cluster = evidence.cluster
    sent = sum(call.nature in {"once", "stream"} for call in evidence.calls.values())
    found = int(cluster.redis.xinfo_stream(cluster.keys.calls("Once"))["entries-added"]) - cluster.calls_before_load
    replayed = cluster.state.observed.counters().get("rejected_frames", 0)
    evidence.result.figures["unsafe calls sent, put"] = f"{sent}, {found}"
    if found > sent or replayed:
        evidence.fail(f"{found} entries of {sent} calls were put, {replayed} frames were rejected as put before")


def _run(name: str, title: str, line: Line, fault: Fault, *, short: float = 0.0, every_s: float = 15.0) -> LoadRun:
    return LoadRun(
        name,
        title,
        (fault,),
        every_s=every_s,
        seconds=100,
        short_seconds=short,
        prepare=line.prepare,
        prepares_shards=line is _ALL,
        checks=(recovery(answered_s=10, serving_s=10), nothing_is_put_twice),
    )


_ALL, _NODE, _GATEWAY = Line(""), Line("node-0"), Line("gateway-0")

RUNS: tuple[Run, ...] = (
    _run(
        "K9-replies",
        "answers of the server are lost for 2 or 9 s",
        _ALL,
        _ALL.fault("lost answers", FaultyLink.lose_replies, AWAY, SHORT_S, LONG_S),
        short=8,
    ),
    _run(
        "K9-requests",
        "what is sent to the server is lost for 2 or 9 s",
        _ALL,
        _ALL.fault("lost requests", FaultyLink.lose_requests, AWAY, SHORT_S, LONG_S),
    ),
    _run(
        "K9-half-open",
        "connections to the server stay open for 2 or 9 s, and nothing moves",
        _ALL,
        _ALL.fault("half-open connections", FaultyLink.part, AWAY, SHORT_S, LONG_S),
    ),
    _run(
        "K9-node",
        "one node is parted from the server for 2 or 9 s",
        _NODE,
        _NODE.fault("a node parted from the server", FaultyLink.part, NODE_AWAY, LONG_S, SHORT_S),
    ),
    _run(
        "K9-gateway",
        "one gateway is parted from the server for 2 or 9 s",
        _GATEWAY,
        _GATEWAY.fault("a gateway parted from the server", FaultyLink.part, GATEWAY_AWAY, SHORT_S, LONG_S),
    ),
    _run(
        "K9-latency",
        "everything takes 200 ms to the server and back as long, for 10 s",
        _ALL,
        _ALL.fault("latency", delay, Excuses(), 10.0),
        every_s=20,
    ),
    _run(
        "K9-resets",
        "1 % of all segments to and from the server end their connection, for 10 s",
        _ALL,
        _ALL.fault("resets", reset_some, AWAY, 10.0),
        every_s=20,
    ),
)
