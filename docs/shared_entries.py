"""Griffe extension: a docstring's entry for several names, `a, b: text`, becomes one for each name."""

import re
from typing import Any

import griffe

# the names, and the text with the lines that continue it
ENTRY = re.compile(r"^( {4})((?:\w+, )+\w+)(: .*(?:\n\1 +.*)*)$", re.MULTILINE)


def split_entries(docstring: str) -> str:
    return ENTRY.sub(lambda m: "\n".join(m[1] + name + m[3] for name in m[2].split(", ")), docstring)


class SharedEntries(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_entries(obj.docstring.value)
