"""The example of an application in containers of its own."""

import re

from tests.support.serving import ROOT


def test_the_files_of_an_own_application_fit_together() -> None:
    folder = ROOT / "examples/own_app"
    text = (folder / "docker-compose.yml").read_text()
    more = (folder / "docker-compose.redis.yml").read_text()
    assert '"127.0.0.1:${QSERVE_REDIS_PORT:-6379}:6379"' in more
    assert "${QSERVE_SECRET:?" in more
    assert "QSERVE_PUBLIC_URL: http://localhost:${QSERVE_PORT:-8000}" in text
    named = set(re.findall(r"\$\{(QSERVE_\w+)", text + more))
    told = set(re.findall(r"^(QSERVE_\w+)=", (folder / ".env.example").read_text(), re.MULTILINE))
    assert named == told
