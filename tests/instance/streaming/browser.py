"""A real browser as the peer, at /usr/bin/chromium or in CHROMIUM: `python -m tests.instance.streaming.browser`.

Not part of the test suite, because most machines have no browser. It serves a page that opens a WebSocket, reads
server-sent events and a streamed response, and reports what it saw; that is printed, and fails if it is not as it
should be.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import cloudpickle
import httpx
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import HTMLResponse, StreamingResponse

from qserve import serve
from qserve.testing import instance
from tests.support import gates
from tests.support.waiting import wait_until

EXPECTED = {"echo": ["text", "3 bytes"], "closed": [4001, "enough"], "events": ["0", "1", "2"], "body": 300_000}
PAGE = """<!doctype html><script>
const seen = {echo: [], events: []};
const socket = new WebSocket(`ws://${location.host}/app/socket`);
socket.binaryType = "arraybuffer";
socket.onopen = () => { socket.send("text"); socket.send(new Uint8Array(3)); };
const echoed = new Promise(done => {
  socket.onmessage = event => {
    seen.echo.push(typeof event.data === "string" ? event.data : `${event.data.byteLength} bytes`);
    if (seen.echo.length === 2) socket.send("close");
  };
  socket.onclose = event => { seen.closed = [event.code, event.reason]; done(); };
});
const streamed = new Promise(done => {
  const source = new EventSource("/app/events");
  source.onmessage = event => {
    seen.events.push(event.data);
    if (seen.events.length === 3) { source.close(); done(); }
  };
});
const body = fetch("/app/blocks").then(answer => answer.arrayBuffer()).then(data => { seen.body = data.byteLength; });
Promise.all([echoed, streamed, body]).then(() => fetch("/app/report", {method: "POST", body: JSON.stringify(seen)}));
</script>"""

app = FastAPI()
reports: list[object] = []


@app.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


@app.websocket("/socket")
async def socket(socket: WebSocket) -> None:
    await socket.accept()
    while (message := await socket.receive()).get("text") != "close":
        await socket.send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
    await socket.close(4001, "enough")


@app.get("/events")
async def events() -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        for number in range(3):
            yield f"data: {number}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")


@app.get("/blocks")
async def blocks() -> StreamingResponse:
    return StreamingResponse(bytes(100_000) for _ in range(3))


@app.post("/report")
async def report(request: Request) -> None:
    reports.append(await request.json())


@app.get("/reports")
async def list_reports() -> list[object]:
    return reports


def main() -> None:
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        raise SystemExit(f"not run: there is no browser at {chromium}; name one in CHROMIUM")
    cloudpickle.register_pickle_by_value(gates)

    @serve.deployment(name="app")
    @serve.ingress(app)
    class App:
        pass

    with instance() as running, tempfile.TemporaryDirectory() as profile:
        App.deploy()
        command = [chromium, "--headless", "--no-sandbox", f"--user-data-dir={profile}", f"{running.url}/app/"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as browser:
            try:
                (seen,) = wait_until(lambda: httpx.get(f"{running.url}/app/reports").json())
            finally:
                browser.terminate()
    sys.stdout.write(f"{seen}\n")
    if seen != EXPECTED:
        raise SystemExit(f"expected {EXPECTED}")


if __name__ == "__main__":
    main()
