"""The two servers that are compared."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from qserve import serve
from tests.instance.differential.answer import Answer, ask
from tests.instance.differential.case import Case
from tests.instance.differential.catalogue import Topic


class Sides:
    """Asks both servers the same.

    Args:
        plain: Address of plain uvicorn.
        gateway: Address of the gateway.
    """

    def __init__(self, plain: tuple[str, int], gateway: tuple[str, int]) -> None:
        self.addresses = (plain, gateway)
        self._deployed: Sequence[Topic] = ()
        self._cookies: dict[tuple[tuple[str, int], str], dict[str, str]] = defaultdict(dict)

    def deploy(self, group: Sequence[Topic]) -> None:
        """Deploy a group of applications, a replica each, instead of the group before; plain uvicorn has them all."""
        if group is self._deployed:
            return
        for topic in self._deployed:
            serve.get_deployment(topic.name).delete()
        self._deployed = group
        with ThreadPoolExecutor(len(group)) as pool:
            list(pool.map(_deploy, group))

    def ask(self, topic: Topic, case: Case) -> tuple[Answer, Answer]:
        """The answers of plain uvicorn and of the gateway."""
        plain, gateway = (self._ask_one(address, topic, case) for address in self.addresses)
        return plain, gateway

    def _ask_one(self, address: tuple[str, int], topic: Topic, case: Case) -> Answer:
        jar = self._cookies[address, topic.name]
        answer = ask(address, case, topic.prefix.rstrip("/"), jar)
        jar.update(answer.set_cookies())
        return answer


def _deploy(topic: Topic) -> None:
    serve.deployment(name=topic.name, route_prefix=topic.prefix)(topic.ingress).deploy()
