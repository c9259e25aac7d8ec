"""What a worker says of itself, which others forget when its node stands still for long."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import redis

from qserve.settings import Settings
from qserve_workers.pool import announce
from qserve_workers.pool.keeper import Keeper
from qserve_workers.replica.replica_events import DeploymentSeen


def test_it_is_said_again_now_and_then(
    settings: Settings, redis_client: "redis.Redis", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSERVE_RUNTIME_DIR", str(tmp_path))
    later = Mock(return_value=SimpleNamespace(cancel=lambda: None))
    keeper = Keeper("Echo", 1, settings, Mock(), resize=Mock(), call_later=later, node="node-1")
    reports = settings.keys.of("Echo").workers("Echo")
    keeper.start()
    try:
        keeper.rollout.born(1, 0.0)
        keeper.rollout.report(DeploymentSeen(pid=1, generation=1, revision="a"), 0.0)
        keeper.act()
        assert redis_client.hdel(reports, "node-1") == 1
        keeper.say_alive()
        assert not redis_client.hexists(reports, "node-1")  # it was said a moment ago
        monkeypatch.setattr(announce, "TELL_AGAIN_EVERY_S", 0.0, raising=False)
        keeper.say_alive()
        assert redis_client.hexists(reports, "node-1")
    finally:
        keeper.stop()
