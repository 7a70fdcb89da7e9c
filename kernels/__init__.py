"""What is done to bytes on their way: gathered, scattered, checked, unpacked, normalised.

One file per operation: its versions, a reference in NumPy (float64 where there are numbers), the CPU
path, the CUDA source, then `check` and `timing`, which `python -m overcommit.kernels.NAME` runs: of the
CUDA path where there is a GPU and cupy, of the CPU path everywhere.

| operation | what |
|---|---|
| `gather` | ragged requests out of their ingress blocks into one padded batch, mask and lengths |
| `scatter` | the rows of a batch's result into the egress blocks, cut to their lengths |
| `digest` | 64 bits that tell whether a stretch of memory holds what it should; pieces add up |
| `unpack` | weights packed without loss: exponents entropy-coded; decoded while they are copied |
| `image` | pictures, uint8 rows of pixels, to normalised planes |

Invariants
 1. Nothing here imports anything of ours, and nothing imports cupy before a GPU path is asked for.
 2. The CPU path and the CUDA path of an operation give the same bits.
 3. The CUDA sources are C with nothing but what `cuda.PRELUDE` declares, without headers: they need
    no CUDA toolkit where they run, and the tests also run them on the CPU, thread by thread.
"""
