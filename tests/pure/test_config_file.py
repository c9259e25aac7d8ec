"""The config file: what it may say, what is told where it is wrong, and what becomes of the applications it names."""

import datetime
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from qserve.applications.app_import import import_app
from qserve.applications.graph import Graph
from qserve.cli.application import import_found
from qserve.cli.command_line import main
from qserve.cli.config.http_section import ServingOptions, serving_options
from qserve.cli.project.lookup import find_app
from qserve.cli.project.overrides import Overrides
from qserve.config_file.configured import configured_graph
from qserve.config_file.json_schema import schema_text
from qserve.config_file.reading import FileWithLines, read_config_file
from qserve.config_file.writing import deployed_section
from qserve.errors import ConfigurationError
from qserve.wire.options import DECLARED, RAY_NAMES, GivenOptions
from qserve.wire.ray_names import WITHOUT_EFFECT
from qserve.wire.spec import Deployed
from tests.support.local_code import CODEC
from tests.support.tables import CONFIG_FILE_SCHEMA

SHOP = """
import os
from pydantic import BaseModel
from qserve import serve

@serve.deployment(num_replicas=2, max_ongoing_requests=7, user_config={"factor": 1})
class Price:
    def __init__(self, currency="EUR"):
        ...

    def reconfigure(self, config):
        ...

@serve.deployment
class Shop:
    def __init__(self, price):
        ...

class Args(BaseModel):
    currency: str
    count: int = 1

seen = []

def typed(args: Args):
    seen.append((args, os.environ.get("SHOP_REGION")))
    return Shop.bind(Price.bind(args.currency * args.count))

def plain(args):
    return Shop.bind(Price.bind(args.get("currency", "none")))

def alone():
    return Price

def broken(args):
    return args["missing"]

def nothing(request): ...

app = Shop.bind(Price.bind())
"""
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the config file, beside shop.py in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QSERVE_APP", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "shop.py").write_text(SHOP)

    def write_file(text: str) -> Path:
        path = tmp_path / "app.yaml"
        path.write_text(text)
        return path

    yield write_file
    sys.modules.pop("shop", None)


def one(section: str) -> str:
    """A file with one application."""
    return f"applications:\n  - import_path: shop:app\n    {section}\n"


def graph_of(path: Path, index: int = 0) -> Graph:
    return configured_graph(read_config_file(path), index)


