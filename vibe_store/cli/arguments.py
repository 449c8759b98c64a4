"""What ``vibe-store train`` was asked to do: the flags, on top of the preset or of the run that goes on."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vibe_store.checkpoint.finding import distribution_named
from vibe_store.checkpoint.opening import open_directory
from vibe_store.checkpoint.step_index import latest_step
from vibe_store.cli.options import parse_options, refuse
from vibe_store.discovery import Kind, kind_text
from vibe_store.errors import (
    CheckpointsExistError,
    InvalidValueError,
    UnknownProviderError,
    VibeStoreWarning,
)
from vibe_store.metrics.tensorboard import check_tensorboard
from vibe_store.registry import default_registry, get_retention, get_serializer
from vibe_store.run_dir import Place, RunDir, find_runs
from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.loop import Progress
from vibe_store.runner.presets import Preset
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import UrlPath, place_of

__all__ = ["TrainPlan", "parse_runner", "plan_training", "storing_settings"]

_AT_ONCE = 16
"""How many runs' configurations are read at the same time."""

_ONE_RUN_ONLY = ("resume", "overwrite")
"""Fields of RunnerConfig that say how to begin, so a later start takes nothing from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """One training run that is about to begin or to go on.

    Attributes:
        preset: what is trained.
        run: its folder.
        config: the hyperparameters of the preset's algorithm.
        runner: the settings; its ``checkpoint_dir`` is ``directory``.
        directory: where the checkpoints are: a path, or a URL with the options of its storage.
        tensorboard: whether to write the metrics for TensorBoard too.
        existing: whether the folder is that of a run that began earlier.
        stored: what the run's ``config.json`` is to hold.
        changes: the settings that differ from those the run had before: by flag, a phrase on each.
    """

    preset: Preset
    run: RunDir
    config: Any
    runner: RunnerConfig
    directory: Place
    tensorboard: bool
    existing: bool
    stored: Mapping[str, Any]
    changes: Mapping[str, str]


@dataclass(frozen=True)
class _Flags:
    config: Any
    runner: RunnerConfig
    run_id: str | None = None
    base_dir: str = "runs"
    storage_options: str | None = None
    tensorboard: bool = False


def plan_training(preset: Preset, flags: Sequence[str], *, prog: str) -> TrainPlan:
    """Find the run that is meant, or create its folder, and settle its configuration.

    A new run begins with the preset's settings, one that goes on with those in its ``config.json``; flags
    come on top of either. Without ``--run-id``, ``--runner.resume true`` goes on with the newest run of the
    preset; with ``--runner.checkpoint-dir``, with the newest one whose checkpoints are there.

    Args:
        preset: the preset.
        flags: the arguments after the preset's name.
        prog: the command and the preset's name, for the help.

    Raises:
        SystemExit: the flags cannot be understood (status 2), or were ``--help`` (status 0).
        InvalidValueError: the run is of another preset, its ``config.json`` or a setting cannot be used, or
            its checkpoints are not where they are said to be.
        CheckpointsExistError: the run exists, and neither to resume nor to overwrite it was asked for.
    """
    defaults = _Flags(preset.config, preset.runner)
    given = _parse(flags, defaults, preset, prog)
    _check_places(given)
    options = parse_options(given.storage_options, "--storage-options")
    run = _existing_run(preset, given, options)
    stored = run.load_config() if run is not None and given.runner.resume else None
    if run is not None and stored is not None:
        defaults = _stored_flags(run, stored, defaults, preset.algorithm)
        given = _parse(flags, defaults, preset, prog)
    existing = run is not None
    _check(given, options, existing=existing)
    preset.check(given.config, given.runner)
    if run is not None and stored is not None:
        _check_plugins(run, stored, _providers(given))
    if run is None:
        run = _new_run(preset, given, options)
    place = None if given.runner.checkpoint_dir is None else _absolute(given.runner.checkpoint_dir)
    lasting = dataclasses.replace(given.runner, checkpoint_dir=place, resume=False, overwrite=False)
    directory = _directory(run, place, options)
    if stored is not None:
        _check_moved(run, _directory(run, defaults.runner.checkpoint_dir, options), directory)
    group = preset.algorithm
    changes = _changes(group, defaults.config, given.config) | _changes("runner", defaults.runner, lasting)
    return TrainPlan(
        preset=preset,
        run=run,
        config=given.config,
        runner=dataclasses.replace(given.runner, checkpoint_dir=directory),
        directory=directory,
        tensorboard=given.tensorboard,
        existing=existing,
        stored={
            "preset": preset.name,
            "created": (stored or {}).get("created") or datetime.now(UTC).isoformat(),
            group: dataclasses.asdict(given.config),
            "runner": dataclasses.asdict(lasting),
            "plugins": _plugins_of(_providers(given)),
        },
        changes=changes if stored is not None else {},
    )


def parse_runner(preset: Preset, flags: Sequence[str], *, prog: str) -> RunnerConfig:
    """Return the settings of a new run with these flags, for which nothing is looked up or made.

    Raises:
        SystemExit: the flags cannot be understood (status 2).
    """
    return _parse(flags, _Flags(preset.config, preset.runner), preset, prog).runner


def storing_settings(plan: TrainPlan, on_progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Return a callback that stores a resumed run's settings once they have proved to fit its checkpoint."""
    stored = False

    def store_once(progress: Progress) -> None:
        nonlocal stored
        if not stored:
            plan.run.save_config(plan.stored)
            stored = True
        on_progress(progress)

    return store_once


