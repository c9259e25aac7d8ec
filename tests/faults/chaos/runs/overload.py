"""Overload, as benchmarks/overload.py drives it: here its exact demands are one more run of the suite."""

from dataclasses import dataclass

from benchmarks import overload
from benchmarks.steps import Step, Verdict
from tests.faults.chaos.play import Plan, Result, Run


@dataclass(frozen=True)
class Overload:
    """Half to five times of what a deployment can do, by calls that do not wait for each other."""

    name: str = "overload"
    title: str = "0.5 to 5 times of the capacity, then 0.5 again"
    step_s: float = 20.0
    short_step_s: float = 2.0

    def length(self, plan: Plan) -> float:
        """Seven steps and the start."""
        return plan.seconds(self.step_s, self.short_step_s) * 7 + 15

    def play(self, plan: Plan) -> Result:
        """Measure the capacity and exceed it."""
        result = Result(self.name, self.title, plan.seed)
        plan.stage.close()  # two instances would share the two cores
        seconds = plan.seconds(self.step_s, self.short_step_s)
        with overload.stage() as stage:
            for row in overload.overload(stage, seconds):
                if isinstance(row, Step):
                    self._count(row, result)
                else:
                    self._check(row, seconds, result)
        return result

    @staticmethod
    def _count(step: Step, result: Result) -> None:
        result.faults += 1
        judged = result.judgement
        judged.calls += step.sent
        judged.outcomes["once", "503"] += step.refused
        judged.outcomes["once", "ok"] += step.sent - step.refused
        goodput = f"goodput {step.goodput / step.capacity:.2f} C, p99 {step.p99_ms:.0f} ms"
        result.figures[f"at {step.name}"] = f"{goodput}, refused {step.refused} in {step.refusal_p99_ms:.0f} ms (p99)"

    @staticmethod
    def _check(verdict: Verdict, seconds: float, result: Result) -> None:
        if not verdict.passed and (verdict.is_exact or seconds >= overload.FULL_S):
            result.failures.append(f"{verdict.what}: {verdict.measured}, demanded {verdict.demanded}")


RUNS: tuple[Run, ...] = (Overload(),)
