"""Plans of schedules, made of handles."""

from typing import Any

import pytest

from qserve.calls.handle import get_handle
from qserve.calls.planned_call import plan_call
from qserve.wire.messages import MODEL


def test_a_plan_calls_what_its_handle_calls_on_its_terms() -> None:
    handle: Any = get_handle("Echo")
    plan = plan_call("nightly", "every 1h", handle.options(durable=True, retries=2).clean, (1,), {"deep": True})
    assert (plan.deployment, plan.method, plan.args, plan.kwargs) == ("Echo", "clean", (1,), {"deep": True})
    assert plan.options.terms.retries == 2
    assert plan_call("nightly", "every 1h", handle, (), {}).method == ""


@pytest.mark.parametrize("options", [{}, {"durable": True}])
def test_the_calls_of_a_plan_are_for_the_model_of_its_handle(options: Any) -> None:
    handle: Any = get_handle("Echo").options(multiplexed_model_id="a", **options)
    assert plan_call("nightly", "every 1h", handle, (), {}).meta == {MODEL: "a"}


@pytest.mark.parametrize("handle", [get_handle("Echo", sync=False), "Echo", print], ids=repr)
def test_what_is_no_handle_of_a_deployment_is_refused(handle: Any) -> None:
    with pytest.raises(TypeError, match="a schedule takes a deployment or a handle made with sync=True, not"):
        plan_call("nightly", "every 1h", handle, (), {})
