"""`--gateway-workers` and TLS from the command line, and the Compose variant."""

import json
import re
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from qserve.settings import Settings
from tests.support.processes import command_line
from tests.support.serving import ROOT, free_ports, runtime_folder
from tests.support.shell import Shell, background, descendants
from tests.support.slowness import patience

APP = """
    from qserve import serve

    @serve.deployment(route_prefix="/")
    def hello():
        return "hello"
    """


@pytest.mark.timeout(90)
def test_several_gateways_serve_one_port_and_each_has_its_admin_listener(tmp_path: Path) -> None:
    admin = free_ports(3)
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime, {"QSERVE_ADMIN_PORT": str(admin), "QSERVE_ADMIN_TOKEN": "t"})
        shell.write("app.py", APP)
        with background(shell, "run", "app", "--port", "0", "--gateway-workers", "3") as running:
            running.wait_for("Ctrl-C stops it")
            found = re.search(r"curl (http://\S+)", running.output)
            assert found
            gateways = [it.pid for it in descendants(running.process.pid) if "qserve: gateway" in command_line(it)]
            assert len(gateways) == 3
            for _ in range(30):
                with urllib.request.urlopen(found[1], timeout=patience(5)) as answer:
                    assert answer.read() == b"hello"
            told = [status(admin + number) for number in range(3)]
            assert sorted(it["pid"] for it in told) == sorted(gateways)
            assert {gateway["pid"] for gateway in told[0]["gateways"]} == set(gateways)


def status(port: int) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/-/status", headers={"Authorization": "Bearer t"})
    with urllib.request.urlopen(request, timeout=patience(5)) as answer:
        told: dict[str, Any] = json.load(answer)
    return told


def test_run_serves_https(tmp_path: Path, certificate: Path) -> None:
    with runtime_folder() as runtime:
        shell = Shell(tmp_path, runtime)
        shell.write("app.py", APP)
        files = ["--ssl-certfile", str(certificate / "cert.pem"), "--ssl-keyfile", str(certificate / "key.pem")]
        with background(shell, "run", "app", "--port", "0", *files) as running:
            running.wait_for("Ctrl-C stops it")
            found = re.search(r"curl -k (https://\S+)", running.output)
            assert found
            context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
            with urllib.request.urlopen(found[1], timeout=patience(5), context=context) as answer:
                assert answer.read() == b"hello"


def test_the_compose_variant_sets_what_there_is_and_publishes_the_admin_port_to_this_machine_only() -> None:
    text = (ROOT / "docker-compose.secure.yml").read_text()
    variables = set(re.findall(r"^ {6}(QSERVE_\w+):", text, re.MULTILINE))
    assert variables <= {f"QSERVE_{name.upper()}" for name in Settings.model_fields}
    assert {"QSERVE_API_KEYS", "QSERVE_ADMIN_TOKEN"} <= variables
    services = yaml.safe_load(text)["services"].items()
    unset = {name: service["environment"]["QSERVE_SECRET"].partition(":?")[0] for name, service in services}
    assert unset == dict.fromkeys(("deploy", "gateway", "worker"), "${QSERVE_SECRET")
    assert re.findall(r'^ +- "(.*):9000"$', text, re.MULTILINE) == ["127.0.0.1:${QSERVE_ADMIN_PUBLISHED_PORT:-9000}"]
