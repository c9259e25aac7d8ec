"""What README.md and the other documents show is run, in order, one test per document.

A comment before each block of code says what it is:
`file: NAME` is saved, `serve: PATH` runs in the background until PATH answers, `run` is run (`console` blocks are
compared with their output, where `...` stands for anything), `run: alone` is run after the servers have been stopped,
and `not run: REASON` is only shown.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

from tests.support.serving import ROOT, environment, free_port, runtime_folder, serving
from tests.support.slowness import patience

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = {"python", "shell", "console"}
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """One fenced block and the comment before it."""

    verb: str
    argument: str
    language: str
    text: str


def blocks_of(document: Path) -> Iterator[Block]:
    for found in BLOCK.finditer(document.read_text()):
        verb, _, argument = (found["mark"] or "").partition(": ")
        yield Block(verb, argument, found["language"], found["text"])


def anchors_of(document: Path) -> set[str]:
    """How GitHub names the headings of a document in links."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class Reader:
    """Somebody who follows a document step by step in an empty folder."""

    def __init__(self, folder: Path, runtime: Path, servers: ExitStack) -> None:
        self.folder = folder
        self.runtime = runtime
        self.servers = servers
        self.ports = {"8000": str(free_port()), "8001": str(free_port())}

    def follow(self, block: Block) -> None:
        text = re.sub(r"\b800[01]\b", lambda port: self.ports[port[0]], block.text)
        if block.verb == "file":
            (self.folder / block.argument).write_text(text)
        elif block.verb == "serve":
            words = shlex.split(text)
            settings = list(takewhile(lambda word: "=" in word, words))  # NAME=VALUE before the command, as in a shell
            command = [*settings, str(Path(sys.executable).parent / words[len(settings)]), *words[len(settings) + 1 :]]
            command = ["env", *command, "--port", self.ports["8000"]]
            port = int(self.ports["8000"])
            self.servers.enter_context(serving(command, port, self.runtime, self.folder, block.argument))
        elif block.verb == "run":
            if block.argument == "alone":
                self.servers.close()
            if block.language == "python":
                script = self.folder / "snippet.py"
                script.write_text(text)
                self.run([sys.executable, str(script)])
            else:
                self.compare(text)

    def run(self, command: list[str]) -> str:
        done = subprocess.run(
            command,
            check=False,
            cwd=self.folder,
            env=environment(self.runtime),
            capture_output=True,
            text=True,
            timeout=patience(50),
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def compare(self, text: str) -> None:
        for step in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, expected = step.partition("\n")
            shown = self.run(["sh", "-c", command])
            pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
            assert re.fullmatch(pattern, shown.strip(), re.DOTALL), f"$ {command}\n{shown}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_of_code_says_whether_it_is_run(document: Path) -> None:
    unmarked = [
        block.text
        for block in blocks_of(document)
        if block.language in CODE and block.verb not in ("file", "serve", "run", "not run")
    ]
    assert unmarked == []


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "document",
    [document for document in DOCUMENTS if any(block.verb == "run" for block in blocks_of(document))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_what_a_document_shows_works(document: Path, tmp_path: Path) -> None:
    if shutil.which("curl") is None and "curl" in document.read_text():
        pytest.skip("curl is not installed")
    with runtime_folder() as runtime, ExitStack() as servers:
        reader = Reader(tmp_path, runtime, servers)
        for block in blocks_of(document):
            reader.follow(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, heading = target.partition("#")
        if "://" not in path:
            other = document.parent / path if path else document
            if not other.exists() or (heading and heading not in anchors_of(other)):
                missing.append(target)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_a_document_names_exist(document: Path) -> None:
    """Written as code, from the root of the project: `qserve/serve.py`, `tests/pure/`."""
    named = re.findall(
        r"`((?:\.ci|benchmarks|docs|examples|gateway|qserve|tests|workers)/[\w./-]*)`", document.read_text()
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_events_to_watch_exist() -> None:
    """What docs/operations.md tells to alert on; of its metrics, tests/pure/test_observability.py sees to that."""
    sources = "".join(
        path.read_text() for folder in ("qserve", "gateway", "workers") for path in (ROOT / folder).rglob("*.py")
    )
    events = set(re.findall(r'(?:event=|`)"(\w+)"', (ROOT / "docs/operations.md").read_text()))
    assert len(events) > 3
    assert [name for name in sorted(events) if f'"{name}"' not in sources] == []
