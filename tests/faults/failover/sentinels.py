"""A primary, a replica and three sentinels, for real; every one of them asks for a name and a password."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import redis

from qserve.broker.server import embedded
from tests.support.serving import free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

USER, PASSWORD = "calls", "p@ss/w:rd?#%"
SENTINEL_PASSWORD = "sesame/1"
LOGIN = f"{USER}:{quote(PASSWORD, safe='')}"
SENTINEL_LOGIN = f"sentinel_password={quote(SENTINEL_PASSWORD, safe='')}"
SERVICE = "main"
DATA = f"""
    save ""
    repl-diskless-sync-delay 0
    maxmemory-policy noeviction
    user default off
    user {USER} on ">{PASSWORD}" ~* &* +@all
    masteruser {USER}
    masterauth "{PASSWORD}\""""


class Server:
    """One Valkey, as a server of data or as a sentinel."""

    def __init__(self, folder: Path, config: str, *flags: str) -> None:
        self.port = free_port()
        self.folder = folder
        folder.mkdir()
        self._config = folder / "valkey.conf"
        self._config.write_text(
            f'port {self.port}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/log\nsave ""\n{config}\n'
        )
        self._flags = flags

    def start(self) -> None:
        self.process = subprocess.Popen([str(embedded.find_server()), str(self._config), *self._flags])

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait()

    def accepts(self) -> bool:
        """Whether it listens."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @contextlib.contextmanager
    def client(self, username: str | None = USER, password: str = PASSWORD) -> Iterator["redis.Redis"]:
        """To this very server, whatever its role."""
        with redis.Redis(
            port=self.port, username=username, password=password, protocol=2, socket_timeout=patience(5)
        ) as client:
            yield client

    def role(self) -> str:
        with self.client() as client, contextlib.suppress(redis.RedisError):
            return str(client.execute_command("ROLE")[0].decode())  # type: ignore[no-untyped-call]
        return ""


def sentinel(port: int, quorum: int = 2) -> str:
    """What a sentinel is told that watches a primary.

    It asks once a second whether that lives. If it waited no longer than that, it would find a new primary down as soon
    as it has made it one, where the machine is slow, and go back to the old one.
    """
    return f"""
        requirepass {SENTINEL_PASSWORD}
        sentinel sentinel-pass {SENTINEL_PASSWORD}
        sentinel monitor {SERVICE} 127.0.0.1 {port} {quorum}
        sentinel auth-user {SERVICE} {USER}
        sentinel auth-pass {SERVICE} "{PASSWORD}"
        sentinel down-after-milliseconds {SERVICE} 2000
        sentinel failover-timeout {SERVICE} 5000"""


class Failover:
    """The whole set; `url` is what qserve is told."""

    def __init__(self, folder: Path) -> None:
        self.servers = [Server(folder / "a", DATA)]
        self.servers.append(Server(folder / "b", f"{DATA}\nreplicaof 127.0.0.1 {self.servers[0].port}"))
        self.sentinels = [
            Server(folder / f"sentinel-{i}", sentinel(self.servers[0].port), "--sentinel") for i in range(3)
        ]
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        self.url = f"redis+sentinel://{LOGIN}@{hosts}/{SERVICE}?{SENTINEL_LOGIN}"

    def start(self) -> None:
        """Start all of it, and wait until a failover can succeed."""
        for server in (*self.servers, *self.sentinels):
            server.start()
        wait_until(self.is_ready)

    def kill(self) -> None:
        """End all of it."""
        for server in (*self.sentinels, *self.servers):
            server.kill()

    def primary(self) -> Server:
        """The server that the sentinels name."""
        for sentinel in self.sentinels:
            with sentinel.client(None, SENTINEL_PASSWORD) as client, contextlib.suppress(redis.RedisError):
                _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)  # type: ignore[no-untyped-call]
                return next(server for server in self.servers if server.port == int(port))
        raise AssertionError("no sentinel answers")

    def other(self, server: Server) -> Server:
        """The one that is not it."""
        return next(each for each in self.servers if each is not server)

    def is_ready(self) -> bool:
        """Whether every sentinel knows the others and a replica that could take over."""
        return all(self._sees_all(sentinel) for sentinel in self.sentinels)

    def _sees_all(self, sentinel: Server) -> bool:
        with sentinel.client(None, SENTINEL_PASSWORD) as client, contextlib.suppress(redis.RedisError):
            state: Any = client.sentinel_master(SERVICE)
            replicas: Any = client.sentinel_slaves(SERVICE)
            healthy = [each for each in replicas if each["master-link-status"] == "ok" and not each["is_sdown"]]
            return bool(state["num-other-sentinels"] == 2 and healthy)
        return False
