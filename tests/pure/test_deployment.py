"""Defining deployments: options, their validation, copies, and what becomes of them in the state."""

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
import pytest

from qserve.calls.handle import AsyncDeploymentHandle, DeploymentHandle
from qserve.deployments.checked_options import DeploymentConfig
from qserve.deployments.deployment import Deployment, deployment
from qserve.deployments.driver import THIS_PROCESS
from qserve.deployments.ingress import ingress
from qserve.deployments.loading import importing
from qserve.errors import ConfigurationError, NoInstanceError, ValueNotSerializable
from qserve.wire.codec import Codec
from qserve.wire.spec import DeploymentSpec
from tests.support.local_code import CODEC


class Importable:
    """A class that other processes can import."""


def importable() -> str:
    return "imported"


class FakeInstance:
    """Notes what it was asked to do."""

    codec = CODEC

    def __init__(self) -> None:
        self.done: list[Any] = []

    def put(self, spec: DeploymentSpec) -> "FakeGoal":
        args, kwargs = CODEC.unpack_call(spec.init_args)
        return FakeGoal(self, ("deploy", spec.name, tuple(args), kwargs))

    def put_declared_schedules(self, names: Iterable[str]) -> None:
        """Nothing is scheduled here."""

    def delete(self, name: str) -> None:
        self.done.append(("delete", name))

    def url_of(self, route_prefix: str) -> str:
        return "http://host:1234" + route_prefix


class FakeGoal:
    """Notes whether somebody waits for it."""

    def __init__(self, instance: FakeInstance, put: tuple[Any, ...]) -> None:
        self._instance = instance
        self._number = len(instance.done)
        self.name = put[1]
        instance.done.append((*put, False))

    def wait(self) -> None:
        *put, _ = self._instance.done[self._number]
        self._instance.done[self._number] = (*put, True)


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> FakeInstance:
    fake = FakeInstance()
    monkeypatch.setattr(THIS_PROCESS, "current", lambda: fake)
    return fake


# The decorator


def test_it_works_bare_with_parentheses_and_with_options() -> None:
    @deployment
    def bare() -> None: ...

    @deployment(name="other", num_replicas=3)
    async def given() -> None: ...

    assert [each.name for each in (bare, deployment()(Importable), given)] == ["bare", "Importable", "other"]
    assert given.num_replicas == 3


def test_a_positional_string_is_the_name() -> None:
    assert deployment("hello")(Importable).name == "hello"


def test_defaults() -> None:
    deployed = deployment(Importable)
    assert (deployed.version, deployed.prev_version, deployed.user_config) == (None, None, None)
    assert (deployed.num_replicas, deployed.max_concurrent_queries) == (1, 100)
    assert (deployed.init_args, deployed.init_kwargs, deployed.ray_actor_options) == ((), {}, {})
    assert deployed.route_prefix == "/Importable"
    config = deployed.config
    assert (config.graceful_shutdown_wait_loop_s, config.graceful_shutdown_timeout_s) == (2.0, 20.0)
    assert (config.max_queued_requests, config.idempotent, config.max_threads) == (10_000, False, 1)
    assert (config.timeout_s, config.surge, config.initialization_timeout_s) == (None, True, 600.0)
    assert config.http_method_header is True


def test_properties_are_what_was_given() -> None:
    deployed = deployment(
        name="name",
        version="version",
        prev_version="before",
        num_replicas=2,
        user_config="hi",
        max_concurrent_queries=3,
        route_prefix="/hello",
        ray_actor_options={"num_cpus": 0},
        init_args=[123],
        init_kwargs={"arg": 1},
        idempotent=True,
        timeout_s=5,
    )(Importable)
    assert (deployed.name, deployed.version, deployed.prev_version) == ("name", "version", "before")
    assert (deployed.num_replicas, deployed.user_config, deployed.max_concurrent_queries) == (2, "hi", 3)
    assert (deployed.route_prefix, deployed.ray_actor_options) == ("/hello", {"num_cpus": 0})
    assert (deployed.init_args, deployed.init_kwargs) == ((123,), {"arg": 1})
    assert deployed.func_or_class is Importable
    assert (deployed.config.idempotent, deployed.config.timeout_s) == (True, 5.0)
    assert deployment(version=None, route_prefix=None)(Importable).route_prefix is None


