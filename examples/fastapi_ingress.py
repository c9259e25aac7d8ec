"""A FastAPI application as a deployment: routes, validation and /docs are FastAPI's own, `self` is the replica.

qserve run examples.fastapi_ingress
curl http://127.0.0.1:8000/notes/ -H 'content-type: application/json' -d '{"text": "buy milk"}'
curl http://127.0.0.1:8000/notes/1
"""

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

from qserve import serve

app = FastAPI(title="Notes")


class Note(BaseModel):
    text: str = Field(min_length=1, max_length=500)


class StoredNote(Note):
    id: int


@serve.deployment(route_prefix="/notes")
@serve.ingress(app)
class Notes:
    """Keeps notes in the memory of its one replica, so they end with it."""

    def __init__(self) -> None:
        self.notes: dict[int, StoredNote] = {}

    @app.post("/", status_code=201)
    async def add(self, note: Note) -> StoredNote:
        stored = StoredNote(id=len(self.notes) + 1, text=note.text)
        self.notes[stored.id] = stored
        return stored

    @app.get("/")
    async def read_all(self) -> list[StoredNote]:
        return list(self.notes.values())

    @app.get("/{note_id}")
    async def read(self, note_id: int) -> StoredNote:
        if note_id not in self.notes:
            raise HTTPException(404, f"there is no note {note_id}")
        return self.notes[note_id]
