"""The serializers that come with vibe_store, and what the author of another one needs.

The names here are those that plugins may rely on; each is imported when it is first used. A serializer takes
a tree apart with :func:`flatten`, which refuses by path what cannot be stored, brings its leaves to the host
with :func:`to_host`, writes them, and returns the rows of the leaf table. To load, it takes the template
apart with :func:`flatten`, has :func:`compare` raise every difference from what was saved, and puts a tree
together with :func:`rebuild`. :func:`snapshot` is what most serializers do before that, and for those that
write one file for each item :func:`item_file` and :func:`load_item_file` do most of the rest.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vibe_store.serializers.host import rebuild, snapshot, table_values, to_host
    from vibe_store.serializers.leaf_data import LeafWriter, stored_array
    from vibe_store.serializers.places import natural_places
    from vibe_store.serializers.rows import STORED_KINDS, table_to_json
    from vibe_store.serializers.single_file import item_file, load_item_file
    from vibe_store.serializers.tree import (
        Flat,
        HostCopy,
        compare,
        dtype_named,
        flatten,
        warn_of_other_callables,
    )

__all__ = [
    "STORED_KINDS",
    "Flat",
    "HostCopy",
    "LeafWriter",
    "compare",
    "dtype_named",
    "flatten",
    "item_file",
    "load_item_file",
    "natural_places",
    "rebuild",
    "snapshot",
    "stored_array",
    "table_to_json",
    "table_values",
    "to_host",
    "warn_of_other_callables",
]

_HOME = {
    "STORED_KINDS": "rows",
    "Flat": "tree",
    "HostCopy": "tree",
    "LeafWriter": "leaf_data",
    "compare": "tree",
    "dtype_named": "tree",
    "flatten": "tree",
    "item_file": "single_file",
    "load_item_file": "single_file",
    "natural_places": "places",
    "rebuild": "host",
    "snapshot": "host",
    "stored_array": "leaf_data",
    "table_to_json": "rows",
    "table_values": "host",
    "to_host": "host",
    "warn_of_other_callables": "tree",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
