"""Checks that a `LoadRun` can name: what else must hold when every call has its outcome, and what is measured."""

import bisect

from tests.chaos.ledger import OK, Answer
from tests.chaos.play import Check, Evidence, percentile


def takeover(limit_s: float, exempt: tuple[str, ...] = ()) -> Check:
    """Calls that a killed replica had are started again, or their callers told, within a time (p99).

    Args:
        exempt: Names of faults whose calls are measured and not held to the limit.
    """

    def check(evidence: Evidence) -> None:
        died = {pid: event for event in evidence.injected for pid in event.killed}
        taken: dict[str, list[float]] = {}
        for call in evidence.calls.values():
            ended = {run.pid for run in call.ends}
            for number, run in enumerate(call.runs):
                event = died.get(run.pid)
                if event is None or run.pid in ended:
                    continue
                after = call.runs[number + 1].at if number + 1 < len(call.runs) else None
                told = call.answers[0].at if call.answers else None
                if (resolved := after if after is not None else told) is not None:
                    taken.setdefault(event.fault.name, []).append(resolved - event.began)
        for name, times in taken.items():
            p99 = percentile(times, 0.99)
            evidence.result.figures[f"takeover after {name}, p99 of {len(times)}"] = f"{p99:.2f} s"
            if name not in exempt and p99 > limit_s:
                evidence.fail(f"calls taken over after {name} waited {p99:.2f} s (p99), not {limit_s} s at most")

    return check


def recovery(answered_s: float, serving_s: float) -> Check:
    """After each fault: calls that were under way are answered, and new ones served, within these times."""

    def check(evidence: Evidence) -> None:
        good = sorted((call.sent, call.answers[0].at) for call in evidence.calls.values() if _is_good(call.answers))
        answered, serving = [0.0], [0.0]
        for event in evidence.injected:
            open_calls = [
                call.answers[0].at - event.ended
                for call in evidence.calls.values()
                if call.answers and call.sent < event.ended < call.answers[0].at
            ]
            answered += open_calls
            after = good[bisect.bisect(good, (event.ended, 0.0)) :]
            serving += [min(at for _, at in after[:2000]) - event.ended] if after else []
        evidence.result.figures["under way at the return, answered after at most"] = f"{max(answered):.2f} s"
        evidence.result.figures["first good answer to a new call after at most"] = f"{max(serving):.2f} s"
        if max(answered) > answered_s:
            evidence.fail(f"a call under way was answered {max(answered):.2f} s after the return, not {answered_s} s")
        if max(serving) > serving_s:
            evidence.fail(f"served again {max(serving):.2f} s after the return, not {serving_s} s")

    return check


def _is_good(answers: list[Answer]) -> bool:
    return bool(answers) and answers[0].outcome == OK
