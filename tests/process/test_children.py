"""A node is the parent of what its template forks, and of what user code has left running."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from qserve_workers.children import start_program

SCRIPT = """
import asyncio, os
from pathlib import Path
from qserve_workers.children import AdoptedProcess, Orphans, adopt_orphans

def forked_by_another(code):
    told, tell = os.pipe()
    wait, go = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(wait, 1)  # outlives its parent
            os._exit(code)
        os.write(tell, str(pid).encode())
        os._exit(0)
    os.waitpid(between, 0)
    os.close(go)
    return int(os.read(told, 20))

async def exit_code(pid):
    return await AdoptedProcess(pid).wait()

adopt_orphans()
print(asyncio.run(exit_code(forked_by_another(3))))
orphan, orphans = forked_by_another(0), Orphans()
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
for _ in range(2):
    orphans.reap()
    print(Path(f"/proc/{orphan}").exists())
"""


def test_it_gets_exit_codes_and_reaps_what_nobody_waits_for() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["3", "True", "False"], "")


def test_a_program_gets_signals_that_its_starter_blocks(tmp_path: Path) -> None:
    told = tmp_path / "told"
    tell = f"import pathlib, signal; pathlib.Path({str(told)!r}).write_text(str(signal.pthread_sigmask(0, ())))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    try:
        pid = start_program([sys.executable, "-c", tell], death_signal=signal.SIGKILL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert told.read_text() == "set()"
    assert told.stat().st_mode & 0o77 == 0  # nor may others read what it writes
