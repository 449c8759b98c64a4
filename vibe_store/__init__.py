"""One checkpoint interface for JAX over any storage, any serializer and any retention policy."""