def _parse(flags: Sequence[str], defaults: _Flags, preset: Preset, prog: str) -> _Flags:
    algorithm = preset.algorithm
    run_id = "Name of the run's folder in base_dir: one to create, or to go on with by --runner.resume true."
    base_dir = "Folder that holds the folders of all runs, or its URL (s3://bucket/runs, say)."
    storage_options = (
        "What the storage of a URL in base_dir or checkpoint_dir takes, as a JSON object; it is not "
        "remembered, and credentials are better left to the environment."
    )
    tensorboard = "Write the metrics for TensorBoard too, to the run's logs/tensorboard."
    shown = dataclasses.make_dataclass(
        "Flags",
        [
            (algorithm, _explained(type(preset.config), f"The hyperparameters of {algorithm.upper()}.")),
            ("runner", _explained(RunnerConfig, "The training run.")),
            ("run_id", _explained(str | None, run_id)),
            ("base_dir", _explained(str, base_dir)),
            ("storage_options", Annotated[str | None, tyro.conf.arg(metavar="JSON", help=storage_options)]),
            ("tensorboard", _explained(bool, tensorboard)),
        ],
        frozen=True,
    )
    with _READ_BY_US:
        given: Any = tyro.cli(
            shown,
            args=flags,
            default=shown(*(getattr(defaults, each.name) for each in dataclasses.fields(defaults))),
            prog=prog,
            description=f"Train {preset.name}: {algorithm.upper()} on {preset.env_id}.",
            config=(tyro.conf.FlagConversionOff,),
        )
    return _Flags(*(getattr(given, each.name) for each in dataclasses.fields(given)))


def _explained(kind: Any, text: str) -> Any:
    return Annotated[kind, tyro.conf.arg(help=text)]


_READ_BY_US = ConstructorRegistry()


