"""From applications to a config file."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import yaml

from qserve.applications.graph import Graph, own_name
from qserve.deployments.deployment import Deployment
from qserve.errors import ConfigurationError
from qserve.wire.codec import Codec
from qserve.wire.options import RAY_NAMES
from qserve.wire.spec import Deployed

_WRITTEN_AS = {name: ray_name for ray_name, name in RAY_NAMES.items()}
_NOT_WRITTEN = frozenset({"name", "version", "prev_version", "route_prefix", "init_args", "init_kwargs"})


def config_text(applications: Iterable[Mapping[str, Any]]) -> str:
    """A config file with these applications.

    Raises:
        ConfigurationError: An option has a value that a file cannot have.
    """
    config = {"applications": list(applications)}
    try:
        return yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
    except yaml.representer.RepresenterError as exc:
        raise ConfigurationError(
            f"An option has a value that a config file cannot have: {exc.args[-1]!r}. It takes text, numbers, lists "
            "and mappings."
        ) from exc


def application_section(graph: Graph, import_path: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The section of an application, with the options that its deployments have been given."""
    return {
        "name": graph.name,
        "route_prefix": graph.root.route_prefix,
        "import_path": import_path,
        **({"args": dict(args)} if args else {}),
        "deployments": [_deployment_section(graph.name, each) for each in graph.deployments],
    }


def deployed_section(name: str, deployed: Iterable[Deployed], codec: Codec) -> dict[str, Any]:
    """The section of an application that was deployed from a file, as it is deployed now."""
    members = sorted(deployed, key=lambda each: each.spec.is_root)
    source: dict[str, Any] = json.loads(members[-1].spec.declared)
    specs = [msgspec.structs.replace(each.spec, init_args=b"") for each in members]  # they may be of the user's classes
    graph = Graph(name, tuple(Deployment.from_spec(spec, codec) for spec in specs))
    return application_section(graph, source["import_path"], source["args"])


def _deployment_section(application: str, deployment: Deployment[Any]) -> dict[str, Any]:
    options = {name: value for name, value in deployment.changed_options.items() if name not in _NOT_WRITTEN}
    if deployment.autoscaling_config is None:
        options = {"num_replicas": deployment.num_replicas, **options}
    return {
        "name": own_name(application, deployment.name),
        **{_WRITTEN_AS.get(name, name): _plain(value) for name, value in options.items()},
    }


def _plain(value: Any) -> Any:
    """A value as YAML has it: mappings and lists; anything else that YAML has not is refused when it is written."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
