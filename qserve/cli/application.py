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

from qserve.applications.app_import import import_app, import_one_app
from qserve.applications.application_goal import JointGoal, declared_applications
from qserve.applications.graph import DEFAULT_NAME, make_graph
from qserve.broker.instance.state import State
from qserve.broker.server.redis_checks import connect, require_usable
from qserve.cli.output import Failure, note
from qserve.cli.project.lookup import FoundApp, is_config_file, where_it_was_looked_for
from qserve.cli.project.overrides import Overrides
from qserve.cli.project.source import content_version
from qserve.config_file.configured import configured_graph
from qserve.config_file.reading import read_config_file
from qserve.config_file.sections import ConfigFile
from qserve.deployments.deployment import Deployment
from qserve.deployments.driver import make_codec
from qserve.durable.schedules import Declared, Schedules
from qserve.errors import BrokerUnavailable, ConfigurationError
from qserve.screen.progress import show_progress
from qserve.settings import Settings
from qserve.tracebacks import users_part
from qserve.user_code.method_names import method_names, problem_of
from qserve.user_code.source_files import project_files
from qserve.wire.codec import Codec
from qserve.wire.options import Default
from qserve.wire.spec import DeploymentSpec

_NO_OVERRIDES = Overrides()


@dataclass(frozen=True)
class ImportedApplication:
    """What an import of MODULE[:NAME], or of one application of a config file, gave.

    Attributes:
        deployments: What to deploy, in the order of the module.
        files: The project's source files it consists of.
        folder: Where it was imported from.
    """

    deployments: Sequence[Deployment[Any]]
    files: Sequence[Path]
    folder: Path


@dataclass(frozen=True)
class Imported:
    """What is to be deployed: a module with one application, or a config file with several.

    Attributes:
        config: The config file, if it was one.
        config_files: Its path, or none.
    """

    applications: Sequence[ImportedApplication]
    config: ConfigFile | None = None
    config_files: Sequence[Path] = ()

    @property
    def deployments(self) -> list[Deployment[Any]]:
        """All that is to be deployed."""
        return [each for application in self.applications for each in application.deployments]

    @property
    def files(self) -> list[Path]:
        """All files that it consists of."""
        sources = {path for application in self.applications for path in application.files}
        return sorted(sources | set(self.config_files))


def import_found(app: FoundApp, overrides: Overrides = _NO_OVERRIDES) -> Imported:
    """Import what `find_app` has found.

    Raises:
        ConfigurationError: It cannot be imported, or there is nothing to deploy in it.
    """
    if is_config_file(app.name):
        return _import_config_file(app, overrides)
    try:
        deployments = _import_deployments(app.name, overrides)
    except ConfigurationError as exc:
        close = did_you_mean(app.name)
        missing = isinstance(exc.__cause__, ModuleNotFoundError) and "\n" not in str(exc)
        raise ConfigurationError(f"{exc}{close or (where_it_was_looked_for(app) if missing else '')}") from exc
    return Imported([_imported(deployments, app.folder, overrides.replicas)])


def _import_deployments(name: str, overrides: Overrides) -> Sequence[Deployment[Any]]:
    if not overrides.is_of_one_application:
        return import_app(name, overrides.arguments)
    application = import_one_app(name, overrides.arguments)
    route = Default.VALUE if overrides.route_prefix is None else overrides.route_prefix
    try:
        return make_graph(application, overrides.name or DEFAULT_NAME, route).deployments
    except ValueError as exc:
        raise ConfigurationError(str(exc)) from exc


def _import_config_file(app: FoundApp, overrides: Overrides) -> Imported:
    if overrides.arguments:
        raise ConfigurationError(f"Arguments are in the file {app.name!r}: `args:` of an application.")
    if overrides.is_of_one_application:
        raise ConfigurationError(f"Names and paths are in the file {app.name!r}: `name:` and `route_prefix:`.")
    file = read_config_file(Path(app.name))
    graphs = [configured_graph(file, index) for index in range(len(file.config.applications))]
    imported = [_imported(graph.deployments, app.folder, overrides.replicas) for graph in graphs]
    return Imported(imported, file.config, [Path(app.name)])


