"""The serializers that come with vibe_store, and the leaf table that they share."""
