"""The folder in which an embedded server keeps its data: who may use it, and what is said to those who may not."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from qserve.broker.server import embedded
from qserve.deployments import data_folder
from qserve.deployments.data_folder import DataFolder
from qserve.errors import ConfigurationError


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_server", lambda: Path("valkey-server"))
    monkeypatch.setattr(data_folder, "_version_of", lambda _server: "Valkey 8.1")


def test_its_key_is_that_of_the_first_run_unless_another_is_given(tmp_path: Path) -> None:
    path = tmp_path / "some" / "data"
    key = DataFolder(path).prepare("")
    assert len(key) == 64
    assert DataFolder(path).prepare("") == key
    assert DataFolder(path).prepare("given") == "given"
    assert path.stat().st_mode & 0o77 == 0
    assert (path / "instance.json").stat().st_mode & 0o77 == 0


def test_the_next_run_knows_the_last_node(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.prepare("")
    assert folder.last_node == ""
    folder.note_node("a")
    assert DataFolder(tmp_path).last_node == "a"


def test_one_instance_at_a_time_uses_it_and_others_are_told_which(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    folder.prepare("")
    folder.hold()
    other = (
        "from pathlib import Path; from qserve.deployments.data_folder import DataFolder; "
        f"DataFolder(Path({str(tmp_path)!r})).hold()"
    )

    done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)

    assert f"is in use by another instance (pid {os.getpid()})" in done.stderr
    folder.release()
    subprocess.run([sys.executable, "-c", other], check=True)


def test_what_a_newer_server_has_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DataFolder(tmp_path).prepare("")
    monkeypatch.setattr(data_folder, "_version_of", lambda _server: "Valkey 8.0")
    with pytest.raises(
        ConfigurationError, match=r"Valkey 8\.1 has written .*, and Valkey 8\.0, .* install Valkey 8\.1"
    ):
        DataFolder(tmp_path).prepare("")
    monkeypatch.setattr(data_folder, "_version_of", lambda _server: "Valkey 10.0")
    DataFolder(tmp_path).prepare("")


def test_a_folder_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigurationError, match=r"/file cannot be used for data: File exists\. Name one"):
        DataFolder(file).prepare("")
    with pytest.raises(ConfigurationError, match=r"/proc/none cannot be used for data"):
        DataFolder(Path("/proc/none")).prepare("")


def test_a_broken_record_is_not_replaced_for_the_key_in_it_would_be_lost(tmp_path: Path) -> None:
    DataFolder(tmp_path).prepare("")
    record = tmp_path / "instance.json"
    record.write_bytes(msgspec.json.encode({"secret": 1}))
    with pytest.raises(ConfigurationError, match=r"instance\.json cannot be read .* restore that file"):
        DataFolder(tmp_path).prepare("")
    assert record.read_bytes() == b'{"secret":1}'