def _imported(deployments: Sequence[Deployment[Any]], folder: Path, replicas: int | None) -> ImportedApplication:
    if replicas is not None:
        deployments = [deployment.options(num_replicas=replicas) for deployment in deployments]
    modules = {deployment.func_or_class.__module__ for deployment in deployments}
    return ImportedApplication(deployments, project_files(folder, modules), folder)


def did_you_mean(text: str) -> str:
    """A sentence with the closest existing MODULE[:NAME], "" where nothing is close or nothing is missing."""
    module_name, _, name = text.partition(":")
    if "/" in module_name or module_name.endswith(".py"):
        return ""
    module = sys.modules.get(module_name)
    if module is not None:
        missing = name if name and not hasattr(module, name) else ""
        return _closest(missing, f"{module_name}:", vars(module))
    known, paths = "", [str(Path.cwd())]
    for part in module_name.split("."):
        package = sys.modules.get(known + part)
        if package is None:
            parent = sys.modules.get(known.rstrip("."))
            if parent is not None and not name and hasattr(parent, part):
                return f" Did you mean {f'{known[:-1]}:{module_name.removeprefix(known)}'!r}?"
            rest = module_name.removeprefix(known + part)
            names = {found.name for found in pkgutil.iter_modules(paths)}
            return "" if part in names else _closest(part, known, names, rest + (f":{name}" if name else ""))
        known, paths = f"{known}{part}.", list(getattr(package, "__path__", []))
    return ""


def _closest(missing: str, before: str, names: Iterable[str], after: str = "") -> str:
    close = difflib.get_close_matches(missing, names, n=1)
    return f" Did you mean {f'{before}{close[0]}{after}'!r}?" if close else ""


def deploy_imported(imported: Imported, state: State, settings: Settings) -> list[DeploymentSpec]:
    """Deploy, show how replicas start, and return what is served.

    An application that was deployed from a config file before, and is not in this one, is deleted.

    Raises:
        Failure: A deployment could not be brought up; the others are.
        ConfigurationError: Code that other processes cannot get at.
    """
    check_schedules(imported.deployments, set(state.list()))
    codec = make_codec(settings, signs=state.signer.signs)
    specs = [
        make_spec(each, application, codec) for application in imported.applications for each in application.deployments
    ]
    named = {spec.application for spec in specs}
    leaving = declared_applications(state) - named if imported.config is not None else set[str]()
    try:
        joint = JointGoal(state, specs, leaving)
    except ValueError as exc:
        raise Failure(str(exc)) from exc
    goals = joint.goals
    show_progress(goals)
    if failures := joint.wait_for_each():
        raise Failure("\n".join([*map(users_part, failures), *joint.mixed()]))
    joint.clean_up()
    for application in sorted(leaving):
        note(f"The application {application} is no longer in the file: deleted")
    Schedules(state).put_declared(frozenset(goal.name for goal in goals), codec)
    return [goal.deployed.spec for goal in goals]


def check_schedules(deployments: Sequence[Deployment[Any]], deployed: set[str]) -> None:
    """Refuse schedules for what will not be there.

    Raises:
        Failure: A deployment, or a method of one, is missing.
    """
    codes = {each.name: each.func_or_class for each in deployments}
    for plan in Declared.plans:
        names = deployed | codes.keys()
        if plan.deployment not in names:
            raise Failure(
                f"The schedule {plan.name!r} calls {plan.deployment!r}, and there is no such deployment: "
                f"{', '.join(sorted(names))}. Nothing was deployed."
            )
        code = codes.get(plan.deployment)
        if code is not None and (problem := problem_of(plan.method, method_names(code))):
            raise Failure(f"The schedule {plan.name!r} calls {plan.deployment!r}, but {problem}. Nothing was deployed.")


def make_spec(deployment: Deployment[Any], application: ImportedApplication, codec: Codec) -> DeploymentSpec:
    """The spec of a deployment; without a version of its own, it gets one made of its content."""
    spec = deployment.to_spec(codec)
    if spec.version is not None:
        return spec
    version = content_version(spec, application.folder, application.files)
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
