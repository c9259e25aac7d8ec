"""All errors that qserve raises, with the HTTP status that each becomes.

QServeError
 |- DeploymentNotFound      404  no such deployment (any more)
 |- MethodNotFound          404  the deployment has no such public method
 |- CallNotFound            404  no durable call has this id (any more)
 |- IdempotencyConflict     422  the idempotency key was used for another request
 |- NoInstanceError              no qserve instance is running here
 |- ConfigurationError           a setting, module or server is not usable as it is
 |- ValueNotSerializable    400  an argument cannot be sent
 |- PayloadTooLarge         413  a request or argument list over the limit
 |- BackPressureError       503  the deployment's queue is full
 |- DeploymentUnavailable   503  no replica has been seen, or the deployment failed
 |- BrokerUnavailable       503  Redis cannot be reached
 |- GetTimeoutError         504  the deadline passed (also a TimeoutError)
 |- CallCancelled           499  the caller withdrew the call
 |- ReplicaDied             502  the replica died under the call, which may have run
 |- Indeterminate           502  the call or its answer was lost: it may have run or not
 |- StreamBroken            502  a stream ended before its end
 |- FrameRejected                a message with a bad signature or shape
 '- TaskError               500  user code raised; also an instance of the original class
     |- ResultNotSerializable    the result cannot be sent
     |- ResultTooLarge           the result is over the limit
     '- PoisonCall               the call killed every replica it was given to
"""

from typing import Any, NamedTuple


class QServeError(Exception):
    """Base of all qserve errors; `status` is the HTTP status it becomes, `code` its name on the wire."""

    status = 500

    @property
    def code(self) -> str:
        return type(self).__name__


class DeploymentNotFound(QServeError):
    """There is no deployment of that name."""

    status = 404


class MethodNotFound(QServeError):
    """The deployment has no public method of that name."""

    status = 404


class CallNotFound(QServeError):
    """There is no durable call of that id, or it ended so long ago that it is forgotten."""

    status = 404


class IdempotencyConflict(QServeError):
    """The idempotency key has been used for another request."""

    status = 422


class NoInstanceError(QServeError):
    """No qserve instance is running, or none can be found from here."""


class ConfigurationError(QServeError):
    """Something that the code needs cannot be used: a module, a port, a server, a setting."""


class ValueNotSerializable(QServeError, TypeError):
    """A value cannot be sent to another process; the text names it, its type and what can be done."""

    status = 400


class PayloadTooLarge(QServeError, ValueError):
    """A request or argument list is over the limit."""

    status = 413


class BackPressureError(QServeError):
    """The deployment's queue is full; try again after `retry_after` seconds."""

    status = 503

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeploymentUnavailable(QServeError):
    """Nothing can serve the call: the deployment failed, or no replica has been seen."""

    status = 503


class BrokerUnavailable(QServeError, ConnectionError):
    """Redis cannot be reached, or refused the call."""

    status = 503


class GetTimeoutError(QServeError, TimeoutError):
    """The result was not there in time. When it was `get` that did not wait longer, the call goes on."""

    status = 504


class CallCancelled(QServeError):
    """The caller withdrew the call before it ended."""

    status = 499


class ReplicaDied(QServeError):
    """The replica died while it had the call; it may have run, so it is not run again."""

    status = 502


class Indeterminate(QServeError):
    """The call or its answer was lost, or a gateway ended before it; it may have run or not, and is not run again."""

    status = 502


class StreamBroken(QServeError, ConnectionError):
    """A stream ended before its end: the other side died, left or gave up."""

    status = 502


class FrameRejected(QServeError):
    """A message was not signed with a known key, or does not have the form that it should have."""


class TaskFailure(NamedTuple):
    """What happened in the replica, as qserve tells it.

    Attributes:
        message: `str()` of the original exception.
        type_name: Qualified name of the original class.
        module: Module of the original class.
        traceback_text: The remote traceback, for logs.
        cause: The rebuilt original exception, or None.
    """

    message: str
    type_name: str = ""
    module: str = ""
    traceback_text: str = ""
    cause: BaseException | None = None


class TaskError(QServeError):
    """User code raised in a replica.

    What a caller catches is a `TaskError` and, where the original class is a builtin, one of qserve's or already
    imported by the caller, that class too: `except ZeroDivisionError` works. Its arguments, attributes, notes, cause
    and, if it is a group, its members are those of the original. An attribute of the original that is called like one
    of those below hides it; `failure_of` tells them all the same.

    Attributes:
        message: `str()` of the original exception.
        type_name: Qualified name of the original class.
        module: Module of the original class.
        traceback_text: The remote traceback, for logs.
        cause: The rebuilt original exception, or None.
    """

    message: str
    type_name: str
    module: str
    traceback_text: str
    cause: BaseException | None

    def __init__(
        self,
        message: str = "",
        *,
        type_name: str = "",
        module: str = "",
        traceback_text: str = "",
        cause: BaseException | None = None,
    ) -> None:
        super().__init__(message)
        self.tell(TaskFailure(message, type_name, module, traceback_text, cause))

    def tell(self, failure: TaskFailure) -> None:
        """Make it the error of this failure; without `__init__`, which may go on to the one of a user's class."""
        vars(self).update(failure._asdict(), _failure=failure)

    def __str__(self) -> str:
        failure = failure_of(self)
        return failure.traceback_text or failure.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_plain_task_error, tuple(failure_of(self))[:4])


def failure_of(error: TaskError) -> TaskFailure:
    """What happened in the replica, also where the user's exception has attributes of the same names."""
    failure: TaskFailure | None = vars(error).get("_failure")
    return failure or TaskFailure(" ".join(map(str, error.args)))  # a subclass may not call `__init__`


class ResultNotSerializable(TaskError):
    """The call ran, but its result cannot be sent to the caller."""


class ResultTooLarge(TaskError):
    """The call ran, but its result is over the limit."""


class PoisonCall(TaskError):
    """The call ended every replica that ran it; it is not run again, and is kept among the dead letters."""


def _plain_task_error(message: str, type_name: str, module: str, traceback_text: str) -> TaskError:
    return TaskError(message, type_name=type_name, module=module, traceback_text=traceback_text)
