"""Calls of this process that were refused, or that it did not wait for any longer: counted, and told once a second."""

from qserve.broker.connection import Connection
from qserve.broker.history.buckets import send_ends
from qserve.broker.history.totals import send_total
from qserve.broker.history.troubles import LONGEST_TEXT, Trouble, send_trouble
from qserve.broker.keys import Keys
from qserve.errors import CallCancelled, DeploymentNotFound, QServeError

REFUSED, GAVE_UP = "refused", "gave up"


class TroubledCalls:
    """Belongs to the event loop of its client. What it holds is bounded by the deployments and classes of errors."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Trouble] = {}

    def note(self, deployment: str, call_id: str, what: str, error: QServeError) -> None:
        """Note that a call was refused, or given up."""
        if isinstance(error, DeploymentNotFound | CallCancelled):
            return  # there is no deployment to tell of, or nothing is wrong
        key = (deployment, what, error.code)
        before = self._found.get(key)
        if before is None:
            text = f"{error.code}: {error}"[:LONGEST_TEXT]
            self._found[key] = Trouble(what, call=call_id, error=text)
        else:
            self._found[key] = Trouble(what, times=before.times + 1, error=before.error)

    def send(self, connection: Connection, keys: Keys) -> None:
        """Tell what was noted since the last time."""
        if not self._found or not connection.is_open:
            return
        found, self._found = self._found, {}
        for (deployment, what, _), trouble in found.items():
            send_trouble(connection, keys, deployment, trouble)
            send_ends(connection, keys, deployment, {what: trouble.times})
            send_total(connection, keys, deployment, f"caller {what.replace(' ', '_')}", trouble.times)
