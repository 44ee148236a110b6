"""Training memory lab: measured GPU memory beside the memory an analytic model predicted."""

__version__ = "0.1.0"
