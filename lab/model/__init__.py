"""The lab's own transformer."""

from lab.model.decoder import Decoder

__all__ = ["Decoder"]
