"""``vibe-store curves``: what runs measured as they trained, drawn against the environment step.

The keys of what ``--json`` prints are stable: ``out`` (the file), ``metric``, and ``curves``, a list of
objects with ``name`` (the preset's), ``runs`` (the names of their folders), ``seeds`` (how many), and, one
number for each of ``steps``, ``mean``, ``low`` and ``high`` (null where there are not two seeds).
"""

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import tyro

from vibe_store.cli.drawing import Curve, check_curve_drawing, draw_curves
from vibe_store.cli.inspect import print_json
from vibe_store.cli.options import StorageOptions, parse_options, refuse
from vibe_store.errors import InvalidValueError, VibeStoreWarning
from vibe_store.metrics import read_metrics
from vibe_store.run_dir import RunDir, find_runs
from vibe_store.storage.redaction import without_credentials
from vibe_store.storage.url_path import place_of

__all__ = ["curves", "mean_curve"]

_CONFIDENCE = 0.95

_Series: TypeAlias = dict[int, float]
"""What one seed measured, by step."""


@dataclass(frozen=True)
class _Curves:
    """Draw the learning curves of runs, those of one preset as their mean with a 95 % confidence band.

    What seeds measured at other steps than each other is interpolated in between. The band is Student's t
    interval of the mean, which takes two seeds at least: of several runs, or of one with num_seeds above 1.
    """

    directories: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
    """Directories of runs, or ones that hold several (runs, say), or their URLs."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The picture to write; its ending says of which kind (.png, .pdf, .svg)."""
    metric: str = "eval_return"
    """What to draw: a name in the metrics log."""
    storage_options: StorageOptions = None
    """What the storage takes, as a JSON object; credentials are better left to the environment."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


def curves(argv: Sequence[str]) -> int:
    """Draw learning curves; return the exit status."""
    arguments = tyro.cli(_Curves, prog="vibe-store curves", args=argv)
    options = parse_options(arguments.storage_options, "--storage-options")
    if not arguments.directories:
        print("error: give a run's directory, or one that holds runs.", file=sys.stderr)
        return 2
    out = Path(arguments.out)
    check_curve_drawing(out)
    runs = [each for directory in arguments.directories for each in _runs_of(directory, options)]
    groups: dict[str, list[tuple[RunDir, list[_Series]]]] = {}
    for run, named in {str(run.path): (run, named) for run, named in runs}.values():
        measured = _measured(run, arguments.metric, named=named)
        if measured:
            preset = (run.load_config() or {}).get("preset")
            groups.setdefault(str(preset or run.run_id), []).append((run, measured))
    if not groups:
        raise InvalidValueError(f"None of these runs measured {arguments.metric!r}.")
    found = {name: [series for _, each in group for series in each] for name, group in groups.items()}
    drawn = [mean_curve(name, series) for name, series in sorted(found.items())]
    draw_curves(drawn, arguments.metric, out)
    if arguments.json:
        rows = [_row(curve, [run.run_id for run, _ in groups[curve.name]]) for curve in drawn]
        print_json({"out": arguments.out, "metric": arguments.metric, "curves": rows})
        return 0
    for curve in drawn:
        n_runs = len(groups[curve.name])
        counted = f"{n_runs} run{'s' * (n_runs != 1)}, {curve.seeds} seed{'s' * (curve.seeds != 1)}"
        last = f"{arguments.metric} {curve.mean[-1]:.4g} at step {curve.steps[-1]:,}"
        print(f"{curve.name} ({counted}): {last}")
    print(f"Drawn in {arguments.out}.")
    return 0


def mean_curve(name: str, series: Sequence[_Series]) -> Curve:
    """Return the mean of several seeds, with its 95 % confidence interval (Student's t).

    The steps are those of all of them. Between two of its own steps a seed counts with what lies on the line
    between them; before its first and after its last it does not count.

    Args:
        name: what the curve is of.
        series: what each seed measured, by step; none of them empty.
    """
    from scipy.stats import t as student

    steps = sorted({step for each in series for step in each})
    rows = []
    for each in series:
        own = sorted(each)
        rows.append(np.interp(steps, own, [each[step] for step in own], left=np.nan, right=np.nan))
    values = np.array(rows)
    count = np.sum(~np.isnan(values), axis=0)
    mean = np.nanmean(values, axis=0)
    spread = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / np.maximum(count - 1, 1))
    half = student.ppf((1 + _CONFIDENCE) / 2, np.maximum(count - 1, 1)) * spread / np.sqrt(count)
    half = np.where(count > 1, half, np.nan)
    return Curve(
        name=name,
        seeds=len(series),
        steps=steps,
        mean=mean.tolist(),
        low=(mean - half).tolist(),
        high=(mean + half).tolist(),
    )


def _runs_of(directory: str, options: Mapping[str, Any] | None) -> list[tuple[RunDir, bool]]:
    """Return the runs that a directory holds, or the run that it is, and whether that was named itself."""
    if not directory:
        refuse("a directory is empty text; give its path, '.' for the current folder, or a URL.")
    place = place_of(directory, options)
    if isinstance(place, Path):
        place = place.absolute()
    found = [(run, False) for run in find_runs(place)]
    return found or [(RunDir(base_dir=place.parent, run_id=place.name), True)]


def _measured(run: RunDir, metric: str, *, named: bool) -> list[_Series]:
    """Return what each seed of a run measured; warn where that is nothing.

    Raises:
        InvalidValueError: the run, which the user named, has no metrics log.
    """
    where = without_credentials(str(run.path))
    try:
        lines = read_metrics(run.logs / "metrics.jsonl")
    except FileNotFoundError as error:
        if named:
            raise InvalidValueError(
                f"{where} is no run that has a metrics log, logs/metrics.jsonl, and holds none."
            ) from error
        warnings.warn(
            f"{where} has no metrics log, logs/metrics.jsonl, and is passed over.",
            VibeStoreWarning,
            stacklevel=2,
        )
        return []
    by_seed: dict[int, _Series] = {}
    for line in lines:
        several = line.get(f"{metric}_by_seed")
        values = several if isinstance(several, list) else [line.get(metric)]
        for index, value in enumerate(values):
            if _is_number(value) and _is_number(line.get("step")):
                by_seed.setdefault(index, {})[line["step"]] = value
    if not by_seed:
        names = sorted(
            {name for line in lines for name, value in line.items() if _is_number(value)} - {"step"}
        )
        warnings.warn(
            f"{where} has not measured {metric!r}; it has {', '.join(names) or 'nothing'}.",
            VibeStoreWarning,
            stacklevel=2,
        )
    return [by_seed[index] for index in sorted(by_seed)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _row(curve: Curve, runs: list[str]) -> dict[str, Any]:
    def plain(values: Sequence[float]) -> list[float | None]:
        return [None if math.isnan(value) else value for value in values]

    return {
        "name": curve.name,
        "runs": runs,
        "seeds": curve.seeds,
        "steps": list(curve.steps),
        "mean": list(curve.mean),
        "low": plain(curve.low),
        "high": plain(curve.high),
    }
