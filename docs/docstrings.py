"""Docstrings are plain text with code in backticks; the site's renderer takes Markdown."""

import re

import griffe

# code in backticks, or a character with a meaning in Markdown
MARKUP = re.compile(r"`[^`]*`|[*<\[]")


class PlainText(griffe.Extension):
    """Escape everything in docstrings that Markdown would take for markup, except code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Escape the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = MARKUP.sub(lambda match: match[0] if match[0].startswith("`") else f"\\{match[0]}", obj.docstring.value)
