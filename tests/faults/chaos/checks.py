"""Checks that a `LoadRun` can name: what else must hold when every call has its outcome, and what is measured."""

import bisect

from tests.faults.chaos.ledger import OK, Answer, Call
from tests.faults.chaos.play import Check, Evidence, percentile
from tests.faults.chaos.verdicts import tell


def takeover(told_s: float, again_s: float = 20.0) -> Check:
    """What becomes of the calls that a killed replica had.

    Args:
        told_s: Callers of calls that may not run again know after this time (p99).
        again_s: The others run again after this time: alone in their replica, so after what it is running.
    """

    def check(evidence: Evidence) -> None:
        died = {pid: event for event in evidence.injected for pid in event.killed}
        told: list[float] = []
        again: list[float] = []
        for call in evidence.calls.values():
            ended = {run.pid for run in call.ends}
            for number, run in enumerate(call.runs):
                event = died.get(run.pid)
                if event is None or run.pid in ended:
                    continue
                if number + 1 < len(call.runs):
                    again.append(call.runs[number + 1].at - event.began)
                elif call.answers and call.nature in {"once", "stream"}:
                    told.append(call.answers[0].at - event.began)
        for what, times, limit_s in (("told of it", told, told_s), ("run again", again, again_s)):
            if times:
                p99 = percentile(times, 0.99)
                evidence.result.figures[f"after a death {what} (p99 of {len(times)})"] = f"{p99:.2f} s"
                if p99 > limit_s:
                    evidence.fail(f"calls of a replica that died were {what} after {p99:.2f} s (p99), not {limit_s} s")

    return check


def recovery(answered_s: float, serving_s: float) -> Check:
    """After each fault: calls under way are answered, apart from the time they take, and new ones served, in time."""

    def check(evidence: Evidence) -> None:
        good = sorted((call.sent, call.answers[0].at) for call in evidence.calls.values() if _is_good(call.answers))
        answered: list[tuple[float, str]] = [(0.0, "")]
        serving = [0.0]
        ends = [*(event.began for event in evidence.injected[1:]), float("inf")]
        for event, next_at in zip(evidence.injected, ends, strict=True):
            under_way = (call for call in evidence.calls.values() if _is_open(call, event.ended, next_at))
            answered += [(_waited(call, event.ended), call.id) for call in under_way]
            after = good[bisect.bisect(good, (event.ended, 0.0)) :]
            serving += [min(at for _, at in after[:2000]) - event.ended] if after else []
        longest, call_id = max(answered)
        evidence.result.figures["under way at the return: answered after at most"] = f"{longest:.2f} s"
        evidence.result.figures["new after the return: first good answer after at most"] = f"{max(serving):.2f} s"
        if longest > answered_s:
            call = tell(evidence.calls[call_id])
            evidence.fail(f"a call under way was answered {longest:.2f} s after the return, not {answered_s} s: {call}")
        if max(serving) > serving_s:
            evidence.fail(f"served again {max(serving):.2f} s after the return, not {serving_s} s")

    return check


def _is_open(call: Call, at: float, next_at: float) -> bool:
    """Whether it was under way at a time, and answered before the next fault began."""
    return bool(call.answers) and call.sent < at < call.answers[0].at < next_at


def _waited(call: Call, since: float) -> float:
    return call.answers[0].at - since - call.seconds


def _is_good(answers: list[Answer]) -> bool:
    return bool(answers) and answers[0].outcome == OK


def late_results(evidence: Evidence) -> None:
    """How many results came from replicas that others had taken the calls from; none of them reached a caller."""
    count = evidence.cluster.state.observed.counters().get("late_results", 0)
    evidence.result.figures["results that came too late and were dropped"] = str(count)
