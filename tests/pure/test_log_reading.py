"""Records of a log, and a file that is rotated while it is read."""

import os
from pathlib import Path

import pytest

from qserve.telemetry import log_reading
from qserve.telemetry.log_reading import GrowingFile, RecordReader, last_records

STAMP = "2026-03-01 12:04:00,000 INFO x:"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_a_file_that_is_cut_short_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\nthr")
    with GrowingFile(path) as file:
        assert list(file.lines()) == ["one\n", "two\n"]
        os.truncate(path, 0)
        assert list(file.lines()) == []
        append(path, "ee\nfour\n")
        assert list(file.lines()) == ["ee\n", "four\n"]


def test_a_file_that_is_replaced_is_read_to_its_end_before_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\n")
    with GrowingFile(path) as file:
        assert list(file.lines()) == ["one\n"]
        path.rename(tmp_path / "log.1")
        append(tmp_path / "log.1", "two\nnot whole")
        assert list(file.lines()) == ["two\n"]  # there is no new one yet
        path.touch()
        assert list(file.lines()) == []
        append(path, "three\n")
        assert list(file.lines()) == ["not whole\n", "three\n"]
        path.unlink()
        assert list(file.lines()) == []


def test_a_line_of_any_length_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reading, "_LONGEST_LINE", 10)
    path = tmp_path / "log"
    path.write_text("x" * 11)
    with GrowingFile(path) as file:
        assert list(file.lines()) == ["x" * 11]
        append(path, "y\n")
        assert list(file.lines()) == ["y\n"]


def test_what_begins_no_record_is_given_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reading, "_MOST_LINES", 2)
    printed = ["a\n", "b\n", "c\n", f"{STAMP} d\n"]
    reader = RecordReader()
    assert [*reader.feed(printed), *reader.flush()] == ["a\nb\n", "c\n", f"{STAMP} d\n"]
    path = tmp_path / "log"
    path.write_text("".join(printed))
    assert last_records([path], [], 10, path.stat().st_size) == ["a\n", "b\nc\n", f"{STAMP} d\n"]


def test_what_follows_a_record_that_was_shown_belongs_to_it() -> None:
    reader = RecordReader(["Echo"])
    shown = [*reader.feed([f"{STAMP} Echo failed\n"]), *reader.flush()]
    shown += [*reader.feed(["ValueError: low\n", f"{STAMP} Echoes\n"]), *reader.flush()]
    assert shown == [f"{STAMP} Echo failed\n", "ValueError: low\n"]
    assert [*reader.feed(["of Echoes\n"]), *reader.flush()] == []
