"""The documentation's pages: all in the navigation, parts taken from where they are kept, links that lead."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def nav_files(entries):
    for entry in entries:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else nav_files(target)


def anchors(text):
    """Anchors of a page's headings, as Python-Markdown's toc extension makes them from plain English."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {
        re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h.replace("`", "")).strip().lower()) for h in headings
    }


def test_every_page_is_in_the_navigation():
    assert sorted(nav_files(CONFIG["nav"])) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = hooks.on_page_markdown((DOCS / page).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (DOCS / page).parent / name if name else DOCS / page
        assert path.is_file(), target
        if anchor:
            assert anchor in anchors(hooks.on_page_markdown(path.read_text())), target


def test_an_included_section_is_the_file_s():
    section = hooks.include("README.md: Speed")
    assert section.startswith("## Speed\n") and section.count("\n## ") == 0
    assert section.strip() in (ROOT / "README.md").read_text()
    with pytest.raises(ValueError, match=r"README\.md has no section whose heading begins with 'Haste'"):
        hooks.include("README.md: Haste")


def test_sections_end_at_headings_outside_code_and_links_to_files_are_text(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    text = "# T\nintro\n## A\n```\n## code\n```\n[f](f.h) [w](https://a.b) [s](#a)\n### A1\n## B\nb\n"
    (tmp_path / "f.md").write_text(text)
    assert hooks.include("f.md: A") == "## A\n```\n## code\n```\nf [w](https://a.b) [s](#a)\n### A1\n"
    assert hooks.include("f.md").split() == hooks.include("f.md: A").join(["intro\n", "## B\nb\n"]).split()


@pytest.mark.parametrize("command", ["search", "train", "eval", "bench", "env"])
def test_help_of_each_command_is_on_the_page(command):
    page = (DOCS / "command_line.md").read_text()
    assert f"{{{{ help {command} }}}}" in page
    assert hooks.command_help(command).startswith(f"```text\nusage: rfdarts {command} ")


def test_the_reference_names_every_public_package():
    text = "".join((DOCS / page).read_text() for page in PAGES)
    for package in ("ops", "nn", "spaces", "data", "search", "retrain", "runs", "drop_in"):
        assert f"::: rfdarts_fast.{package}\n" in text
