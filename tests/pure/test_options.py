"""The declaration of a deployment's options, and what follows from it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from qserve.deployments.checked_options import DeploymentConfig, complete_options
from qserve.deployments.deployment import Deployment, deployment
from qserve.wire.options import DECLARED, RAY_NAMES, DeploymentOptions, GivenOptions, script_fields
from qserve.wire.spec import DeploymentSpec, Target
from tests.support.local_code import CODEC


def plain(hint: Any) -> set[Any]:
    """The members of a union type, without what `Annotated` adds."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    members = get_args(hint) if hint is not Any and type(None) in get_args(hint) else (hint,)
    return {get_args(each)[0] if get_origin(each) is Annotated else each for each in members}


@pytest.mark.parametrize("declared", DECLARED, ids=lambda each: each.field)
def test_the_signature_names_each_option_with_its_type(declared: Any) -> None:
    """Type checkers and editors read `GivenOptions`, which has to be written down beside the declaration."""
    signature = get_type_hints(GivenOptions)
    given = declared.option.given or declared.type
    for name, wanted in zip(declared.names, given if isinstance(given, tuple) else (given,), strict=True):
        optional = {type(None)} if wanted is not Any else set()
        others: dict[str, set[Any]] = {
            "autoscaling_config": {Mapping[str, Any]},
            "backpressure_config": {Mapping[str, Any]},
            "num_replicas": {Literal["auto"]},
        }
        assert plain(signature[name]) == plain(wanted) | optional | others.get(name, set())


def test_the_signature_names_nothing_else() -> None:
    assert set(GivenOptions.__annotations__) == {name for each in DECLARED for name in each.names} | set(RAY_NAMES)


def test_every_field_is_an_option_with_a_text() -> None:
    assert [each.field for each in DECLARED] == [field.name for field in msgspec.structs.fields(DeploymentOptions)]
    assert all(each.option.text for each in DECLARED)


def test_defaults_of_what_users_give_are_those_of_the_spec() -> None:
    made = deployment(complete_options).to_spec(CODEC)
    plainest = DeploymentSpec(
        name="complete_options",
        target=made.target,
        revision=made.revision,
        is_class=False,
        deployed_at=made.deployed_at,
        route_prefix="/complete_options",
        init_args=CODEC.pack_call((), {}, ""),
        sources=made.sources,
        methods=("__call__",),
    )
    assert made == plainest


def test_an_option_that_is_declared_is_checked_carried_and_given_back() -> None:
    """What each option gets without a line of code of its own, shown by all that have no form of their own."""
    alike = [each for each in DECLARED if each.option.check is None and each.option.given is None]
    assert len(alike) > 8
    for each in alike:
        name = each.names[0]
        value = not each.default if isinstance(each.default, bool) else 7
        given: Any = {name: value}
        one: Deployment[Any] = deployment("d", **given)(complete_options)
        assert getattr(one.config, name) == value
        assert getattr(one.to_spec(CODEC), each.field) == value
        assert getattr(deployment("d")(complete_options).options(**given).config, name) == value
        assert Deployment.from_spec(one.to_spec(CODEC), CODEC) == one
        with pytest.raises(ValueError, match=name):
            DeploymentConfig(**{name: "neither a number nor a flag"})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, -1])
def test_seconds_are_refused_that_no_timer_can_count(value: float) -> None:
    of_seconds = [each.names[0] for each in DECLARED if each.names[0].endswith("_s")]
    assert len(of_seconds) >= 6
    for name in of_seconds:
        given: Any = {name: value}
        with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))} is not possible: it should be"):
            deployment("d", **given)(complete_options)
    with pytest.raises(ValueError, match=r"backpressure_config\.retry_after_s"):
        deployment("d", backpressure_config={"retry_after_s": value})(complete_options)


def test_scripts_find_their_limits_under_fixed_names() -> None:
    def found(spec: DeploymentSpec) -> dict[Any, Any]:
        fields = script_fields(spec)
        return dict(zip(fields[::2], fields[1::2], strict=True))

    spec = DeploymentSpec(name="d", target=Target(), revision="r")
    assert found(spec).items() >= {"route": "", "max_queued": 10_000, "idempotent": 0}.items()
    other = msgspec.structs.replace(spec, route_prefix="/d", max_queued_requests=5, idempotent=True)
    assert found(other).items() >= {"route": "/d", "max_queued": 5, "idempotent": 1}.items()


def test_what_is_changed_in_running_replicas_makes_no_version() -> None:
    """`qserve deploy` makes a version from the content of a spec; others than these start new replicas."""
    assert {each.field for each in DECLARED if not each.option.makes_version} == {
        *("version", "prev_version", "num_replicas", "autoscaling", "route_prefix", "user_config"),
        *("health_check_period_s", "health_check_timeout_s", "backpressure", "max_constructor_retry_count"),
    }


def test_a_spec_of_an_earlier_version_is_read_and_has_defaults_for_what_it_lacks() -> None:
    frame = msgspec.msgpack.encode({"name": "d", "target": {"import_path": "a:B"}, "revision": "r", "surge": False})
    spec = msgspec.msgpack.decode(frame, type=DeploymentSpec)
    assert (spec.name, spec.surge, spec.max_threads) == ("d", False, 1)
