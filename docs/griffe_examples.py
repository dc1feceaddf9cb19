"""Shows `Example:` in docstrings as code, for which Griffe wants to read `Examples:`."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Has the docstrings of the package read as Griffe spells them."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Spell the heading of the example in the plural."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")
