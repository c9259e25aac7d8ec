"""Names of Ray Serve 1.x: each is accepted, or refused with what to write instead."""

from typing import Any

import pytest

from qserve import serve
from qserve.deployments.http_options import HTTPOptions


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
    with pytest.raises(TypeError, match="twice, with and without an underscore: _health_check_period_s"):
        serve.deployment(health_check_period_s=1, _health_check_period_s=2)  # type: ignore[call-overload]
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


def test_where_http_is_served() -> None:
    assert HTTPOptions(num_cpus=2).num_cpus == 2
    for options in ({"location": "FixedNumber"}, {"fixed_number_replicas": 2}):
        with pytest.raises(ValueError, match="There is no location FixedNumber"):
            HTTPOptions(**options)
