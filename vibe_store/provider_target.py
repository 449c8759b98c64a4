"""Imports what a provider names, makes the object of it, and says of whatever is wrong whose fault it is."""

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vibe_store.discovery import Registration, kind_text, listed
from vibe_store.errors import InvalidValueError, MissingDependencyError, PluginError, VibeStoreError
from vibe_store.interfaces import Serializer, StorageBackend
from vibe_store.options import Given, Option, options_of, read_options

__all__ = ["Described", "at_fault", "check_usable", "describe_target", "make"]


@dataclass(frozen=True, slots=True)
class Described:
    """What the target of a provider says of itself: its options, and its docstring."""

    options: tuple[Option, ...]
    help: str


def describe_target(row: Registration) -> Described:
    """Import what a provider names, and return what it says of itself.

    Raises:
        MissingDependencyError: it needs a package that is not installed; the message says which.
        PluginError: it cannot be used; the message says why.
    """
    check_usable(row)
    target = _target_of(row)
    signature = _signature(target)
    # A storage's first argument is its URL.
    options = options_of(signature, after=int(row.kind == "storage")) if signature else ()
    return Described(options, inspect.getdoc(target) or "")


def make(row: Registration, *arguments: object, given: Given, options: dict[str, Any]) -> object:
    """Import what a provider names, and call it.

    Args:
        row: the provider.
        arguments: what every target of its kind takes.
        given: the options that stand behind the name, as text.
        options: the options that were passed as keywords.

    Raises:
        InvalidValueError: it does not take such an option, or refuses the value of one.
        MissingDependencyError: it needs a package that is not installed; the message says which.
        PluginError: it cannot be imported, called or used as what it is registered for.
        Exception: what vibe_store and the operating system raise about a place stays as it is.
    """
    target = _target_of(row)
    options = _joined(row, target, given, options)
    _check_options(row, target, arguments, options)
    try:
        return target(*arguments, **options)
    except ImportError as error:
        if isinstance(error, MissingDependencyError) and not row.provider.install:
            raise
        raise _missing_dependency(row, error) from error
    except (VibeStoreError, OSError):
        raise
    except ValueError as error:
        raise InvalidValueError(f"The {row} refuses what it was given: {error}") from error
    except Exception as error:
        raise at_fault(row, f"making it raised {type(error).__name__}: {error}") from error


def check_usable(row: Registration) -> None:
    """Raise for a provider that several plugins claim, or that is registered wrongly."""
    if row.status != "ok":
        raise PluginError(f"The {kind_text(row.kind)} {row.provider.name!r} cannot be used. {row.reason}")


def at_fault(row: Registration, detail: str) -> PluginError:
    """Return the error that says of a plugin what is wrong with what it provides."""
    return PluginError(
        f"The {row} cannot be used: {detail}. Report this to the authors of {row.plugin.distribution}."
    )


def _target_of(row: Registration) -> Callable[..., object]:
    """Import what a provider names, which must be fit for its kind."""
    if row.kind == "storage":
        return _subclass(row, StorageBackend)
    if row.kind == "serializer":
        return _serializer_class(row)
    target = _imported(row)
    if not callable(target):
        raise at_fault(row, f"it is {target!r}, which cannot be called")
    return target


def _imported(row: Registration) -> object:
    module_name, _, attribute = row.provider.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        # Its package was found, so this is a misspelled target and no missing package.
        if "." in module_name and error.name == module_name and isinstance(error, ModuleNotFoundError):
            raise at_fault(row, f"there is no module {module_name}") from error
        raise _missing_dependency(row, error) from error
    except Exception as error:
        detail = f"importing {module_name} raised {type(error).__name__}: {error}"
        raise at_fault(row, detail) from error
    try:
        target: object = operator.attrgetter(attribute)(module)
    except AttributeError as error:
        raise at_fault(row, f"the module {module_name} has no {attribute}") from error
    return target


def _subclass(row: Registration, interface: type) -> Callable[..., object]:
    target = _imported(row)
    if not (isinstance(target, type) and issubclass(target, interface)):
        raise at_fault(row, f"it is no subclass of vibe_store.{interface.__name__}")
    if inspect.isabstract(target):
        lacking = sorted(getattr(target, "__abstractmethods__", ()))
        raise at_fault(row, f"it does not implement {listed(lacking)}")
    return target


def _serializer_class(row: Registration) -> Callable[..., object]:
    """Import a serializer, which must find again what it wrote: by its name, and without options."""
    target = _subclass(row, Serializer)
    own = getattr(target, "name", row.provider.name)  # each object may have one of its own instead
    if isinstance(own, str) and own != row.provider.name:
        raise at_fault(row, f"its attribute `name` is {own!r} instead of {row.provider.name!r}")
    signature = _signature(target)
    required = [option.name for option in options_of(signature) if option.required] if signature else []
    if required:
        have = "option has" if len(required) == 1 else "options have"
        raise at_fault(
            row, f"its {have} no default: {listed(required)}. A checkpoint is loaded without any option"
        )
    return target


def _joined(
    row: Registration, target: Callable[..., object], given: Given, options: dict[str, Any]
) -> dict[str, Any]:
    """Return the options that stand behind a name, read, and those that were passed as keywords."""
    if not given:
        return options
    what = f"{kind_text(row.kind)} {row.provider.name!r}"
    if twice := sorted(given.keys() & options.keys()):
        raise InvalidValueError(
            f"The {what} is given {listed(twice)} twice, behind its name and as a keyword."
        )
    return read_options(what, given, _evaluated_signature(row, target)) | options


def _evaluated_signature(row: Registration, target: Callable[..., object]) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except Exception as error:  # annotations that are text may hold anything
        raise at_fault(row, f"its signature cannot be read ({type(error).__name__}: {error})") from error


def _check_options(
    row: Registration, target: Callable[..., object], arguments: Sequence[object], options: dict[str, Any]
) -> None:
    signature = _signature(target)
    if signature is None:  # a target written in C may have none; the call itself then says what is wrong
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        parameters = list(signature.parameters.values())[len(arguments) :]
        taken = [str(parameter.replace(annotation=parameter.empty)) for parameter in parameters]
        given = f"the options {listed(sorted(options))}" if options else "no options"
        raise InvalidValueError(
            f"The {row} cannot be made with {given}: {error}. It takes {', '.join(taken) or 'no options'}."
        ) from error


@functools.cache  # it takes longer than all else here, and a one-shot save waits for it
def _signature(target: Callable[..., object]) -> inspect.Signature | None:
    try:
        return inspect.signature(target)
    except ValueError:
        return None


def _missing_dependency(row: Registration, error: ImportError) -> MissingDependencyError:
    install = row.provider.install
    remedy = f'Run `pip install "{install}"`.' if install else "Install it."
    return MissingDependencyError(f"The {row} needs a package that is not installed: {error}. {remedy}")