@_READ_BY_US.primitive_rule
def _boolean(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """Let ``--runner.resume true`` be written in any case; by itself tyro takes only ``True``."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda words: _read_boolean(words[0]),
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
    )


@_READ_BY_US.primitive_rule
def _checkpoint_dir(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str | None] | None:
    """Let ``--runner.checkpoint-dir`` be text, of the types that it may have."""
    if info.type != _CHECKPOINT_DIR:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|STR",
        instance_from_str=lambda words: None if words[0] == "None" else words[0],
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )


_CHECKPOINT_DIR = get_type_hints(RunnerConfig)["checkpoint_dir"]


def _read_boolean(word: str) -> bool:
    if word.lower() not in {"true", "false"}:
        raise ValueError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def _check_places(flags: _Flags) -> None:
    """End the process where the flags leave open which place they mean."""
    if flags.base_dir == "":
        refuse("--base-dir is empty; give a folder or a URL, and '.' for the current folder.")
    if flags.runner.overwrite and flags.run_id is None and flags.runner.checkpoint_dir is None:
        refuse(
            "--runner.overwrite true has nothing to delete in a new run; say what to start over by --run-id "
            "or --runner.checkpoint-dir."
        )


def _check(flags: _Flags, options: Mapping[str, Any] | None, *, existing: bool) -> None:
    """Refuse what would only fail once a new run's folder is there.

    Raises:
        SystemExit: an option is of no use (status 2).
        VibeStoreError: a provider or a package is missing.
    """
    if options is not None and not any(map(_is_url, (flags.base_dir, flags.runner.checkpoint_dir or "."))):
        refuse("--storage-options is for a URL, and neither --base-dir nor --runner.checkpoint-dir is one.")
    if flags.tensorboard:
        check_tensorboard(flags.base_dir)
    if not existing:
        get_serializer(flags.runner.serializer)
        if flags.runner.retention is not None:
            get_retention(flags.runner.retention)


def _directory(run: RunDir, checkpoint_dir: Any, options: Mapping[str, Any] | None) -> Place:
    return run.checkpoints if checkpoint_dir is None else _place(str(checkpoint_dir), options)


def _check_moved(run: RunDir, before: Place, now: Place) -> None:
    """Refuse to begin a run anew in one place while its checkpoints are in another.

    Raises:
        InvalidValueError: there is no checkpoint where the run is to go on, and there are some where it was.
    """
    if now == before or latest_step(open_directory(now, None)) is not None:
        return
    newest = latest_step(open_directory(before, None))
    if newest is not None:
        raise InvalidValueError(
            f"The run {_shown(run.path)} cannot go on in {_shown(now)}, where there is no checkpoint: it has "
            f"step {newest} in {_shown(before)}. Leave out --runner.checkpoint-dir to go on from there, or "
            "copy them there first."
        )


def _providers(flags: _Flags) -> dict[Kind, str]:
    """Return what a run needs to be gone on with and no manifest names: its storage and its retention."""
    place = flags.base_dir if flags.runner.checkpoint_dir is None else flags.runner.checkpoint_dir
    named: dict[Kind, str | None] = {"storage": str(place), "retention": flags.runner.retention}
    return {kind: name for kind, name in named.items() if name is not None}


def _plugins_of(providers: Mapping[Kind, str]) -> dict[str, Mapping[str, str | None]]:
    """Return the distribution and version of each that is no part of vibe_store."""
    found = {kind: default_registry().origin_of(kind, name) for kind, name in providers.items()}
    return {
        kind: {"distribution": plugin.distribution, "version": plugin.version}
        for kind, plugin in found.items()
        if plugin is not None and not plugin.builtin
    }


def _check_plugins(run: RunDir, stored: Mapping[str, Any], providers: Mapping[Kind, str]) -> None:
    """Say of what is no longer installed where it came from when the run was last trained.

    Raises:
        UnknownProviderError: a plugin is missing, and ``config.json`` says which.
    """
    for kind, name in providers.items():
        origin = distribution_named(stored, kind)
        if origin is None or default_registry().origin_of(kind, name) is not None:
            continue
        way_out = ", or go on without it: --runner.retention None" if kind == "retention" else ""
        raise UnknownProviderError(
            f"The run {_shown(run.path)} was trained with the {kind_text(kind)} "
            f"{without_credentials(name)!r} of {origin}, which is not installed or does not provide it. Run "
            f"`pip install {origin.name}`, if you trust who wrote {_shown(run.config_path)} to name it"
            f"{way_out}."
        )


def _existing_run(preset: Preset, flags: _Flags, options: Mapping[str, Any] | None) -> RunDir | None:
    """Return the run that is to go on or to be overwritten; None where a new one is to begin."""
    if flags.run_id is not None:
        run = _run_called(flags.run_id, flags, options)
        config = run.load_config()
        if config is None:
            return None
        if config.get("preset") != preset.name:
            raise InvalidValueError(
                f"The run {_shown(run.path)} is of the preset {config.get('preset')!r}, not of "
                f"{preset.name!r}. Name that preset, or another --run-id."
            )
        if not (flags.runner.resume or flags.runner.overwrite):
            raise CheckpointsExistError(
                f"The run {_shown(run.path)} exists. Add --runner.resume true to go on with it, "
                "--runner.overwrite true to start it over, or give another --run-id."
            )
        return run
    if not flags.runner.resume:
        return None
    return _newest_run(preset, flags, options)


def _newest_run(preset: Preset, flags: _Flags, options: Mapping[str, Any] | None) -> RunDir | None:
    """Return the run of this preset that began last; given ``checkpoint_dir``, of those that save there."""
    checkpoint_dir = flags.runner.checkpoint_dir
    runs = find_runs(_place(flags.base_dir, options))
    with ThreadPoolExecutor(_AT_ONCE) as threads:  # in a bucket each is a request
        configs = list(threads.map(_config_of, runs))
    newest, began = None, ""
    for run, config in zip(runs, configs, strict=True):
        if isinstance(config, Exception):
            warnings.warn(f"{config} That run was passed over.", VibeStoreWarning, stacklevel=2)
            continue
        if config.get("preset") != preset.name or str(config.get("created")) < began:
            continue
        runner = config.get("runner")
        place = runner.get("checkpoint_dir") if isinstance(runner, Mapping) else None
        if checkpoint_dir is None or place == _absolute(checkpoint_dir):
            newest, began = run, str(config.get("created"))
    return newest


def _config_of(run: RunDir) -> Mapping[str, Any] | Exception:
    try:
        return run.load_config() or {}
    except InvalidValueError as error:
        return error
    except OSError as error:
        return OSError(f"{_shown(run.config_path)} cannot be read: {error}.")


def _new_run(preset: Preset, flags: _Flags, options: Mapping[str, Any] | None) -> RunDir:
    if flags.run_id is not None:
        return _run_called(flags.run_id, flags, options)
    return RunDir(preset.name, base_dir=_place(flags.base_dir, options))


def _run_called(run_id: str, flags: _Flags, options: Mapping[str, Any] | None) -> RunDir:
    return RunDir(base_dir=_place(flags.base_dir, options), run_id=run_id)


def _place(place: str, options: Mapping[str, Any] | None) -> Place:
    """Return a path, or a URL with the options of its storage."""
    return place_of(place, options if _is_url(place) else None)


def _is_url(place: object) -> bool:
    return isinstance(place_of(place, None), UrlPath)


def _stored_flags(run: RunDir, stored: Mapping[str, Any], defaults: _Flags, algorithm: str) -> _Flags:
    """Return the settings that a run began with; fields that it did not store are those of ``defaults``."""
    return dataclasses.replace(
        defaults,
        config=_stored_config(run, algorithm, stored, defaults.config),
        runner=_stored_config(run, "runner", stored, defaults.runner),
    )


def _stored_config(run: RunDir, group: str, stored: Mapping[str, Any], default: Any) -> Any:
    values = stored.get(group, {})
    if not isinstance(values, Mapping):
        raise InvalidValueError(f"{_shown(run.config_path)} cannot be used: {group!r} is no JSON object.")
    names = {field.name for field in dataclasses.fields(default)}
    unknown = sorted(values.keys() - names)
    if unknown:
        warnings.warn(
            f"{_shown(run.config_path)} has settings that this version does not know, which are passed over: "
            f"{', '.join(f'{group}.{name}' for name in unknown)}.",
            VibeStoreWarning,
            stacklevel=2,
        )
    known: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in names
    }
    try:
        return dataclasses.replace(default, **known)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"{_shown(run.config_path)} cannot be used: {error}") from error


def _shown(place: Place) -> str:
    return without_credentials(str(place))


def _absolute(place: str | os.PathLike[str] | UrlPath) -> str:
    text = str(place)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def _changes(group: str, before: Any, now: Any) -> dict[str, str]:
    old = dataclasses.asdict(before)
    return {
        f"{group}.{name}": f"{group}.{name} is {value!r} (was {old[name]!r})"
        for name, value in dataclasses.asdict(now).items()
        if value != old[name]
    }
