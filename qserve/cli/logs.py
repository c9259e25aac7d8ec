"""`qserve logs`: the log of the instance on this machine."""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from qserve.cli.output import Failure, note, visible
from qserve.deployments.local_instance import NO_INSTANCE, find_record
from qserve.deployments.log_files import files_of, newest_log_file
from qserve.settings import Settings
from qserve.telemetry.log_reading import GrowingFile, RecordReader, end_of_lines, last_records
from qserve.this_machine import is_running, runtime_folder

_POLL_S = 0.2
_CONTROL = re.compile(r"[\x7f-\x9f]").sub


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Show what is logged from now on, too, until Ctrl-C.")
@click.option("--call", "call_id", default="", metavar="ID", help="Only what names this call or request.")
@click.option("-n", "--lines", type=click.IntRange(min=0), help="Only the last so many records.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each record, a line each.")
@click.argument("name", required=False)
def logs(name: str | None, follow: bool, call_id: str, lines: int | None, as_json: bool) -> None:
    """Show the log of the instance on this machine: all of it, or what is about the deployment NAME or one call."""
    path, pid = log_path()
    words = [word for word in (name, call_id) if word]
    records, files = RecordReader(words), files_of(path)
    with contextlib.suppress(KeyboardInterrupt):
        start = 0
        if lines is None:
            for older in files[:0:-1]:
                with GrowingFile(older) as file:
                    _print(records.feed(file.lines()), as_json)
        else:
            start = end_of_lines(path) if follow else path.stat().st_size
            _print(last_records(files, words, lines, start), as_json)
        with GrowingFile(path, start) as log:
            is_last = False
            while not is_last:
                is_last = not follow or pid is None or not is_running(pid)
                _print(records.feed(log.lines()), as_json)
                if is_last:
                    _print(records.feed([log.rest()]), as_json)
                else:
                    time.sleep(_POLL_S)
                _print(records.flush(), as_json)
        if follow:
            note("The instance has ended.")


def log_path() -> tuple[Path, int | None]:
    """The log file of the instance on this machine, with its pid, or of the last one, which may have crashed.

    Raises:
        Failure: There is none, the instance logs to a terminal, or another one is meant.
    """
    settings = Settings()
    namespace, url = settings.namespace, settings.redis_url
    record = find_record(namespace)
    last = newest_log_file(runtime_folder(), namespace) if record is None else None
    if url and (record.redis_url != url if record is not None else last is not None):
        here = (
            f"the instance that runs here (pid {record.pid})"
            if record is not None
            else f"the log of the last one here, {last},"
        )
        raise Failure(
            "QSERVE_REDIS_URL names an instance elsewhere, whose processes log where they run, to their own output. "
            f"For {here} unset QSERVE_REDIS_URL."
        )
    if record is None:
        if last is None:
            raise Failure(f"{NO_INSTANCE} Nodes that `qserve start` runs log to their own output.")
        note(f"No instance runs; this is the log of the last one, {last}")
        return last, None
    path = Path(record.log_file)
    if not record.log_file or not path.exists():
        raise Failure(
            f"The instance (pid {record.pid}) has no log file: `qserve run` and `qserve start` log to the terminal or "
            "service that started them, such as `journalctl -u UNIT` or `docker logs CONTAINER`."
        )
    return path, record.pid


def _print(records: Iterable[str], as_json: bool) -> None:
    for record in records:
        text = record.rstrip("\n")
        for line in _json_lines(text) if as_json else (visible(text),):
            click.echo(line)


def _json_lines(record: str) -> Iterator[str]:
    """A record that is JSON as it is, and as an object each what is not, such as lines that were printed after it."""
    first, _, rest = record.partition("\n")
    if not _is_object(first):
        rest = record
    else:
        # Within JSON these are parts of texts; as they are, they could command a terminal.
        yield _CONTROL(lambda found: f"\\u{ord(found[0]):04x}", first)
    if rest:
        yield json.dumps({"record": rest})


def _is_object(text: str) -> bool:
    try:
        return text.startswith("{") and isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
