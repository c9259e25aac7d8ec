"""`qserve build`, `config`, `schema`: writing config files, and what editors know of them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from qserve.applications.app_import import import_one_app
from qserve.applications.application_goal import declared_applications, deployments_of
from qserve.applications.graph import DEFAULT_NAME, make_graph
from qserve.cli.instance import connected
from qserve.cli.output import Failure, log_to_stderr, note, redis_url_option
from qserve.cli.project.lookup import find_app
from qserve.config_file.json_schema import schema_text
from qserve.config_file.writing import application_section, config_text, deployed_section
from qserve.deployments.driver import make_codec
from qserve.deployments.local_instance import find_settings
from qserve.settings import Settings

_output_option = click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="File to write. Default: standard output."
)


@click.command()
@_output_option
@click.option(
    "--app-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder to import from. Default: this one.",
)
@click.argument("apps", metavar="MODULE:NAME...", nargs=-1, required=True)
def build(apps: Sequence[str], app_dir: Path | None, output: Path | None) -> None:
    """Write a config file of one application or of several, for `qserve deploy`.

    It lists their deployments, with the options that the code gives them.
    """
    log_to_stderr(Settings())
    names = _names_of(apps)
    sections = []
    for app, name in zip(apps, names, strict=True):
        found = find_app(app, app_dir)
        route_prefix = "/" if name == DEFAULT_NAME else f"/{name}"
        graph = make_graph(import_one_app(found.name, {}), name, route_prefix)
        sections.append(application_section(graph, found.name, {}))
    _write(config_text(sections), output)


def _names_of(apps: Sequence[str]) -> list[str]:
    if len(apps) == 1:
        return [DEFAULT_NAME]
    wanted = [Path(app.partition(":")[0]).stem.rpartition(".")[2] for app in apps]
    seen = Counter[str]()
    names = []
    for name in wanted:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}{seen[name]}")
    return names


@click.command()
@redis_url_option
@click.argument("name", required=False)
def config(name: str | None) -> None:
    """Print the applications that were deployed from a config file, as they are deployed now, or the one called NAME.

    Options that were changed since, with `qserve scale` for example, are as they are now.
    """
    settings = find_settings()
    with connected() as state:
        declared = sorted(declared_applications(state))
        if name is not None and name not in declared:
            known = ", ".join(declared) or "none was"
            raise Failure(f"No application {name!r} was deployed from a config file. Those that were: {known}.")
        codec = make_codec(settings, signs=state.signer.signs)
        sections = [
            deployed_section(each, deployments_of(state, each).values(), codec)
            for each in declared
            if name in (None, each)
        ]
    click.echo(config_text(sections), nl=False)


@click.command()
@_output_option
def schema(output: Path | None) -> None:
    """Write the JSON schema of config files, with which editors complete and check them.

    An editor with a YAML language server takes it for a file that begins with the line
    `# yaml-language-server: $schema=FILE`.
    """
    _write(schema_text(), output)


def _write(text: str, output: Path | None) -> None:
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as exc:
        raise Failure(f"{output} cannot be written: {exc.strerror}.") from exc
    note(f"{output}: written")
