"""``vibe-store eval``: episodes of the policy in a checkpoint, counted and drawn."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnax.environments.classic_control.cartpole import CartPole

from vibe_store.algorithms.dqn import DQNConfig
from vibe_store.checkpoint import CheckpointManager
from vibe_store.runner import RunnerConfig
from vibe_store.runner.dqn import dqn_program
from vibe_store.runner.seeds import of_seeds, run_keys

pytestmark = pytest.mark.usefixtures("compiled_once")

Run = Callable[..., Any]

CONFIG = DQNConfig(hidden_sizes=(8,), buffer_size=64, batch_size=8)


def always(state: Any, action: int) -> Any:
    """The state with a network that always chooses one action."""
    bias = jnp.zeros_like(state.params.layers[-1].bias).at[..., action].set(1e3)
    return state._replace(params=eqx.tree_at(lambda net: net.layers[-1].bias, state.params, bias))


def save(directory: Path, env: tuple[Any, Any], *, num_seeds: int = 1, metric: float = 1.0) -> None:
    """Save steps 10 and 20, the first of which is the best."""
    settings = RunnerConfig(num_envs=2, num_seeds=num_seeds)
    program = dqn_program(*env, dqn_config=CONFIG, runner_config=settings)
    carry = jax.jit(of_seeds(program, num_seeds).init)(run_keys(0, num_seeds))
    with CheckpointManager(directory, async_timeout_secs=None) as manager:
        for step, value in ((10, metric), (20, metric - 1)):
            manager.save(
                step,
                always(carry.state, 1),
                metrics={"eval_return": value},
                metadata=program.metadata,
            )


@pytest.fixture(scope="module")
def cartpole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose agent always pushes to the right: its episodes last 8 to 11 steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    save(run / "checkpoints", gymnax.make("CartPole-v1"))
    return run


def test_eval_prints_the_mean_spread_and_range_of_returns_and_lengths(
    vibe_store: Run, cartpole_run: Path
) -> None:
    ran = vibe_store("eval", cartpole_run, "--episodes", "5")
    assert (ran.status, ran.err) == (0, "")
    first, returns, lengths = ran.out.splitlines()
    assert first == f"Step 20 in {cartpole_run}/checkpoints: 5 episodes of CartPole-v1, seed 0."
    kinds, numbers = returns.split()[1::2], [float(word) for word in returns.split()[2::2]]
    assert kinds == ["mean", "std", "min", "max"]
    assert 8 <= numbers[2] <= numbers[0] <= numbers[3] <= 11
    assert [float(word) for word in lengths.split()[2::2]] == pytest.approx(numbers, abs=0.11)


def test_eval_as_json_has_the_documented_keys(vibe_store: Run, cartpole_run: Path) -> None:
    printed = json.loads(vibe_store("eval", cartpole_run, "--episodes", "5", "--json").out)
    returns = printed.pop("returns")
    assert printed.pop("lengths") == returns
    summary = {"mean": np.mean(returns), "std": np.std(returns), "min": min(returns), "max": max(returns)}
    assert printed.pop("return") == pytest.approx(summary)
    assert printed.pop("length") == pytest.approx(summary)
    assert printed == {
        "directory": str(cartpole_run / "checkpoints"),
        "step": 20,
        "algorithm": "dqn",
        "env": "CartPole-v1",
        "episodes": 5,
        "seed": 0,
        "render": None,
    }


def test_the_seed_decides_the_episodes(vibe_store: Run, cartpole_run: Path) -> None:
    def returns(seed: int) -> list[float]:
        ran = vibe_store("eval", cartpole_run, "--episodes", "5", "--json", "--seed", str(seed))
        return json.loads(ran.out)["returns"]

    assert returns(3) == returns(3)
    assert returns(3) != returns(4)


@pytest.mark.parametrize(
    ("flags", "step"), [((), 20), (("--step", "10"), 10), (("--best",), 10)], ids=["newest", "step", "best"]
)
def test_the_checkpoint_is_the_newest_a_step_or_the_best(
    flags: tuple[str, ...], step: int, vibe_store: Run, cartpole_run: Path
) -> None:
    ran = vibe_store("eval", cartpole_run, "--episodes", "5", "--json", *flags)
    assert json.loads(ran.out)["step"] == step


def test_the_parameters_of_the_environment_are_those_of_training(vibe_store: Run, tmp_path: Path) -> None:
    env, params = gymnax.make("CartPole-v1")
    save(tmp_path, (env, params.replace(max_steps_in_episode=4)))
    assert json.loads(vibe_store("eval", tmp_path, "--episodes", "5", "--json").out)["lengths"] == [4] * 5


def test_parameters_that_are_arrays_come_back(vibe_store: Run, tmp_path: Path) -> None:
    env, params = gymnax.make("Acrobot-v1")
    still = params.replace(available_torque=jnp.zeros(3), max_steps_in_episode=5)
    save(tmp_path, (env, still))
    assert json.loads(vibe_store("eval", tmp_path, "--episodes", "5", "--json").out)["lengths"] == [5] * 5


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--step", "10", "--best"), "give one of --step and --best."),
        (("--episodes", "0"), "--episodes is 1 or more; got 0."),
        (("--seed", "-1"), "--seed is from 0 to 4294967295; got -1."),
        (("--step", "x"), "a step is a whole number, 0 or more; 'x' is none."),
        (("--render", "out.mp4"), "--render writes a GIF, so its name ends in .gif; got out.mp4."),
    ],
)
def test_a_mistake_in_the_arguments_is_a_sentence(
    flags: tuple[str, ...], sentence: str, vibe_store: Run, tmp_path: Path
) -> None:
    ran = vibe_store("eval", tmp_path, *flags)
    assert (ran.status, ran.out, ran.err) == (2, "", f"error: {sentence}\n")


def test_of_several_seeds_one_is_named(vibe_store: Run, tmp_path: Path) -> None:
    save(tmp_path, gymnax.make("CartPole-v1"), num_seeds=2)
    ran = vibe_store("eval", tmp_path, "--episodes", "5")
    assert ran.status == 1
    assert "--run-seed of vibe-store eval" in ran.err
    assert vibe_store("eval", tmp_path, "--episodes", "5", "--run-seed", "1").status == 0


def test_an_environment_that_gymnax_does_not_have_is_a_sentence(
    vibe_store: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, params = gymnax.make("CartPole-v1")
    monkeypatch.setattr(type(env), "name", "MyPole-v0")
    save(tmp_path, (env, params))
    ran = vibe_store("eval", tmp_path)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: gymnax has no environment 'MyPole-v0', on which this checkpoint was")


class WithAZero(CartPole):
    """CartPole whose observations have a fifth number, under the same name."""

    def get_obs(self, *arguments: Any, **named: Any) -> jax.Array:
        return jnp.append(super().get_obs(*arguments, **named), 0.0)


def test_an_environment_of_the_same_name_and_another_shape_is_refused(
    vibe_store: Run, tmp_path: Path
) -> None:
    env = WithAZero()
    save(tmp_path, (env, env.default_params))
    ran = vibe_store("eval", tmp_path)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: CartPole-v1 as gymnax makes it has {'obs_shape': [4], ")
    assert "was trained on {'obs_shape': [5], " in ran.err


def test_parameters_that_this_gymnax_does_not_have_are_named(
    vibe_store: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env, params = gymnax.make("CartPole-v1")
    monkeypatch.setattr(type(env), "name", "Pendulum-v1")
    save(tmp_path, (env, params))
    ran = vibe_store("eval", tmp_path)
    assert (ran.status, ran.out) == (1, "")
    assert "on Pendulum-v1 with the parameters force_mag, " in ran.err


def frames_of(path: Path) -> int:
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as picture:
        return int(picture.n_frames)


def test_parameters_that_are_no_numbers_are_not_taken_for_the_usual_ones(
    vibe_store: Run, tmp_path: Path
) -> None:
    env, params = gymnax.make("CartPole-v1")
    save(tmp_path, (env, params.replace(x_threshold=float("inf"))))
    ran = vibe_store("eval", tmp_path)
    assert ran.status == 1
    assert "on CartPole-v1 with values of x_threshold that are no numbers" in ran.err


def test_a_return_that_is_no_number_is_text_in_json(
    vibe_store: Run, cartpole_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_env = CartPole.step_env

    def without_reward(self: Any, *arguments: Any) -> Any:
        obs, state, reward, *rest = step_env(self, *arguments)
        return (obs, state, reward * jnp.nan, *rest)

    monkeypatch.setattr(CartPole, "step_env", without_reward)
    ran = vibe_store("eval", cartpole_run, "--episodes", "2", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert json.loads(ran.out)["returns"] == ["NaN", "NaN"]
    assert json.loads(ran.out)["return"]["mean"] == "NaN"


def test_render_draws_an_episode_frame_by_frame(vibe_store: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    env, params = gymnax.make("Breakout-MinAtar")
    save(tmp_path, (env, params.replace(max_steps_in_episode=5)))
    ran = vibe_store("eval", tmp_path, "--episodes", "5", "--render", tmp_path / "out.gif", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert json.loads(ran.out)["render"] == str(tmp_path / "out.gif")
    assert 1 < frames_of(tmp_path / "out.gif") <= 5
    assert json.loads(ran.out)["lengths"] == [5] * 5


def test_render_draws_classic_control(vibe_store: Run, cartpole_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("pygame", reason='needs pip install "vibe-store[render]"')
    ran = vibe_store("eval", cartpole_run, "--episodes", "5", "--render", tmp_path / "out.gif")
    assert (ran.status, ran.err) == (0, "")
    assert f"One more episode is drawn in {tmp_path / 'out.gif'}." in ran.out
    assert 7 <= frames_of(tmp_path / "out.gif") <= 11


def test_an_environment_that_cannot_be_drawn_is_a_sentence(vibe_store: Run, tmp_path: Path) -> None:
    env, params = gymnax.make("DeepSea-bsuite")
    save(tmp_path, (env, params))
    ran = vibe_store("eval", tmp_path, "--render", tmp_path / "out.gif")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "error: gymnax cannot draw DeepSea-bsuite. Leave out --render.\n"
    assert not (tmp_path / "out.gif").exists()


def test_a_missing_package_is_answered_with_what_to_install(
    vibe_store: Run, cartpole_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = vibe_store("eval", cartpole_run, "--render", tmp_path / "out.gif")
    assert (ran.status, ran.out) == (1, "")
    assert 'pip install "vibe-store[render]"' in ran.err
