"""The least a deployment can do; `make bench` measures it."""

from qserve import serve


@serve.deployment(route_prefix="/noop")
class Noop:
    async def __call__(self) -> str:
        return "ok"
