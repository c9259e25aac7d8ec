"""What one more small deployment costs: memory, and the time until it answers."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

from benchmarks import processes, small
from benchmarks.rows import Row
from qserve import serve
from tests.support.serving import free_port

_DEPLOYS = 5
_WORKERS = "worker and replica"


def measure() -> list[Row]:
    """Measure the deployments of benchmarks/small.py, and deploys into their instance."""
    port = free_port()
    urls = [f"http://127.0.0.1:{port}/small{number}" for number in range(small.COUNT)]
    command = [sys.executable, "-m", "qserve.cli", "run", "benchmarks.small", "--port", str(port)]
    with tempfile.TemporaryDirectory() as runtime_dir:
        began = time.perf_counter()
        with processes.running(command, urls[-1], runtime_dir) as (pid, _):
            for url in urls:
                urllib.request.urlopen(url, timeout=30).close()
            all_s = time.perf_counter() - began
            each_mib = processes.Parts(pid).pss_mib()[_WORKERS] / small.COUNT
            deploy_s = statistics.median(_deploys(runtime_dir))
    return [
        Row(
            "`qserve run` of 20 deployments of 3 lines, until all have answered", f"{all_s:.2f} s", "<= 3 s", all_s <= 3
        ),
        Row("each of them, worker and replica (PSS)", f"{each_mib:.0f} MiB", "<= 35 MiB", each_mib <= 35),
        Row("`deploy()` of one more, until it has answered", f"{deploy_s:.2f} s", "<= 0.25 s", deploy_s <= 0.25),
    ]


def _deploys(runtime_dir: str) -> list[float]:
    environment = processes.environment(runtime_dir)
    command = [sys.executable, "-m", "benchmarks.deployments"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=processes.ROOT)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def main() -> None:
    """Deploy into the running instance, and print the seconds that each deploy has taken up to the first answer."""
    seconds = []
    for number in range(_DEPLOYS):
        further = serve.deployment(name=f"further{number}")(small.answer)
        began = time.perf_counter()
        further.deploy()
        further.get_handle().remote().result(30)
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
