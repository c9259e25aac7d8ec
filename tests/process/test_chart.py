"""The Helm chart: what it renders, what it refuses, and that the commands in it run."""

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from qserve.settings import Settings
from tests.support import chart
from tests.support.serving import ROOT, environment, free_port, runtime_folder
from tests.support.waiting import wait_until

_CUSTOM = {"ScaledObject", "TriggerAuthentication", "ServiceMonitor", "PrometheusRule"}
"""Kinds of operators, of which the schemas of Kubernetes say nothing."""


def find(text: str, kind: str, name: str) -> dict[str, Any]:
    [found] = [each for each in chart.documents(text) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def container_of(document: dict[str, Any]) -> dict[str, Any]:
    [container] = document["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


@pytest.mark.parametrize("values", chart.VALUES, ids=lambda path: path.stem)
def test_the_chart_renders_what_is_expected(values: Path) -> None:
    chart.helm("lint", str(chart.CHART), "--strict", "--values", str(values))

    assert chart.render(values) == chart.expected_of(values).read_text(), "`make tables` writes it anew"


def test_the_plain_manifests_are_those_of_the_chart() -> None:
    assert chart.plain() == chart.PLAIN.read_text(), "`make tables` writes them anew"
    kustomization = yaml.safe_load((chart.PLAIN.parent / "kustomization.yaml").read_text())
    [secret] = kustomization["secretGenerator"]
    keys = {literal.partition("=")[0] for literal in secret["literals"]}
    named = {reference["key"] for reference in _secret_references(chart.documents(chart.PLAIN.read_text()))}
    assert keys == named
    assert kustomization["resources"] == [chart.PLAIN.name]


@pytest.mark.parametrize("version", ["1.29", "1.33"])
@pytest.mark.parametrize("values", chart.VALUES, ids=lambda path: path.stem)
def test_kubernetes_takes_every_object(values: Path, version: str) -> None:
    for document in chart.documents(chart.render(values)):
        if document["kind"] not in _CUSTOM:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("values", chart.VALUES, ids=lambda path: path.stem)
def test_every_pod_is_confined(values: Path) -> None:
    pods = [
        each["spec"]["template"]["spec"]
        for each in chart.documents(chart.render(values))
        if "template" in each.get("spec", {})
    ]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            confined = container["securityContext"]
            assert confined["readOnlyRootFilesystem"]
            assert not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}
            assert "requests" in container["resources"]


@pytest.mark.parametrize("values", chart.VALUES, ids=lambda path: path.stem)
def test_secrets_are_named_and_never_written_out(values: Path) -> None:
    text = chart.render(values)
    made = {
        (each["metadata"]["name"], key)
        for each in chart.documents(text)
        if each["kind"] == "Secret"
        for key in each["data"] or {}
    }
    own = "q-qserve"
    for reference in _secret_references(chart.documents(text)):
        assert reference["name"] != own or (own, reference["key"]) in made, reference
    assert "password@" not in re.sub(r"\$\(VALKEY_PASSWORD\)@", "", text)


def _secret_references(found: Any) -> Iterator[dict[str, str]]:
    if isinstance(found, dict):
        if "secretKeyRef" in found:
            yield found["secretKeyRef"]
        for value in found.values():
            yield from _secret_references(value)
    elif isinstance(found, list):
        for value in found:
            yield from _secret_references(value)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["gateway.replica=2"], "additional properties 'replica' not allowed|Additional property replica"),
        (["gateway.replicas=0"], "greater than or equal to 1|minimum"),
        (["redis.url=http://x"], "redis.url|pattern"),
        (["redis.url=redis://x", "redis.existingSecret=y"], "give one of them"),
        (["serviceMonitor.enabled=true"], "needs admin.enabled=true"),
        (["pools.default.keda.enabled=true"], "needs admin.enabled=true"),
        (["admin.enabled=true", "pools.a.keda.enabled=true"], "pools.a.keda.deployment is missing"),
        (
            ["admin.enabled=true", "pools.a.keda.enabled=true", "pools.a.keda.deployment=Other", "pools.a.only={Own}"],
            "pools.a.keda.deployment is Other, which is not in its only",
        ),
        (["gateway.args={--ssl-ca-certs=/ca.pem}"], "no gateway would become ready"),
        (["pools.Bad_Name.replicas=1"], "Bad_Name"),
        (["settings.lower=1"], "lower"),
        (["gateway.ingress.enabled=true"], "needs gateway.ingress.hosts"),
        (
            ["gateway.autoscaling.enabled=true", "gateway.autoscaling.maxReplicas=1"],
            "is 2, more than its maxReplicas, 1",
        ),
        (["extraObjects[0]=x"], "extraObjects"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_values_are_refused_with_a_sentence(sets: list[str], said: str) -> None:
    with pytest.raises(chart.ChartError, match=said):
        chart.render(None, *sets)


def test_settings_arrive_as_they_are_written(tmp_path: Path) -> None:
    """Whatever a file of values says is a float to Helm where it is a number."""
    written = {
        "QSERVE_MAX_BODY_BYTES": 1073741824,
        "QSERVE_SLOW_CALL_S": 0.5,
        "QSERVE_DEBUG": True,
        "QSERVE_APP": "shop:app",
    }
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"settings": written}))
    for component in ("gateway", "worker-default"):
        container = container_of(find(chart.render(values), "Deployment", f"q-qserve-{component}"))
        given = {each["name"]: each["value"] for each in container["env"] if each["name"] in written}
        assert given == {
            "QSERVE_MAX_BODY_BYTES": "1073741824",
            "QSERVE_SLOW_CALL_S": "0.5",
            "QSERVE_DEBUG": "true",
            "QSERVE_APP": "shop:app",
        }


