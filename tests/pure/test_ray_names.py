"""Names of Ray Serve, 1.x and 2.x: each is accepted, or refused with what to write instead."""

import pickle
import re
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from starlette.datastructures import QueryParams

from qserve import serve
from qserve.deployments.deployment import Deployment
from qserve.deployments.http_options import HTTPOptions
from qserve.wire.options import Backpressure
from qserve.wire.ray_names import MISSING, REFUSED, WITHOUT_EFFECT
from qserve_workers.user.plain_responses import to_json
from tests.support.local_code import CODEC


def test_options_that_ray_called_experimental_are_taken_with_their_underscore() -> None:
    options: dict[str, Any] = {
        "_autoscaling_config": {"max_replicas": 4},
        "_graceful_shutdown_timeout_s": 5,
        "_graceful_shutdown_wait_loop_s": 1,
        "_health_check_period_s": 2,
        "_health_check_timeout_s": 3,
    }
    made = serve.deployment(name="f", **options)(lambda: None)
    assert made.autoscaling_config is not None
    assert made.autoscaling_config.max_replicas == 4
    found = made.config.model_dump()
    assert {name: found[name.removeprefix("_")] for name in options if name != "_autoscaling_config"} == {
        name: value for name, value in options.items() if name != "_autoscaling_config"
    }
    longer: Any = {"_health_check_period_s": 7}
    changed = made.options(**longer)
    assert changed.config.health_check_period_s == 7


def test_an_option_is_given_once() -> None:
    with pytest.raises(TypeError, match="twice, under different names: _health_check_period_s and health"):
        serve.deployment(health_check_period_s=1, _health_check_period_s=2)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="max_concurrent_queries and max_ongoing_requests"):
        serve.deployment(max_ongoing_requests=1, max_concurrent_queries=2)
    with pytest.raises(ValueError, match="target_ongoing_requests was given twice"):
        serve.deployment(
            autoscaling_config={"target_num_ongoing_requests_per_replica": 1, "target_ongoing_requests": 2}
        )


def test_the_names_of_autoscaling_in_ray_1_are_taken() -> None:
    made = serve.deployment(
        name="f",
        autoscaling_config={
            "min_replicas": 2,
            "max_replicas": 3,
            "target_num_ongoing_requests_per_replica": 7,
            "metrics_interval_s": 1,
            "look_back_period_s": 5,
            "smoothing_factor": 1.5,
            "downscale_delay_s": 60,
            "upscale_delay_s": 3,
        },
    )(lambda: None)
    config = made.autoscaling_config
    assert config is not None
    assert (config.target_ongoing_requests, config.downscale_delay_s, config.upscale_delay_s) == (7, 60, 3)


def test_options_of_ray_2_are_taken() -> None:
    made = serve.deployment(
        name="f",
        num_replicas="auto",
        max_ongoing_requests=5,
        max_queued_requests=-1,
        autoscaling_config={"max_replicas": 7, "min_replicas": 0, "initial_replicas": 2, "aggregation_function": "max"},
        backpressure_config={"status_code": 429, "retry_after_s": 3},
        ray_actor_options={"num_gpus": 0.5, "runtime_env": {"env_vars": {"A": "1"}}},
    )(lambda: None)
    assert made.autoscaling_config is not None
    assert (made.autoscaling_config.min_replicas, made.autoscaling_config.max_replicas) == (0, 7)
    assert (made.max_concurrent_queries, made.max_ongoing_requests) == (5, 5)
    assert made.config.max_queued_requests > 10**9
    assert made.to_spec(CODEC).backpressure == Backpressure(429, 3)
    assert Deployment.from_spec(made.to_spec(CODEC), CODEC) == made
    assert pickle.loads(cloudpickle.dumps(made)).to_spec(CODEC).backpressure == Backpressure(429, 3)


