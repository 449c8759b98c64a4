"""Arguments that several commands have, and how one that is a mistake is answered."""

import json
import sys
from typing import Annotated, Any, NoReturn

import tyro

__all__ = ["StorageOptions", "parse_options", "refuse"]

StorageOptions = Annotated[str | None, tyro.conf.arg(metavar="JSON")]
"""An argument that holds the options of a storage."""


def parse_options(text: str | None, name: str) -> dict[str, Any] | None:
    """Return the options of a storage; end the process with a sentence where they are none.

    They may hold secrets, so nothing shows them.

    Args:
        text: what was given to the argument.
        name: of the argument, for the sentence.
    """
    if text is None:
        return None
    try:
        options = json.loads(text)
    except ValueError as error:
        # The error quotes nothing of the text.
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        _refuse(f"{name} is no JSON{where}")
    except RecursionError:
        _refuse(f"{name} is nested too deeply")
    if not isinstance(options, dict):
        _refuse(f"{name} is no JSON object")
    return options


def refuse(sentence: str) -> NoReturn:
    """End the process as for any mistake in the arguments: with a sentence on it, and status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _refuse(sentence: str) -> NoReturn:
    example = '\'{"endpoint_url": "https://..."}\''
    refuse(f"{sentence}; write it as {example}, in single quotes.")
