"""What the admin pages show: the status of the instance as JSON, and metrics as text for Prometheus."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from qserve.broker.history.totals import become_exporter
from qserve.broker.instance.state import State
from qserve.calls.client import Client
from qserve.deployments.deploying import condition, live_workers
from qserve.errors import BrokerUnavailable
from qserve_gateway.admin.instance_metrics import InstanceCollector
from qserve_gateway.door.limits import Door
from qserve_gateway.door.request_counts import BOUNDS_S


def status(state: State, namespace: str, gateway_id: str) -> dict[str, Any]:
    """Describe the gateways, the nodes, the deployments and their replicas."""
    observed = state.observed
    deployments = sorted(state.list().items())
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
                **dict(zip(("state", "error"), condition(deployed, live_workers(state, name)), strict=True)),
                "version": deployed.spec.version,
                "generation": deployed.generation,
                "queued": observed.queued(name),
                "replicas": [
                    {"tag": it.tag, "host": it.host, "pid": it.pid, "state": it.state, "running": it.running}
                    for it in observed.replicas(name).values()
                ],
            }
            for name, deployed in deployments
        ],
        "demand": {name: observed.demand(name) for name, _ in deployments},
    }


def metrics(state: State, door: Door, client: Client, accept: str, share: str, *, scraped: bool) -> tuple[bytes, str]:
    """Write metrics, in the format that is asked for; gives the text and its content type.

    Args:
        accept: The Accept header: OpenMetrics where it names it, else Prometheus' text format.
        share: "gateway" for its own metrics, "instance" for those of the instance, "" for all that it is to show.
        scraped: Somebody adds up what all gateways say. Then only one of them shows the metrics of the instance.
    """
    encode, content_type = choose_encoder(accept)
    own, everything = CollectorRegistry(auto_describe=False), CollectorRegistry(auto_describe=False)
    for registry in (own, everything):
        if share != "instance":
            registry.register(_GatewayCollector(door, client))
    if share == "gateway" or (share == "" and not client.sender.is_open):
        return encode(own), content_type
    try:
        if share == "instance" or not scraped or _is_exporter(state, client.id):
            everything.register(InstanceCollector(state))
        return encode(everything), content_type
    except BrokerUnavailable:
        if share == "instance":
            raise
        return encode(own), content_type  # what it has seen itself tells of the trouble


def _is_exporter(state: State, gateway: str) -> bool:
    return become_exporter(state.redis, state.keys, gateway, state.observed.gateways())


class _GatewayCollector(Collector):
    """What this process has seen."""

    def __init__(self, door: Door, client: Client) -> None:
        self._client = client
        self._door = door

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily("qserve_build_info", "1 for what runs here.", labels=["version", "python"])
        build.add_metric([version("qserve"), platform.python_version()], 1)
        yield build
        is_open = all(each.sender.is_open for each in self._client.all())
        yield GaugeMetricFamily("qserve_redis_up", "1 while the gateway is connected to Redis.", value=float(is_open))
        longest = max((each.redis_clock.round_trip_s for each in self._client.all()), default=0.0)
        yield GaugeMetricFamily("qserve_redis_round_trip_seconds", "What Redis takes to answer.", value=longest)
        yield from self._requests()
        yield from self._connections()
        yield from self._calls()

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("qserve_http_requests", "Responses.", labels=["deployment", "status"])
        counts = {key: series.count for key, series in list(self._door.counts.series.items())}
        # Errors from the beginning: what Prometheus sees for the first time has not increased for it.
        zeros = {(deployment, status): 0 for deployment, _ in counts for status in (2, 4, 5)}
        for (deployment, status), count in sorted((zeros | counts).items()):
            requests.add_metric([deployment, f"{status}xx"], count)
        yield requests
        latencies = HistogramMetricFamily(
            "qserve_http_request_duration_seconds", "From a request's headers to its last byte.", labels=["deployment"]
        )
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        for deployment, (buckets, seconds) in sorted(self._door.counts.latencies().items()):
            exemplars = self._door.counts.exemplars(deployment)
            pairs: list[tuple[str, float] | tuple[str, float, Exemplar]] = [
                (bound, float(count), exemplars[place]) if place in exemplars else (bound, float(count))
                for place, (bound, count) in enumerate(zip(bounds, buckets, strict=True))
            ]
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
