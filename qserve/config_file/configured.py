"""From a section of a config file to the deployments of its application, with the options that the file gives."""

import contextlib
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from qserve.applications.app_import import import_one_app
from qserve.applications.graph import Graph, make_graph, own_name
from qserve.config_file.reading import FileWithLines, Place, shown
from qserve.config_file.sections import ApplicationSection, DeploymentSection
from qserve.deployments.binding import Application, Membership
from qserve.deployments.deployment import Deployment
from qserve.errors import ConfigurationError
from qserve.wire.ray_names import warn_of


def configured_graph(file: FileWithLines, index: int) -> Graph:
    """Import an application of the file and give its deployments the options of the file.

    Args:
        index: Which of the applications.

    Raises:
        ConfigurationError: It cannot be imported, or the file names a deployment that it does not have.
    """
    section, place = file.config.applications[index], ("applications", index)
    _warn_of_what_has_no_effect(section)
    with _environment(section.runtime_env.env_vars):
        application = _imported(file, section, place)
    try:
        graph = make_graph(application, section.name, section.route_prefix)
    except ValueError as exc:
        raise file.mistakes([(place, f"{shown(place)}: {exc}")]) from exc
    _refuse_unknown(file, section, place, graph)
    sections = {each.name: each for each in section.deployments}
    source = {"import_path": section.import_path, "args": section.args}
    declared = json.dumps(source, sort_keys=True, default=str)  # a date, which YAML knows and JSON does not
    deployments = []
    for each in graph.deployments:
        changed = _with_options(each, sections.get(own_name(section.name, each.name)), section.runtime_env.env_vars)
        is_root = each is graph.root
        deployments.append(changed.as_member(Membership(section.name, is_root, declared if is_root else "")))
    return Graph(section.name, tuple(deployments))


def _imported(file: FileWithLines, section: ApplicationSection, place: Place) -> Application[Any]:
    try:
        return import_one_app(section.import_path, section.args)
    except ConfigurationError as exc:
        mistake = file.mistakes([((*place, "import_path"), f"{shown(place)}.import_path: {exc}")])
        raise mistake from exc.__cause__


def _refuse_unknown(file: FileWithLines, section: ApplicationSection, place: Place, graph: Graph) -> None:
    names = [own_name(section.name, each.name) for each in graph.deployments]
    mistakes = list[tuple[Place, str]]()
    for index, each in enumerate(section.deployments):
        if each.name not in names:
            close = difflib.get_close_matches(each.name, names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            here = (*place, "deployments", index, "name")
            said = (
                f"{shown(here)}: the application {section.name!r} has no deployment {each.name!r}.{hint} "
                f"It has {', '.join(names)}."
            )
            mistakes.append((here, said))
    if mistakes:
        raise file.mistakes(mistakes)


def _with_options(
    deployment: Deployment[Any], section: DeploymentSection | None, env_vars: Mapping[str, str]
) -> Deployment[Any]:
    given = section.options() if section is not None else {}
    if env_vars:
        given["ray_actor_options"] = _with_env_vars(
            given.get("ray_actor_options", deployment.ray_actor_options), env_vars
        )
    return deployment.options(**given) if given else deployment


def _with_env_vars(actor_options: Mapping[str, Any], env_vars: Mapping[str, str]) -> dict[str, Any]:
    """The options of replicas with the variables of their application; those of the deployment itself count more."""
    own = actor_options.get("runtime_env") or {}
    return {**actor_options, "runtime_env": {**own, "env_vars": {**env_vars, **(own.get("env_vars") or {})}}}


def _warn_of_what_has_no_effect(section: ApplicationSection) -> None:
    warn_of(
        {
            "runtime_env": section.runtime_env.model_extra,
            "logging_config": section.logging_config,
            "external_scaler_enabled": section.external_scaler_enabled,
            "policy": section.autoscaling_policy,
        }
    )


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A block in which these environment variables are set."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
