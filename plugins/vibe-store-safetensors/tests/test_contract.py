"""The serializer keeps every promise of serializers."""

import pytest
from vibe_store_safetensors.serializer import SafetensorsSerializer

from vibe_store.testing import SerializerContract


class TestSafetensors(SerializerContract):
    @pytest.fixture
    def serializer(self) -> SafetensorsSerializer:
        return SafetensorsSerializer()
