"""What tests see of durable calls, and how they let time pass. Thread-safe."""

from qserve.calls.durable_ref import CallStatus
from qserve_workers.local.local_client import LocalClient
from qserve_workers.local.local_schedules import LocalSchedules


class LocalCalls:
    """The durable calls of deployments in this process."""

    def __init__(self, client: LocalClient, schedules: LocalSchedules) -> None:
        self._client = client
        self._schedules = schedules

    def statuses(self) -> list[CallStatus]:
        """How each call is doing, in the order in which they were submitted."""
        return self._client.durable.statuses()

    def pass_time(self, seconds: float) -> None:
        """Begin the calls, delayed or of schedules, that are due within so many seconds from now."""
        self._client.clock.passed_s += seconds
        self._client.durable.wake(self._client.run_soon, list(self._schedules.due()))
