"""A schema that does not tell the prefix."""

from fastapi import FastAPI

from qserve import serve
from tests.instance.differential.case import Case

app = FastAPI(root_path_in_servers=False, separate_input_output_schemas=False, swagger_ui_parameters={"deepLinking": 0})


@app.get("/things")
def things() -> list[str]:
    return []


@serve.ingress(app)
class Served: ...


CASES = [Case("openapi.json", "GET", "/openapi.json"), Case("docs", "GET", "/docs")]