def test_a_deployment_is_not_called_and_not_built_by_hand() -> None:
    deployed = deployment(Importable)
    with pytest.raises(RuntimeError, match="Deployments cannot be constructed directly"):
        deployed()
    with pytest.raises(RuntimeError, match="constructor should not be called directly"):
        Deployment(Importable, "name")
    with pytest.raises(TypeError, match="expects a class or a function"):
        deployment()(deployed)


INVALID: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"version": 1}, TypeError, r"version must be a string\."),
    ({"prev_version": 1}, TypeError, r"prev_version must be a string\."),
    ({"name": 1}, TypeError, r"name must be a string\."),
    ({"num_replicas": "hi"}, ValueError, "num_replicas"),
    ({"num_replicas": 0}, ValueError, "num_replicas"),
    ({"num_replicas": -1}, ValueError, "num_replicas"),
    ({"max_concurrent_queries": "hi"}, ValueError, "max_concurrent_queries"),
    ({"max_concurrent_queries": [1]}, ValueError, "max_concurrent_queries"),
    ({"max_concurrent_queries": 0}, ValueError, "max_concurrent_queries"),
    ({"max_concurrent_queries": -1}, ValueError, "max_concurrent_queries"),
    ({"init_args": {1, 2}}, TypeError, r"init_args must be a tuple\."),
    ({"init_args": "hi"}, TypeError, r"init_args must be a tuple\."),
    ({"init_kwargs": [1]}, TypeError, r"init_kwargs must be a dict\."),
    ({"ray_actor_options": [1]}, TypeError, r"ray_actor_options must be a dict\."),
    ({"ray_actor_options": "hi"}, TypeError, r"ray_actor_options must be a dict\."),
    ({"ray_actor_options": {"name": "x"}}, ValueError, "'name' in ray_actor_options is not allowed"),
    ({"ray_actor_options": {"lifetime": None}}, ValueError, "'lifetime'"),
    ({"ray_actor_options": {"max_restarts": 1}}, ValueError, "'max_restarts'"),
    ({"ray_actor_options": {"placement_group": 1}}, ValueError, "'placement_group'"),
    ({"route_prefix": "hello"}, ValueError, r"route_prefix must start with '/'\."),
    ({"route_prefix": "/hello/"}, ValueError, r"route_prefix must not end with '/' unless it's the root\."),
    ({"route_prefix": "/{hello}"}, ValueError, r"route_prefix may not contain wildcards\."),
    ({"route_prefix": 1}, TypeError, r"route_prefix must be a string\."),
    ({"name": "with space"}, ValueError, "letters, digits"),
    ({"name": "x" * 64}, ValueError, "1 to 63"),
    ({"max_threads": 0}, ValueError, "max_threads"),
    ({"max_queued_requests": 0}, ValueError, "max_queued_requests"),
    ({"timeout_s": 0}, ValueError, "timeout_s"),
]


@pytest.mark.parametrize(("options", "error", "text"), INVALID, ids=[str(options) for options, _, _ in INVALID])
def test_wrong_options_are_refused_by_decorator_and_options(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        deployment(**options)
    with pytest.raises(error, match=text):
        deployment(Importable).options(**options)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="num_replica"):
        deployment(num_replica=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="num_replica"):
        deployment(Importable).options(num_replica=2)  # type: ignore[call-arg]


def test_a_name_that_cannot_be_a_queue_asks_for_another() -> None:
    with pytest.raises(ValueError, match=r"'<lambda>' is not possible.*name="):
        deployment(lambda: None)


