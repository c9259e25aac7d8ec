"""What KEDA's scalers ask, as they ask it, and what they make of the answers.

`metrics_api` and `redis_streams` stand in for the scalers of these names: the same requests, the same reading of the
answer. Both give the number that decides between no pod and some.
"""

import json
import re
from typing import Any

import httpx
import pytest
import redis
import yaml

from qserve.broker.keys import GROUP, Keys
from qserve.settings import Settings
from tests.support import chart
from tests.support.calling import deploy
from tests.support.gateways import gateway

TOKEN = "a-token-for-keda"


def metrics_api(url: str, value_location: str, token: str) -> int:
    """GET with a bearer token; anything but 200 is an error, and the value at the path has to be a JSON number."""
    answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 200, answer.text
    value = json.loads(answer.text)
    for step in re.split(r"(?<!\\)\.", value_location):  # dots within a name stand behind a backslash
        value = value[step.replace("\\.", ".")]
    assert type(value) in (int, float), value
    return int(value)


def redis_streams(client: "redis.Redis", stream: str, group: str | None = None, *, lag: bool = False) -> int:
    """XLEN without a consumer group; with one XPENDING, or the group's lag, where nothing counts as 0."""
    answer: Any
    if group is None:
        answer = client.xlen(stream)
    elif not lag:
        answer = client.xpending(stream, group)["pending"]
    else:
        groups: Any = client.xinfo_groups(stream)
        answer = next(each["lag"] for each in groups if each["name"] == group.encode()) or 0
    return int(answer)


@pytest.mark.parametrize("name", ["Reports", "shop.Reports"])
def test_the_demand_of_a_deployment_without_replicas_is_a_number_where_the_chart_looks(
    settings: Settings, redis_client: "redis.Redis", keys: Keys, name: str
) -> None:
    deploy(settings, name)
    sets = ["admin.enabled=true", "pools.a.keda.enabled=true", f"pools.a.keda.deployment={name}"]
    objects = list(yaml.safe_load_all(chart.render(None, *sets)))
    [scaled] = [each for each in objects if each and each["kind"] == "ScaledObject"]
    [trigger] = scaled["spec"]["triggers"]
    assert (trigger["type"], trigger["metadata"]["authMode"]) == ("metrics-api", "bearer")
    path = httpx.URL(trigger["metadata"]["url"]).path

    with gateway(settings, QSERVE_ADMIN_PORT=0, QSERVE_ADMIN_TOKEN=TOKEN) as running:

        def demand() -> int:
            return metrics_api(running.admin + path, trigger["metadata"]["valueLocation"], TOKEN)

        assert demand() == 0
        for _ in range(3):
            redis_client.xadd(keys.calls(name), {"d": b""})
        redis_client.zadd(keys.low(name), {"low": 1})
        redis_client.zadd(keys.due(name), {"due": 1, "in a year or so": 1e13})
        assert demand() == 5
        redis_client.xreadgroup(GROUP, "replica", {keys.calls(name): ">"})
        assert demand() == 5  # what runs counts, too, so its pod stays


def test_a_stream_whose_lag_is_not_known_looks_empty(redis_client: "redis.Redis", keys: Keys) -> None:
    stream = keys.calls("Echo")
    redis_client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    redis_client.xadd(stream, {"d": b""})
    redis_client.xreadgroup(GROUP, "replica", {stream: ">"})
    withdrawn, *_ = [redis_client.xadd(stream, {"d": b""}) for _ in range(3)]
    assert redis_streams(redis_client, stream, GROUP, lag=True) == 3

    redis_client.xdel(stream, withdrawn)  # as when a caller gives up

    assert redis_streams(redis_client, stream, GROUP, lag=True) == 0
    assert redis_streams(redis_client, stream) == 3


def test_pending_entries_alone_are_no_reason_for_the_first_pod(redis_client: "redis.Redis", keys: Keys) -> None:
    stream = keys.calls("Echo")
    redis_client.xgroup_create(stream, GROUP, id="0", mkstream=True)
    redis_client.xadd(stream, {"d": b""})

    assert redis_streams(redis_client, stream, GROUP) == 0
    assert redis_streams(redis_client, stream) == 1
