"""`qserve run`: everything on this machine, in the foreground, until Ctrl-C."""

import contextlib
import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from qserve.cli.deploy import import_from_here
from qserve.cli.output import Failure, log_to_stderr, note, redis_url_option
from qserve.cli.source import Watcher, project_files
from qserve.errors import ConfigurationError, QServeError

if TYPE_CHECKING:
    from qserve.deployment import Deployment

_LOOK_FOR_EDITS_S = 1.0


@click.command()
@redis_url_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.option("--replicas", type=click.IntRange(min=1), help="Replicas of every deployment, whatever the code says.")
@click.option("--reload", is_flag=True, help="Deploy again when a source file of the application changes.")
@click.option("--debug", is_flag=True, help="Put tracebacks into HTTP error bodies.")
@click.argument("app", metavar="MODULE[:NAME]", envvar="QSERVE_APP")
def run(app: str, host: str, port: int, replicas: int | None, reload: bool, debug: bool) -> None:
    """Serve what is defined in a module (or one NAME of it) from this machine, until Ctrl-C.

    Without --redis-url a server of its own is started along. Ctrl-C lets calls in flight finish; a second one does not.
    """
    log_to_stderr()
    if debug:
        os.environ["QSERVE_DEBUG"] = "1"
    deployments = import_from_here(app)
    if replicas is not None:
        deployments = [deployment.options(num_replicas=replicas) for deployment in deployments]
    check_port(host, port)
