"""Handles of applications and of their deployments."""

from typing import Any

from qserve.applications.application_goal import root_of
from qserve.applications.graph import name_in
from qserve.calls.handle import DeploymentHandle, get_handle
from qserve.context import get_replica_context, in_replica
from qserve.deployments.driver import THIS_PROCESS
from qserve.errors import QServeError


def get_app_handle(name: str) -> DeploymentHandle[Any]:
    """The handle of an application: of the deployment that serves it.

    Raises:
        QServeError: There is no such application.
        NoInstanceError: No instance is running.
    """
    root = root_of(THIS_PROCESS.current().state, name)
    if root is None:
        raise QServeError(f"Application {name!r} does not exist. `serve.status().applications` has those that do.")
    return get_handle(root.spec.name)


def get_deployment_handle(
    deployment_name: str, app_name: str | None = None, _check_exists: bool = True
) -> DeploymentHandle[Any]:
    """The handle of a deployment of an application. It need not be deployed yet: calls wait for replicas.

    Args:
        app_name: None: the application to which the calling replica belongs.

    Raises:
        QServeError: Called outside of replicas without `app_name`.
    """
    if app_name is None:
        if not in_replica():
            raise QServeError("Give app_name=: this process is no replica, and belongs to no application.")
        app_name = get_replica_context().app_name
    return get_handle(name_in(app_name, deployment_name))
