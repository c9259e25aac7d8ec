"""Metrics of the whole instance, as Redis has them: the same, whichever gateway is asked."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from qserve.broker.counters import RARE_EVENTS, VALUES
from qserve.broker.history.buckets import BOUNDS_MS
from qserve.broker.history.call_index import count_states
from qserve.broker.history.totals import read_totals
from qserve.broker.instance.state import State
from qserve.broker.server.memory import read_memory
from qserve.deployments.deploying import condition
from qserve.wire.spec import DEPLOY_FAILED, DEPLOYING, HEALTHY, Deployed
from qserve_gateway.admin.metrics_of_users import UserMetrics

STATES = ("STARTING", "STANDBY", "SERVING", "STALLED", "UNHEALTHY", "DRAINING")
_ENDS = ("done", "failed", "cancelled")
_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_EVERY = 3
"""Of the bounds that are counted, every third is shown: two for each power of ten."""
_HANDLE_CALLS = {"calls_of_replicas": "replica", "calls_of_programs": "program"}


class InstanceCollector(Collector):
    """Queues, replicas, calls and nodes of an instance."""

    def __init__(self, state: State) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        """Read everything once, and tell it. Blocks while it waits for Redis."""
        observed = self._state.observed
        deployments = dict(sorted(self._state.list().items()))
        yield GaugeMetricFamily("qserve_nodes", "Nodes that live.", value=len(observed.nodes()))
        yield GaugeMetricFamily("qserve_gateways", "Gateways that live.", value=len(observed.gateways()))
        # All that there may be, from the beginning: what Prometheus sees for the first time has not increased for it.
        known = dict.fromkeys((*RARE_EVENTS, *_HANDLE_CALLS, *VALUES), 0)
        counters = known | observed.counters()
        events = CounterMetricFamily("qserve_events", "Rare events anywhere in the instance.", labels=["event"])
        handles = CounterMetricFamily("qserve_handle_calls", "Calls through handles on a queue.", labels=["caller"])
        values = CounterMetricFamily("qserve_large_values", "Large values that have arrived.", labels=["way"])
        for name, count in sorted(counters.items()):
            if name in VALUES:
                values.add_metric([VALUES[name]], count)
            elif name in _HANDLE_CALLS:
                handles.add_metric([_HANDLE_CALLS[name]], count)
            else:
                events.add_metric([name], count)
        yield from (events, handles, values)
        yield from self._queues(deployments)
        yield from self._replicas(deployments)
        totals = dict(
            zip(deployments, read_totals(self._state.redis, self._state.keys, list(deployments)), strict=True)
        )
        yield from self._calls(totals)
        yield from self._users(totals)
        yield from self._durable(list(deployments))
        yield from self._memory()

    def _queues(self, deployments: Mapping[str, Deployed]) -> Iterator[Metric]:
        depth = GaugeMetricFamily("qserve_queue_depth", "Calls queued and running.", labels=["deployment"])
        limit = GaugeMetricFamily("qserve_queue_limit", "Most calls that may be queued.", labels=["deployment"])
        waiting = GaugeMetricFamily("qserve_queue_waiting", "Calls that no replica has taken.", labels=["deployment"])
        oldest = GaugeMetricFamily(
            "qserve_queue_oldest_waiting_seconds", "For how long the first of them has waited.", labels=["deployment"]
        )
        for name, deployed in deployments.items():
            depth.add_metric([name], self._state.observed.queued(name))
            limit.add_metric([name], deployed.spec.max_queued_requests)
            count, seconds = self._state.observed.waiting(name)
            waiting.add_metric([name], count)
            oldest.add_metric([name], seconds)
        yield from (depth, limit, waiting, oldest)

    def _replicas(self, deployments: Mapping[str, Deployed]) -> Iterator[Metric]:
        observed = self._state.observed
        running = GaugeMetricFamily("qserve_running", "Calls running.", labels=["deployment"])
        replicas = GaugeMetricFamily("qserve_replicas", "Replicas.", labels=["deployment", "state"])
        wanted = GaugeMetricFamily("qserve_replicas_wanted", "Replicas that there are to be.", labels=["deployment"])
        states = GaugeMetricFamily("qserve_deployment_state", "1 for its state.", labels=["deployment", "state"])
        for name, deployed in deployments.items():
            found = list(observed.replicas(name).values())
            running.add_metric([name], sum(replica.running for replica in found))
            by_state = Counter(replica.state for replica in found)
            for state in (*STATES, *sorted(by_state.keys() - set(STATES))):
                replicas.add_metric([name, state], by_state[state])
            workers = observed.workers(name).values()
            wanted.add_metric([name], sum(worker.wanted for worker in workers))
            now, _ = condition(deployed, workers)
            for state in dict.fromkeys((DEPLOYING, HEALTHY, DEPLOY_FAILED, now)):
                states.add_metric([name, state], float(state == now))
        yield from (running, replicas, wanted, states)

    def _users(self, totals: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
        metrics = UserMetrics()
        for name, counts in totals.items():
            metrics.add_totals(name, counts)
            for replica in self._state.observed.replicas(name).values():
                metrics.add_gauges(name, replica.tag, replica.gauges)
        return metrics.families()

    def _calls(self, totals_of: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
        by = ["deployment"]
        ends = CounterMetricFamily("qserve_calls_run", "Calls that replicas ran.", labels=[*by, "outcome"])
        waits = HistogramMetricFamily("qserve_call_wait_seconds", "From the queue's end to a replica.", labels=by)
        runs = HistogramMetricFamily("qserve_call_run_seconds", "From a replica's taking it to its answer.", labels=by)
        retries = CounterMetricFamily("qserve_call_retries", "Calls to be run again.", labels=[*by, "reason"])
        given_up = CounterMetricFamily(
            "qserve_calls_without_result", "Calls refused, or given up by their callers.", labels=[*by, "reason"]
        )
        dropped = CounterMetricFamily("qserve_user_metrics_dropped", "Values that no metric has room for.", labels=by)
        batches = HistogramMetricFamily("qserve_batch_size", "Calls in a batch of serve.batch.", labels=by)
        started = CounterMetricFamily("qserve_replicas_started", "Processes started as replicas.", labels=by)
        ended = CounterMetricFamily("qserve_replicas_ended", "Processes of replicas that ended.", labels=[*by, "how"])
        for name, totals in totals_of.items():
            counts = _Counts(totals)
            for outcome in dict.fromkeys((*_ENDS, *counts.of("ends"))):
                ends.add_metric([name, outcome], counts.of("ends").get(outcome, 0))
            for times, what in ((waits, "wait"), (runs, "run")):
                seconds = counts.of(f"{what}_us").get("all", 0) / 1e6
                times.add_metric([name], counts.times(what), sum_value=seconds)
            for family, what, always in (
                (retries, "retries", ("failed", "replica_died")),
                (given_up, "caller", ("refused", "gave_up")),
                (ended, "replicas", ("died", "left")),
            ):
                for label in always:
                    family.add_metric([name, label], counts.of(what).get(label, 0))
            started.add_metric([name], counts.of("replicas").get("started", 0))
            batches.add_metric([name], *counts.sizes())
            dropped.add_metric([name], counts.of("user_metrics").get("dropped", 0))
        yield from (ends, waits, runs, retries, given_up, batches, started, ended, dropped)

    def _durable(self, names: Sequence[str]) -> Iterator[Metric]:
        calls = GaugeMetricFamily("qserve_durable_calls", "Records by state.", labels=["deployment", "state"])
        states = count_states(self._state.redis, self._state.keys, names) if names else []
        for name, found in zip(names, states, strict=True):
            for state, count in found.items():
                calls.add_metric([name, state], count)
        yield calls

    def _memory(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("qserve_redis_memory_bytes", "Memory that Redis uses.", labels=["server"])
        limit = GaugeMetricFamily("qserve_redis_memory_limit_bytes", "Most that Redis may use.", labels=["server"])
        for memory in read_memory(self._state.redis):
            used.add_metric([memory.server], memory.used)
            limit.add_metric([memory.server], memory.limit)
        yield from (used, limit)


class _Counts:
    """The totals of a deployment."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self._by_kind: dict[str, dict[str, int]] = {}
        for field, count in totals.items():
            kind, _, label = field.partition(" ")
            self._by_kind.setdefault(kind, {})[label] = count

    def of(self, kind: str) -> Mapping[str, int]:
        """Label -> count."""
        return self._by_kind.get(kind, {})

    def times(self, kind: str) -> list[tuple[str, float]]:
        """Buckets of a histogram of times: upper bound in seconds, and how many took no longer."""
        places = {int(place): count for place, count in self.of(kind).items()}
        shown = range(0, len(BOUNDS_MS), _EVERY)
        # Place N counts what took less than bound N.
        found = [
            (f"{BOUNDS_MS[last] / 1000:.3g}", float(sum(count for place, count in places.items() if place <= last)))
            for last in shown
        ]
        return [*found, ("+Inf", float(sum(places.values())))]

    def sizes(self) -> tuple[list[tuple[str, float]], float]:
        """Buckets of the histogram of batches, and how many calls were in all of them."""
        sizes = {int(size): count for size, count in self.of("batch").items()}
        found = [(str(most), float(sum(n for size, n in sizes.items() if size <= most))) for most in _BATCHES]
        return [*found, ("+Inf", float(sum(sizes.values())))], float(sum(size * n for size, n in sizes.items()))
