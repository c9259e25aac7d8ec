"""An instance whose Redis has a user for each kind of process, all of them under names and secrets one can look for."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from click.testing import CliRunner

from qserve.broker.server import embedded
from qserve.broker.server.acl import ROLES
from qserve.cli.checks.redis_acl import redis_acl
from tests.support.servers import wait_until_accepting
from tests.support.serving import ROOT, free_port
from tests.support.slowness import patience

NAMESPACE = "guarded"


@dataclass
class Guarded:
    """The server and what runs on it.

    Attributes:
        passwords: By role; "admin" may do everything.
        secret: QSERVE_SECRET.
    """

    folder: Path
    port: int
    passwords: dict[str, str]
    secret: str
    gateway_url: str = ""
    processes: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def url(self, role: str) -> str:
        user = "admin" if role == "admin" else f"qserve-{role}"
        return f"redis://{user}:{self.passwords[role]}@127.0.0.1:{self.port}/0"

    def connect(self, role: str) -> "redis.Redis":
        return redis.Redis.from_url(self.url(role), protocol=2)

    def environment(self, role: str, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("QSERVE_")}
        mine = {
            "QSERVE_REDIS_URL": self.url(role),
            "QSERVE_SECRET": self.secret,
            "QSERVE_NAMESPACE": NAMESPACE,
            "QSERVE_RUNTIME_DIR": str(self.folder),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]),
        }
        return kept | mine | more

    def run(self, role: str, *command: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """A Python module to its end, as a user of a role."""
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=self.environment(role, **more),
            capture_output=True,
            text=True,
            timeout=patience(60),
            check=False,
        )

    def start(self, role: str, log: str, *command: str, **more: str) -> "subprocess.Popen[bytes]":
        """A Python module that stays."""
        with (self.folder / f"{log}.log").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=self.environment(role, **more),
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def denied(self) -> "list[dict[str, Any]]":
        """What the server refused to users of ours, without what libraries say of themselves."""
        with self.connect("admin") as admin:
            found: list[dict[str, Any]] = admin.acl_log()
        return [entry for entry in found if _text(entry["object"]) not in ("client|setinfo", "config|get")]


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def acl_file(passwords: dict[str, str]) -> str:
    """What `qserve redis-acl` prints, and an administrator instead of the default user."""
    given = {f"QSERVE_ACL_{role.name.upper()}": passwords[role.name] for role in ROLES}
    printed = CliRunner().invoke(redis_acl, ["--namespace", NAMESPACE], env=given)
    assert printed.exit_code == 0, printed.output
    admin = f"user admin on >{passwords['admin']} ~* &* +@all\n"
    return f"user default off\n{admin}{printed.stdout}"


@contextmanager
def guarded(
    folder: Path, mark: str = "", *, processes: bool = True, variables: Mapping[str, str] | None = None
) -> Iterator[Guarded]:
    """Runs a server, a node and a gateway.

    Args:
        mark: Begins every secret.
        processes: Run a node and a gateway; else the server alone.
        variables: Environment of the gateway and the node.
    """
    passwords = {role.name: f"{mark}{secrets.token_hex(8)}" for role in ROLES} | {"admin": secrets.token_hex(8)}
    found = Guarded(folder, free_port(), passwords, f"{mark}{secrets.token_hex(16)}")
    users = folder / "users.acl"
    users.write_text(acl_file(passwords))
    server = subprocess.Popen(
        [
            *(*embedded.command(folder), "--port", str(found.port), "--bind", "127.0.0.1", "--aclfile", str(users)),
            # so that DEBUG is refused to users, not to everybody; so that what is stored can be searched
            *("--enable-debug-command", "yes", "--rdbcompression", "no"),
        ]
    )
    try:
        wait_until_accepting(embedded.socket_path(folder), server)
        if processes:
            found.start("worker", "node", "qserve_workers.node", "--exact", **(variables or {}))
            ready = folder / "ready"
            os.mkfifo(ready)
            found.start(
                *("gateway", "gateway", "qserve_gateway", "--port", "0", "--ready-file", str(ready)),
                **(variables or {}),
            )
            found.gateway_url = json.loads(ready.read_text())["url"]
        yield found
    finally:
        for process in found.processes:
            process.terminate()
        for process in found.processes:
            try:
                process.wait(patience(30))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        server.kill()
        server.wait()
