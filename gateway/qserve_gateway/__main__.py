"""`python -m qserve_gateway`: one gateway process."""

import asyncio
import logging
import os
import sys
from pathlib import Path

import click

from qserve.calls.process_client import new_event_loop
from qserve.deployments.local_instance import find_settings
from qserve.errors import ConfigurationError, NoInstanceError
from qserve.telemetry.log_records import log_to_stderr

try:
    from qserve_gateway.listener import ListenAddress, TlsFiles
    from qserve_gateway.server import GatewayOptions, GatewayProcess, Ready, report
except ModuleNotFoundError as exc:
    sys.exit(f"A gateway needs the package {exc.name!r}, which is not installed: pip install 'qserve[gateway]'")


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0: any free one.")
@click.option("--fd", type=int, help="Inherited socket, bound already, instead of host and port.")
@click.option("--reuse-port", is_flag=True, help="Share the port with other gateways of this machine.")
@click.option("--ready-file", type=click.Path(path_type=Path), help="Gets a line of JSON: the URL or the error.")
@click.option(
    "--forwarded-allow-ips",
    "trusted_proxies",
    envvar="FORWARDED_ALLOW_IPS",
    default="",
    help="Proxies whose X-Forwarded-* headers are believed, comma-separated. Default: none.",
)
@click.option("--ssl-certfile", help="Certificate chain, for HTTPS.")
@click.option("--ssl-keyfile", help="Key of the certificate, where it is not in the same file.")
@click.option("--ssl-keyfile-password", envvar="QSERVE_SSL_KEYFILE_PASSWORD", help="Password of the key.")
@click.option("--ssl-ca-certs", help="Authorities: clients must show a certificate of one of them.")
@click.option("--graceful-shutdown-timeout", "graceful_shutdown_timeout_s", default=20, show_default=True)
def main(
    host: str,
    port: int,
    fd: int | None,
    reuse_port: bool,
    ready_file: Path | None,
    trusted_proxies: str,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    ssl_keyfile_password: str | None,
    ssl_ca_certs: str | None,
    graceful_shutdown_timeout_s: int,
) -> None:
    """Serve the deployments of a namespace over HTTP."""
    tls = TlsFiles(ssl_certfile, ssl_keyfile, ssl_keyfile_password, ssl_ca_certs) if ssl_certfile else None
    address = ListenAddress(host, port, fd, reuse_port)
    options = GatewayOptions(address, ready_file, trusted_proxies, graceful_shutdown_timeout_s, tls)
    try:
        settings = find_settings()
        log_to_stderr("gateway", settings.log_level, settings.log_format)
        # Our own lines tell when the server starts and stops.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        try:
            gateway = GatewayProcess(options, settings)
        except ConfigurationError as exc:
            report(ready_file, Ready(os.getpid(), error=str(exc)))
            raise
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(gateway.run())
    except (ConfigurationError, NoInstanceError) as exc:
        sys.exit(str(exc))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
