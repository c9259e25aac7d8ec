"""TLS in front of a server that speaks none."""

import contextlib
import socket
import ssl
import threading

from tests.support.waiting import joined

_HANDSHAKE = b"\x16"


class TlsProxy:
    """Listens on a free port of 127.0.0.1 until the end of the block.

    Args:
        context: With the certificate to show.
        target: Port of the server.
        plain: Connections without TLS pass as they are, so that a sentinel that speaks none can watch the server.
    """

    def __init__(self, context: ssl.SSLContext, target: int = 0, *, plain: bool = False) -> None:
        self.target = target
        self._plain = plain
        self.encrypted = 0
        """How many connections have been encrypted."""
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> "TlsProxy":
        self._threads[0].start()
        return self

    def __exit__(self, *_exc: object) -> None:
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        joined(*self._threads)
        for sock in self._open:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._open.append(client)
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if client.recv(1, socket.MSG_PEEK) == _HANDSHAKE:
                client = self._context.wrap_socket(client, server_side=True)
                self._open.append(client)
                self.encrypted += 1
            elif not self._plain:
                raise OSError("no TLS")
            server = socket.create_connection(("127.0.0.1", self.target))
            self._open.append(server)
            self._start(self._pump, server, client)
            self._pump(client, server)
            return
        client.close()

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
