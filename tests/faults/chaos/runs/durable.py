"""Runs of durable calls: whatever dies, what was accepted ends once, with its own result, for whoever asks."""

from collections import Counter

from starlette.responses import Response

from qserve import serve
from tests.faults.chaos.checks import recovery
from tests.faults.chaos.cluster import Setup
from tests.faults.chaos.faults import Excuses, Fault, kill_replica
from tests.faults.chaos.ledger import digest
from tests.faults.chaos.load import DURABLE, Load
from tests.faults.chaos.play import Evidence, LoadRun, Run
from tests.faults.chaos.runs.server import restart_server

_MOST_ASKED = 5000
_REFUSED = Excuses.of(durable="503 indeterminate")


def everyone_gets_the_same(evidence: Evidence) -> None:
    """Another process asks for what was accepted: each call has ended, once, with the right result."""
    states: Counter[str] = Counter()
    accepted = [call for call in evidence.calls.values() if call.accepted][-_MOST_ASKED:]
    refs = [(call, serve.get_ref(call.accepted)) for call in accepted]
    for call, ref in refs:
        value = ref.result(30)
        body = bytes(value.body) if isinstance(value, Response) else str(value)
        states[ref.status().state] += 1
        if digest(body) != call.expected:
            evidence.result.judgement.blame("swapped", f"{call.kind} {call.id}, asked for by another process")
    if states.total() != states["done"]:
        evidence.fail(f"states of calls that have ended: {dict(states)}")
    evidence.result.figures["asked for again by another process"] = str(len(accepted))


def ran_again_for_a_reason(evidence: Evidence) -> None:
    """Calls ran again because their replica died: not more of them than it can have had."""
    kills = sum(len(event.killed) for event in evidence.injected)
    again, calls = evidence.result.judgement.reruns, evidence.result.judgement.durable
    evidence.result.figures["ran more than once"] = f"{again} of {calls} ({100 * again / max(1, calls):.2f} %)"
    if again > 2 * kills * 100:
        evidence.fail(f"{again} calls ran again after {kills} deaths")


RUNS: tuple[Run, ...] = (
    LoadRun(
        "K15",
        "durable calls; SIGKILL of replicas and of the server in turn",
        (
            Fault("SIGKILL of a replica", kill_replica),
            Fault("SIGKILL of another replica", kill_replica),
            Fault("SIGKILL of the server", restart_server, _REFUSED, grace_s=5),
        ),
        every_s=4,
        seconds=330,
        short_every_s=1.5,
        load=Load(rate=110, kinds=DURABLE),
        short_rate=60,
        setup=Setup(server=("--appendfsync", "always")),  # "everysec" holds writes back while a disk is busy
        checks=(recovery(answered_s=25, serving_s=15), everyone_gets_the_same, ran_again_for_a_reason),
    ),
)
