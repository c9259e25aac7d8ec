"""What the options of a handle may be."""

import re
from typing import Any

import pytest

from qserve.calls.handle import get_handle

HANDLE: Any = get_handle("Echo", sync=True)


@pytest.mark.parametrize("option", ["method_name", "multiplexed_model_id"])
@pytest.mark.parametrize("kind", [{}, {"stream": True}, {"durable": True}])
def test_what_is_sent_with_a_call_is_text(option: str, kind: dict[str, bool]) -> None:
    assert HANDLE.options(**{option: "größe"}, **kind)

    with pytest.raises(TypeError, match=f"{option} is a string, not 5"):
        HANDLE.options(**{option: 5}, **kind)
    with pytest.raises(ValueError, match=re.escape(f"{option}='a\\ud800' cannot be sent: it contains half a char")):
        HANDLE.options(**{option: "a\ud800"}, **kind)
