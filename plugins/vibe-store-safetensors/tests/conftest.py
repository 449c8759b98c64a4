"""Settings for every test."""

import os

# Before JAX is imported: the tests run anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
