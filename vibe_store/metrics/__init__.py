"""What a run measures as it trains: written line by line, and read back."""

from vibe_store.metrics.logger import MetricsLogger as MetricsLogger
from vibe_store.metrics.reading import read_metrics as read_metrics

__all__ = ["MetricsLogger", "read_metrics"]
