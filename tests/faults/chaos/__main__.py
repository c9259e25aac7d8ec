"""`python -m tests.faults.chaos`: break everything under load, and judge every call from ledgers kept on both sides.

    python -m tests.faults.chaos                      the whole suite (make chaos), 85 minutes
    python -m tests.faults.chaos --part 2/11          an eleventh; each ends within 9 minutes
    python -m tests.faults.chaos --runs K1,K5         some runs
    python -m tests.faults.chaos --slice              every run, each for seconds; ends within 6 minutes
    python -m tests.faults.chaos --cluster            on a Redis cluster, without the runs that one server needs

Exit code 1: something that is promised did not hold. How the suite is made:

    ledger     what clients and replicas write down, and the proof that an answer is the right one
    app        the deployments that are called          load     the processes that call them (http_calls: over HTTP)
    cluster    server, nodes, gateways as processes      faults   what is done to them, and what that excuses
    verdicts   lost, stuck, dup-run, ... for every call  play     a run: a cluster, load, faults, quiet, verdicts
    checks     what else must hold, and figures          report   the table, benchmarks/chaos.md
    runs/      the runs themselves: each module has a tuple RUNS, and `runs_of_the_suite` below lists the modules

A new run is a `play.LoadRun` in a module of `runs`: a name, faults, lengths, checks. A fault is a function that gets
the cluster, random numbers of the run and an `Injected` to note in it whom it has killed; with it stands what calls may
end as because of it (`Excuses`), and nothing else is forgiven. Give processes environment variables (a failpoint, a
preloaded library, the URL of a proxy) by their role: `Setup(environment={"node-1": {...}})`, or in `prepare`, which
runs once the server does: `cluster.environment["node-0"] = {"QSERVE_REDIS_URL": proxy.url}`. The role "client" is the
load. A run of another shape is any object with `name`, `title`, `length(plan)` and `play(plan) -> Result`; it can use
`play.running(setup)` for a cluster and `play.calling(cluster, load, seconds, dice)` for load, and `verdicts.judge`.
"""

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback

from tests.faults.chaos import report
from tests.faults.chaos.cluster import end_everything
from tests.faults.chaos.play import Plan, Result, Run, Stage, interleave
from tests.faults.chaos.runs import (
    cancels,
    clocks,
    deaths,
    durable,
    failover,
    frames,
    gateways,
    links,
    overload,
    replicas,
    rollouts,
    server,
    shards,
    soak,
    values,
)

SLICE_LIMIT_S, SLICE_LAST_START_S = 330.0, 265.0
PART_LIMIT_S = 535.0
_LANES = 2


def runs_of_the_suite() -> tuple[Run, ...]:
    """Every run there is."""
    modules = [replicas, gateways, server, failover, shards, links, clocks, deaths, frames, cancels]
    modules += [rollouts, durable, values, overload, soak]
    return tuple(run for module in modules for run in module.RUNS)


def main() -> int:
    """Play what was asked for, print and save the table."""
    started, options = time.monotonic(), _arguments()
    if options.slice and not options.runs and not options.part:
        return _play_lanes(options.seed)
    stage = Stage(shared=options.slice)
    plan = Plan(options.seed, options.seconds_scale, options.slice, options.cluster, stage)
    runs = _chosen(options, plan)
    limit_s = SLICE_LIMIT_S if options.slice else PART_LIMIT_S if options.part else None
    if limit_s is not None:
        _stop_hard_after(limit_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of everything that has to be stopped
    logging.basicConfig(level=logging.CRITICAL)
    try:
        results = _played_in_time(runs, plan, started)
    finally:
        plan.stage.close()
    sys.stdout.write(f"\n{report.table(results)}\n")
    if options.save:
        report.save(results, [run.name for run in runs_of_the_suite()])
    return 0 if all(result.holds for result in results) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.chaos", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runs", default="", metavar="NAMES", help="only these, separated by commas")
    parser.add_argument("--part", default="", metavar="N/M", help="the Nth of M parts of about the same length")
    parser.add_argument("--seconds-scale", type=float, default=1.0, metavar="X", help="multiplies the lengths of runs")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="default: a random one")
    parser.add_argument("--slice", action="store_true", help="every run for a few seconds; the part for CI")
    parser.add_argument("--cluster", action="store_true", help="in place of one server, a Redis cluster")
    parser.add_argument("--save", action="store_true", help="put the rows into benchmarks/chaos.md")
    return parser.parse_args()


def _play_lanes(seed: int) -> int:
    """The slice, in two processes side by side: most of it is waiting."""
    command = [sys.executable, "-m", "tests.faults.chaos", "--slice", "--seed", str(seed), "--part"]
    lanes = [subprocess.Popen([*command, f"{lane}/{_LANES}"]) for lane in range(1, _LANES + 1)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return max(abs(lane.wait()) for lane in lanes)
    finally:
        for lane in lanes:
            lane.terminate()
            lane.wait(30)


def _chosen(options: argparse.Namespace, plan: Plan) -> list[Run]:
    runs = list(runs_of_the_suite())
    if options.runs:
        names = options.runs.split(",")
        if unknown := set(names) - {run.name for run in runs}:
            sys.exit(f"no such run: {', '.join(sorted(unknown))}. There are {', '.join(run.name for run in runs)}.")
        runs = [run for run in runs if run.name in names]
    if options.slice or options.cluster:
        left_out = [run.name for run in runs if run.length(plan) == 0]
        runs = [run for run in runs if run.name not in left_out]
        if options.runs and left_out:
            sys.stdout.write(f"left out, they have no form of this kind: {', '.join(left_out)}\n")
    if options.part:
        number, _, parts = options.part.partition("/")
        runs = interleave(runs, int(parts), plan)[int(number) - 1]
    if options.slice and runs:  # in the order of the suite, as neighbours share a cluster; not always the same first
        names = [run.name for run in runs_of_the_suite()]
        runs.sort(key=lambda run: names.index(run.name))
        first = plan.seed % len(runs)
        runs = runs[first:] + runs[:first]
    return runs


def _played_in_time(runs: list[Run], plan: Plan, started: float) -> list[Result]:
    """Play them; the slice leaves out those for which a slow machine has no time left, and says so."""
    results = []
    for number, run in enumerate(runs):
        if plan.is_slice and time.monotonic() - started > SLICE_LAST_START_S:
            sys.stdout.write(f"left out, there is no time left: {', '.join(each.name for each in runs[number:])}\n")
            break
        results.append(_played(run, plan))
    return results


def _played(run: Run, plan: Plan) -> Result:
    started = time.monotonic()
    try:
        result = run.play(plan)
    except Exception as exc:
        broken = "".join(traceback.format_exception(exc))
        result = Result(run.name, run.title, plan.seed, failures=[f"broke off: {broken}"])
    verdict = "holds" if result.holds else "VIOLATED"
    what = f"{run.name}, {run.title}: {verdict}, {result.judgement.calls} calls"
    lines = [f"{what} in {time.monotonic() - started:.0f} s, seed {plan.seed}"]
    lines += [f"  {name}: {value}" for name, value in result.figures.items()]
    if not result.holds:
        lines += [result.judgement.told(), *result.failures]
    sys.stdout.write("\n".join((*lines, "")))  # in one piece: lanes share the terminal
    sys.stdout.flush()
    return result


def _stop_hard_after(seconds: float) -> None:
    """End with exit code 2 when the time is over: whoever started this must not wait for a run that hangs."""

    def stop() -> None:
        sys.stderr.write(f"\nthe suite was still at it after {seconds:.0f} s and was stopped\n")
        end_everything()
        os._exit(2)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
