"""`celery -A qserve_workers inspect replicas`, `control stop_replica`, `control drain`."""

from typing import TYPE_CHECKING, Any

from celery.worker import state as worker_state
from celery.worker.control import control_command, inspect_command

if TYPE_CHECKING:  # the command line knows the commands too, and needs nothing of the pool
    from qserve_workers.pool.keeper import Keeper


@inspect_command()  # type: ignore[untyped-decorator]
def replicas(state: Any) -> list[dict[str, Any]]:
    """Replicas of this worker: pid, id, tag, state, generation, calls running and handled, uptime."""
    return _keeper(state).describe()


@control_command(args=[("replica", str)], signature="<pid|id|tag>")  # type: ignore[untyped-decorator]
def stop_replica(state: Any, replica: str) -> dict[str, str]:
    """Let one replica finish its calls and leave; another takes its place."""
    keeper = _keeper(state)
    pid = keeper.find(str(replica))
    if pid is None:
        return {"error": f"no replica {replica} of {keeper.deployment} here; `inspect replicas` lists them"}
    if not keeper.stop_replica(pid):
        return {"ok": f"replica {replica} of {keeper.deployment} is leaving already"}
    return {"ok": f"replica {replica} of {keeper.deployment} drains and leaves; another takes its place"}


@control_command()  # type: ignore[untyped-decorator]
def drain(state: Any) -> dict[str, str]:
    """Let all replicas of this worker finish their calls and leave, and end the worker."""
    keeper = _keeper(state)
    worker_state.should_stop = 0
    return {"ok": f"{len(keeper.rollout.crew.by_pid)} replica(s) of {keeper.deployment} drain, the worker ends"}


def _keeper(state: Any) -> "Keeper":
    keeper: Keeper = state.consumer.pool.keeper
    return keeper
