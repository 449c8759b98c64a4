"""What storages say of an object when something goes wrong with it."""

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vibe_store.storage.redaction import redact

__all__ = ["about", "exists", "missing"]


@contextmanager
def about(doing: str, key: str, url: str, secrets: Iterable[str]) -> Iterator[None]:
    """Note on an error of a client what it was about, unless it says so itself; hide secrets in it.

    Args:
        doing: "reading", say.
        key: the object.
        url: the root of the storage, as it is shown.
        secrets: see :func:`~vibe_store.storage.redaction.secrets_of`.
    """
    try:
        yield
    except Exception as error:
        redact(error, secrets)
        if url not in str(error):
            error.add_note(f"This happened while {doing} {key!r} in {url!r}.")
        raise


def missing(key: str, url: str) -> FileNotFoundError:
    """Return the error that says that there is no such object."""
    return FileNotFoundError(errno.ENOENT, f"There is no object {key!r} in {url!r}.")


def exists(key: str, url: str) -> FileExistsError:
    """Return the error that says that an object to be created is there already."""
    return FileExistsError(errno.EEXIST, f"The object {key!r} exists already in {url!r}.")
