"""Background tasks run after the answer, in order."""

import asyncio
import time
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI()
notes: list[str] = []
written = asyncio.Condition()


async def note(text: str) -> None:
    async with written:
        notes.append(text)
        written.notify_all()


def note_slowly(text: str) -> None:
    time.sleep(0.05)
    notes.append(text)


def in_dependency(tasks: BackgroundTasks) -> str:
    tasks.add_task(note_slowly, "dependency")
    return "value"


@app.post("/notes/{text}", status_code=202)
async def write(text: str, tasks: BackgroundTasks, value: Annotated[str, Depends(in_dependency)]) -> str:
    tasks.add_task(note_slowly, f"first {text}")
    tasks.add_task(note, f"second {text}")
    return value


@app.post("/own")
async def own() -> JSONResponse:
    return JSONResponse("own", background=BackgroundTask(note, "own"))


@app.get("/notes/{count}")
async def read(count: int) -> list[str]:
    async with written, asyncio.timeout(10):
        await written.wait_for(lambda: len(notes) >= count)
        return notes


@serve.ingress(app)
class Served: ...


CASES = [
    Case("answers first", "POST", "/notes/x"),
    Case("runs all of them", "GET", "/notes/3"),
    Case("of a response", "POST", "/own"),
    Case("runs that too", "GET", "/notes/4"),
]
