"""A call that is to be made again and again, as the plan of a schedule."""

from typing import Any

from qserve.calls.handle import DeploymentHandle
from qserve.calls.handles.durable_handle import DurableHandle
from qserve.durable.schedules import Plan
from qserve.wire.call_record import make_durable_options


def plan_call(
    name: str, when: str, handle: "DeploymentHandle[Any] | DurableHandle", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Plan:
    """The plan to call what a handle calls.

    Raises:
        TypeError: This is no handle of a deployment, or one of a kind that schedules cannot have.
    """
    if not isinstance(handle, DeploymentHandle | DurableHandle):
        raise TypeError(f"a schedule takes a deployment or a handle made with sync=True, not {handle!r}")
    terms = handle._terms if isinstance(handle, DurableHandle) else make_durable_options()
    options = handle._options
    return Plan(name, when, handle.deployment_name, options.method_name, terms, args, kwargs, options.meta)
