"""MODULE[:NAME] on a command line: import it, deploy it, see it through."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qserve import rollout
from qserve.cli.output import Failure, note
from qserve.cli.progress import show_progress
from qserve.cli.source import content_version, project_files
from qserve.codec import Codec
from qserve.deployment import Deployment
from qserve.doctor import connect, require_usable
from qserve.errors import BrokerUnavailable
from qserve.handle import handle_from_wire
from qserve.apps import import_app
from qserve.settings import Settings
from qserve.spec import DeploymentSpec
from qserve.state import State


@dataclass(frozen=True)
class Application:
    """What an import of MODULE[:NAME] gave.

    Attributes:
        deployments: What to deploy, in the order of the module.
        files: The project's source files it consists of.
    """

    deployments: Sequence[Deployment]
    files: Sequence[Path]


def import_application(text: str, replicas: int | None = None) -> Application:
    """Import MODULE[:NAME] as if from the current folder.

    Args:
        replicas: Overrides `num_replicas` of every deployment.

    Raises:
        ConfigurationError: It cannot be imported, or there is nothing to deploy in it.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    deployments = import_app(text)
    if replicas is not None:
        deployments = [deployment.options(num_replicas=replicas) for deployment in deployments]
    modules = {deployment.func_or_class.__module__ for deployment in deployments}
    return Application(deployments, project_files(Path.cwd(), modules))


def deploy_application(application: Application, state: State, settings: Settings) -> list[DeploymentSpec]:
    """Deploy, show how replicas start, and return what is served.

    Raises:
        Failure: A deployment could not be brought up; the others are.
        ConfigurationError: Code that other processes cannot get at.
    """
    codec = Codec(allow_pickle=state.signer.signs, max_bytes=settings.max_value_bytes, make_handle=handle_from_wire)
    specs = [make_spec(deployment, application, codec) for deployment in application.deployments]
    goals = [_put(state, spec) for spec in specs]
    show_progress(goals)
    failures = []
    for goal in goals:
        try:
            goal.wait()
        except RuntimeError as exc:
            failures.append(f"Deployment {goal.name!r}: {exc}")
    if failures:
        raise Failure("\n".join(failures))
    return [goal.deployed.spec for goal in goals]


def make_spec(deployment: Deployment, application: Application, codec: Codec) -> DeploymentSpec:
    """The spec of a deployment; without a version of its own, it gets one made of its content."""
    spec = deployment.to_spec(codec)
    if spec.version is not None:
        return spec
    version = content_version(spec, Path.cwd(), application.files)
    return msgspec.structs.replace(spec, version=version)


def wait_for_redis(url: str, timeout_s: float) -> None:
    """Until the server answers; at once an error where waiting does not help.

    Raises:
        ConfigurationError: It answers, but cannot be used.
        BrokerUnavailable: It did not answer in time.
    """
    deadline, told = time.monotonic() + timeout_s, False
    with connect(url) as redis:
        while True:
            try:
                return require_usable(redis)
            except BrokerUnavailable as exc:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    note(f"{exc} Waiting up to {timeout_s:.0f} s for it.")
                    told = True
            time.sleep(0.3)


def _put(state: State, spec: DeploymentSpec) -> rollout.Goal:
    try:
        return rollout.deploy(state, spec)
    except ValueError as exc:
        raise Failure(f"Deployment {spec.name!r}: {exc}") from exc
