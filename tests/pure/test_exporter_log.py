"""What is logged while spans cannot be sent."""

import logging

import pytest

from qserve.telemetry import exporter_log


def test_a_receiver_that_is_away_is_told_once_in_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_log, "_EXPORTERS", ("test.http", "test.sdk"))
    exporter_log.say_seldom()
    http, sdk = logging.getLogger("test.http"), logging.getLogger("test.sdk")

    http.warning("Transient error %s, retrying", "refused")
    http.error("Failed to export")
    sdk.error("Exception while exporting", exc_info=ValueError("x"))

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    (first,) = caplog.messages
    assert first.startswith("Spans cannot be sent")
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in first
    assert first.endswith("(Transient error refused, retrying)")
