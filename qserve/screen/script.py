"""`serve.run(..., blocking=True)`: a script that shows what `qserve run` shows."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from qserve.applications.application_goal import JointGoal
from qserve.deployments import local_instance
from qserve.deployments.deployment import Deployment
from qserve.deployments.driver import THIS_PROCESS, ConnectedInstance
from qserve.deployments.http_options import HTTPOptions
from qserve.screen.introduction import curl_command, introduction
from qserve.screen.own_console import console_environment
from qserve.screen.progress import show_progress
from qserve.screen.terminal import Relay

_LOOK_S = 0.2
_INTERRUPTED = 130
"""Exit code of a script that Ctrl-C has ended before it served anything, as shells have it."""


def serve_in_foreground(deployments: Sequence[Deployment[Any]], options: HTTPOptions, *, detached: bool) -> None:
    """Deploy, say what is served, and stay until Ctrl-C or until the instance has ended.

    Raises:
        RuntimeError: A deployment failed; see `Deployment.deploy`.
        SystemExit: Ctrl-C came before everything was served.
    """
    _listen_to_ctrl_c()
    try:
        _bring_up(deployments, options, detached=detached)
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # once more: at once
            THIS_PROCESS.stop_own()
        sys.exit(_INTERRUPTED)
    try:
        _stay(THIS_PROCESS.current().settings.namespace)
    except KeyboardInterrupt:
        _say(["", "Stopping; calls in flight may finish. Ctrl-C again does not wait for them."])


def _bring_up(deployments: Sequence[Deployment[Any]], options: HTTPOptions, *, detached: bool) -> None:
    relay = Relay(everything=False)
    with contextlib.nullcontext() if detached else relay.output_of_new_processes():
        shown_with = None if detached else {**relay.environment, **console_environment()}
        instance = THIS_PROCESS.start(options, detached=detached, wait=False, shown_with=shown_with)
    joint = JointGoal(instance.state, [each.to_spec(instance.codec) for each in deployments])
    show_progress(joint.goals)
    joint.wait()
    THIS_PROCESS.wait_until_ready()
    instance.put_declared_schedules(goal.name for goal in joint.goals)
    _say([*_introduction(deployments, instance), "Ctrl-C stops it."])
    relay.deploying = False


def _introduction(deployments: Sequence[Deployment[Any]], instance: ConnectedInstance) -> list[str]:
    record = local_instance.find_record(instance.settings.namespace)
    console = record.console_url if record is not None else ""
    return introduction(deployments, instance.url_of, console=console, curl=curl_command(instance.url_of("/") or ""))


def _listen_to_ctrl_c() -> None:
    # A shell that runs scripts lets its background jobs ignore SIGINT; `kill -INT` means this process all the same.
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stay(namespace: str) -> None:
    while local_instance.find_record(namespace) is not None:
        time.sleep(_LOOK_S)


def _say(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
