"""Builds the documentation site from README.md, docs/ and the other pages of the repository: `make docs-site`.

The pages are laid out in `build/site-source/pages`; links between them stay links inside the site, and links to other
files of the repository become links to its web page. The finished site is in `build/site/NAME`, where NAME is the
version, and `build/site/index.html` leads to the newest. Each build also writes `llms.txt` and `llms-full.txt`, the
index and the whole text for language models (https://llmstxt.org).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "build/site-source"
SITE = ROOT / "build/site"
CONFIGURATION = ROOT / "docs/zensical.toml"

_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FETCHED = re.compile(r'<(?:script|img|iframe|link rel="(?:stylesheet|preload)")[^>]*?(?:src|href)="(https?:[^"]+)')
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def configuration() -> dict[str, Any]:
    """The table `project` of docs/zensical.toml."""
    project: dict[str, Any] = tomllib.loads(CONFIGURATION.read_text())["project"]
    return project


def place_of(page: Path) -> Path | None:
    """Where a file of the repository is in the site; None if it is not part of it.

    Args:
        page: Its path from the root of the repository.
    """
    if page == Path("README.md"):
        return Path("index.md")
    if page.parts[0] == "docs" and page.suffix in (".md", ".png", ".svg", ".json", ".js"):
        return Path(*page.parts[1:])
    if page.suffix == ".md" and (len(page.parts) == 1 or page.parts[0] == "benchmarks"):
        return page
    return None


def pages() -> list[Path]:
    """The files of the repository that are part of the site, from its root."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*"), *(ROOT / "benchmarks").glob("*.md")]
    return sorted(path for each in found if each.is_file() and place_of(path := each.relative_to(ROOT)) is not None)


def in_the_site(page: Path, text: str) -> str:
    """The text of a page with its links as the site needs them.

    Args:
        page: Its path from the root of the repository.

    Raises:
        SystemExit: It links to a file that is not there.
    """
    here = place_of(page)
    assert here is not None

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / found[1]))
        if not (ROOT / target).exists():
            raise SystemExit(f"{page} links to {found[1]}, which does not exist")
        anchor = found[2] or ""
        place = place_of(target)
        if place is not None:
            return os.path.relpath(place, here.parent) + anchor
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{configuration()['repo_url']}/{kind}/main/{target}{anchor}"

    return _outside_fences(text, link)


def _outside_fences(text: str, link: Any) -> str:
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(link, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, text[end:])])


def nav_pages(entries: Any) -> Iterator[str]:
    """The pages that the navigation names, in its order."""
    if isinstance(entries, str):
        yield entries
    elif isinstance(entries, dict):
        for entry in entries.values():
            yield from nav_pages(entry)
    else:
        for entry in entries:
            yield from nav_pages(entry)


def lay_out() -> None:
    """Write the pages, the configuration and the texts for language models into `build/site-source`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    folder = SOURCE / "pages"
    for page in pages():
        place = place_of(page)
        assert place is not None
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".md":
            (folder / place).write_text(in_the_site(page, (ROOT / page).read_text()))
        else:
            shutil.copy(ROOT / page, folder / place)
    # mkdocstrings looks for the packages from the folder of the configuration.
    text = CONFIGURATION.read_text().replace('paths = [".."]', f"paths = {json.dumps([str(ROOT)])}")
    (SOURCE / "zensical.toml").write_text(text)
    write_llms(folder)


def write_llms(folder: Path) -> None:
    """Write `llms.txt`, the index, and `llms-full.txt`, all pages of the navigation in one."""
    project = configuration()
    lines, whole = [f"# {project['site_name']}", "", f"> {project['site_description']}"], []
    for section in project["nav"]:
        [(title, entries)] = section.items()
        lines += ["", f"## {title}", ""]
        for page in nav_pages(entries):
            text = re.sub(r"^<!-- .*? -->\n", "", (folder / page).read_text(), flags=re.MULTILINE)
            heading = re.search(r"^# (.+)$", text, re.MULTILINE)
            lines.append(f"- [{heading[1] if heading else page}]({project['site_url']}{page.removesuffix('.md')})")
            whole.append(text)
    (folder / "llms.txt").write_text("\n".join(lines) + "\n")
    (folder / "llms-full.txt").write_text("\n\n".join(whole))


def check_that_it_needs_no_network(folder: Path) -> None:
    """Check that the pages of a site fetch nothing from other hosts, so that they can be read and searched anywhere.

    Raises:
        SystemExit: A page does.
    """
    for page in sorted(folder.rglob("*.html")):
        if (found := _FETCHED.search(page.read_text())) is not None:
            raise SystemExit(f"{page.relative_to(folder)} fetches {found[1]}: the site has to work without a network")


def build(name: str) -> Path:
    """Build the site under the name of a version.

    Raises:
        SystemExit: A link leads nowhere, a page needs the network, or the generator fails.
    """
    lay_out()
    done = subprocess.run([Path(sys.executable).parent / "zensical", "build", "--strict"], cwd=SOURCE, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    target = SITE / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(SOURCE / "out", target)
    for text in ("llms.txt", "llms-full.txt"):
        shutil.copy(SOURCE / "pages" / text, target / text)
    check_that_it_needs_no_network(target)
    names = sorted((each.name for each in SITE.iterdir() if each.is_dir()), reverse=True)
    versions = [{"version": each, "title": each, "aliases": []} for each in names]
    (SITE / "versions.json").write_text(json.dumps(versions))
    (SITE / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={name}/index.html">\n')
    return target


if __name__ == "__main__":
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    site = build(sys.argv[1] if len(sys.argv) > 1 else version)
    count = sum(1 for _ in site.rglob("*.html"))
    print(f"The site was built: {count} pages in {site.relative_to(ROOT)}/, and no link leads nowhere")  # noqa: T201
