"""A Celery app like ours whose replicas are fakes that follow a JSON file instead of Redis.

The file (`FAKE_REPLICA_STATE`) holds null, or generation, revision, num_replicas, surge and how the fake behaves. What
the fakes do is noted beside it, in a file of the same name with `.log`.
"""

import errno
import json
import os
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

from qserve.settings import Settings
from qserve_workers.celery_app import App
from qserve_workers.replica.birth import Birth

app = App(Settings())
app.conf.qserve_replica = "fake_replica:FakeReplica"


if "FAKE_REPLICA_NO_FORKS" in os.environ:
    _fork, _forks = os.fork, count(1)

    def fork() -> int:
        """The first fork succeeds, and the next two do not, as where there are too many processes."""
        if next(_forks) in (2, 3):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return _fork()

    os.fork = fork


class FakeReplica:
    """Behaves to the pool as `ReplicaProcess` does."""

    def __init__(self, birth: Birth, _settings: Settings) -> None:
        self.birth = birth
        self.file = Path(os.environ["FAKE_REPLICA_STATE"])
        self.may_serve = threading.Event()
        self.draining = threading.Event()
        self.drained = threading.Event()
        self.spec: dict[str, Any] = {}
        self.seen: Any = 0

    def start(self, _hear: object = None) -> None:
        self.note("born", standby=self.birth.standby)
        if "FAKE_REPLICA_CRASHES" in os.environ:
            os._exit(3)
        if not self.birth.standby:
            self.may_serve.set()
        threading.Thread(target=self.run, daemon=True).start()

    def serve(self) -> None:
        self.may_serve.set()

    def release(self) -> None:
        self.draining.set()

    def drain(self) -> None:
        self.draining.set()

    def wait_drained(self, timeout: float | None) -> bool:
        return self.drained.wait(timeout)

    def note(self, event: str, **facts: Any) -> bytes:
        pid = os.getpid()
        line = json.dumps({"pid": pid, "replica": f"replica-{pid}", "event": event, "at": time.time(), **facts})
        with self.file.with_suffix(".log").open("ab", buffering=0) as log:
            log.write(line.encode() + b"\n")
        return line.encode() + b"\n"

    def report(self, event: str, **facts: Any) -> None:
        os.write(self.birth.reports_fd, self.note(event, **facts))

    def state(self, state: str) -> None:
        self.report("state", state=state, generation=self.spec["generation"], revision=self.spec["revision"])

    def follow(self) -> None:
        found = json.loads(self.file.read_text())
        if found == self.seen:
            return
        self.seen = found
        if found and found.get("exits") == os.getpid():
            os._exit(0)
        if found is None:
            self.report("deleted")
            return
        facts = ("generation", "revision", "num_replicas", "surge", "initialization_timeout", "graceful_timeout")
        self.report("deployed", **{name: found[name] for name in facts if name in found})
        if self.spec and found["revision"] == self.spec["revision"]:
            if found.get("refuse"):
                self.report("reconfigure_failed", generation=found["generation"], error="cannot reconfigure")
            else:
                self.report("applied", generation=found["generation"])
        elif not self.spec:
            self.spec = found

    def run(self) -> None:
        while not self.spec and not self.draining.wait(0.01):
            self.follow()
        if self.spec:
            self.construct()
        while not self.draining.wait(0.01):
            self.follow()
        if self.spec:
            self.state("DRAINING")
            while self.spec.get("stuck"):
                time.sleep(1)
            time.sleep(self.spec.get("drain_s", 0))
        self.note("drained")
        self.drained.set()

    def construct(self) -> None:
        self.state("STARTING")
        if self.spec.get("grandchild") and os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        self.draining.wait(min(0.2, 0.05 * self.birth.failures))
        self.draining.wait(self.spec.get("construct_s", 0))
        if self.spec.get("fail"):
            facts = {"generation": self.spec["generation"], "revision": self.spec["revision"]}
            self.report("failed", error="RuntimeError: no such model", **facts)
            os._exit(0)
        if not self.may_serve.is_set():
            self.state("STANDBY")
        while not self.may_serve.wait(0.01) and not self.draining.is_set():
            self.follow()
        self.state("SERVING")
