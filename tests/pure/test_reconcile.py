"""How many calls are sent again after Redis lost them."""

from qserve.calls.reconcile import RetryBudget


def test_a_tenth_of_the_calls_of_the_last_ten_seconds_may_be_sent_again() -> None:
    budget = RetryBudget()
    for second in range(20):
        budget.note(second * 100, float(second))

    granted = sum(budget.take(19.0) for _ in range(500))

    assert granted == 100
    assert not budget.take(25.0)
    assert budget.take(29.5)


def test_a_few_may_be_sent_again_where_little_is_going_on() -> None:
    budget = RetryBudget()
    assert [budget.take(0.0) for _ in range(12)] == [True] * 10 + [False] * 2
