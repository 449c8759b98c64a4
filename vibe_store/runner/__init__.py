"""Training runs that checkpoint, stop on a signal, and resume bit for bit."""

from vibe_store.runner.config import RunnerConfig
from vibe_store.runner.dqn import train_dqn
from vibe_store.runner.environment import Environment
from vibe_store.runner.loop import Progress, TrainResult
from vibe_store.runner.policy import Policy, load_policy
from vibe_store.runner.ppo import train_ppo
from vibe_store.runner.resume_check import ResumeReport, verify_resume
from vibe_store.runner.sac import train_sac
from vibe_store.runner.seeds import select_seed
from vibe_store.runner.signals import TrainingInterrupted

__all__ = [
    "Environment",
    "Policy",
    "Progress",
    "ResumeReport",
    "RunnerConfig",
    "TrainResult",
    "TrainingInterrupted",
    "load_policy",
    "select_seed",
    "train_dqn",
    "train_ppo",
    "train_sac",
    "verify_resume",
]
