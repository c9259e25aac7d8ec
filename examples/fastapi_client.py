"""A FastAPI application of your own that calls a deployment through a handle; only the deployment runs in qserve.

qserve run examples.hello                                        # in one terminal
uvicorn examples.fastapi_client:app --port 8001                  # in another
curl -X POST http://127.0.0.1:8001/visits
"""

from fastapi import FastAPI

from qserve import serve

app = FastAPI()
counter = serve.get_deployment("Counter").get_handle(sync=False)


@app.post("/visits")
async def visit() -> dict[str, int]:
    ref = await counter.add.remote(1)
    return {"visits": await ref}
