"""Learning algorithms as pure functions on pytrees: ``init``, ``act`` and ``update``, without any I/O."""
