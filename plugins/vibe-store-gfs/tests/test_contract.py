"""The policy keeps every promise of retention policies."""

import pytest
from vibe_store_gfs.policy import GrandfatherFatherSon

from vibe_store.testing import RetentionContract


class TestGfs(RetentionContract):
    @pytest.fixture
    def policy(self) -> GrandfatherFatherSon:
        return GrandfatherFatherSon(hourly=2, daily=2, weekly=1, monthly=1)
