"""Twenty deployments of three lines, for the benchmark of what a further one costs."""

from qserve import serve

COUNT = 20


def answer() -> str:
    return "here"


globals().update({f"small_{number}": serve.deployment(name=f"small{number}")(answer) for number in range(COUNT)})
