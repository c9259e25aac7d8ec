"""Clients that do not do their part."""

import select
import socket

import pytest
from starlette.responses import Response, StreamingResponse

from qserve import serve
from qserve.testing import TestInstance
from tests.instance.front_door.cases import get
from tests.support.gateways import gateway
from tests.support.raw_http import read_response


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_client_that_does_not_read_its_response_is_given_up(qserve_instance: TestInstance, in_parts: bool) -> None:
    @serve.deployment
    async def big() -> Response:
        return StreamingResponse(iter([bytes(1 << 20)] * 12)) if in_parts else Response(bytes(12 << 20))

    big.deploy()
    with gateway(qserve_instance.settings, QSERVE_HTTP_SEND_TIMEOUT_S=1) as served:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((served.address.host, served.address.port))
            connection.sendall(get(target=b"/big"))
            cut = select.poll()
            cut.register(connection, 0)  # errors are told in any case
            assert cut.poll(30_000)
        with served.address.connect(20) as connection:
            connection.sendall(get(target=b"/-/healthz"))
            assert read_response(connection)[0] == 200
