"""``vibe-store eval``: how well the policy of a checkpoint plays.

The keys of what ``--json`` prints are stable: ``directory``, ``step``, ``algorithm``, ``env``, ``episodes``,
``seed``, ``returns`` and ``lengths`` (one number for each episode), ``return`` and ``length`` (objects with
``mean``, ``std``, ``min`` and ``max``), and ``render`` (the file; null where none was asked for).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from vibe_store.checkpoint.finding import find_checkpoint
from vibe_store.cli.drawing import check_episode_drawing, draw_episode
from vibe_store.cli.inspect import plain_metrics, plain_number, print_json, step_number
from vibe_store.cli.options import StorageOptions, parse_options
from vibe_store.runner.evaluate import evaluate as play
from vibe_store.runner.evaluate import record_episode
from vibe_store.runner.named_env import named_env
from vibe_store.runner.policy import load_policy
from vibe_store.storage.redaction import without_credentials

__all__ = ["evaluate"]

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class _Eval:
    """Play greedy episodes of a checkpoint, on the environment that it was trained on."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A run's directory, a directory of checkpoints, or one checkpoint, or the URL of one of these."""
    step: Annotated[str | None, tyro.conf.arg(metavar="N")] = None
    """Which checkpoint; the newest by default."""
    best: _Flag = False
    """Take the checkpoint that `best` points to, or else the one with the highest eval_return."""
    episodes: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """How many episodes to play."""
    seed: Annotated[int, tyro.conf.arg(metavar="S")] = 0
    """Seed of the episodes."""
    run_seed: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Of a run with num_seeds above 1, whose policy to play, counted from 0."""
    render: Annotated[str | None, tyro.conf.arg(metavar="FILE.gif")] = None
    """Draw one more episode into this file."""
    storage_options: StorageOptions = None
    """What the storage takes, as a JSON object; credentials are better left to the environment."""
    json: _Flag = False
    """Print JSON."""


def evaluate(argv: Sequence[str]) -> int:
    """Play episodes; return the exit status."""
    arguments = tyro.cli(_Eval, prog="vibe-store eval", args=argv)
    options = parse_options(arguments.storage_options, "--storage-options")
    step = step_number(arguments.step)
    mistake = _mistake(arguments)
    if mistake is not None:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    if arguments.render is not None:
        check_episode_drawing()
    storage, step = find_checkpoint(
        arguments.directory,
        step=step,
        best_metric="eval_return" if arguments.best else None,
        storage_options=options,
    )
    policy = load_policy(storage, step=step, seed=arguments.run_seed)
    env, key = named_env(policy.metadata), jax.random.key(arguments.seed)
    if arguments.render is not None:
        states, returns_so_far = record_episode(env, policy, key)
        draw_episode(env, states, returns_so_far, Path(arguments.render))
    returns, lengths = jax.device_get(
        jax.jit(lambda key: play(env, policy, key, episodes=arguments.episodes))(key)
    )
    where = without_credentials(storage.url)
    if arguments.json:
        print_json(
            {
                "directory": where,
                "step": step,
                "algorithm": policy.metadata["algorithm"],
                "env": env.name,
                "episodes": arguments.episodes,
                "seed": arguments.seed,
                "returns": [plain_number(value) for value in returns.tolist()],
                "lengths": lengths.tolist(),
                "return": plain_metrics(_summary(returns)),
                "length": plain_metrics(_summary(lengths)),
                "render": arguments.render,
            }
        )
        return 0
    episodes = f"{arguments.episodes} episode{'s' * (arguments.episodes != 1)}"
    print(f"Step {step:,} in {where}: {episodes} of {env.name}, seed {arguments.seed}.")
    for name, values in (("return", returns), ("length", lengths)):
        numbers = "  ".join(f"{kind} {value:.1f}" for kind, value in _summary(values).items())
        print(f"{name}  {numbers}")
    if arguments.render is not None:
        print(f"One more episode is drawn in {arguments.render}.")
    return 0


def _mistake(arguments: _Eval) -> str | None:
    if arguments.best and arguments.step is not None:
        return "give one of --step and --best."
    if arguments.episodes < 1:
        return f"--episodes is 1 or more; got {arguments.episodes}."
    if not 0 <= arguments.seed < 2**32:
        return f"--seed is from 0 to {2**32 - 1}; got {arguments.seed}."
    if arguments.render is not None and not arguments.render.lower().endswith(".gif"):
        return f"--render writes a GIF, so its name ends in .gif; got {arguments.render}."
    return None


def _summary(values: Any) -> Mapping[str, float]:
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values)),
        "min": float(np.min(values)),
        "max": float(np.max(values)),
    }
