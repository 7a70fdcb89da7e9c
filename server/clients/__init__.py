"""Python clients of a running server: `Client` blocks, `AsyncClient` awaits.

    tensors.py     arrays <-> datatype, shape, bytes
    exchange.py    what is sent and what comes back, without a socket
    sync.py, aio.py    the sockets

`import overcommit` gives both under the package's own name.  They need NumPy; neither imports torch.
"""
