"""The figures of a load generator, as rows of a table."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.openloop import Request


@dataclass(frozen=True)
class Verdict:
    """A demand, and whether it was met. One that is exact must be met however busy the machine is."""

    what: str
    measured: str
    demanded: str
    passed: bool
    is_exact: bool = False

    @classmethod
    def at_most(cls, what: str, value: float, most: float, unit: str) -> "Verdict":
        return cls(what, f"{value:.3g} {unit}", f"<= {most:.3g} {unit}", value <= most)

    @classmethod
    def at_least(cls, what: str, value: float, least: float, unit: str) -> "Verdict":
        return cls(what, f"{value:.3g} {unit}", f">= {least:.3g} {unit}", value >= least)

    @classmethod
    def none(cls, what: str, count: int, of: int) -> "Verdict":
        # With none among n, the true rate is below 3/n with 95 % confidence.
        bound = f" (< {3 / of:.1g})" if of and not count else ""
        return cls(what, f"{count} of {of:,}{bound}", "0", not count, is_exact=True)


@dataclass(frozen=True)
class Step:
    """A time under one load. Goodput counts answers that came in it, latencies are of requests that were due in it."""

    name: str
    rate: float
    sent: int
    goodput: float
    p50_ms: float
    p99_ms: float
    refused: int
    refusal_p99_ms: float
    retry_after: str
    deepest: int
    lag_p99_ms: float
    capacity: float

    @classmethod
    def of(
        cls,
        name: str,
        seen: Iterable[Request],
        begin: float,
        seconds: float,
        depths: Iterable[tuple[float, int]],
        capacity: float,
        settle: float = 0.2,
    ) -> "Step":
        """The figures of a step without its beginning, in which the length of the queue still changes."""
        end = begin + seconds
        begin += min(2.0, settle * seconds)
        seen = list(seen)
        due = [request for request in seen if begin <= request.due < end]
        accepted = [request.seconds for request in due if request.status == 200]
        refused = [request for request in due if request.status == 503]
        waits = [request.retry_after for request in refused]
        return cls(
            name,
            len(due) / (end - begin),
            len(due),
            ended(seen, begin, end) / (end - begin),
            percentile_ms(accepted, 50),
            percentile_ms(accepted, 99),
            len(refused),
            percentile_ms([request.seconds for request in refused], 99),
            f"{min(waits):.1f}-{max(waits):.1f}" if waits else "",
            max((depth for when, depth in depths if begin <= when < end), default=0),
            percentile_ms([request.lag for request in due], 99),
            capacity,
        )

    @property
    def cells(self) -> tuple[str, ...]:
        share = self.refused / max(1, self.sent)
        return (
            self.name,
            f"{self.rate:,.0f}/s",
            f"{self.goodput:,.0f}/s = {self.goodput / self.capacity:.2f} C",
            f"{self.p50_ms:,.0f} / {self.p99_ms:,.0f} ms",
            f"{share:.0%}, p99 {self.refusal_p99_ms:.1f} ms" if self.refused else "none",
            self.retry_after,
            str(self.deepest),
            f"{self.lag_p99_ms:.1f} ms",
        )


HEADS = (
    *("load", "sent", "goodput", "p50 / p99 of accepted", "refused", "Retry-After, s", "longest queue"),
    "generator late, p99",
)


def ended(seen: Iterable[Request], begin: float, end: float) -> int:
    """How many good answers came between two moments."""
    return sum(request.status == 200 and begin <= request.due + request.seconds < end for request in seen)


def percentile_ms(seconds: Iterable[float], percent: int) -> float:
    """A percentile by the nearest rank, in ms; 0 if there are no values."""
    ordered = sorted(seconds)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] * 1000 if ordered else 0.0


def table(about: list[str], rows: list[Step | Verdict]) -> str:
    """The text of overload.md."""
    lines = ["# Overload", "", *about, ""]
    for kind, group in itertools.groupby(rows, type):
        if kind is Step:
            lines += [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
            lines += [f"| {' | '.join(row.cells)} |" for row in group if isinstance(row, Step)]
        else:
            lines += ["| what | measured | demanded | |", "|---|---|---|---|"]
            lines += [
                f"| {row.what} | {row.measured} | {row.demanded} | {'pass' if row.passed else 'FAIL'} |"
                for row in group
                if isinstance(row, Verdict)
            ]
        lines.append("")
    return "\n".join(lines)
