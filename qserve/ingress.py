"""`@serve.ingress(app)`: an ASGI application (FastAPI, APIRouter, Starlette or any other) in front of a class."""

from typing import Any


def bind_app(instance: object) -> Any:
    """The application of an instance's class."""
    return type(instance).__qserve_asgi__  # type: ignore[attr-defined]
