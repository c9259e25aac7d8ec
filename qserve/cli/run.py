"""`qserve run`: everything on this machine, in the foreground, until Ctrl-C."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from qserve.broker.server.redis_checks import require_usable_at
from qserve.cli.application import Imported, deploy_imported, import_found
from qserve.cli.config.http_section import ServingOptions, apply_to_own_instance, serving_options
from qserve.cli.gateway_options import gateway_options
from qserve.cli.instance import check_port, state_of
from qserve.cli.output import Failure, log_to_stderr, note, redis_url_option
from qserve.cli.project.lookup import FoundApp, app_argument, find_app
from qserve.cli.project.overrides import Overrides, override_options
from qserve.cli.project.source import Watcher
from qserve.deployments.head_start import HeadStart
from qserve.deployments.local_instance import (
    InstanceRecord,
    LaunchOptions,
    LocalInstance,
    find_record,
    launch,
    require_extras,
    start_lock,
)
from qserve.errors import ConfigurationError
from qserve.screen.introduction import curl_command, introduction
from qserve.screen.own_console import console_environment
from qserve.screen.terminal import Relay
from qserve.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])

_LOOK_S = 1.0
"""How often we look whether the instance still runs and, with --reload, for edits."""
_FORCED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""


def _serving_options(command: Command) -> Command:
    """The options that `run` and `dev` share."""
    for option in reversed(
        (
            redis_url_option,
            click.option("--host", show_default="127.0.0.1", help="Address to listen on."),
            click.option("--port", type=click.IntRange(0, 65535), show_default="8000", help="Port to listen on."),
            click.option(
                "--data",
                type=click.Path(path_type=Path),
                metavar="DIR",
                help="Folder in which the server that is started along keeps calls and deployments from run to run.",
            ),
            click.option("-v", "--verbose", is_flag=True, help="Show all that the processes of the instance log."),
            gateway_options,
            app_argument,
            override_options,
        )
    ):
        command = option(command)
    return command


@click.command()
@_serving_options
@click.option("--reload", is_flag=True, help="Deploy again when a source file of the application changes.")
@click.option("--debug", is_flag=True, help="Put tracebacks into the bodies of HTTP errors.")
def run(**options: Any) -> None:
    """Serve what is defined in a module or file (or one NAME of it), or in a config file, until Ctrl-C.

    FILE may be a config file (app.yaml). KEY=VALUE is for a NAME that is a function, which builds the application.

    Without MODULE, it is what pyproject.toml names ([tool.qserve] app = "module:name"), or app.py or main.py.

    Without --redis-url a server of its own is started along, which keeps nothing on disk unless --data names a folder.

    Ctrl-C lets calls in flight finish; a second one does not.
    """
    serve_until_ctrl_c(**options)


@click.command()
@_serving_options
def dev(**options: Any) -> None:
    """Serve a module while you work on it: like `run --reload --debug`.

    It is deployed again when one of its source files changes, and tracebacks are in the bodies of HTTP errors.
    """
    serve_until_ctrl_c(**options, reload=True, debug=True)


def serve_until_ctrl_c(
    *,
    app: str | None,
    app_dir: Path | None,
    overrides: Overrides,
    host: str | None,
    port: int | None,
    reload: bool,
    debug: bool,
    verbose: bool,
    data: Path | None,
    gateway_workers: int,
    **tls: str | None,
) -> None:
    """What `run` and `dev` do."""
    log_to_stderr(Settings())
    if debug:
        os.environ["QSERVE_DEBUG"] = "1"  # for gateway and replicas, which inherit it
    found = find_app(app, app_dir)
    require_extras(serves_http=False)  # else the first import of the application that needs one would be what is told
    imported = import_found(found, overrides)
    serving = serving_options(imported.config, host, port, tls)
    settings = Settings()
    if settings.redis_url:
        require_usable_at(settings.redis_url)
    relay = Relay(everything=verbose)
    with relay.output_of_new_processes():
        environment = {**relay.environment, **console_environment()}
        instance = start_instance(*(settings, serving, gateway_workers), environment=environment, data=data)
    try:
        with termination_as_interrupt():
            record = bring_up(instance, imported, stay_anyway=reload)
            introduce(
                *(imported, record.gateway_url, record.console_url),
                shows_certificate=serving.shows_certificate,
            )
            relay.deploying = reload
            redeploy = Reloader(found, overrides, imported.files, instance.settings) if reload else None
            stay(settings.namespace, redeploy)
    except KeyboardInterrupt:
        stop(instance, "\nStopping; calls in flight may finish. Ctrl-C again does not wait for them.")
    finally:
        stop(instance)


def start_instance(
    settings: Settings,
    serving: ServingOptions,
    gateway_workers: int,
    *,
    environment: Mapping[str, str],
    data: Path | None,
) -> LocalInstance:
    """Start the processes of this machine.

    Raises:
        ConfigurationError: An instance runs already, the address is taken, the folder for data cannot be used, or there
            is no server to run.
    """
    with start_lock(settings.namespace):
        other = find_record(settings.namespace)
        if other is not None:
            raise ConfigurationError(
                f"An instance runs on this machine already (pid {other.pid}, {other.gateway_url or 'no HTTP'}). Deploy "
                "into it with `qserve deploy`, end it with `qserve shutdown`, or set QSERVE_NAMESPACE to run another."
            )
        host, port = serving.host, serving.port
        if host is not None:
            check_port(host, port)
        options = LaunchOptions(
            host,
            port,
            {"host": host, "port": port},
            log_to_stderr=True,
            environment=environment,
            gateway_workers=gateway_workers,
            gateway_arguments=serving.gateway_arguments,
            head_start=click.get_current_context().find_object(HeadStart),
            data=data,
        )
        return launch(settings, options)


def bring_up(instance: LocalInstance, imported: Imported, *, stay_anyway: bool) -> InstanceRecord:
    """Deploy while the gateway starts.

    Args:
        stay_anyway: Only tell that a deployment failed; an edit may mend it.
    """
    settings = instance.settings
    instance.wait_for_redis()
    with state_of(settings) as state:
        if imported.config is not None:
            apply_to_own_instance(imported.config, state)
        try:
            deploy_imported(imported, state, settings)
        except Failure as exc:
            if not stay_anyway:
                raise
            exc.show()
    return instance.wait_until_ready()


def introduce(imported: Imported, gateway_url: str, console: str, *, shows_certificate: bool) -> None:
    """Print a command to try each deployment, and how to stop."""
    lines = introduction(
        imported.deployments,
        lambda prefix: gateway_url.rstrip("/") + prefix,
        console=console,
        curl=curl_command(gateway_url, shows_certificate=shows_certificate),
    )
    click.echo("\n".join([*lines, "Ctrl-C stops it; -v shows the whole log."]))


def stay(namespace: str, reloader: "Reloader | None") -> None:
    """Wait until the command is interrupted.

    Raises:
        Failure: The instance has ended.
    """
    while find_record(namespace) is not None:
        time.sleep(_LOOK_S)
        if reloader is not None:
            reloader.look()
    raise Failure("The instance has ended. Somebody ran `qserve shutdown`, or else its last messages say why.")


class Reloader:
    """Deploys an application again after an edit, from a process of its own: nothing imported before lingers there."""

    def __init__(
        self,
        app: FoundApp,
        overrides: Overrides,
        files: Sequence[Path],
        settings: Settings,
    ) -> None:
        self._watcher = Watcher(files)
        self._command = [sys.executable, "-m", "qserve.cli", "deploy", "--print-files", app.name]
        self._command += [*overrides.as_arguments(), "--app-dir", str(app.folder)]
        self._environment = os.environ | {"QSERVE_REDIS_URL": settings.redis_url, "QSERVE_SECRET": settings.secret}

    def look(self) -> None:
        """Deploy if a file has changed since the last look.

        If that fails, the error is shown and the old version goes on serving.
        """
        edited = self._watcher.changed()
        if not edited:
            return
        note(f"{', '.join(path.name for path in edited)} changed: deploying again.")
        done = subprocess.run(self._command, env=self._environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            note("What was served before goes on. The next change is tried again.")
        if done.stdout:
            self._watcher.watch([Path(name) for name in json.loads(done.stdout)])


def stop(instance: LocalInstance, text: str = "") -> None:
    """Stop all processes of the instance; exit code 130 when the user would not wait. Harmless when it has ended."""
    try:
        with termination_as_interrupt():
            if text:
                note(text)
            instance.stop()
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            os.kill(instance.pid, signal.SIGKILL)  # the kernel ends what it has started
        instance.stop()
        note("Stopped at once.")
        sys.exit(_FORCED)


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM (a supervisor, `docker stop`) ends a command the way Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
