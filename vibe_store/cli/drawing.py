"""The pictures of ``vibe-store eval --render`` and ``curves``; matplotlib is imported when one is drawn."""

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vibe_store.errors import InvalidValueError, MissingDependencyError

if TYPE_CHECKING:
    from vibe_store.runner.envs import VectorEnv

__all__ = ["Curve", "check_curve_drawing", "check_episode_drawing", "draw_curves", "draw_episode"]

_PYGAME = {"PYGAME_HIDE_SUPPORT_PROMPT": "1", "SDL_AUDIODRIVER": "dummy", "SDL_VIDEODRIVER": "dummy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What several seeds measured, against the environment step.

    Attributes:
        name: what it is of.
        seeds: how many seeds there are.
        steps: the steps.
        mean: the mean at each step.
        low: the lower end of the confidence interval of the mean; NaN where there are not two seeds.
        high: its upper end.
    """

    name: str
    seeds: int
    steps: Sequence[int]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def check_curve_drawing(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is read.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidValueError: matplotlib writes no files of this kind.
    """
    with _needed("plot", "Drawing curves"):
        from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise InvalidValueError(
            f"{path} has no ending that says what picture to write. Endings are: {', '.join(sorted(kinds))}."
        )


def draw_curves(curves: Sequence[Curve], metric: str, path: Path) -> None:
    """Draw curves into one picture, each with its confidence band.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="environment steps of each seed", ylabel=metric.replace("_", " "))
    for curve in curves:
        label = f"{curve.name} ({curve.seeds} seed{'s' * (curve.seeds != 1)})"
        (line,) = axes.plot(curve.steps, curve.mean, label=label, marker="." if len(curve.steps) == 1 else "")
        axes.fill_between(curve.steps, curve.low, curve.high, alpha=0.2, linewidth=0, color=line.get_color())
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def check_episode_drawing() -> None:
    """Refuse to draw episodes where a package for it is missing, before any is played.

    Raises:
        MissingDependencyError: matplotlib, or what else gymnax draws with, is not installed.
    """
    # Gymnasium starts all of pygame, which would look for a screen and a sound card, and print its name.
    for name, value in _PYGAME.items():
        os.environ.setdefault(name, value)
    with _needed("render", "Drawing episodes"):
        import matplotlib as mpl

        mpl.use("Agg")
        importlib.import_module("gymnax.visualize")


def draw_episode(env: "VectorEnv", states: Sequence[Any], returns: Sequence[float], path: Path) -> None:
    """Draw an episode as an animated GIF, as gymnax does.

    Args:
        env: the environments.
        states: the state of one of them, at each step.
        returns: the return up to each step.
        path: the file.

    Raises:
        InvalidValueError: gymnax cannot draw this environment.
        MissingDependencyError: pygame, with which Gymnasium draws this environment, is not installed.
        OSError: the file cannot be written.
    """
    from gymnasium.error import DependencyNotInstalled
    from gymnax.visualize import Visualizer
    from matplotlib import pyplot

    trial = Visualizer(env.env, env.params, states[:1])
    try:
        trial.init()
    except DependencyNotInstalled as error:
        raise MissingDependencyError(
            f'{env.name} cannot be drawn ({error}): pip install "vibe-store[render]"'
        ) from error
    finally:
        pyplot.close(trial.fig)
    if not hasattr(trial, "im"):
        raise InvalidValueError(f"gymnax cannot draw {env.name}. Leave out --render.")
    Visualizer(env.env, env.params, states, returns).animate(str(path))


@contextmanager
def _needed(extra: str, what: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs {error.name}, which cannot be imported ({error}): "
            f'pip install "vibe-store[{extra}]"'
        ) from error
