"""What exporters of spans log: while their receiver is away, one line instead of one for each attempt."""

import logging
import time
from typing import Final

_EXPORTERS: Final = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",
)
_SAY_AGAIN_S: Final = 600.0


class _Seldom(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._silent_until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        now = time.monotonic()
        if now < self._silent_until:
            return False
        self._silent_until = now + _SAY_AGAIN_S
        record.args, record.exc_info = (record.getMessage(),), None
        record.msg = (
            "Spans cannot be sent; those of this process are lost until their receiver answers. Is it where "
            "OTEL_EXPORTER_OTLP_ENDPOINT says? Said once in ten minutes. (%s)"
        )
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        return True


def say_seldom() -> None:
    """Let the exporters of this process warn once in ten minutes."""
    seldom = _Seldom()
    for name in _EXPORTERS:
        logging.getLogger(name).addFilter(seldom)