@pytest.mark.parametrize("name", ["max_ongoing_requests", "max_concurrent_queries"])
def test_a_value_that_is_not_possible_is_told_under_the_name_that_was_given(name: str) -> None:
    wrong: dict[str, Any] = {name: "a"}
    for take in (serve.deployment, serve.deployment(name="f")(lambda: None).options):
        with pytest.raises(ValueError, match=f"^{name}='a' is not possible: it should be a valid integer"):
            take(**wrong)


def test_what_is_said_of_logging_names_the_page_about_logs() -> None:
    [page, heading] = re.findall(r"docs/(\w+\.md)#(\w+)", WITHOUT_EFFECT["logging_config"])[0]
    assert f"## {heading.capitalize()}" in (Path(__file__).parents[2] / "docs" / page).read_text()


def test_auto_is_one_to_a_hundred_replicas() -> None:
    made = serve.deployment(name="f", num_replicas="auto")(lambda: None)
    assert made.autoscaling_config is not None
    found = made.autoscaling_config
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (1, 100, 2)


def test_what_has_no_effect_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qserve.wire.ray_names._told", set())
    options: dict[str, Any] = {"max_surge_percent": 10, "logging_config": {"log_level": "DEBUG"}}
    for _ in range(2):
        serve.deployment(**options, ray_actor_options={"num_gpus": 1, "runtime_env": {"pip": ["x"]}})
    said = [record.getMessage().split()[0] for record in caplog.records]
    assert sorted(said) == ["logging_config", "max_surge_percent", "runtime_env"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_had_is_refused_with_a_sentence(name: str) -> None:
    options: dict[str, Any] = {name: [{}]}
    with pytest.raises(ValueError, match=rf"{name} is not available in qserve\. There are no "):
        serve.deployment(**options)


def test_a_misspelled_option_is_told_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"unknown options: max_ongoing_request\. Did you mean 'max_ongoing_requests'"):
        serve.deployment(max_ongoing_request=1)  # type: ignore[call-overload]


@pytest.mark.parametrize("value", [-1, 1.5, "1"])
def test_an_impossible_number_of_gpus(value: object) -> None:
    with pytest.raises(ValueError, match="num_gpus must be a whole number or a fraction below 1"):
        serve.deployment(ray_actor_options={"num_gpus": value})


def test_environment_variables_are_strings() -> None:
    with pytest.raises(TypeError, match="env_vars"):
        serve.deployment(ray_actor_options={"runtime_env": {"env_vars": {"A": 1}}})


def test_mappings_are_json_objects() -> None:
    assert to_json(QueryParams("a=b&c=d")) == b'{\n  "a": "b",\n  "c": "d"\n}'


def test_modules_of_ray_serve_are_serve_itself_and_its_names_are_there() -> None:
    for path in (
        *("handle.DeploymentHandle", "config.AutoscalingConfig", "config.AutoscalingContext", "config.ProxyLocation"),
        *("exceptions.RayServeException", "schema.LoggingConfig", "metrics.Counter", "api.run"),
        *("Counter", "Gauge", "Histogram"),
    ):
        found: object = serve
        for name in path.split("."):
            found = getattr(found, name)
    assert serve.ProxyLocation.Disabled == "Disabled"
    assert not hasattr(serve, "no_such_name")
    with pytest.raises(AttributeError, match=r"module 'qserve.serve' has no attribute 'deploymnt'"):
        serve.deploymnt  # type: ignore[attr-defined]  # noqa: B018
    assert not [name for name in serve.__all__ if name in MISSING]


@pytest.mark.parametrize("name", sorted(MISSING))
def test_a_name_that_only_ray_serve_has_says_what_there_is_instead(name: str) -> None:
    with pytest.raises(ImportError, match=f"qserve.serve has no '{name}', which Ray Serve has. [A-Z]"):
        exec(f"from qserve.serve import {name}")


def test_where_http_is_served() -> None:
    assert HTTPOptions(num_cpus=2).num_cpus == 2
    for options in ({"location": "FixedNumber"}, {"fixed_number_replicas": 2}):
        with pytest.raises(ValueError, match="There is no location FixedNumber"):
            HTTPOptions(**options)
