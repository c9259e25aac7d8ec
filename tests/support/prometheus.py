"""A Prometheus that scrapes gateways with the configuration of deploy/observability."""

import contextlib
import json
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.serving import ROOT, free_port
from tests.support.slowness import patience
from tests.support.waiting import wait_until

OBSERVABILITY = ROOT / "deploy/observability"


class Prometheus:
    """Answers questions as its HTTP interface does."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=patience(10)) as response:
            return json.loads(response.read())["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(urllib.request.urlopen(f"{self.url}/-/ready", timeout=patience(10)))
        return False


def board_expressions() -> list[str]:
    """Every expression of the board, for all deployments."""
    board: dict[str, Any] = json.loads((OBSERVABILITY / "grafana/qserve.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return [each.replace("$__rate_interval", "10s").replace("$deployment", ".*") for each in found]


@contextlib.contextmanager
def prometheus(folder: Path, token: str, targets: list[str]) -> Iterator[Prometheus]:
    """Runs one that scrapes each second; its targets are told here, where Compose has a name for them."""
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(OBSERVABILITY / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "token")
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": targets}]
    (folder / "token").write_text(token)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    files = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command = ["prometheus", *files, f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=exemplar-storage"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        running = Prometheus(f"http://127.0.0.1:{port}")
        wait_until(running.is_ready, 20, shows=(folder / "log").read_text)
        yield running
    finally:
        process.kill()
        process.wait()
