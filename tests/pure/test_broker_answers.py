"""What Redis says to a call in words, and the order of the ids it gives out."""

import pytest
from redis.exceptions import ResponseError

from qserve.broker.refusals import queue_full, refusal_of_all
from qserve.broker.stream_ids import order
from qserve.errors import BrokerUnavailable, DeploymentNotFound, DeploymentUnavailable


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        ([-1], DeploymentNotFound, "there is no deployment 'Echo': `qserve status` lists those that exist"),
        (
            [-2, b"no model"],
            DeploymentUnavailable,
            "calls to 'Echo' are refused until a version of it starts: no model",
        ),
        ([-4], DeploymentNotFound, "there is no deployment 'Echo': `qserve status` lists those that exist"),
        (
            ResponseError("NOPERM"),
            BrokerUnavailable,
            "Redis refused the call, which does not run: NOPERM. `qserve doctor`",
        ),
        (
            ResponseError("OOM command not allowed"),
            BrokerUnavailable,
            "Redis has no memory left and refused the call, which does not run. Raise its maxmemory",
        ),
        (BrokerUnavailable("gone"), BrokerUnavailable, "gone"),
    ],
)
def test_a_script_that_took_no_call_says_why(answer: object, kind: type[Exception], text: str) -> None:
    error = refusal_of_all("Echo", answer)

    assert type(error) is kind
    assert str(error).startswith(text)


def test_a_script_that_took_calls_refuses_none_of_them_together() -> None:
    assert refusal_of_all("Echo", [0, 0, b"1-0", None]) is None


def test_a_full_queue_says_how_full_it_is_and_when_to_come_back() -> None:
    error = queue_full("Echo", 12, 2.5)

    assert str(error) == "the queue of 'Echo' is full (12 calls wait or run): try again later"
    assert error.retry_after == 2.5


def test_ids_are_ordered_by_time_then_by_number() -> None:
    ids = ["9-0", "10-2", "10-10", "11"]

    assert sorted(["11", "10-10", "9-0", "10-2"], key=order) == ids
    assert order(b"10-2") == order("10-2")
