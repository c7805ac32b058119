"""MkDocs hooks: pages take their text from where it is kept, so that nothing is written twice.

Lines of a page that are filled in:
    {{ include FILE }}             a file of the repository without its title
    {{ include FILE: HEADING }}    its `## ` sections whose heading begins so
    {{ help COMMAND }}             the output of `rfdarts COMMAND --help`
"""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\{\{ (include|help)(?: (.*?))? \}\}$", re.MULTILINE)
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# a link to another file of the repository, which the site does not have
FILE_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)[^)]*\)")
# an image, which it has
IMAGE = re.compile(r"(!\[[^\]]*\]\()docs/")


def sections(text: str) -> list[tuple[str, str]]:
    """Heading and text (heading included) of each `## ` section; the text before the first has heading ''."""
    parts, fenced = [("", "")], False
    for line in text.splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append((line[3:].strip(), ""))
        parts[-1] = (parts[-1][0], parts[-1][1] + line)
    return parts


def include(argument: str) -> str:
    """ValueError if the file has no such section."""
    name, _, heading = argument.partition(": ")
    text = re.sub(r"\A# .*\n", "", (ROOT / name).read_text())
    found = [part for title, part in sections(text) if title.startswith(heading)]
    if not found:
        raise ValueError(f"{name} has no section whose heading begins with {heading!r}")
    parts = CODE.split("\n".join(found))
    return "".join(
        part if i % 2 else IMAGE.sub(r"\1", FILE_LINK.sub(r"\1", part)) for i, part in enumerate(parts)
    )


def command_help(command: str) -> str:
    from rfdarts_fast.cli import main

    printed = io.StringIO()
    arguments = ["rfdarts", *command.split(), "--help"]
    plain = {"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"}
    with (
        mock.patch.object(sys, "argv", arguments),
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main()
    return f"```text\n{printed.getvalue().strip()}\n```"


def on_page_markdown(markdown: str, **_: object) -> str:
    makers = {"include": include, "help": command_help}
    return DIRECTIVE.sub(lambda match: makers[match[1]](match[2] or ""), markdown)
