"""What the admin pages show: the status of the instance as JSON, and metrics as text for Prometheus."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qserve.broker.instance.state import State
from qserve.calls.client import Client
from qserve_gateway.door.limits import Door
from qserve_gateway.door.request_counts import BOUNDS_S

STATES = ("STARTING", "STANDBY", "SERVING", "STALLED", "UNHEALTHY", "DRAINING")


def status(state: State, namespace: str, gateway_id: str) -> dict[str, Any]:
    """Describe the gateways, the nodes, the deployments and their replicas."""
    observed = state.observed
    return {
        "namespace": namespace,
        "gateway": gateway_id,
        "pid": os.getpid(),
        "gateways": [
            {"id": it.id, "host": it.host, "pid": it.pid, "url": it.url} for it in observed.gateways().values()
        ],
        "nodes": [{"id": it.id, "host": it.host, "pid": it.pid} for it in observed.nodes().values()],
        "deployments": [
            {
                "name": name,
                "route": deployed.spec.route_prefix,
                "state": deployed.state,
                "error": deployed.error,
                "version": deployed.spec.version,
                "generation": deployed.generation,
                "queued": observed.queued(name),
                "replicas": [
                    {"tag": it.tag, "host": it.host, "pid": it.pid, "state": it.state, "running": it.running}
                    for it in observed.replicas(name).values()
                ],
            }
            for name, deployed in sorted(state.list().items())
        ],
    }


def metrics(state: State, door: Door, client: Client) -> bytes:
    """Write, for Prometheus, the metrics of this gateway and of the queues and replicas that all gateways share."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(state, door, client))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, state: State, door: Door, client: Client) -> None:
        self._client = client
        self._state = state
        self._door = door

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._connections()
        yield from self._calls()
        yield from self._deployments()
        events = CounterMetricFamily("qserve_events", "Rare events anywhere in the instance.", labels=["event"])
        for name, count in sorted(self._state.observed.counters().items()):
            events.add_metric([name], count)
        yield events

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("qserve_http_requests", "Responses.", labels=["deployment", "status"])
        for (deployment, status), series in sorted(self._door.counts.series.items()):
            requests.add_metric([deployment, f"{status}xx"], series.count)
        yield requests
        latencies = HistogramMetricFamily(
            "qserve_http_request_duration_seconds", "From a request's headers to its last byte.", labels=["deployment"]
        )
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        for deployment, (buckets, seconds) in sorted(self._door.counts.latencies().items()):
            pairs = list(zip(bounds, map(float, buckets), strict=True))
            latencies.add_metric([deployment], pairs, sum_value=seconds)
        yield latencies

    def _connections(self) -> Iterator[Metric]:
        refused = CounterMetricFamily("qserve_http_refused", "Requests refused at the door.", labels=["reason"])
        for kind, count in sorted(self._door.refused.items()):
            refused.add_metric([kind], count)
        yield refused
        yield GaugeMetricFamily("qserve_http_connections", "Open connections.", value=self._door.connections)
        yield GaugeMetricFamily("qserve_websockets", "Open WebSockets.", value=self._door.websockets)

    def _calls(self) -> Iterator[Metric]:
        tally = self._client.tally
        yield CounterMetricFamily("qserve_calls_accepted", "Calls on a queue.", value=tally["accepted"])
        yield CounterMetricFamily("qserve_calls_sent_again", "After Redis lost them.", value=tally["sent again"])
        refused = CounterMetricFamily("qserve_calls_refused", "Calls that no queue took.", labels=["reason"])
        ended = CounterMetricFamily("qserve_calls_ended", "Accepted calls that ended.", labels=["outcome"])
        for what, count in sorted(dict(tally).items()):
            kind, _, which = what.partition(" ")
            if kind in ("refused", "ended"):
                (refused if kind == "refused" else ended).add_metric([which], count)
        yield from (refused, ended)
        yield GaugeMetricFamily("qserve_calls_pending", "Calls that wait for their end.", value=self._client.pending)

    def _deployments(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily("qserve_queue_depth", "Calls queued and running.", labels=["deployment"])
        waiting = GaugeMetricFamily("qserve_queue_waiting", "Calls that no replica has taken.", labels=["deployment"])
        oldest = GaugeMetricFamily(
            "qserve_queue_oldest_waiting_seconds", "For how long the first of them has waited.", labels=["deployment"]
        )
        running = GaugeMetricFamily("qserve_running", "Calls running.", labels=["deployment"])
        replicas = GaugeMetricFamily("qserve_replicas", "Replicas.", labels=["deployment", "state"])
        for name in sorted(self._state.list()):
            found = list(self._state.observed.replicas(name).values())
            queued.add_metric([name], self._state.observed.queued(name))
            count, seconds = self._state.observed.waiting(name)
            waiting.add_metric([name], count)
            oldest.add_metric([name], seconds)
            running.add_metric([name], sum(replica.running for replica in found))
            by_state = Counter(replica.state for replica in found)
            for state in (*STATES, *sorted(by_state.keys() - set(STATES))):
                replicas.add_metric([name, state], by_state[state])
        yield from (queued, waiting, oldest, running, replicas)
