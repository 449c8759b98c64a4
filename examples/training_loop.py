"""A training loop written by hand: checkpoints, evaluation, the best model, metrics, and resuming.

    python examples/training_loop.py        # run it again with RUN_ID=<the name it prints> to go on

fits a line by gradient descent; in place of `train_step` goes whatever you train.
"""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vibe_store import MetricsLogger, RunDir, initialize_checkpoint_dir, load_checkpoint
from vibe_store.metrics import read_metrics

TOTAL_STEPS, SAVE_EVERY, EVALUATE_EVERY = 1_000, 200, 200
OPTIMIZER = optax.adam(1e-2)


class TrainState(NamedTuple):
    """All that the loop carries. What is not in here is not in a checkpoint, so put the random key in."""

    params: dict[str, jax.Array]
    opt_state: optax.OptState
    key: jax.Array


def new_state(seed: int) -> TrainState:
    params = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}
    return TrainState(params, OPTIMIZER.init(params), jax.random.key(seed))


def loss_of(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)


@jax.jit
def train_step(state: TrainState) -> tuple[TrainState, jax.Array]:
    key, batch_key = jax.random.split(state.key)
    x = jax.random.normal(batch_key, (32,))
    loss, slopes = jax.value_and_grad(loss_of)(state.params, x, 3 * x - 1)
    changes, opt_state = OPTIMIZER.update(slopes, state.opt_state)
    return TrainState(optax.apply_updates(state.params, changes), opt_state, key), loss


def main() -> None:
    run_id = os.environ.get("RUN_ID")
    run = RunDir(run_id=run_id) if run_id else RunDir("line_fit")
    run.save_config({"total_steps": TOTAL_STEPS})
    manager, resuming = initialize_checkpoint_dir(
        run.checkpoints, max_to_keep=3, save_interval_steps=SAVE_EVERY, resume=True
    )
    state, start = new_state(seed=0), 0
    if resuming:
        start = manager.latest_step()
        state = manager.restore(start, state)
    print(f"run {run.run_id}, from step {start}")

    x = jnp.linspace(-2, 2, 100)
    # Lines past the step that was restored go: they will be written again.
    with manager, MetricsLogger(run.log_path(), resume_step=start) as metrics:
        best = min((line["error"] for line in read_metrics(run.log_path())), default=float("inf"))
        for step in range(start + 1, TOTAL_STEPS + 1):
            state, loss = train_step(state)
            # Saves at multiples of SAVE_EVERY only, in the background, from a copy of the state.
            manager.save(step, state, metrics={"loss": float(loss)})
            if step % EVALUATE_EVERY == 0:
                error = float(loss_of(state.params, x, 3 * x - 1))
                metrics.write({"step": step, "loss": float(loss), "error": error})
                if error < best:
                    best = error
                    run.mark_best(step=step)

    found = load_checkpoint(run.best_checkpoint, like=state)
    print(f"best error {best:.2g}, slope {float(found.params['slope']):.2f}")


if __name__ == "__main__":
    main()
