"""The storages: a local disk, this process's memory, and whatever fsspec knows; each is imported by name."""
