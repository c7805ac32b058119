"""The documentation's pages: all in the navigation, parts taken from where they are kept, links that lead."""

import ast
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
REFERENCE = [
    "ops",
    "nn",
    "spaces",
    "data",
    "search",
    "retrain",
    "runs",
    "tables",
    "results",
    "study",
    "export",
    "drop_in",
]
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")


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
    text = (
        "# T\nintro\n## A\n```\n## code\nf[i](x)\n```\n[f](f.h) [w](https://a.b) [s](#a)\n### A1\n## B\nb\n"
    )
    (tmp_path / "f.md").write_text(text)
    assert (
        hooks.include("f.md: A") == "## A\n```\n## code\nf[i](x)\n```\nf [w](https://a.b) [s](#a)\n### A1\n"
    )
    assert hooks.include("f.md").split() == hooks.include("f.md: A").join(["intro\n", "## B\nb\n"]).split()


@pytest.mark.parametrize(
    "command",
    ["search", "train", "cache", "eval", "export", "check", "study", "show", "query", "bench", "env"],
)
def test_help_of_each_command_is_on_the_page(command):
    page = (DOCS / "command_line.md").read_text()
    assert f"{{{{ help {command} }}}}" in page
    assert hooks.command_help(command).startswith(f"```text\nusage: rfdarts {command} ")


@pytest.mark.parametrize("package", REFERENCE)
def test_the_reference_has_every_public_name(package):
    """mkdocstrings shows what has a docstring; a constant has the string below it."""
    pages = "".join((DOCS / page).read_text() for page in PAGES)
    assert f"::: rfdarts_fast.{package}\n" in pages
    documented = set()
    for path in (ROOT / "rfdarts_fast" / package).rglob("*.py"):
        for node, below in itertools.pairwise([*ast.parse(path.read_text()).body, ast.Pass()]):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                documented.add(node.name)
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                documented |= {target.id for target in targets if isinstance(target, ast.Name)}
    public = getattr(importlib.import_module(f"rfdarts_fast.{package}"), "__all__", ())
    assert set(public) <= documented


def test_an_entry_for_several_names_is_split():
    pytest.importorskip("griffe", reason="needs the extra `docs`")
    split_entries = load("shared_entries").split_entries
    text = "T: a, b: c\n\nArgs:\n    a, b: one\n        two, three: four\n    c: five\n"
    both = "    a: one\n        two, three: four\n    b: one\n        two, three: four\n"
    assert split_entries(text) == f"T: a, b: c\n\nArgs:\n{both}    c: five\n"
