"""The folder in which the embedded server of an instance keeps its data, from one run to the next."""

import contextlib
import fcntl
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from qserve.broker.server import embedded
from qserve.errors import ConfigurationError


class _Record(msgspec.Struct, kw_only=True):
    """What one run tells the next. It holds the signing key, so only its user may read it.

    Attributes:
        server: The server that has written here, such as "Valkey 8.1".
        node: Id of the last node.
    """

    secret: str
    server: str = ""
    node: str = ""


class DataFolder:
    """Such a folder, which one instance at a time may use."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._record_path = self.path / "instance.json"
        self._lock: Any = None

    def prepare(self, secret: str) -> str:
        """Make the folder, or see to it that it can be used again.

        Args:
            secret: The key of this instance; "": that of the last run, or a new one.

        Returns:
            The key of this instance.

        Raises:
            ConfigurationError: Another instance uses it, a newer server has written there, or it cannot be used.
        """
        server = _version_of(embedded.find_server())
        with self._errors():
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            record = self._read() or _Record(secret=secrets.token_hex(32))
            if _is_newer(record.server, server):
                raise ConfigurationError(
                    f"{record.server} has written the data in {self.path}, and {server}, which is installed here, may "
                    f"not be able to read it. Nothing was started: install {record.server} or newer, or name another "
                    "folder."
                )
            self.hold()
            self.release()
            record.secret, record.server = secret or record.secret, server
            self._write(record)
        return record.secret

    def hold(self) -> None:
        """Use the folder, until this process ends.

        Raises:
            ConfigurationError: Another process uses it.
        """
        with self._errors():
            # Not `flock`: children would inherit that, and one that outlives its parents would keep it.
            lock = (self.path / "lock").open("a+")
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip()
                lock.close()
                raise ConfigurationError(
                    f"The data in {self.path} is in use by another instance (pid {holder}). Nothing was started: end "
                    "that one first, or name another folder."
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            self._lock = lock

    def release(self) -> None:
        """Let another process use it."""
        self._lock.close()

    @property
    def last_node(self) -> str:
        """Id of the node that has run here last; "" where none has."""
        record = self._read()
        return record.node if record is not None else ""

    def note_node(self, node: str) -> None:
        """Tell the next run which node has run here last."""
        record = self._read()
        if record is not None:
            record.node = node
            with self._errors():
                self._write(record)

    def _read(self) -> _Record | None:
        try:
            return msgspec.json.decode(self._record_path.read_bytes(), type=_Record)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigurationError(
                f"{self._record_path} cannot be read ({exc}), and without the key in it nobody can read the calls "
                "in that folder. Nothing was started: restore that file, or name another folder."
            ) from exc

    def _write(self, record: _Record) -> None:
        new = self._record_path.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.encode(record))
        new.replace(self._record_path)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise ConfigurationError(
                f"The folder {self.path} cannot be used for data: {exc.strerror or exc}. Name one that this user may "
                "write to."
            ) from exc


def _version_of(server: Path) -> str:
    answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
    found = re.match(r"(\w+) server v=(\d+\.\d+)", answer)
    return f"{found[1]} {found[2]}" if found else ""


def _is_newer(one: str, other: str) -> bool:
    """Whether one server is a newer version of the other."""
    (name, _, version), (other_name, _, other_version) = one.partition(" "), other.partition(" ")
    return name == other_name and _numbers(version) > _numbers(other_version)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part]
