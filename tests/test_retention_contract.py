"""Every retention policy of ours keeps the contract."""

import pytest

from vibe_store.interfaces import RetentionPolicy
from vibe_store.retention import best_n, every_seconds, every_steps, keep_any, latest
from vibe_store.testing import RetentionContract


class TestLatest(RetentionContract):
    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        return latest(3)


class TestEverySteps(RetentionContract):
    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        return every_steps(4)


class TestEverySeconds(RetentionContract):
    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        return every_seconds(60)


class TestBestN(RetentionContract):
    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        return best_n(2, "loss", mode="min")


class TestKeepAny(RetentionContract):
    @pytest.fixture
    def policy(self) -> RetentionPolicy:
        return keep_any(latest(1), every_steps(7), best_n(1, "return", mode="max"))
