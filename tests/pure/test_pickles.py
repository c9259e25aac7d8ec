"""What pickles name: public paths only, so that one version of qserve reads what another has pickled."""

import pickle
import pickletools
from typing import Any

import cloudpickle
import pytest

from qserve import errors, serve
from qserve.calls.handle import get_handle
from qserve.calls.handles.durable_handle import AsyncDurableHandle, DurableHandle
from qserve.calls.handles.stream_handle import StreamHandle
from qserve.calls.ref import Ref
from qserve.deployments.deployment import unpickle_deployment
from tests.support.local_code import CODEC


def globals_of(data: bytes) -> set[str]:
    """What a pickle imports, as `module name`."""
    return {str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}


def pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)  # the last one whose imports are spelled out


SYNC, ASYNC = get_handle("Echo"), get_handle("Echo", sync=False)
HANDLES: list[Any] = [
    SYNC,
    ASYNC,
    SYNC.options(method_name="m", timeout_s=2.0, http_headers={"a": "b"}),
    ASYNC.m,
    SYNC.options(stream=True, timeout_s=1.0),
    ASYNC.options(stream=True),
    SYNC.options(durable=True, retries=3, retry_on=ValueError, delay=1.0, durability="fsync").m,
    ASYNC.options(durable=True, priority="batch", expires=5.0),
]


@pytest.mark.parametrize("handle", HANDLES, ids=repr)
def test_a_pickled_handle_names_one_public_function(handle: Any) -> None:
    data = pickled(handle)

    assert globals_of(data) == {"qserve.serve unpickle_handle"}
    again = pickle.loads(data)
    assert type(again) is type(handle)
    assert again._options == handle._options
    assert again.deployment_name == "Echo"
    assert again._sync == handle._sync
    if isinstance(handle, DurableHandle | AsyncDurableHandle):
        assert again._terms == handle._terms


def test_a_handle_without_options_is_the_one_of_its_process() -> None:
    assert pickle.loads(pickled(SYNC)) is SYNC
    assert isinstance(pickle.loads(pickled(SYNC.options(stream=True))), StreamHandle)


def test_a_handle_that_was_pickled_when_this_test_was_written_can_be_read() -> None:
    data = (
        b"\x80\x02cqserve.serve\nunpickle_handle\nX\x04\x00\x00\x00syncX\x04\x00\x00\x00Echo}(X\x0b\x00\x00\x00method_name"
        b"X\x01\x00\x00\x00mX\t\x00\x00\x00timeout_sNX\x0b\x00\x00\x00http_methodX\x03\x00\x00\x00GETX\x0c\x00\x00\x00"
        b"http_headers)X\t\x00\x00\x00shard_keyNu\x87R."
    )
    handle = pickle.loads(data)
    assert repr(handle) == "<DeploymentHandle of 'Echo', method 'm'>"


class Echo:
    """User code that a deployment is made of."""


DEPLOYMENTS: list[Any] = [
    serve.deployment(Echo),
    serve.deployment(version="1", route_prefix=None, init_args=(1,), init_kwargs={"a": 2}, timeout_s=3)(Echo),
    serve.deployment(autoscaling_config={"max_replicas": 3}, user_config={"b": 4}, prev_version="0")(Echo),
]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: str(each.config))
def test_a_pickled_deployment_names_one_public_function_and_its_code(deployment: Any) -> None:
    data = pickled(deployment)

    assert globals_of(data) == {"qserve.serve unpickle_deployment", f"{__name__} Echo"}
    again = pickle.loads(data)
    assert again == deployment
    assert (again.func_or_class, again.prev_version) == (Echo, deployment.prev_version)
    assert again.options(name="other").route_prefix == deployment.options(name="other").route_prefix


def test_a_deployment_that_was_read_from_the_state_is_pickled_without_its_code() -> None:
    spec = serve.deployment(Echo).to_spec(CODEC)
    data = pickled(serve.Deployment.from_spec(spec, CODEC))

    assert globals_of(data) == {"qserve.serve unpickle_deployment", "__builtin__ bytes"}
    assert pickle.loads(data).func_or_class is Echo


def test_a_deployment_pickled_by_a_newer_version_keeps_the_options_that_are_known() -> None:
    made = unpickle_deployment(Echo, None, {"name": "d", "num_replicas": 2, "of_the_future": 1})
    assert (made.name, made.num_replicas) == ("d", 2)


OTHER_NAMES = {
    *(
        "ApplicationStatusOverview",
        "BackPressureError",
        "DeploymentResponse",
        "DeploymentResponseGenerator",
        "DeploymentUnavailableError",
    ),
    *("RayServeException", "ReplicaUnavailableError", "RequestCancelledError"),
}
"""Names of Ray Serve for what has its public path elsewhere."""


@pytest.mark.parametrize("name", sorted(set(serve.__all__) - OTHER_NAMES))
def test_every_public_class_is_named_by_a_public_path(name: str) -> None:
    value = getattr(serve, name)
    if isinstance(value, type):
        assert f"{value.__module__}.{value.__qualname__}" == f"qserve.serve.{name}"


def test_pickled_errors_name_public_paths() -> None:
    full = errors.BackPressureError("full", retry_after=3.0)
    failed = errors.TaskError("no", type_name="KeyError", module="builtins", traceback_text="Traceback")

    assert globals_of(pickled(full)) == {"qserve.errors BackPressureError"}
    assert {name.partition(" ")[0] for name in globals_of(pickled(failed))} == {"qserve.errors"}
    assert pickle.loads(pickled(full)).retry_after == 3.0
    assert pickle.loads(pickled(failed)).type_name == "KeyError"


def test_a_ref_says_what_to_do_instead() -> None:
    ref: Ref[int] = Ref()
    with pytest.raises(TypeError, match="pass it as an argument of a call"):
        pickle.dumps(ref)


def test_a_deployment_whose_code_names_the_deployment_itself_is_pickled_by_value() -> None:
    @serve.deployment
    class Countdown:
        def next_name(self) -> str:
            return Countdown.name

    again = cloudpickle.loads(cloudpickle.dumps(Countdown))
    assert again == Countdown
    assert again.func_or_class().next_name() == "Countdown"
