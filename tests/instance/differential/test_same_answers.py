"""Any FastAPI or Starlette app behaves behind the gateway as it does on uvicorn: same requests, same answers."""

import pytest

from tests.instance.differential.case import Case
from tests.instance.differential.catalogue import Topic, load_topics
from tests.instance.differential.sides import Sides

GROUP_SIZE = 8
"""So many applications are deployed at once: a replica of each takes 80 MiB."""

TOPICS = load_topics()

_DOTS = "the gateway refuses paths with '..', which others may resolve to another deployment"

DIFFERENT: dict[tuple[str, str], str] = {
    ("header_params", "connection ends at the gateway"): "no intermediary hands these on (RFC 9110, 7.6.1)",
    ("path_params", "dots stay"): _DOTS,
    ("proxied", "X-Forwarded-For and -Proto"): "uvicorn trusts local proxies, the gateway those it is told",
    ("static_files", "out of the folder"): _DOTS,
    ("unicode", "encoded dots"): _DOTS,
}
"""Cases whose answers differ on purpose, by topic and name, and why."""

ALL = [
    pytest.param(group, topic, case, id=f"{topic.name}: {case.name}")
    for group in (tuple(TOPICS[first : first + GROUP_SIZE]) for first in range(0, len(TOPICS), GROUP_SIZE))
    for topic in group
    for case in topic.cases
]


@pytest.mark.parametrize(("group", "topic", "case"), ALL)
def test_the_answer_is_that_of_plain_uvicorn(sides: Sides, group: tuple[Topic, ...], topic: Topic, case: Case) -> None:
    sides.deploy(group)
    plain, gateway = sides.ask(topic, case)
    same = gateway.comparable(plain, case.mask) == plain.comparable(gateway, case.mask)
    if (topic.name, case.name) in DIFFERENT:
        assert not same, "this case has no place in the table of differences any more"
    else:
        assert gateway.comparable(plain, case.mask) == plain.comparable(gateway, case.mask)


def test_the_suite_is_as_large_as_it_is_said_to_be() -> None:
    assert len(TOPICS) >= 40
    assert len(ALL) >= 150


def test_the_table_of_differences_names_cases_that_exist() -> None:
    assert DIFFERENT.keys() <= {(topic.name, case.name) for topic in TOPICS for case in topic.cases}
