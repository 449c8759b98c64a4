"""What a run measures as it trains: written line by line, and read back."""

from vibe_store.metrics.logger import MetricsLogger as MetricsLogger
from vibe_store.metrics.reading import read_metrics as read_metrics
from vibe_store.metrics.tensorboard import TensorBoardLogger as TensorBoardLogger

__all__ = ["MetricsLogger", "TensorBoardLogger", "read_metrics"]
