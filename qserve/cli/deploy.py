"""`qserve deploy`, `delete`, `shutdown`: change what a running instance serves."""

import json
from pathlib import Path

import click

from qserve.applications.application_goal import delete_all, deployments_of
from qserve.cli.application import deploy_imported, import_found, wait_for_redis
from qserve.cli.call import unknown_deployment
from qserve.cli.config.http_section import apply_to_running_instance
from qserve.cli.instance import connected, state_of
from qserve.cli.output import Failure, Seconds, log_to_stderr, note, redis_url_option
from qserve.cli.project.lookup import app_argument, find_app
from qserve.cli.project.overrides import Overrides, override_options
from qserve.deployments import deploying
from qserve.deployments.local_instance import find_record, find_settings, stop_instance
from qserve.operating.operators import write_down
from qserve.settings import Settings
from qserve.wire.spec import WAITING


@click.command()
@redis_url_option
@click.option(
    "--timeout",
    type=Seconds(),
    default=60.0,
    show_default=True,
    help="Seconds to wait for Redis to answer.",
)
@click.option("--print-files", is_flag=True, hidden=True, help="Print the application's source files as JSON.")
@app_argument
@override_options
def deploy(
    app: str | None,
    app_dir: Path | None,
    overrides: Overrides,
    timeout: float,
    print_files: bool,
) -> None:
    """Deploy what is defined in a module or file (or one NAME of it), or in a config file, into a running instance.

    FILE may be a config file (app.yaml): then applications that were deployed from one and are not in it are deleted.
    KEY=VALUE is for a NAME that is a function, which builds the application.

    A deployment without a version gets a hash of its code and arguments as version, so that doing it again changes
    nothing. Where no node is alive yet, it is started by the first one that comes.
    """
    log_to_stderr(Settings())
    settings = find_settings()
    imported = import_found(find_app(app, app_dir), overrides)
    if print_files:
        click.echo(json.dumps([str(path) for path in imported.files]))
    wait_for_redis(settings.redis_url, timeout)
    with state_of(settings) as state:
        if imported.config is not None:
            apply_to_running_instance(imported.config, state)
        for spec in deploy_imported(imported, state, settings):
            deployed = state.get(spec.name)
            how = "waits for a node" if deployed is not None and deployed.state == WAITING else "serving"
            if deployed is not None and deployed.spec.version != spec.version:
                how = f"superseded by version {deployed.spec.version}"
            write_down(state, "deploy", spec.name, f"{how}, version {spec.version}")
            note(f"{spec.name}: {how}, version {spec.version}, route {spec.route_prefix or 'none'}")


@click.command()
@redis_url_option
@click.argument("name")
def delete(name: str) -> None:
    """Stop serving the application or the deployment NAME; calls that were already accepted are finished."""
    with connected() as state:
        known = state.list()
        members = [*deployments_of(state, name)]
        if not members and name not in known:
            raise Failure(unknown_deployment(name, known))
        delete_all(state, members or [name])
        write_down(state, "delete", ", ".join(members or [name]))
    for each in members or [name]:
        note(f"{each}: deleted")


@click.command()
@redis_url_option
@click.option(
    "-y", "--yes", is_flag=True, expose_value=False, help="Accepted because Ray Serve has it: nothing is asked."
)
def shutdown() -> None:
    """Delete every deployment, and stop the instance where it runs on this machine.

    Nodes and gateways that were started elsewhere (`qserve start`, containers) go on and wait for the next deploy.
    """
    with connected() as state:
        for name in state.list():
            deploying.delete(state, name)
            write_down(state, "delete", name)
            note(f"{name}: deleted")
        nodes = [node.host for node in state.observed.nodes().values()]
    settings = Settings()
    record = find_record(settings.namespace)
    if record is not None and settings.redis_url in ("", record.redis_url):
        stop_instance(record)
        note(f"Stopped the instance on this machine (pid {record.pid}).")
    elif nodes:
        note(f"The nodes on {', '.join(nodes)} go on running, with nothing to serve.")
