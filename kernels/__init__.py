"""GPU kernels.

Nothing is here yet: without a GPU the CPU paths in `overcommit.runtime` do this work.  The kernels
(gathering requests out of the rings, digests of chunks, weight unpacking) come with the GPU tier.
"""
