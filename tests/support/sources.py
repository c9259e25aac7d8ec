"""The modules of the three packages, and the tables in their documents, for tests of what must agree."""

import re

from tests.support.serving import ROOT

PACKAGES = {
    "qserve": ROOT / "qserve",
    "qserve_gateway": ROOT / "gateway/qserve_gateway",
    "qserve_workers": ROOT / "workers/qserve_workers",
}
SOURCES = {
    ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
}


def table_column(document: str, heading: str) -> set[str]:
    """The names in the first column of the table under a heading."""
    text = (ROOT / "docs" / document).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
