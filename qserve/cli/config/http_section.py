"""What a config file says about HTTP and logging: for the instance that `run` starts, or for one that is running."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from qserve.broker.instance.state import State
from qserve.cli.gateway_options import gateway_arguments
from qserve.cli.output import note
from qserve.config_file.sections import ConfigFile, HTTPSection
from qserve.deployments import deploying
from qserve.wire.ray_names import warn_of

_DISABLED = "Disabled"
_OF_PROCESSES = frozenset(HTTPSection.model_fields) - {"root_path"}
"""Options that the gateway's process has been started with."""


class ServingOptions(NamedTuple):
    """How `qserve run` serves HTTP.

    Attributes:
        host: None: not at all.
        gateway_arguments: More options of the gateway's command line.
        shows_certificate: Clients have to show a certificate.
    """

    host: str | None
    port: int
    gateway_arguments: tuple[str, ...]
    shows_certificate: bool


def serving_options(
    config: ConfigFile | None, host: str | None, port: int | None, tls: Mapping[str, str | None]
) -> ServingOptions:
    """Options of the command line, and those of the config file for what was not given there.

    What the file says of logging and timeouts goes into the environment, for variables that are not set there.
    """
    config = config or ConfigFile(applications=())
    http = config.http_options
    _set_variables(config)
    options = {name: value or getattr(http, name) for name, value in tls.items()}
    return ServingOptions(
        host=None if config.proxy_location == _DISABLED else host or http.host or "127.0.0.1",
        port=next(each for each in (port, http.port, 8000) if each is not None),
        gateway_arguments=gateway_arguments(**options),
        shows_certificate=bool(options.get("ssl_ca_certs")),
    )


def _set_variables(config: ConfigFile) -> None:
    http, logging = config.http_options, config.logging_config
    said = {
        "QSERVE_HTTP_TIMEOUT_S": http.request_timeout_s,
        "QSERVE_HTTP_KEEP_ALIVE_S": http.keep_alive_timeout_s,
        "QSERVE_LOG_FORMAT": logging.encoding.lower() if "encoding" in logging.model_fields_set else None,
        "QSERVE_LOG_LEVEL": logging.level_name if "log_level" in logging.model_fields_set else None,
        "QSERVE_ACCESS_LOG": None if logging.enable_access_log else "off",
    }
    for name, value in said.items():
        if value is not None:
            os.environ.setdefault(name, str(value))


def apply_to_own_instance(config: ConfigFile, state: State) -> None:
    """Give the gateways of an instance that was started for this file what they need to know of it."""
    _tell_what_has_no_effect(config)
    given = {"root_path": config.http_options.root_path} if config.http_options.root_path else {}
    if config.proxy_location not in (None, _DISABLED):
        given["location"] = str(config.proxy_location)
    before = state.get_http()
    changed = msgspec.structs.replace(before, **given)
    if changed != before:
        deploying.wait_for_gateways(state, state.set_http(changed))


def apply_to_running_instance(config: ConfigFile, state: State) -> None:
    """Change what can be changed of an instance that runs, and say what cannot."""
    apply_to_own_instance(config, state)
    kept = sorted(f"http_options.{name}" for name in config.http_options.model_fields_set & _OF_PROCESSES)
    kept += ["proxy_location"] if config.proxy_location == _DISABLED else []
    kept += ["logging_config"] if config.logging_config.model_fields_set else []
    if kept:
        note(f"The instance that runs keeps what its processes were started with: {', '.join(kept)}.")


def _tell_what_has_no_effect(config: ConfigFile) -> None:
    warn_of({"grpc_options": config.grpc_options.get("grpc_servicer_functions")})
