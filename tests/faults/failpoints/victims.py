"""A process that does one thing to the deployment of a failpoint test, and may die of it: `... victims WHAT [ID]`."""

import asyncio
import sys

from qserve.broker.instance.state import State
from qserve.calls.client import Client
from qserve.calls.handles.handle_codec import codec_of
from qserve.settings import Settings, at_deployment
from qserve.wire.call_record import DurableOptions
from qserve.wire.channel import Channel
from qserve.wire.messages import PYTHON, STREAM, Outcome, Signer
from tests.faults.failpoints.stage import NAME, work_spec


def deploy(settings: Settings) -> None:
    """Deploy it anew."""
    state = State(settings.redis_url, settings.keys, Signer(settings.secrets))
    state.deploy(work_spec(sys.argv[2], revision="2"), expected=state.generation(NAME))


async def ordinary(client: Client, method: str) -> None:
    """Make a call and wait for its outcome."""
    ended = asyncio.get_running_loop().create_future()
    pending = client.prepare(
        NAME,
        kind=STREAM if method == "parts" else PYTHON,
        method=method,
        payload=codec_of(client).pack_call((method,), {}),
        timeout_s=60,
        safe=False,
        on_outcome=ended.set_result,
    )
    channel: Channel | None = client.open_channel(pending) if method == "parts" else None
    client.put(pending)
    while channel is not None and await channel.receive() is not None:
        pass
    await ended


async def submit(client: Client) -> None:
    """Submit a durable call."""
    admitted = asyncio.get_running_loop().create_future()
    client.durable.submissions.submit(
        client.durable.submissions.prepare(
            NAME,
            kind=PYTHON,
            method="work",
            payload=codec_of(client).pack_call(("durable",), {}),
            options=DurableOptions(),
            on_admitted=admitted.set_result,
        )
    )
    await admitted


async def cancel(client: Client) -> None:
    """Cancel one."""
    ended: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    client.durable.by_id.cancel(sys.argv[2], ended.set_result)
    await ended


async def main() -> None:
    what = sys.argv[1]
    settings = Settings()
    if what == "deploy":
        deploy(settings)
        return
    client = Client(at_deployment(settings, NAME))
    await client.start()
    # A process that dies with answers unread resets its connection: the server may not read what was sent last.
    await client.sender.call("PING")
    if what == "submit":
        await submit(client)
    elif what == "cancel":
        await cancel(client)
    else:
        await ordinary(client, what)
    await client.stop()


if __name__ == "__main__":
    asyncio.run(main())
