"""Makes Markdown of our docstrings, for the API reference: lists of indented definitions, and arguments in pairs."""

import re

import griffe

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):$")
ITEM = re.compile(r"(- |\d+\. )")
PAIR = re.compile(r"^  [\w*]+(?:, [\w*]+)+:")
TERM = re.compile(r"([^\s:`]+(?:, [^\s:`]+)*): ")


def markdown(text):
    """Returns a docstring as griffe and Markdown read it.

    Lines that are indented by two spaces become a list, except in sections such as `Args:`. In a section `a, b: text`
    gets a space that does not break, because griffe takes what follows another one for a type.
    """
    lines, section, item, listed = [], False, False, False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section, item, listed = bool(SECTION.match(line)), bool(ITEM.match(line)), False
        elif section:
            line = PAIR.sub(lambda match: match[0].replace(", ", ",\N{NO-BREAK SPACE}"), line)
        elif not item and re.match(r"  \S", line):
            if not listed and lines and lines[-1]:
                lines.append("")
            listed, rest = True, line.strip()
            line = rest if ITEM.match(rest) else "- " + TERM.sub(r"`\1`: ", rest, count=1)
        lines.append(line)
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Changes every docstring that griffe finds."""

    def on_object(self, *, obj, **kwargs):
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
