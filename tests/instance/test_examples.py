"""The examples, served by `qserve run examples.everything` and called the way their own texts say."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import ROOT, Serving, environment, free_port, runtime_folder, serving, wait_for_answer
from tests.support.slowness import patience

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def examples() -> Iterator[Serving]:
    port = free_port()
    command = [sys.executable, "-m", "qserve.cli", "run", "examples.everything", "--port", str(port)]
    with runtime_folder() as runtime, serving(command, port, runtime, ROOT, "/digits/docs") as instance:
        yield instance


def fetch(url: str, body: bytes | None = None) -> str:
    request = urllib.request.Request(url, data=body, headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=patience(20)) as response:
        return str(response.read().decode())


def run_python(examples: Serving, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=ROOT,
        env=environment(examples.runtime),
        capture_output=True,
        text=True,
        timeout=patience(100),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_noop_and_hello_answer(examples: Serving) -> None:
    assert fetch(f"{examples.url}/noop") == "ok"
    assert fetch(f"{examples.url}/hello?name=Ada") == "Hello Ada!"


def test_the_counter_counts(examples: Serving) -> None:
    first, second = (json.loads(fetch(f"{examples.url}/counter")) for _ in range(2))
    assert second["count"] == first["count"] + 1


def test_notes_are_a_fastapi_application(examples: Serving) -> None:
    note = json.loads(fetch(f"{examples.url}/notes/", b'{"text": "buy milk"}'))
    assert json.loads(fetch(f"{examples.url}/notes/{note['id']}")) == note
    assert "Notes" in fetch(f"{examples.url}/notes/openapi.json")


@pytest.mark.parametrize("form", [[], ["--png"]], ids=["json", "png"])
def test_the_digits_service_reads_99_percent_of_the_held_out_images(examples: Serving, form: list[str]) -> None:
    shown = run_python(examples, "examples/digits/evaluate.py", "--url", f"{examples.url}/digits", *form)
    assert float(shown.split()[1]) >= 0.98, shown


def test_a_png_is_classified_and_explained(examples: Serving) -> None:
    picture = (ROOT / "examples/digits/seven.png").read_bytes()
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="seven.png"\r\n\r\n'
    request = urllib.request.Request(
        f"{examples.url}/digits/upload?explain=true",
        data=head + picture + b"\r\n--x--\r\n",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    with urllib.request.urlopen(request, timeout=patience(20)) as response:
        answer = json.load(response)
    assert answer["digit"] == 7
    assert max(max(row) for row in answer["importance"]) > 0


@pytest.mark.parametrize(
    ("server", "app"),
    [(["uvicorn", "--log-level", "warning"], "fastapi_client:app"), (["flask", "--app"], "flask_client")],
    ids=["fastapi", "flask"],
)
def test_an_application_of_ones_own_calls_a_deployment(examples: Serving, server: list[str], app: str) -> None:
    port = free_port()
    command = [sys.executable, "-m", *server, f"examples.{app}", *(["run"] if server[0] == "flask" else [])]
    output = examples.runtime / f"output-{port}"
    with output.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=ROOT,
            env=environment(examples.runtime),
            stdout=out,
            stderr=out,
            text=True,
        )
    try:
        own = Serving(f"http://127.0.0.1:{port}", examples.runtime, process, output)
        wait_for_answer(own, "/visits")  # 405: it takes POST
        first, second = (json.loads(fetch(f"{own.url}/visits", b""))["visits"] for _ in range(2))
        assert second == first + 1
    finally:
        process.terminate()
        process.wait(patience(20))


def test_every_example_is_part_of_everything_or_a_client() -> None:
    shown = {path.stem for path in Path(ROOT / "examples").glob("*.py")} - {"__init__", "everything"}
    assert shown == {"noop", "hello", "fastapi_ingress", "fastapi_client", "flask_client"}
