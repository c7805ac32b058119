"""Docstrings say what a thing is, and each thing has one name: the names it had before are gone."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("What", "Which", "Why", "Where", "How", "Whether")
CODE = ("rfdarts_fast", "csrc", "tests", "benchmarks", "examples", "setup.py")
TEXT = (*CODE, "docs", "README.md", "CONTRIBUTING.md", "Makefile")

# retired identifiers, where, and the name of the thing today; (?<!\.) spares other libraries' attributes
NAMES = [
    (r"native\w*", CODE, "compiled, cpu or cuda"),
    (r"(?<!\.)(kind|found)", ("rfdarts_fast", "csrc"), "the thing it is"),
    (r"grad_mix|mix|strengths?", ("rfdarts_fast/ops", "csrc"), "op_weights, term_weight"),
    (r"(?<!\.)(concatenated?(_\w+)?|together)", ("rfdarts_fast", "csrc"), "concat"),
    (r"cell_kept", CODE, "cell_branch_outputs"),
    (r"(?<!\.)(again|join)", ("csrc",), "bypass_backward; training is an argument"),
    (r"Images", ("csrc",), "ImageQueue, ImageView"),
    (r"coef[0-3]", ("rfdarts_fast/ops", "csrc"), "scale, slope, mean, shift"),
    (r"Plan", CODE, "CellPlan, or the name of the other plan"),
    (r"recipe\w*|RECIPES", ("rfdarts_fast",), "preset"),
]
# the same for text and the names of files
WORDS = [
    (r"(?i)(\b|\w*_)engines?(_\w*|\b)", TEXT, "backend, or runs"),
    (r"(\"|'|`|--backend )native\b", TEXT, "cpu or cuda"),
    (r"\bwhy_not\w*", TEXT, "unsupported_reason, unavailable_reason"),
    (r"--recipe\b", TEXT, "--preset"),
    (r"tests/(cpu|cuda|triton)\b", TEXT, "tests/kernels/..."),
]
# names of which there is one definition
ONCE = [r"(struct|class) CellArguments\b"]
# what says that a name is retired
EXEMPT = {
    "tests/test_prose.py",
    "rfdarts_fast/runs/run_folder.py",
    "tests/runs/test_old_folders.py",
    "tests/cli/test_errors.py",
}
COMMENTS_AND_STRINGS = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
# C++ and CUDA, Python, text
SUFFIXES = (".h", ".cpp", ".cu", ".py", ".md")


def files(places):
    """(name, text) of the files in these places, without the records of past measurements."""
    for place in places:
        for path in [ROOT / place] if (ROOT / place).is_file() else sorted((ROOT / place).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            read = path.suffix in SUFFIXES or path.name == "Makefile"
            if read and name not in EXEMPT and not name.startswith("benchmarks/results/"):
                yield name, path.read_text()


def identifiers(name, text):
    """(line, identifier) of each identifier in code, attributes with their dot."""
    if name.endswith(".py"):
        dot = ""
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], dot + token.string
            dot = "." if token.string == "." else ""
    elif not name.endswith((".md", "Makefile")):
        code = COMMENTS_AND_STRINGS.sub(lambda match: "\n" * match.group().count("\n"), text)
        for line, content in enumerate(code.splitlines(), 1):
            for identifier in re.findall(r"\.?\b[A-Za-z_]\w*", content):
                yield line, identifier


def words(pattern, text):
    """(line, occurrence) of a pattern in text."""
    for match in re.finditer(pattern, text):
        yield text.count("\n", 0, match.start()) + 1, match.group()


def questions(text):
    """(line, first line) of the docstrings, also of attributes, that begin with a question's first word."""
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            first = value.value.strip().splitlines()[0]
            if re.match(rf"({'|'.join(QUESTIONS)})\b", first):
                yield node.lineno, first


def listed(places, find):
    hits = ((name, *hit) for name, text in files(places) for hit in find(name, text))
    return "\n".join(f"{name}:{line}: {hit}" for name, line, hit in hits)


def test_docstrings_say_what_a_thing_is():
    hits = listed(["rfdarts_fast"], lambda name, text: questions(text) if name.endswith(".py") else ())
    assert not hits, f"the subject first, please:\n{hits}"


@pytest.mark.parametrize(("pattern", "places", "now"), NAMES, ids=[pattern for pattern, *_ in NAMES])
def test_retired_names_are_gone(pattern, places, now):
    retired = re.compile(rf"\.?({pattern})")
    hits = listed(places, lambda *file: (hit for hit in identifiers(*file) if retired.fullmatch(hit[1])))
    assert not hits, f"now {now}:\n{hits}"


@pytest.mark.parametrize(("pattern", "places", "now"), WORDS, ids=[pattern for pattern, *_ in WORDS])
def test_retired_words_are_gone(pattern, places, now):
    def find(name, text):
        return [*((0, name) for _ in words(pattern, name)), *words(pattern, text)]

    hits = listed(places, find)
    assert not hits, f"now {now}:\n{hits}"


@pytest.mark.parametrize("pattern", ONCE)
def test_one_definition(pattern):
    hits = listed(CODE, lambda _, text: words(pattern, text))
    assert hits.count("\n") == 0, f"defined more than once:\n{hits}"


PYTHON = '''"""Where native is."""
x = native_plan  # kind
class A:
    y = x.kind
    """How
    many."""
'''
CPP = """// kind
int found = f("mix");
/* again
*/ t.join();
"""


def test_the_readers_of_names_and_words():
    names = [(2, "x"), (2, "native_plan"), (3, "class"), (3, "A"), (4, "y"), (4, "x"), (4, ".kind")]
    assert list(identifiers("a.py", PYTHON)) == names
    assert list(questions(PYTHON)) == [(1, "Where native is."), (5, "How")]
    assert not list(questions('"""Wherever it is: what, why and how."""'))
    names = [(2, "int"), (2, "found"), (2, "f"), (4, "t"), (4, ".join")]
    assert list(identifiers("a.cu", CPP)) == names
    assert list(words(r"\bmix\b", "a\nmix mixed")) == [(2, "mix")]
    assert {name for name, _ in files(TEXT)} >= {"README.md", "Makefile", "rfdarts_fast/cli.py"}
