"""The table: one row per run, printed, and kept in benchmarks/chaos.md with the seeds and figures."""

import os
import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from tests.faults.chaos.ledger import OK
from tests.faults.chaos.play import Result
from tests.faults.chaos.verdicts import VERDICTS
from tests.support.serving import ROOT

PATH = ROOT / "benchmarks/chaos.md"
_COLUMNS = (
    *("run", "what is done", "seed", "times", "calls", "durable", "ok", "told otherwise"),
    *(*VERDICTS, "95 % bound", "ran again", "indeterminate", "verdict"),
)
_FIGURES = ("run", "figure", "value")
_CALLS, _DURABLE = _COLUMNS.index("calls"), _COLUMNS.index("durable")
_INTRODUCTION = """# What the chaos suite has shown

Written by `make chaos` (tests/faults/chaos); [how this is tested](../docs/chaos.md) says what the columns mean. The
bound is 3/n: with no violation among n calls, the true rate is below it with 95 % confidence.
"""

Row = tuple[str, ...]


def table(results: Iterable[Result]) -> str:
    """The rows of some runs."""
    return _table(_COLUMNS, [_row(result) for result in results])


def save(results: Sequence[Result], order: Sequence[str]) -> None:
    """Put the rows into the document, in place of those that these runs have there.

    Args:
        order: Names of all runs of the suite, as they are to stand.
    """
    text = PATH.read_text() if PATH.exists() else ""
    played = {result.run for result in results}
    rows = [row for row in _rows(text, len(_COLUMNS)) if row[0] in order and row[0] not in played]
    figures = [row for row in _rows(text, len(_FIGURES)) if row[0] in order and row[0] not in played]
    rows += [_row(result) for result in results]
    figures += [(result.run, name, value) for result in results for name, value in result.figures.items()]
    rows.sort(key=lambda row: order.index(row[0]))
    figures.sort(key=lambda row: order.index(row[0]))
    calls, durable = (sum(int(row[column]) for row in rows) for column in (_CALLS, _DURABLE))
    machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    totals = f"{calls:,} calls, {durable:,} of them durable, in {len(rows)} of {len(order)} runs. {machine}."
    parts = (_INTRODUCTION, totals, "", _table(_COLUMNS, rows), "", "## Figures", "", _table(_FIGURES, figures), "")
    PATH.write_text("\n".join(parts))


def _table(columns: Row, rows: Iterable[Row]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, tuple("---" for _ in columns), *rows))


def _rows(text: str, width: int) -> list[Row]:
    lines = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    return [tuple(cells) for cells in lines if len(cells) == width]


def _row(result: Result) -> Row:
    judged = result.judgement
    ended: Counter[str] = Counter()
    for (_, outcome), count in judged.outcomes.items():
        ended[outcome] += count
    good = ended.pop(OK, 0)
    told = ", ".join(f"{count} x {outcome}" for outcome, count in sorted(ended.items())) or "0"
    found = [len(judged.violations.get(verdict, ())) for verdict in VERDICTS]
    bound = f"{3 / judged.calls:.1e}" if judged.calls and not any(found) else "-"
    counts = (result.seed, result.faults, judged.calls, judged.durable, good)
    return (
        *(result.run, result.title, *(str(count) for count in counts), told, *(str(count) for count in found)),
        *(bound, str(judged.reruns), str(judged.indeterminate), "holds" if result.holds else "VIOLATED"),
    )