MISTAKES = {
    "an option is misspelled": (
        one("deployments: [{name: Price, num_replica: 2}]"),
        "line 3: There is no option 'applications[0].deployments[0].num_replica'. Did you mean 'num_replicas'?",
    ),
    "a key is misspelled": (
        "application: []\n",
        "line 1: There is no option 'application'. Did you mean 'applications'?",
    ),
    "a value is not possible": (
        one("deployments:\n      - name: Price\n        num_replicas: -1"),
        "line 5: applications[0].deployments[0].num_replicas=-1 is not possible: it should be greater than 0.",
    ),
    "the code is not named": ("applications:\n  - name: shop\n", "line 2: applications[0].import_path is missing."),
    "the deployment is not named": (one("deployments: [{num_replicas: 2}]"), "deployments[0].name is missing."),
    "a variable is a number": (
        one("runtime_env: {env_vars: {PORT: 1}}"),
        "line 3: applications[0].runtime_env.env_vars.PORT: "
        'YAML takes 1 for a number. For text, put it between quotes: "1"',
    ),
    "a variable is a truth value": (
        one("runtime_env: {env_vars: {DEBUG: off}}"),
        'env_vars.DEBUG: YAML takes off for a truth value. For text, put it between quotes: "off"',
    ),
    "a variable of a deployment is a number": (
        one("deployments: [{name: Price, ray_actor_options: {runtime_env: {env_vars: {PORT: 1}}}}]"),
        'must be strings, and \'PORT\': 1 is not. Put it between quotes: "PORT": "1"',
    ),
    "a key is true or false in YAML 1.1": (
        one("args:\n      NO: 1"),
        'line 4: applications[0].args: YAML takes the key NO for a truth value. For text, put it between quotes: "NO"',
    ),
    "a key deep in a config is true or false in YAML 1.1": (
        one("deployments: [{name: Price, user_config: {switch: [{on: 1}]}}]"),
        'user_config.switch[0]: YAML takes the key on for a truth value. For text, put it between quotes: "on"',
    ),
    "a key is nothing, after one that is text": (
        one('runtime_env: {env_vars: {A: "x", ~: "x"}}'),
        'env_vars: YAML takes the key ~ for no value. For text, put it between quotes: "~"',
    ),
    "a key is a number": (
        one('runtime_env: {env_vars: {8080: "x"}}'),
        'env_vars: YAML takes the key 8080 for a number. For text, put it between quotes: "8080"',
    ),
    "the code is to be fetched": (
        one('runtime_env: {working_dir: "https://there/code.zip"}'),
        "line 3: applications[0].runtime_env: working_dir is not available in qserve: code is not fetched.",
    ),
    "an option cannot be had": (
        one("deployments: [{name: Price, placement_group_bundles: [{CPU: 1}]}]"),
        "placement_group_bundles is not available in qserve. There are no placement groups",
    ),
    "replicas are fixed and scaled": (
        one("deployments: [{name: Price, num_replicas: 2, autoscaling_config: {max_replicas: 3}}]"),
        "num_replicas and autoscaling_config exclude each other",
    ),
    "an option is given twice": (
        one("deployments: [{name: Price, max_ongoing_requests: 2, max_concurrent_queries: 3}]"),
        "max_concurrent_queries is given twice, also as max_ongoing_requests.",
    ),
    "scaling goes nowhere": (
        one("deployments: [{name: Price, autoscaling_config: {min_replicas: 3, max_replicas: 2}}]"),
        "autoscaling_config: max_replicas (2) is below min_replicas (3).",
    ),
    "a route has no slash": (one("route_prefix: shop"), "route_prefix: route_prefix must start with '/'."),
    "a name is not possible": (one("name: my shop"), "applications[0].name: 'my shop' is not possible"),
    "a key is there twice": (one("name: a\n    name: b"), "line 3: applications[0].name is there again in line 4."),
    "an application is there twice": (
        one("route_prefix: /a\n  - import_path: shop:app"),
        "line 1: applications: the application 'default' is there twice.",
    ),
    "a route is there twice": (
        one("name: a\n  - import_path: shop:app"),
        "line 1: applications: the route_prefix '/' is there twice.",
    ),
    "the file is of one application, as it once was": (
        "import_path: shop:app\ndeployments: []\n",
        "Put it into a list: `applications:`",
    ),
    "a variable is a list": (one("runtime_env: {env_vars: {A: [1]}}"), "applications[0].runtime_env.env_vars.A"),
    "a variable has a name that none can have": (
        one('runtime_env: {env_vars: {"A=B": "x"}}'),
        "env_vars: an environment variable cannot be called 'A=B' and be 'x'",
    ),
    "a variable has no name": (one('runtime_env: {env_vars: {"": "x"}}'), "cannot be called '' and be 'x'"),
    "a variable has a zero byte": (
        one('deployments: [{name: Price, ray_actor_options: {runtime_env: {env_vars: {A: "x\\0y"}}}}]'),
        "an environment variable cannot be called 'A' and be 'x\\x00y'",
    ),
    "a level of the log is none": (
        "logging_config: {log_level: bogus}\n" + one("name: a"),
        "line 1: logging_config.log_level: 'bogus' is no level: write one of CRITICAL, ERROR, WARNING, INFO, DEBUG.",
    ),
    "a level of the log is a number of none": (
        "logging_config: {log_level: 15}\n" + one("name: a"),
        "line 1: logging_config.log_level: 15 is no level",
    ),
    "a time never passes": (
        "http_options: {request_timeout_s: .inf}\n" + one("name: a"),
        "request_timeout_s=inf is not possible: it should be a finite number.",
    ),
    "a date is none": (one("args: {day: 2001-99-99}"), "is no YAML: month must be in 1..12"),
    "an alias is within itself": (one("args: &all {x: *all}"), "an alias (`*name`) stands within what it stands for"),
    "the file is no YAML": ("applications: [", "is no YAML"),
    "the file is empty": ("", "has to be a mapping with `applications:`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_its_place(write: Write, name: str) -> None:
    text, said = MISTAKES[name]
    with pytest.raises(ConfigurationError) as told:
        read_config_file(write(text))
    assert said in str(told.value)
    assert "pydantic" not in str(told.value)


def test_what_ray_serve_itself_writes_is_taken(write: Write) -> None:
    path = write(
        """
        proxy_location: EveryNode
        http_options: {host: 0.0.0.0, port: 8000, request_timeout_s: null, keep_alive_timeout_s: 5}
        grpc_options: {port: 9000, grpc_servicer_functions: []}
        logging_config: {encoding: TEXT, log_level: INFO, logs_dir: null, enable_access_log: true}
        target_capacity: null
        applications:
          - name: app1
            route_prefix: /
            import_path: shop:app
            runtime_env: {}
            external_scaler_enabled: false
            deployments:
              - name: Price
                max_ongoing_requests: 5
                user_config: null
                autoscaling_config:
                  min_replicas: 1
                  initial_replicas: null
                  max_replicas: 4
                  target_ongoing_requests: 2.0
                  metrics_interval_s: 10.0
                  look_back_period_s: 30.0
                  smoothing_factor: 1.0
                  upscale_smoothing_factor: null
                  downscale_delay_s: 600.0
                  upscale_delay_s: 30.0
                graceful_shutdown_wait_loop_s: 2.0
                graceful_shutdown_timeout_s: 20.0
                health_check_period_s: 10.0
                health_check_timeout_s: 30.0
                ray_actor_options: {num_cpus: 1.0}
              - {name: Shop, num_replicas: 1}
        """
    )
    price, shop = graph_of(path).deployments
    assert (price.max_ongoing_requests, price.user_config, shop.num_replicas) == (5, {"factor": 1}, 1)
    assert price.autoscaling_config is not None
    assert price.autoscaling_config.max_replicas == 4


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(write: Write) -> None:
    path = write("http_options: {prot: 80}\n" + one("rout: /x\n    deployments: [{name: A, max_threads: 0}]"))
    with pytest.raises(ConfigurationError) as told:
        read_config_file(path)
    assert [line.split(":")[0].strip() for line in str(told.value).splitlines()[1:]] == ["line 1", "line 4", "line 5"]


IN_CODE = {
    "a deployment that is not there": (
        one("deployments: [{name: Prices}]"),
        "line 3: applications[0].deployments[0].name: the application 'default' has no deployment 'Prices'. "
        "Did you mean 'Price'? It has Price, Shop.",
    ),
    "a module that is not there": (
        "applications:\n  - import_path: shopp:app\n",
        "line 2: applications[0].import_path: Could not import module 'shopp'",
    ),
    "arguments that do not fit": (
        "applications:\n  - import_path: shop:typed\n    args: {currenzy: EUR}\n",
        "The arguments of 'shop:typed' do not fit its Args: currency is missing.",
    ),
    "arguments of what takes none": (one("args: {a: 1}"), "'shop:app' takes no arguments (a)"),
    "a function that fails": (
        "applications:\n  - import_path: shop:broken\n",
        "'shop:broken' was called with {} to build an application, because it is a function",
    ),
    "a function that builds nothing": (
        "applications:\n  - import_path: shop:nothing\n",
        "There is nothing to deploy in 'shop:nothing': it is a function that is not decorated.",
    ),
}


@pytest.mark.parametrize("name", IN_CODE)
def test_what_does_not_fit_the_code_is_told_with_its_place(write: Write, name: str) -> None:
    text, said = IN_CODE[name]
    with pytest.raises(ConfigurationError) as told:
        graph_of(write(text))
    assert said in str(told.value)


def test_the_file_wins_over_the_code(write: Write) -> None:
    path = write(
        one(
            "name: shop\n    route_prefix: /shop\n    deployments:\n"
            "      - {name: Price, max_ongoing_requests: 3, user_config: {factor: 2}}\n"
            "      - {name: Shop, num_replicas: auto, autoscaling_config: {min_replicas: 2}}"
        )
    )
    price, shop = graph_of(path).deployments
    assert (price.name, price.max_ongoing_requests, price.user_config) == ("shop.Price", 3, {"factor": 2})
    assert price.num_replicas == 2  # as the code says
    assert (shop.route_prefix, price.route_prefix) == ("/shop", None)
    assert shop.autoscaling_config is not None
    assert (shop.autoscaling_config.min_replicas, shop.autoscaling_config.max_replicas) == (2, 100)


def test_a_function_builds_the_application_from_arguments(write: Write) -> None:
    path = write(
        "applications:\n"
        "  - {import_path: 'shop:typed', args: {currency: EUR, count: 2}, runtime_env: {env_vars: {SHOP_REGION: n}}}\n"
        "  - {import_path: 'shop:plain', name: plain, route_prefix: /plain, args: {currency: GBP}}\n"
        "  - {import_path: 'shop:alone', name: alone, route_prefix: null}\n"
    )
    assert graph_of(path).deployments[0].init_args == ("EUREUR",)
    assert graph_of(path, 1).deployments[0].init_args == ("GBP",)
    assert [each.name for each in graph_of(path, 2).deployments] == ["alone.Price"]
    assert sys.modules["shop"].seen[0][1] == "n"
    assert "SHOP_REGION" not in os.environ
    assert import_app("shop:typed", {"currency": "CHF"})[0].init_args == ("CHF",)


def test_variables_of_a_deployment_count_more_than_those_of_its_application(write: Write) -> None:
    path = write(
        one(
            "runtime_env: {env_vars: {A: '1', B: '2'}}\n"
            "    deployments:\n      - {name: Price, ray_actor_options: {runtime_env: {env_vars: {B: '3'}}}}"
        )
    )
    price, shop = graph_of(path).deployments
    assert price.ray_actor_options == {"runtime_env": {"env_vars": {"A": "1", "B": "3"}}}
    assert shop.ray_actor_options == {"runtime_env": {"env_vars": {"A": "1", "B": "2"}}}


def test_what_is_built_is_a_file_that_changes_nothing(write: Write) -> None:
    built = CliRunner().invoke(main, ["build", "shop:app"], catch_exceptions=False)
    assert yaml.safe_load(built.stdout)["applications"] == [
        {
            "name": "default",
            "route_prefix": "/",
            "import_path": "shop:app",
            "deployments": [
                {"name": "Price", "num_replicas": 2, "max_ongoing_requests": 7, "user_config": {"factor": 1}},
                {"name": "Shop", "num_replicas": 1},
            ],
        }
    ]
    configured = graph_of(write(built.stdout)).deployments
    assert [each.changed_options for each in configured] == [each.changed_options for each in import_app("shop:app")]


def test_an_option_that_a_file_cannot_have_is_named(write: Write, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        SHOP.replace('{"factor": 1}', '{"factor": object}').replace("import os", "seen = {1}")
    )
    built = CliRunner().invoke(main, ["build", "shop:app"])
    assert "An option has a value that a config file cannot have: <class 'object'>" in built.output


def test_several_applications_are_built_under_names_and_routes_of_their_own(write: Write) -> None:
    path = write("")
    CliRunner().invoke(main, ["build", "shop:app", "shop:plain", "-o", str(path)], catch_exceptions=False)
    sections = yaml.safe_load(path.read_text())["applications"]
    assert [(each["name"], each["route_prefix"]) for each in sections] == [("shop", "/shop"), ("shop2", "/shop2")]


def test_what_is_deployed_is_written_as_the_file_says_it(write: Write) -> None:
    path = write(
        "applications:\n- {name: shop, import_path: 'shop:typed', args: {currency: EUR},"
        " deployments: [{name: Price, num_replicas: 3}]}\n"
    )
    graph = graph_of(path)
    deployed = [Deployed(each.to_spec(CODEC), generation=1) for each in graph.deployments]
    section = deployed_section("shop", deployed, CODEC)
    assert (section["import_path"], section["args"]) == ("shop:typed", {"currency": "EUR"})
    assert section["deployments"][0]["num_replicas"] == 3
    assert graph_of(write(yaml.safe_dump({"applications": [section]}))).root == graph.root


def test_only_roots_of_files_are_declared(write: Write) -> None:
    specs = [each.to_spec(CODEC) for each in graph_of(write(one("name: shop"))).deployments]
    assert [json.loads(each.declared) if each.declared else None for each in specs] == [
        None,
        {"import_path": "shop:app", "args": {}},
    ]
    assert [each.to_spec(CODEC).declared for each in import_app("shop:app")] == ["", ""]


def test_arguments_may_be_what_yaml_knows_beyond_json(write: Write) -> None:
    path = write("applications:\n  - {import_path: 'shop:plain', args: {currency: 2026-01-02}}\n")
    graph = graph_of(path)
    assert graph.deployments[0].init_args == (datetime.date(2026, 1, 2),)
    assert "2026-01-02" in graph.root.to_spec(CODEC).declared


def test_a_config_file_is_imported_like_a_module_and_watched_itself(write: Write) -> None:
    path = write(one("name: shop"))
    imported = import_found(find_app("app.yaml", None))
    assert [each.name for each in imported.deployments] == ["shop.Price", "shop.Shop"]
    assert {each.name for each in imported.files} == {path.name, "shop.py"}
    with pytest.raises(ConfigurationError, match="Arguments are in the file"):
        import_found(find_app("app.yaml", None), Overrides(arguments={"a": "1"}))
    with pytest.raises(ConfigurationError, match="Names and paths are in the file"):
        import_found(find_app("app.yaml", None), Overrides(name="shop"))


def test_pyproject_may_name_a_config_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(one("name: shop"))
    (tmp_path / "pyproject.toml").write_text('[tool.qserve]\napp = "app.yaml"\n')
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert find_app(None, None) == (str(path), path.parent)


def serving(file: FileWithLines, host: str | None = None, port: int | None = None, **tls: str | None) -> ServingOptions:
    return serving_options(file.config, host, port, {"ssl_certfile": None, "ssl_keyfile": None, **tls})


def test_the_command_line_and_the_environment_win_over_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_LOG_LEVEL", "ERROR")
    for name in ("QSERVE_HTTP_TIMEOUT_S", "QSERVE_ACCESS_LOG", "QSERVE_LOG_FORMAT"):
        monkeypatch.setenv(name, "")  # so that it is as before at the end
        monkeypatch.delenv(name)
    path = write(
        "http_options: {host: 0.0.0.0, port: 81, request_timeout_s: 5, ssl_certfile: a.pem}\n"
        "logging_config: {log_level: DEBUG, encoding: JSON, enable_access_log: false}\napplications: []\n"
    )
    file = read_config_file(path)
    assert serving(file) == ServingOptions("0.0.0.0", 81, ("--ssl-certfile=a.pem",), shows_certificate=False)
    assert serving(file, "::1", 0, ssl_certfile="b.pem")[:3] == ("::1", 0, ("--ssl-certfile=b.pem",))
    assert (os.environ["QSERVE_LOG_LEVEL"], os.environ["QSERVE_LOG_FORMAT"]) == ("ERROR", "json")
    assert (os.environ["QSERVE_HTTP_TIMEOUT_S"], os.environ["QSERVE_ACCESS_LOG"]) == ("5.0", "off")
    assert serving(read_config_file(write("proxy_location: Disabled\napplications: []"))).host is None
    assert serving_options(None, None, None, {})[:2] == ("127.0.0.1", 8000)


def test_the_published_schema_is_the_one_of_the_code() -> None:
    assert CONFIG_FILE_SCHEMA.read_text() == schema_text(), "`make tables` writes it"


def test_every_option_of_a_deployment_can_be_given() -> None:
    schema: dict[str, Any] = json.loads(schema_text())
    known = schema["$defs"]["DeploymentSection"]["properties"].keys()
    elsewhere = {"prev_version", "route_prefix", "init_args", "init_kwargs"}
    assert (
        known == (GivenOptions.__annotations__.keys() | RAY_NAMES.keys() | (known & WITHOUT_EFFECT.keys())) - elsewhere
    )
    assert len(DECLARED) > 20
