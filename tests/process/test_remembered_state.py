"""A server that has forgotten what was deployed gets it back, or at least nobody takes that for a wish."""

import redis

from qserve.broker.instance.change_log import connect_asyncio, read_snapshot
from qserve.broker.instance.remembered_state import RememberedState, restore
from qserve.broker.instance.state import State
from qserve.broker.keys import Keys
from qserve.settings import Settings
from qserve.wire.messages import Signer
from qserve.wire.spec import Deployed, DeploymentSpec, HttpSettings, Target
from tests.support.chosen_server import empty, needs_one_server


def deploy(state: State, name: str, route: str | None = None) -> Deployed:
    spec = DeploymentSpec(name=name, target=Target("m:C"), revision="1", route_prefix=route)
    return state.deploy(spec, expected=state.generation(name))


async def test_what_is_forgotten_is_put_back_as_it_was(
    settings: Settings, keys: Keys, signer: Signer, state: State, redis_client: "redis.Redis"
) -> None:
    deploy(state, "A", "/a")
    deploy(state, "B")
    deploy(state, "B")
    state.pause("B", "ada@host")
    state.set_http(HttpSettings(root_path="/root"))
    memory, client = RememberedState(keys, signer, restores=True), connect_asyncio(settings.redis_url)
    before = await memory.compare(client, await read_snapshot(client, keys, signer))

    empty(settings.redis_url)
    after = await memory.compare(client, await read_snapshot(client, keys, signer))

    assert {name: deployed.spec for name, deployed in after.deployments.items()} == {
        name: deployed.spec for name, deployed in before.deployments.items()
    }
    assert (state.generation("A"), state.generation("B")) == (1, 2)
    assert after.deployments["B"].paused == before.deployments["B"].paused != ""
    assert after.deployments["A"].paused == ""
    assert (after.http, after.instances) == (before.http, before.instances)
    assert redis_client.xlen(keys.of("A").calls("A")) == 0
    await client.aclose()


async def test_what_was_deleted_or_deployed_since_stays_so(
    settings: Settings, keys: Keys, signer: Signer, state: State
) -> None:
    old, gone = deploy(state, "Old"), deploy(state, "Gone")
    deploy(state, "Old")
    state.delete("Gone")
    client = connect_asyncio(settings.redis_url)

    assert await restore(client, keys, signer, [old, gone]) == 0
    assert state.list()["Old"].generation == 2
    assert "Gone" not in state.list()
    await client.aclose()


async def test_of_two_that_remember_the_newer_wins(
    settings: Settings, keys: Keys, signer: Signer, state: State
) -> None:
    first, second = deploy(state, "A"), deploy(state, "A")
    empty(settings.redis_url)
    client = connect_asyncio(settings.redis_url)

    assert [await restore(client, keys, signer, [each]) for each in (first, second, first)] == [1, 1, 0]
    assert state.generation("A") == 2
    await client.aclose()


@needs_one_server  # on a cluster a shard in which nobody has deployed since goes on as before
async def test_without_autorestore_nothing_is_written_and_nothing_is_undeployed(
    settings: Settings, keys: Keys, signer: Signer, state: State, redis_client: "redis.Redis"
) -> None:
    deploy(state, "A")
    memory, client = RememberedState(keys, signer, restores=False), connect_asyncio(settings.redis_url)
    await memory.compare(client, await read_snapshot(client, keys, signer))

    empty(settings.redis_url)
    lost = await memory.compare(client, await read_snapshot(client, keys, signer))
    assert list(lost.deployments) == ["A"]
    assert redis_client.keys() == []

    deploy(state, "B")
    anew = await memory.compare(client, await read_snapshot(client, keys, signer))
    assert list(anew.deployments) == ["B"]
    await client.aclose()


@needs_one_server
async def test_whoever_may_not_put_it_back_goes_on_until_somebody_does(
    settings: Settings, keys: Keys, signer: Signer, state: State, redis_client: "redis.Redis"
) -> None:
    known = deploy(state, "A")
    redis_client.acl_setuser("reader", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-hset", "-set"])
    client = connect_asyncio(settings.redis_url.replace("unix://", "unix://reader:any@"))
    memory = RememberedState(keys, signer, restores=True)
    before = await memory.compare(client, await read_snapshot(client, keys, signer))

    empty(settings.redis_url)
    lost = await memory.compare(client, await read_snapshot(client, keys, signer))
    assert list(lost.deployments) == ["A"]
    other = connect_asyncio(settings.redis_url)
    await restore(other, keys, signer, [known])
    redis_client.set(keys.instance, before.instances[0])

    after = await memory.compare(client, await read_snapshot(client, keys, signer))
    assert after.deployments["A"].spec == known.spec
    redis_client.acl_deluser("reader")
    await other.aclose()
    await client.aclose()
