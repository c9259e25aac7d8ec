"""From ledgers to verdicts: what became of every call, and whether it may have."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.faults.chaos.faults import Injected
from tests.faults.chaos.ledger import INDETERMINATE, OK, Answer, Call

VERDICTS = ("lost", "stuck", "dup-run", "dup-reply", "swapped", "wrong-code", "late-run")
"""lost: no outcome 2 s after the deadline. stuck: one that came later than 1 s after it. dup-run: what must not run
twice did. dup-reply: two answers. swapped: not the right answer. wrong-code: an outcome that no fault excuses.
late-run: started after its deadline."""

LOST_AFTER_S, STUCK_AFTER_S = 2.0, 1.0
MOST_RUNS = 3
"""Replicas that a call may take down, by QSERVE_MAX_DELIVERIES."""
_MOST_SHOWN = 5


@dataclass
class Judgement:
    """What was found out about the calls of a run.

    Attributes:
        outcomes: How often calls of each nature ended how: ("safe", "ok") -> 1200.
        violations: Verdict -> a line for each call it fell on.
        reruns: Calls that may run again and did.
        indeterminate: Calls whose caller was told that they may have run or not.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: dict[str, list[str]] = field(default_factory=dict)
    calls: int = 0
    durable: int = 0
    reruns: int = 0
    indeterminate: int = 0

    def blame(self, verdict: str, line: str) -> None:
        """Note a violation."""
        self.violations.setdefault(verdict, []).append(line)

    def told(self) -> str:
        """The violations, a few of each verdict."""
        lines = []
        for verdict, found in self.violations.items():
            lines.append(f"{verdict}: {len(found)}")
            lines += [f"  {each}" for each in found[:_MOST_SHOWN]]
        return "\n".join(lines)


def judge(calls: Iterable[Call], injected: Sequence[Injected]) -> Judgement:
    """Verdicts on all calls."""
    judgement = Judgement()
    for call in calls:
        judgement.calls += 1
        judgement.durable += call.nature == "durable"
        _judge_answers(call, injected, judgement)
        _judge_runs(call, judgement)
    return judgement


def _judge_answers(call: Call, injected: Sequence[Injected], judgement: Judgement) -> None:
    if not call.answers:
        judgement.blame("lost", tell(call))
        judgement.outcomes[call.nature, "none"] += 1
        return
    answer = call.answers[0]
    judgement.outcomes[call.nature, answer.outcome] += 1
    judgement.indeterminate += answer.outcome == INDETERMINATE
    late_s = answer.at - call.deadline
    if late_s > LOST_AFTER_S:
        judgement.blame("lost", tell(call))
    elif late_s > STUCK_AFTER_S:
        judgement.blame("stuck", tell(call))
    if len(call.answers) > 1 or call.kind == "http-surplus":
        judgement.blame("dup-reply", tell(call))
    if answer.outcome == OK:
        if answer.digest != call.expected:
            judgement.blame("swapped", tell(call))
        elif not call.runs:
            judgement.blame("swapped", f"{tell(call)}, which no replica has started")
    elif not (
        any(_excuses(event, call, answer) for event in injected)
        or _is_own_fault(call, answer)
        or _has_killed_three(call, answer, injected)
    ):
        judgement.blame("wrong-code", tell(call))


def _excuses(event: Injected, call: Call, answer: Answer) -> bool:
    allowed: frozenset[str] = getattr(event.fault.excuses, call.nature)
    under_way = call.sent <= event.ended + event.fault.grace_s and answer.at >= event.began - 0.05
    return answer.outcome in allowed and under_way and event.via in {"", call.via}


_FATES = {"safe": "500", "once": "502", "stream": "502", "durable": "500"}
"""What a call ends as that kills every replica it is given to."""


def _is_own_fault(call: Call, answer: Answer) -> bool:
    if call.fate == "raise":
        return answer.outcome == "500"
    return call.fate in {"abort", "exit"} and answer.outcome == _FATES[call.nature]


def _has_killed_three(call: Call, answer: Answer, injected: Sequence[Injected]) -> bool:
    """Given up, and rightly: three replicas that had started it were killed before it ended."""
    killed = {pid for event in injected for pid in event.killed}
    died = {run.pid for run in call.runs} & killed - {run.pid for run in call.ends}
    return answer.outcome == "500" and "Task failed with 2 retries" in answer.detail and len(died) >= MOST_RUNS


def _judge_runs(call: Call, judgement: Judgement) -> None:
    if len(call.runs) > 1:
        if call.nature in {"once", "stream"}:
            judgement.blame("dup-run", f"{tell(call)}, run by {[run.pid for run in call.runs]}")
        else:
            judgement.reruns += 1
    for run in call.runs:
        if call.nature != "durable" and run.at > call.deadline + STUCK_AFTER_S:
            judgement.blame("late-run", f"{tell(call)}, started {run.at - call.sent:.3f} s after it was sent")


def tell(call: Call) -> str:
    """A call in a line."""
    ends = ", ".join(f"{answer.outcome} after {answer.at - call.sent:.3f} s {answer.detail}" for answer in call.answers)
    runs = ", ".join(f"pid {run.pid} at +{run.at - call.sent:.3f} s attempt {run.attempt}" for run in call.runs)
    done = ", ".join(f"pid {run.pid} at +{run.at - call.sent:.3f} s" for run in call.ends)
    sent = f"{call.kind} {call.id} sent {call.sent:.3f} via {call.via}"
    return f"{sent}: {ends or 'no answer'}; runs: {runs}; ends: {done}"
