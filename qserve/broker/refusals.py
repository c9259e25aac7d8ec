"""Why a call was not taken, as the error that its caller gets: the answers of admit.lua and submit.lua in words."""

from qserve.broker.connection import Answer
from qserve.broker.keys import Keys
from qserve.broker.link import Link
from qserve.broker.retry_after import Pace
from qserve.errors import (
    BackPressureError,
    BrokerUnavailable,
    DeploymentNotFound,
    DeploymentUnavailable,
    QServeError,
)

NO_PAYLOAD = b"payload"
"""What submit.lua says of a call whose large payload Redis has refused to store before."""


def refusal_of_all(deployment: str, answer: Answer) -> QServeError | None:
    """Why none of the calls of one script was taken; None if each of them has an answer of its own.

    Args:
        answer: What admit.lua or submit.lua has returned, or the exception that came instead.
    """
    if isinstance(answer, QServeError):
        return answer
    if str(answer).startswith("OOM"):
        return BrokerUnavailable(
            "Redis has no memory left and refused the call, which does not run. Raise its maxmemory"
        )
    if isinstance(answer, Exception):
        return BrokerUnavailable(f"Redis refused the call, which does not run: {answer}. `qserve doctor` looks for why")
    if answer[0] == -2:
        why = answer[1].decode()
        return DeploymentUnavailable(f"calls to {deployment!r} are refused until a version of it starts: {why}")
    if answer[0] < 0:
        return DeploymentNotFound(f"there is no deployment {deployment!r}: `qserve status` lists those that exist")
    return None


def payload_refused() -> BrokerUnavailable:
    """The error for a call whose large arguments Redis has not stored."""
    return BrokerUnavailable(
        "Redis has no memory left for the large arguments of the call, which does not run. Raise its maxmemory"
    )


def queue_full(deployment: str, depth: int, retry_after_s: float = 1.0) -> BackPressureError:
    """The error for a call that found so many others in the queue."""
    message = f"the queue of {deployment!r} is full ({depth} calls wait or run): try again later"
    return BackPressureError(message, retry_after=retry_after_s)


class FullQueues:
    """The errors for calls that found a full queue, with how long to wait. Belongs to its client's loop.

    Args:
        link: The connection for commands.
    """

    def __init__(self, keys: Keys, link: Link) -> None:
        self._keys = keys
        self._link = link
        self._paces: dict[str, Pace] = {}

    def refusal(self, deployment: str, depth: int) -> BackPressureError:
        """The error for a call that found so many others in the queue."""
        pace = self._paces.get(deployment)
        if pace is None:
            pace = self._paces[deployment] = Pace(self._keys.calls(deployment))
        pace.look(self._link.sender)
        return queue_full(deployment, depth, pace.wait_s(depth))