def test_config_values_are_checked_on_assignment() -> None:
    config = DeploymentConfig(num_replicas=2)
    with pytest.raises(pydantic.ValidationError):
        config.num_replicas = -1
    with pytest.raises(pydantic.ValidationError):
        config.max_concurrent_queries = 0


# Copies with other options


def test_options_copy_and_keep_what_is_not_given() -> None:
    original = deployment(
        name="a", version="1", prev_version="0", num_replicas=2, init_args=(1,), user_config={"x": 1}, timeout_s=3
    )(Importable)
    copy = original.options(num_replicas=5, version=None, user_config=None)
    assert (original.num_replicas, copy.num_replicas) == (2, 5)
    assert (copy.name, copy.version, copy.init_args, copy.user_config) == ("a", "1", (1,), {"x": 1})
    assert copy.config.timeout_s == 3
    assert copy.func_or_class is Importable
    assert (original.prev_version, copy.prev_version) == ("0", None)


def test_the_default_route_follows_the_name_and_none_disables_it() -> None:
    original = deployment(Importable)
    assert original.options(name="other").route_prefix == "/other"
    assert original.options(route_prefix=None).options(num_replicas=2).route_prefix is None
    assert original.options(route_prefix="/x").options(name="other").route_prefix == "/x"


def test_options_can_change_the_code() -> None:
    assert deployment(Importable).options(importable).func_or_class is importable
    assert deployment(Importable).options(func_or_class=importable).name == "Importable"


def test_equality_is_by_what_is_served_not_by_the_code() -> None:
    one = deployment(name="d", version="1", init_args=(1,))(Importable)
    assert one == deployment(name="d", version="1", init_args=(1,), route_prefix="/d")(importable)
    assert one != one.options(num_replicas=2)
    assert one != one.options(route_prefix=None)
    assert one != one.options(init_args=(2,))
    assert one != one.options(version="2")
    assert one != "d"


# Verbs


def test_deploying_and_deleting_go_to_the_instance(instance: FakeInstance) -> None:
    deployed = deployment(name="d", init_args=(1,), init_kwargs={"a": 2})(Importable)
    deployed.deploy(3, b=4)
    deployed.deploy()
    assert isinstance(deployed.deploy(_blocking=False), FakeGoal)
    deployed.delete()
    assert instance.done == [
        ("deploy", "d", (3,), {"b": 4}, True),
        ("deploy", "d", (1,), {"a": 2}, True),
        ("deploy", "d", (1,), {"a": 2}, False),
        ("delete", "d"),
    ]
    assert deployed.url == "http://host:1234/d"
    assert deployed.options(route_prefix=None).url is None


def test_importing_is_not_deploying(instance: FakeInstance) -> None:
    deployed = deployment(Importable)
    with importing():
        deployed.deploy()
        deployed.delete()
        assert isinstance(deployed.get_handle(), DeploymentHandle)
    assert instance.done == []


def test_without_an_instance_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("QSERVE_REDIS_URL", raising=False)
    with pytest.raises(NoInstanceError, match=r"serve\.start\(detached=True\)"):
        deployment(Importable).deploy()


def test_functions_take_no_init_args(instance: FakeInstance) -> None:
    with pytest.raises(ValueError, match=r"init_args not supported for function deployments\."):
        deployment(importable).deploy(1)
    with pytest.raises(ValueError, match=r"init_kwargs not supported for function deployments\."):
        deployment(init_kwargs={"a": 1})(importable).deploy()
    assert instance.done == []


def test_a_handle_needs_no_instance_and_is_the_same_each_time() -> None:
    deployed = deployment(Importable)
    assert deployed.get_handle() is deployed.options(num_replicas=2).get_handle()
    assert isinstance(deployed.get_handle(sync=False), AsyncDeploymentHandle)


# In the state


