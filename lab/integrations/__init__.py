"""The lab inside other people's training loops: ``from lab.integrations import MemoryCallback``."""

from lab.integrations.hf_trainer import MemoryCallback

__all__ = ["MemoryCallback"]
