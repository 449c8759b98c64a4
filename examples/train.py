"""Train a preset with the library itself: what `vibe-store train` does, without its messages.

    python examples/train.py cartpole_dqn
    python examples/train.py cartpole_dqn --runner.resume true      # goes on where the last run stopped

takes every flag that `vibe-store train` takes.
"""

import sys

from vibe_store import MetricsLogger, initialize_checkpoint_dir
from vibe_store.cli.arguments import plan_training, storing_settings
from vibe_store.errors import VibeStoreError
from vibe_store.runner import Progress
from vibe_store.runner.presets import get_preset


def main() -> None:
    # The flags come on top of the preset or, with `--runner.resume true`, of the run that goes on. What comes
    # out are the two configurations (DQNConfig, say, and RunnerConfig) and the run's folder.
    preset = get_preset(sys.argv[1] if len(sys.argv) > 1 else "cartpole_dqn")
    plan = plan_training(preset, sys.argv[2:], prog=f"train.py {preset.name}")
    env, env_params = preset.make_env()

    # A directory of checkpoints is a local folder or a URL. With `resume` it is opened at its newest
    # checkpoint that verifies, with `overwrite` it is emptied, and with neither it has to be empty.
    checkpointer, resuming = initialize_checkpoint_dir(
        plan.directory,
        resume=plan.runner.resume,
        overwrite=plan.runner.overwrite,
        max_to_keep=plan.runner.max_checkpoints,
        keep_period=plan.runner.keep_period,
        best_fn=lambda metrics: metrics["eval_return"],
        best_mode="max",
        async_timeout_secs=plan.runner.async_timeout_secs,
        serializer=plan.runner.serializer,
        retention=plan.runner.retention,
    )
    step = checkpointer.latest_step() if resuming else 0
    if not resuming:
        plan.run.save_config(plan.stored)
    print(f"run {plan.run.path}, from step {step:,}")

    def show(progress: Progress) -> None:
        print(f"step {progress.step:,} of {progress.total:,}, return {progress.recent_return}")

    # The lines that the run had logged past its newest checkpoint go, since it will log them again.
    with checkpointer, MetricsLogger(plan.run.log_path(), resume_step=step) as metrics:
        # Ctrl-C and SIGTERM save what was trained, and end the script with TrainingInterrupted, a SystemExit.
        result = preset.train(
            env,
            env_params,
            plan.config,
            plan.runner,
            checkpointer=checkpointer,
            metrics=metrics,
            on_progress=storing_settings(plan, show),  # once they fit what was restored
            on_best=plan.run.mark_best,
        )
    print(f"done: step {result.step:,}, mean return of the last evaluation {result.eval_return}")
    print(f"load the policy with load_checkpoint({plan.directory!r}, like=..., step={result.step})")


if __name__ == "__main__":
    try:
        main()
    except VibeStoreError as error:
        sys.exit(f"error: {error}")
