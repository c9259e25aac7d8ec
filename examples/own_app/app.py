"""What the containers serve. Put your own code here, and what it needs into requirements.txt."""

import numpy
from starlette.requests import Request

from qserve import serve


@serve.deployment(route_prefix="/median")
class Medians:
    async def __call__(self, request: Request) -> float:
        return self.of([float(number) for number in request.query_params["numbers"].split(",")])

    def of(self, numbers: list[float]) -> float:
        return float(numpy.median(numbers))
