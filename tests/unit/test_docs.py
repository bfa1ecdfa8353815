"""References in docs and docstrings: files, anchors of pages, and dotted names of the package exist."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*PAGES, *sorted((ROOT / "sdpg_megatron").rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def resolves(name: str) -> bool:
    """True if `pkgutil` finds the dotted name: a module, or an attribute below one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_dotted_names_exist() -> None:
    found = {
        f"{source.relative_to(ROOT)}: {name}"
        for source in SOURCES
        for name in re.findall(r"`(sdpg_megatron(?:\.\w+)+)(?=[`(])", source.read_text(encoding="utf-8"))
        if not resolves(name)
    }
    assert found == set()


def test_named_files_of_the_package_exist() -> None:
    found = {
        f"{page.relative_to(ROOT)}: {path}"
        for page in PAGES
        for path in re.findall(
            r"`((?:sdpg_megatron/)?\w+(?:/\w+)+\.(?:py|md|sh|yaml))`", page.read_text(encoding="utf-8")
        )
        if not any(
            (base / path).exists() for base in (ROOT, ROOT / "sdpg_megatron", ROOT / "sdpg_megatron" / "rollout")
        )
    }
    assert found == set()