def test_a_spec_has_all_of_it_and_gives_an_equal_deployment_back() -> None:
    deployed = deployment(
        name="d",
        version="1",
        num_replicas=2,
        route_prefix="/x",
        user_config={"threshold": 0.5},
        init_args=(1, "two"),
        init_kwargs={"three": 3.0},
        ray_actor_options={"num_gpus": 1},
        max_queued_requests=7,
        idempotent=True,
        max_threads=4,
        timeout_s=1.5,
        surge=False,
        http_method_header=False,
        graceful_shutdown_timeout_s=0,
        initialization_timeout_s=30,
    )(Importable)
    spec = deployed.to_spec(CODEC)
    assert spec.target.import_path == f"{__name__}:Importable"
    assert (spec.is_class, spec.is_ingress) == (True, False)
    assert (spec.max_queued_requests, spec.idempotent, spec.max_threads, spec.timeout_s) == (7, True, 4, 1.5)
    assert (spec.surge, spec.http_method_header) == (False, False)
    assert (spec.graceful_shutdown_timeout_s, spec.initialization_timeout_s) == (0, 30)
    restored = Deployment.from_spec(spec, CODEC)
    assert restored == deployed
    assert restored.ray_actor_options == {"num_gpus": 1}
    assert restored.config == deployed.config
    assert restored.func_or_class is Importable


def test_a_restored_deployment_can_be_deployed_again_without_importing_its_code() -> None:
    spec = deployment(name="d", init_args=(1,))(Importable).to_spec(CODEC)
    again = Deployment.from_spec(spec, CODEC).options(num_replicas=3).to_spec(CODEC)
    assert (again.target, again.init_args, again.num_replicas) == (spec.target, spec.init_args, 3)


def test_functions_and_ingress_classes_are_marked_so() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    assert deployment(importable).to_spec(CODEC).is_class is False
    assert deployment(ingress(app)(type("Empty", (), {}))).to_spec(CODEC).is_ingress is True


def test_init_args_of_one_deploy_go_before_those_of_the_decorator() -> None:
    deployed = deployment(init_args=(1,), init_kwargs={"a": 2})(Importable)
    spec = deployed.to_spec(CODEC, init_args=(), init_kwargs={"b": 3})
    assert CODEC.unpack_call(spec.init_args) == ((), {"b": 3})


def test_what_cannot_travel_without_a_key_is_refused_with_the_way_out() -> None:
    unsigned = Codec(allow_pickle=False, max_bytes=1000)

    class Local:
        pass

    with pytest.raises(ConfigurationError, match=r"Local.*QSERVE_SECRET"):
        deployment(Local).to_spec(unsigned)
    with pytest.raises(ValueNotSerializable, match="constructor of 'Importable'"):
        deployment(Importable).to_spec(unsigned, init_args=(lambda: 1,), init_kwargs={})


def test_init_args_may_be_closures_where_frames_are_signed() -> None:
    word = "closed over"
    spec = deployment(Importable).to_spec(CODEC, init_args=(lambda: word,), init_kwargs={})
    args, _ = CODEC.unpack_call(spec.init_args)
    assert args[0]() == "closed over"


# The class behind the name


def test_a_deployment_can_be_a_base_class_and_the_type_in_isinstance() -> None:
    @deployment
    class Base:
        limit = 3

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Base)  # type: ignore[arg-type,unused-ignore]

        __hash__ = None  # type: ignore[assignment]

    code: Any = Base.func_or_class

    class Derived(Base):
        def twice(self) -> int:
            return 2 * super().limit

    assert Derived.__mro__[1] is code
    assert Derived().twice() == 6
    assert code() == Derived()
    assert code() != object()
    with pytest.raises(TypeError, match="'importable' is a function; a class cannot be derived from it"):
        types.new_class("Derived", (deployment(importable),))


def test_attributes_of_the_code_are_found_through_the_deployment() -> None:
    made: Any = deployment(type("Model", (), {"limit": 3, "of": classmethod(lambda cls, x: (cls.__name__, x))}))
    assert made.limit == 3
    assert made.of(1) == ("Model", 1)
    assert made.name == "Model"
    with pytest.raises(AttributeError, match=r"no attribute 'wieght', nor has .*func_or_class"):
        _ = made.wieght
    assert not hasattr(made, "__array__")
