"""Fixtures and settings for every test."""

import os

# Before JAX is imported: the tests run anywhere, and two workers must not fight over all cores.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
