"""The parent's side of the replicas: feeds the rollout with what happens, and does what it decides.

Everything runs on Celery's event loop, in the main thread; user code is never imported here.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from qserve.background import until_next
from qserve.deployments.alive_files import SAY_EVERY_S, AliveFile
from qserve.settings import Settings
from qserve.wire.autoscaling import Autoscaling
from qserve.wire.messages import Signer
from qserve.wire.spec import DEPLOY_FAILED, DEPLOYING, HEALTHY, WorkerInfo
from qserve_workers.pool import child_signals
from qserve_workers.pool.announce import Announcer
from qserve_workers.pool.rollout import Action, Kill, Publish, Release, Resize, Rollout, Serve, Status, Stop
from qserve_workers.pool.scaling import Scaler, WorkerDemand
from qserve_workers.replica.birth import Birth
from qserve_workers.replica.replica_events import DemandMeasured, decode_event
from qserve_workers.replica.replica_process import ReplicaProcess
from qserve_workers.supervise import reason_of
from qserve_workers.titles import set_title

logger = logging.getLogger(__name__)


ReplicaFactory = Callable[[Birth, Settings], ReplicaProcess]


class Keeper:
    """Owns the rollout of one worker, the pipe its replicas report through, and what the worker announces.

    Args:
        resize: Makes the pool keep that many processes, starting new ones at once.
        call_later: Runs a function after some seconds; returns something with `cancel()`.

    Attributes:
        on_demand: Called when the replicas have reported how much there is to do.
    """

    def __init__(
        self,
        deployment: str,
        concurrency: int,
        settings: Settings,
        make_replica: ReplicaFactory,
        *,
        resize: Callable[[int], None],
        call_later: Callable[[float, Callable[[], None]], Any],
        node: str = "",
        exact: bool = False,
        bounds: tuple[int, int] | None = None,
    ) -> None:
        self.deployment = deployment
        self.id = f"{deployment}-{secrets.token_hex(8)}"
        self.rollout = Rollout(concurrency, exact=exact, bounded=bounds is not None)
        self.scaler = Scaler(bounds)
        self.on_demand: Callable[[], None] = self.act
        self._demand: WorkerDemand | None = None
        self._settings = settings
        self._resize = resize
        self._call_later = call_later
        self._make_replica = make_replica
        self._node = node or self.id
        self._announcer = Announcer(
            settings.redis_url,
            settings.keys,
            Signer(settings.secrets),
            deployment,
            self._node,
            by_hand=not node,
            call_later=call_later,
        )
        self._reader = self._writer = -1
        self._partial = b""
        self._timer: Any = None
        self._alive_timer: Any = None
        self._acting = self._again = False
        self._standby = False
        self._rank = 0

    def start(self) -> None:
        """Open the reports pipe; call before the first fork."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._announcer.start()
        self._alive = AliveFile(self._settings.namespace, f"worker of {self.deployment}")
        self.say_alive()

    def stop(self) -> None:
        """Say goodbye; call when the last replica is gone."""
        self._announcer.publish(None)
        self._announcer.stop()
        self._alive.remove()
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """The end of the reports pipe to watch; call `on_readable` when it is readable."""
        return self._reader

    # Called by the pool

    def before_birth(self) -> Callable[[], ReplicaProcess]:
        """What the process forked next shall run."""
        self._standby, failures, self._rank = self.rollout.birth()
        scaled = self.scaler.bounds is not None
        birth = Birth(self.deployment, self.id, self._node, self._standby, failures, self._writer, scaled, self._rank)
        return partial(self._in_child, birth)

    def _in_child(self, birth: Birth) -> ReplicaProcess:
        os.close(self._reader)
        set_title(f"qserve: replica of {birth.deployment}")
        return self._make_replica(birth, self._settings)

    def after_birth(self, pid: int) -> None:
        """A process has been forked."""
        self.rollout.born(pid, time.monotonic(), standby=self._standby, rank=self._rank)
        self._announcer.count("replicas started")

    def on_no_birth(self, error: OSError) -> None:
        """A process could not be forked."""
        problem = (
            f"No process can be started for a replica: {error.strerror}. Those that run serve on, and it is tried "
            "again. Have fewer replicas here, or raise the limits of processes, memory and open files"
        )
        logger.warning("Deployment %s: %s", self.deployment, problem)
        self.rollout.missed_birth(problem)

    def on_death(self, pid: int, exitcode: int | None) -> bool:
        """A process has ended and been reaped; False: by itself, before it had come to anything."""
        self._read()  # what it said last counts
        how = "end unknown" if exitcode is None else reason_of(exitcode)
        replica = self.rollout.died(pid, how, time.monotonic())
        if replica is None:
            return True
        # User code may end its process with 0, too: only one that said that it leaves has left.
        has_died = bool(exitcode or (replica.state and not replica.leaving))
        self._announcer.count("replicas died" if has_died else "replicas left")
        logger.log(
            logging.INFO if replica.leaving and not exitcode else logging.WARNING,
            "Deployment %s: replica %s (pid %d) has ended, %s",
            *(self.deployment, replica.id or "unnamed", pid, how),
        )
        if has_died:
            self._announcer.note_death(pid, how)
        if replica.id and has_died:  # who has left has said goodbye; a tombstone would count as a crash
            self._announcer.bury(replica.id, how)
        self.act()
        return bool(replica.state) or replica.leaving

    def on_readable(self, *_args: object) -> None:
        """Replicas have reported."""
        before = self._demand
        self._read()
        if self._demand is not before:
            self.on_demand()
        self.act()

    def act(self) -> None:
        """Do what there is to do now, and come back when the next thing is due."""
        if self._acting:  # a resize reaps too, and a death comes back here
            self._again = True
            return
        self._acting = self._again = True
        try:
            while self._again:
                self._again = False
                for action in self.rollout.actions(time.monotonic()):
                    self._do(action)
        finally:
            self._acting = False
        self._arm()

    def say_alive(self) -> None:
        """Say, now and every few seconds, that this worker makes progress."""
        self._alive.touch()
        self._announcer.tell_again()
        if self._alive_timer is not None:
            self._alive_timer.cancel()
        self._alive_timer = self._call_later(until_next(SAY_EVERY_S), self.say_alive)

    def resume(self) -> None:
        """The event loop is (again) connected to the broker; timers set while it was not are void."""
        self._announcer.resume()
        self.say_alive()
        self.act()

    # Called by the autoscaler

    def decide(self, now: float) -> int:
        """How many replicas there are to be; 0 where they are not scaled, or nothing was measured yet."""
        rollout, bounds = self.rollout, self.scaler.bounds
        if not rollout.is_scaled or rollout.crew.desired is None or self._demand is None:
            return 0
        policy = rollout.crew.desired.autoscaling or Autoscaling(*(bounds or (1, 1)))
        return self.scaler.decide(self._demand, policy, current=rollout.wanted, ready=rollout.crew.ready, now=now)

    def scale(self, wanted: int) -> None:
        """Have so many replicas; those that are too many leave when they are idle."""
        self.rollout.scale(wanted, self.scaler.lowest)
        self.act()

    def _do(self, action: Action) -> None:
        match action:
            case Stop(pid):
                logger.info("Deployment %s: pid %d is to drain and leave", self.deployment, pid)
                _signal(pid, child_signals.LEAVE)
            case Release(pid):
                _signal(pid, child_signals.RELEASE)
            case Serve(pid):
                _signal(pid, child_signals.SERVE)
            case Kill(pid, why):
                logger.warning("Deployment %s: killing pid %d: %s", self.deployment, pid, why)
                _signal(pid, signal.SIGKILL)
            case Resize(processes):
                self._resize(processes)
            case Publish(status):
                self._publish(status)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self.rollout.next_deadline()
        if deadline is not None:
            self._timer = self._call_later(max(0.0, deadline - time.monotonic()), self.act)

    # Called by control commands

    def find(self, which: str) -> int | None:
        """The pid of one of this worker's replicas, by pid, id or tag."""
        tags = {info.tag: info.pid for info in self._announcer.describe().values()} if "#" in which else {}
        for pid, replica in self.rollout.crew.by_pid.items():
            if which in (str(pid), replica.id) or tags.get(which) == pid:
                return pid
        return None

    def stop_replica(self, pid: int) -> bool:
        """Let one replica drain and leave; another takes its place. False if it is leaving already."""
        stopped = self.rollout.stop(pid, time.monotonic())
        if stopped:
            _signal(pid, child_signals.LEAVE)
            self.act()
        return stopped

    def describe(self) -> list[dict[str, Any]]:
        """This worker's replicas, for `celery inspect replicas`."""
        infos = self._announcer.describe()
        now = time.monotonic()
        return [
            {
                "pid": replica.pid,
                "replica": replica.id,
                "tag": infos[replica.id].tag if replica.id in infos else "",
                "state": "DRAINING" if replica.leaving else replica.state or "WAITING",
                "generation": replica.applied,
                "running": replica.running,
                "handled": replica.handled,
                "uptime_s": round(now - replica.born_at, 1),
            }
            for replica in self.rollout.crew.by_pid.values()
        ]

    def _publish(self, status: Status | None) -> None:
        if status is None:
            self._announcer.publish(None)
            return
        if status.state != DEPLOYING:
            logger.log(
                logging.ERROR if status.state == DEPLOY_FAILED else logging.INFO,
                "Deployment %s, generation %d: %s, %d of %d replicas ready%s",
                *(self.deployment, status.generation, status.state, status.ready, status.wanted),
                "" if status.state == HEALTHY else f": {(status.error.strip().splitlines() or ['?'])[-1]}",
            )
        self._announcer.publish(
            WorkerInfo(
                id=self.id,
                node=self._node,
                host=socket.gethostname(),
                pid=os.getpid(),
                generation=status.generation,
                state=status.state,
                wanted=status.wanted,
                ready=status.ready,
                error=status.error,
            )
        )

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._reader, 65_536)
            except BlockingIOError:
                return
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            for line in lines:
                try:
                    event = decode_event(line)
                except msgspec.DecodeError as exc:
                    logger.error("Deployment %s: ignoring what is no event, %r: %s", self.deployment, line, exc)
                    continue
                now = time.monotonic()
                self.rollout.report(event, now)
                if isinstance(event, DemandMeasured):
                    self._demand = WorkerDemand.from_event(event, now)


def _signal(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was faster; the pool will hear of its death
        os.kill(pid, signum)
