"""What the options of a handle may be."""

import re
from enum import StrEnum
from typing import Any

import numpy as np
import pytest

from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle, get_handle
from qserve.calls.handles.durable_handle import AsyncDurableHandle, DurableHandle
from qserve.calls.handles.stream_handle import StreamHandle

HANDLE: Any = get_handle("Echo", sync=True)
ASYNC_HANDLE: Any = get_handle("Echo", sync=False)


@pytest.mark.parametrize("option", ["method_name", "multiplexed_model_id"])
@pytest.mark.parametrize("kind", [{}, {"stream": True}, {"durable": True}])
def test_what_is_sent_with_a_call_is_text(option: str, kind: dict[str, bool]) -> None:
    assert HANDLE.options(**{option: "größe"}, **kind)

    with pytest.raises(TypeError, match=f"{option} is a string, not 5"):
        HANDLE.options(**{option: 5}, **kind)
    with pytest.raises(ValueError, match=re.escape(f"{option}='a\\ud800' cannot be sent: it contains half a char")):
        HANDLE.options(**{option: "a\ud800"}, **kind)


class Model(StrEnum):
    SMALL = "small"


@pytest.mark.parametrize("option", ["method_name", "multiplexed_model_id"])
@pytest.mark.parametrize("text", [np.str_("small"), Model.SMALL])
def test_text_of_other_classes_is_sent_as_text(option: str, text: str) -> None:
    sent = getattr(HANDLE.options(**{option: text})._options, option)
    assert (type(sent), sent) == (str, "small")


WRONG_SECONDS = [
    (float("inf"), ValueError, "less than 1000000000, not inf"),
    (float("nan"), ValueError, "not nan"),
    (1e300, ValueError, "less than 1000000000, not 1e+300"),
    (0, ValueError, "at least 0.001 and less than"),
    (-1, ValueError, "at least 0.001 and less than"),
    ("5", TypeError, "must be a number, not '5'"),
    (True, TypeError, "must be a number, not True"),
]


@pytest.mark.parametrize("kind", [{}, {"stream": True}, {"durable": True}])
@pytest.mark.parametrize(("value", "error", "says"), WRONG_SECONDS)
def test_a_timeout_is_refused_where_it_is_given(
    kind: dict[str, bool], value: object, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=f"timeout_s must be .*{re.escape(says.removeprefix('must be '))}"):
        HANDLE.options(timeout_s=value, **kind)
    assert HANDLE.options(timeout_s=999_999_999, **kind)
    assert HANDLE.options(timeout_s=None, **kind)


@pytest.mark.parametrize(
    ("term", "error", "says"),
    [
        ({"retries": 1.5}, ValueError, "retries must be a whole number, not 1.5"),
        ({"retry_on": 3}, TypeError, "retry_on takes exception classes and names of them, not 3"),
        ({"expires": float("inf")}, ValueError, "expires must be at least 0.001 and less than 1000000000, not inf"),
        ({"delay": 1e9}, ValueError, "delay must be at least 0 and less than 1000000000, not 1000000000.0"),
    ],
)
def test_terms_of_durable_calls_that_cannot_be_kept_are_refused(
    term: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=re.escape(says)):
        HANDLE.options(durable=True, **term)
    assert HANDLE.options(durable=True, retries=2.0, retry_on=iter([KeyError]), delay=3)


@pytest.mark.parametrize(
    ("handle", "plain", "durable"),
    [(HANDLE, DeploymentHandle, DurableHandle), (ASYNC_HANDLE, AsyncDeploymentHandle, AsyncDurableHandle)],
)
def test_options_are_chained_and_what_is_not_given_anew_stays(handle: Any, plain: type, durable: type) -> None:
    streams = handle.options(stream=True, timeout_s=3).options(method_name="m").options(multiplexed_model_id="a")
    assert type(streams) is StreamHandle
    assert streams._options == handle.options(method_name="m", timeout_s=3, multiplexed_model_id="a")._options
    assert type(streams.options(stream=False)) is plain
    assert type(streams.other.options(durable=True)) is durable

    made = handle.options(durable=True, retries=3, retry_on=KeyError, delay=2, priority="batch", durability="fsync")
    again = made.options(method_name="m").options(backoff=5)
    assert type(again) is durable
    assert repr(again).endswith("of 'Echo', method 'm'>")
    assert again._terms == made.options(backoff=5)._terms
    assert again._terms._replace(terms=made._terms.terms) == made._terms
    assert (again._terms.terms.retries, again._terms.terms.backoff_s) == (3, 5)
    assert type(again.options(durable=False)) is plain
    assert type(again.options(stream=True)) is StreamHandle
    with pytest.raises(ValueError, match="exclude each other"):
        again.options(stream=True, durable=True)
    with pytest.raises(ValueError, match="retries: this is for calls with durable=True only"):
        HANDLE.options(stream=True).options(retries=3)


def test_the_expiry_of_durable_calls_follows_what_was_given_last() -> None:
    made = HANDLE.options(durable=True, timeout_s=5)
    assert made._terms.expires_s == made.options(retries=1)._terms.expires_s == 5
    assert made.options(timeout_s=7)._terms.expires_s == 7
    assert made.options(expires=9)._terms.expires_s == 9
    assert made.options(expires=9).options(retries=1)._terms.expires_s == 9
