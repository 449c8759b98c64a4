"""Fits docstrings to the pages: roles become plain code, and overrides get the text of what they override."""

import re
from typing import Any

from griffe import Attribute, Class, Extension, Function, Object

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`")
_LITERAL_BLOCK = re.compile(r"::$", re.MULTILINE)


class PlainRoles(Extension):
    """``:class:`~vibe_store.interfaces.Blob``` becomes ```vibe_store.interfaces.Blob```."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of whatever was read."""
        del kwargs
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = _LITERAL_BLOCK.sub(":", text)
        elif isinstance(obj, Attribute | Function) and isinstance(obj.parent, Class):
            inherited = (base.members.get(obj.name) for base in obj.parent.mro())
            obj.docstring = next((each.docstring for each in inherited if each and each.docstring), None)