@pytest.mark.parametrize(
    "certificate", ["gateway.args={--ssl-certfile=/tls.pem}", "gateway.args={--ssl-certfile,/tls.pem}"]
)
def test_probes_speak_https_where_the_gateway_does(certificate: str) -> None:
    for sets, scheme in (((), "HTTP"), ((certificate,), "HTTPS")):
        gateway = container_of(find(chart.render(None, *sets), "Deployment", "q-qserve-gateway"))
        probes = [gateway[probe]["httpGet"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")]
        assert {probe.get("scheme", "HTTP") for probe in probes} == {scheme}


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel", "redis+cluster", "rediss+cluster"])
def test_a_server_of_every_kind_may_be_named(scheme: str) -> None:
    assert chart.render(None, f"redis.url={scheme}://host:6379")


def test_the_rules_of_the_chart_are_those_for_prometheus() -> None:
    assert chart.RULES_IN_CHART.read_text() == chart.RULES.read_text(), "`make tables` copies them"
    rules = find(chart.render(chart.CHART / "ci/production-values.yaml"), "PrometheusRule", "q-qserve")
    assert rules["spec"] == yaml.safe_load(chart.RULES.read_text())


def test_a_pool_has_the_defaults_but_for_what_it_says() -> None:
    text = chart.render(chart.CHART / "ci/production-values.yaml")
    models = find(text, "Deployment", "q-qserve-worker-models")
    assert models["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 130
    assert container_of(models)["args"] == ["--no-gateway", "--replicas-per-node=2", "--only=Classifier,Embedder"]
    assert container_of(models)["resources"]["requests"] == {"cpu": "500m", "memory": "512Mi"}
    assert container_of(models)["resources"]["limits"]["nvidia.com/gpu"] == 1
    reports = find(text, "Deployment", "q-qserve-worker-reports")
    assert "replicas" not in reports["spec"], "KEDA decides, and an upgrade must not put it back"


def test_a_leaving_gateway_has_the_time_that_it_was_promised() -> None:
    gateway = find(chart.render(None), "Deployment", "q-qserve-gateway")
    pod = gateway["spec"]["template"]["spec"]
    container = container_of(gateway)
    [_, pause] = container["lifecycle"]["preStop"]["exec"]["command"]
    [graceful] = [arg for arg in container["args"] if arg.startswith("--graceful-shutdown-timeout=")]
    assert pod["terminationGracePeriodSeconds"] > int(pause) + int(graceful.partition("=")[2])


@contextmanager
def running(
    container: dict[str, Any], redis_url: str, runtime: Path, *instead: str
) -> Iterator["subprocess.Popen[str]"]:
    """A container's command, with its environment, on this machine.

    Args:
        instead: Arguments that replace those of the same option.
    """
    options = {each.partition("=")[0]: each for each in [*container.get("args", []), *instead]}
    command = [*container["command"], *options.values()]
    command[0] = str(Path(sys.executable).parent / command[0])
    rendered = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    given = {"QSERVE_REDIS_URL": redis_url, "QSERVE_SECRET": "secret", "QSERVE_RUNTIME_DIR": str(runtime)}
    with (runtime / f"output-{command[1].strip('-')}").open("w+") as output:
        process = subprocess.Popen(
            command,
            env=environment(runtime) | rendered | given,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def test_the_commands_of_the_containers_run_and_their_probes_answer(settings: Settings) -> None:
    text = chart.render(None, f"settings.QSERVE_NAMESPACE={settings.namespace}", "application=examples.hello")
    gateway = container_of(find(text, "Deployment", "q-qserve-gateway"))
    node = container_of(find(text, "Deployment", "q-qserve-worker-default"))
    job = container_of(find(text, "Job", "q-qserve-deploy"))
    port = free_port()

    def answers(path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as response:
                return bool(response.status == 200)
        except OSError:
            return False

    with (
        runtime_folder() as runtime,
        running(node, settings.redis_url, runtime),
        running(gateway, settings.redis_url, runtime, "--host=127.0.0.1", f"--port={port}"),
    ):
        with running(job, settings.redis_url, runtime) as deploying:
            assert deploying.wait(60) == 0
        paths = {gateway[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
        wait_until(lambda: all(answers(path) for path in paths))
        wait_until(lambda: answers("/hello?name=Ada"))
        command = node["livenessProbe"]["exec"]["command"]
        alive = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env=os.environ | {"QSERVE_RUNTIME_DIR": str(runtime), "QSERVE_NAMESPACE": settings.namespace},
            check=False,
        )
        assert alive.returncode == 0
