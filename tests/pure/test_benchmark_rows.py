"""How benchmark results are written: by section, and into the README's table."""

import pytest

from benchmarks import bench, rows
from benchmarks.rows import Row


def test_a_section_takes_the_place_of_the_one_before_and_others_stay() -> None:
    first = rows.replace_sections("", "# Measured", {"A": "## A\n\n| x | 1 |\n", "B": "## B\n\n| y | 1 |\n"})
    second = rows.replace_sections(first, "# Measured, again", {"A": "## A\n\n| x | 2 |\n", "C": "## C\n\n| z | 2 |\n"})

    assert second == "# Measured, again\n\n## A\n\n| x | 2 |\n\n## B\n\n| y | 1 |\n\n## C\n\n| z | 2 |\n"


def test_the_readme_takes_over_the_figures_of_the_rows_it_names() -> None:
    text = "before\n<!-- measured -->\n| what | measured |\n|---|---|\n| x | old |\n| y | old |\n<!-- /measured -->\n"

    changed = rows.replace_measured(text, [Row("x", "new"), Row("z", "new")])

    assert changed == text.replace("| x | old |", "| x | new |")


def test_the_readme_shows_what_the_benchmark_has_measured() -> None:
    readme = rows.README.read_text()
    shown = rows.measured_in(readme[readme.index("<!-- measured -->") : readme.index("<!-- /measured -->")])
    measured = rows.measured_in(rows.RESULTS.read_text())

    assert shown.pop("what") == "measured"
    assert shown
    assert {what: measured.get(what) for what in shown} == shown


def test_a_section_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "cals"])

    with pytest.raises(SystemExit, match="no section cals; there are calls, streaming"):
        bench.main()


def test_the_cpu_time_of_a_request_is_told_by_process() -> None:
    bare, ours = [{"gateway": 20.0}], [{"gateway": 30.0, "Valkey": 15.0, "node": 0.0}]

    told, alone = bench.cpu_rows(64, bare, ours, most_us=40)

    assert (told.measured, told.verdict) == ("45.0 us (gateway 30.0, Valkey 15.0)", "FAIL")
    assert alone.measured == "20.0 us"
