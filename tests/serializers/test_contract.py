"""Every serializer of ours keeps the contract."""

import pytest

from vibe_store.interfaces import Serializer
from vibe_store.registry import get_serializer
from vibe_store.testing import SerializerContract


class TestEqx(SerializerContract):
    @pytest.fixture
    def serializer(self) -> Serializer:
        return get_serializer("eqx")


class TestOrbax(SerializerContract):
    examples = 10

    @pytest.fixture
    def serializer(self) -> Serializer:
        pytest.importorskip("orbax.checkpoint", reason='needs pip install "vibe-store[orbax]"')
        return get_serializer("orbax")
