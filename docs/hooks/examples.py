"""Shows the docstrings' "Example:" as code: the parser of the site knows "Examples:" alone."""

import re
from typing import Any

import griffe

_TITLE = re.compile(r"^Example:$", re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """Renames the section of each docstring while the package is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _TITLE.sub("Examples:", obj.docstring.value)
