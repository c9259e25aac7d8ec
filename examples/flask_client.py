"""A Flask application of your own that calls a deployment through a handle; only the deployment runs in qserve.

qserve run examples.hello                                        # in one terminal
flask --app examples.flask_client run --port 8001                # in another
curl -X POST http://127.0.0.1:8001/visits
"""

from flask import Flask

import qserve
from qserve import serve

app = Flask(__name__)
counter = serve.get_deployment("Counter").get_handle()


@app.post("/visits")
def visit() -> dict[str, int]:
    return {"visits": qserve.get(counter.add.remote(1), timeout=10)}
