"""A program that only calls: `python -m tests.faults.security.guarded_client`; prints what went wrong, if anything."""

import asyncio
import sys

import qserve
from qserve import serve
from tests.support.slowness import patience


def main() -> None:
    handle = serve.get_deployment("Echo").get_handle()
    assert qserve.get(handle.remote("plain"), timeout=patience(30)) == "plain"
    large = "x" * 1_000_000
    assert qserve.get(handle.remote(large), timeout=patience(30)) == large
    assert qserve.get([handle.remote(n) for n in range(300)], timeout=patience(30)) == list(range(300))
    assert list(handle.options(stream=True).count.remote(50)) == list(range(50))
    asyncio.run(asynchronous())

    durable = handle.options(durable=True)
    ref = durable.slow.remote(0.1)
    assert serve.get_ref(ref.id).result(timeout=patience(30)) == "slept 0.1"
    assert ref.progress() == {"percent": 50}
    assert durable.remote(large).result(timeout=patience(30)) == large
    assert handle.options(durable=True, delay=0.2).remote("later").result(timeout=patience(30)) == "later"
    assert handle.options(durable=True, priority="batch").remote("low").result(timeout=patience(30)) == "low"
    late = handle.options(durable=True, delay=100).remote("never")
    late.cancel()
    assert late.status().state == "cancelled"
    with_retry = handle.options(durable=True, retries=1, backoff=0.01).fail.remote()
    expect(ValueError, lambda: with_retry.result(timeout=patience(30)))
    assert with_retry.status().state == "dead"

    waiting = handle.wait.remote(60)
    waiting.cancel()
    expect(qserve.GetTimeoutError, lambda: qserve.get(handle.wait.remote(5), timeout=0.2))
    expect(qserve.ReplicaDied, lambda: qserve.get(handle.die.remote(), timeout=patience(30)))
    assert qserve.get(handle.remote("after"), timeout=patience(30)) == "after"
    assert serve.status()
    sys.stdout.write("done\n")


async def asynchronous() -> None:
    handle = serve.get_deployment("Echo").get_handle(sync=False)
    assert await (await handle.remote("async")) == "async"


def expect(kind: type[Exception], action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


if __name__ == "__main__":
    main()
