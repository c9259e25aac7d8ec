"""A cluster whose nodes are reached through TLS with certificates that are checked, before and after a failover."""

import shutil
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trustme

from qserve.broker.server.address import at_slot, slot_of
from qserve.errors import BrokerUnavailable
from tests.faults.failover.test_tls import WAYS, by_call_path
from tests.support.cluster import Cluster
from tests.support.tls_proxy import TlsProxy
from tests.support.waiting import until

SLOT = slot_of("tls")
"""Of the namespace that drivers and followers use in `WAYS`."""


class SecuredCluster:
    """A cluster that tells everybody the ports of its TLS proxies."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "other.pem")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        self._folder = folder
        self.cluster = Cluster(folder)
        stack.callback(self.cluster.kill)
        self.proxies = {}
        for node in self.cluster.nodes:
            # The servers themselves speak no TLS, and a replica connects to its primary by the port that this tells.
            proxy = stack.enter_context(TlsProxy(context, node.port, plain=True))
            node.announced, self.proxies[node.port] = proxy.port, proxy
        self.cluster.start()

    def url(self, authority: str = "ca.pem") -> str:
        nodes = ",".join(f"127.0.0.1:{proxy.port}" for proxy in self.proxies.values())
        return f"rediss+cluster://{nodes}/?ssl_ca_certs={self._folder / authority}"

    def encrypted_by_primary(self) -> int:
        """How many encrypted connections have been made to the server that has SLOT."""
        return self.proxies[self.cluster.primary_of(SLOT).port].encrypted


@pytest.fixture
def secured() -> Iterator[SecuredCluster]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        yield SecuredCluster(folder, stack)


async def test_every_way_to_connect_is_encrypted_before_and_after_a_failover(secured: SecuredCluster) -> None:
    with pytest.raises(BrokerUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await by_call_path(at_slot(secured.url("other.pem"), SLOT))

    dead = secured.cluster.primary_of(SLOT)
    for _ in ("before", "after"):
        for connect in WAYS:
            before = secured.encrypted_by_primary()
            url = secured.url()
            await connect(at_slot(url, SLOT) if connect is by_call_path else url)
            if connect.__name__ != "by_celery":  # which uses the slot of another namespace
                assert secured.encrypted_by_primary() > before
        if dead.process.poll() is None:
            dead.kill()
            await until(lambda: secured.cluster.primary_of(SLOT) is not dead)
