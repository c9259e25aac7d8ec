"""MODULE[:NAME] on a command line: import it, deploy it, see it through."""

import difflib
import pkgutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qserve.applications.app_import import import_app
from qserve.applications.application_goal import JointGoal
from qserve.broker.instance.state import State
from qserve.broker.server.redis_checks import connect, require_usable
from qserve.cli.output import Failure, note
from qserve.cli.source import content_version, project_files
from qserve.deployments.deployment import Deployment
from qserve.deployments.driver import make_codec
from qserve.durable.schedules import Declared, Schedules
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.screen.progress import show_progress
from qserve.screen.tracebacks import users_part
from qserve.settings import Settings
from qserve.wire.codec import Codec
from qserve.wire.spec import DeploymentSpec


@dataclass(frozen=True)
class ImportedApplication:
    """What an import of MODULE[:NAME] gave.

    Attributes:
        deployments: What to deploy, in the order of the module.
        files: The project's source files it consists of.
    """

    deployments: Sequence[Deployment[Any]]
    files: Sequence[Path]


def import_application(text: str, replicas: int | None = None) -> ImportedApplication:
    """Import MODULE[:NAME] as if from the current folder.

    Args:
        replicas: Overrides `num_replicas` of every deployment.

    Raises:
        ConfigurationError: It cannot be imported, or there is nothing to deploy in it.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        deployments = import_app(text)
    except ConfigurationError as exc:
        raise ConfigurationError(f"{exc}{did_you_mean(text)}") from exc
    if replicas is not None:
        deployments = [deployment.options(num_replicas=replicas) for deployment in deployments]
    modules = {deployment.func_or_class.__module__ for deployment in deployments}
    return ImportedApplication(deployments, project_files(Path.cwd(), modules))


def did_you_mean(text: str) -> str:
    """A sentence with the closest existing MODULE[:NAME], "" where nothing is close or nothing is missing."""
    module_name, _, name = text.partition(":")
    module = sys.modules.get(module_name)
    if module is not None:
        missing = name if name and not hasattr(module, name) else ""
        return _closest(missing, f"{module_name}:", vars(module))
    known, paths = "", [str(Path.cwd())]
    for part in module_name.split("."):
        package = sys.modules.get(known + part)
        if package is None:
            rest = module_name.removeprefix(known + part)
            names = {found.name for found in pkgutil.iter_modules(paths)}
            return "" if part in names else _closest(part, known, names, rest + (f":{name}" if name else ""))
        known, paths = f"{known}{part}.", list(getattr(package, "__path__", []))
    return ""


def _closest(missing: str, before: str, names: Iterable[str], after: str = "") -> str:
    close = difflib.get_close_matches(missing, names, n=1)
    return f" Did you mean {f'{before}{close[0]}{after}'!r}?" if close else ""


def deploy_application(application: ImportedApplication, state: State, settings: Settings) -> list[DeploymentSpec]:
    """Deploy, show how replicas start, and return what is served.

    Raises:
        Failure: A deployment could not be brought up; the others are.
        ConfigurationError: Code that other processes cannot get at.
    """
    codec = make_codec(settings, signs=state.signer.signs)
    specs = [make_spec(deployment, application, codec) for deployment in application.deployments]
    try:
        joint = JointGoal(state, specs)
    except ValueError as exc:
        raise Failure(str(exc)) from exc
    goals = joint.goals
    show_progress(goals)
    failures = []
    for goal in goals:
        try:
            goal.wait()
        except RuntimeError as exc:
            failures.append(f"Deployment {goal.name!r}: {users_part(str(exc))}")
    if failures:
        raise Failure("\n".join(failures))
    joint.clean_up()
    for plan in Declared.plans:
        Schedules(state).put(plan, codec)
    return [goal.deployed.spec for goal in goals]


def make_spec(deployment: Deployment[Any], application: ImportedApplication, codec: Codec) -> DeploymentSpec:
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
