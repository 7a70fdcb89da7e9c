"""The core: rings, arenas, residency, batching, engines and the processes that use them."""
