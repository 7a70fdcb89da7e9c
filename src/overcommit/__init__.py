"""An inference server that serves far more models than fit in GPU memory."""

__version__ = "0.1.0"
