"""What went wrong with a request, out of what obstore raises.

obstore has one exception for all that is neither missing nor forbidden, and says the rest in its text. What
is read from there decides only whether a request is tried again, and what a person is told.
"""

import errno
import re
from collections.abc import Awaitable
from typing import TypeVar

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

__all__ = ["RequestError", "answer_of"]

_T = TypeVar("_T")

_DEBUG = "\n\nDebug source:\n"
_STATUS = re.compile(r"status code: (?P<status>\d{3})")
_OF_ONE_OBJECT = re.compile(r"\(code: (?P<code>\w+)\)")
"""Of one of the objects that a request was to remove together."""

_REASON = re.compile(r'(?:message|error): "(?P<text>[^"]+)"|(?P<name>TimedOut|InvalidCertificate\(\w+\))')

_PASSING_STATUSES = frozenset({"408", "409", "429", "500", "502", "503", "504"})
_PASSING_CODES = frozenset({"InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown"})
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")
_DENIED = frozenset({"AccessDenied", "401", "403"})

_WANTED_TOO_MUCH = "Wanted range starting at"
_NEEDS_HTTP = "builder error"


class RequestError(Exception):
    """A request failed, or was refused.

    Attributes:
        status: the status of the answer, as text; None where there was no answer.
        passes: whether it may succeed when it is sent again.
        exists: whether an object is there that was to be created.
        changed: whether the object is not the version that was asked for.
        past_end: whether a range was asked for that begins at the end of the object or past it.
        no_bucket: whether the bucket is what is missing.
        missing: whether the object, or the upload, is.
        forgotten: whether the store no longer knows an upload, or never did.
        denied: whether the credentials do not allow it.
    """

    def __init__(self, error: Exception) -> None:
        text, _, debug = str(error).partition(_DEBUG)
        status = _STATUS.search(text)
        code = _OF_ONE_OBJECT.search(text)
        reason = None if status or code else _REASON.search(debug)
        sentence = " ".join(text.split())
        if reason is not None and (why := reason["text"] or reason["name"]) not in sentence:
            sentence += f" ({why})"
        if _NEEDS_HTTP in text:
            sentence += " (an endpoint that begins with 'http://' needs client_options={'allow_http': True})"
        super().__init__(sentence)
        self.status = status["status"] if status else None
        self.exists = isinstance(error, AlreadyExistsError) and (
            # Of S3, 409 means that two conditional writes met; of Azure, this code that the object is there.
            self.status != "409" or "BlobAlreadyExists" in text
        )
        self.changed = isinstance(error, PreconditionError)
        self.past_end = self.status == "416" or _WANTED_TOO_MUCH in text
        self.no_bucket = _NO_BUCKET.search(text) is not None
        self.missing = isinstance(error, FileNotFoundError) or self.status == "404"
        self.forgotten = self.missing or "<Code>InvalidBlockList</Code>" in text
        self.denied = (
            isinstance(error, PermissionDeniedError | UnauthenticatedError)
            or self.status in _DENIED
            or (code is not None and code["code"] in _DENIED)
        )
        self.passes = not self.exists and (
            self.status in _PASSING_STATUSES
            or (code is not None and code["code"] in _PASSING_CODES)
            or (self.status is None and "HTTP error" in text and _may_pass(text, debug))
        )


def _may_pass(text: str, debug: str) -> bool:
    return _NEEDS_HTTP not in text and "InvalidCertificate" not in debug


async def answer_of(request: Awaitable[_T]) -> _T:
    """Return what a request to obstore returns.

    Raises:
        PermissionError: it was refused to these credentials.
        RequestError: anything else that obstore raises.
    """
    try:
        return await request
    except (BaseError, FileNotFoundError) as error:
        failure = RequestError(error)
        if failure.denied:
            raise PermissionError(errno.EACCES, str(failure)) from error
        raise failure from error
