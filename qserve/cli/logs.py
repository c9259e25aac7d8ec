"""`qserve logs`: the log of the instance on this machine."""

import json
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import click

from qserve.cli.output import Failure, note, visible
from qserve.deployments.local_instance import NO_INSTANCE, find_record
from qserve.deployments.log_files import newest_log_file
from qserve.settings import Settings
from qserve.this_machine import runtime_folder

_POLL_S = 0.2
_BEGINS = re.compile(r"\{|\[?\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|\[")
"""How the first line of a record begins: the others are tracebacks and the like."""


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Show what is logged from now on, too, until Ctrl-C.")
@click.option("--call", "call_id", default="", metavar="ID", help="Only what names this call or request.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last so many records.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each record, a line each.")
@click.argument("name", required=False)
def logs(name: str | None, follow: bool, call_id: str, lines: int | None, as_json: bool) -> None:
    """Show the log of the instance on this machine: all of it, or what is about the deployment NAME or one call."""
    path = log_path()
    wanted = [word for word in (name, call_id) if word]
    try:
        with path.open(errors="replace", newline="\n") as file:
            found = (each for each in records(file) if _is_about(each, wanted))
            for record in found if lines is None else deque(found, lines):
                _print(record, as_json)
            while follow and path.exists():
                time.sleep(_POLL_S)
                for record in records(_whole_lines(file)):
                    if _is_about(record, wanted):
                        _print(record, as_json)
    except KeyboardInterrupt:
        pass


def log_path() -> Path:
    """The log file of the instance on this machine, or of the last one, which may have crashed.

    Raises:
        Failure: There is none, or the instance logs to a terminal.
    """
    namespace = Settings().namespace
    record = find_record(namespace)
    if record is None:
        last = newest_log_file(runtime_folder(), namespace)
        if last is None:
            raise Failure(f"{NO_INSTANCE} Nodes that `qserve start` runs log to their own output.")
        note(f"No instance runs; this is the log of the last one, {last}")
        return last
    path = Path(record.log_file)
    if not record.log_file or not path.exists():
        raise Failure(
            f"The instance (pid {record.pid}) has no log file: `qserve run` and `qserve start` log to the terminal or "
            "service that started them, such as `journalctl -u UNIT` or `docker logs CONTAINER`."
        )
    return path


def _whole_lines(file: TextIO) -> Iterator[str]:
    """The lines that are left in a file, but the beginning of one that is being written."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield line


def records(file: Iterable[str]) -> Iterator[str]:
    """The records among the lines of a log, each with the lines that belong to it."""
    lines: list[str] = []
    for line in file:
        if lines and _BEGINS.match(line):
            yield "".join(lines)
            lines = []
        lines.append(line)
    if lines:
        yield "".join(lines)


def _is_about(record: str, words: list[str]) -> bool:
    return all(re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w-])", record) for word in words)


def _print(record: str, as_json: bool) -> None:
    text = record.rstrip("\n")
    if not as_json or text.startswith("{"):
        click.echo(visible(text))
    else:
        click.echo(json.dumps({"record": text}))
