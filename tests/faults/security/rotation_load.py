"""Calls without end: `python -m tests.faults.security.rotation_load`; on the end of its input it prints what failed."""

import json
import sys
import threading

import qserve
from qserve import serve
from tests.support.slowness import patience


def main() -> None:
    handle, done, failed = serve.get_deployment("Echo").get_handle(), 0, []
    durable = handle.options(durable=True)
    stop = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    while not stop.is_set():
        refs = [handle.remote(done), durable.remote(done), handle.remote("x" * 300_000)]
        try:
            assert qserve.get(refs, timeout=patience(30))[:2] == [done, done]
            assert list(handle.options(stream=True).count.remote(3)) == [0, 1, 2]
        except Exception as exc:
            failed.append(repr(exc))
        done += 1
        if done == 1:
            sys.stdout.write("calling\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps({"done": done, "failed": failed}))


if __name__ == "__main__":
    main()
