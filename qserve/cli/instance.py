"""Reaching the instance that a command is about."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from qserve.broker.instance.state import State
from qserve.broker.server.redis_checks import require_usable_at
from qserve.deployments.local_instance import check_address, find_settings
from qserve.errors import ConfigurationError, FrameRejected
from qserve.settings import Settings
from qserve.wire.messages import Signer


@contextmanager
def connected() -> Iterator[State]:
    """The state of the instance, after a look at whether its server can be used.

    Raises:
        NoInstanceError: None runs on this machine, and none is named.
        BrokerUnavailable, ConfigurationError: Its server cannot be used.
    """
    settings = find_settings()
    require_usable_at(settings.redis_url)
    with state_of(settings) as state:
        yield state


@contextmanager
def state_of(settings: Settings) -> Iterator[State]:
    """The state of the instance that settings name.

    Raises:
        ConfigurationError: It was signed with another key.
    """
    with closing(State(settings.redis_url, settings.keys, Signer(settings.secrets))) as state:
        try:
            state.check_key()
            yield state
        except FrameRejected as exc:
            raise ConfigurationError(
                f"What is deployed was signed with another key than the one here ({exc}). Set QSERVE_SECRET to the key "
                "of the instance."
            ) from exc


def check_port(host: str, port: int) -> None:
    """Fail before anything is started.

    Raises:
        ConfigurationError: The address cannot be listened on.
    """
    try:
        check_address(host, port)
    except ValueError as exc:
        reason = exc.__cause__.strerror if isinstance(exc.__cause__, OSError) else exc
        raise ConfigurationError(
            f"Cannot listen on {host}:{port}: {reason}. Give an address of this machine that is free with --host and "
            "--port; --port 0 takes any free port."
        ) from exc
