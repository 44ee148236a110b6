"""Does this device take the attention backend that was asked for? Asked before training, on tiny tensors."""

from __future__ import annotations

import re
import warnings

import torch

from lab.config import ConfigError, RunConfig
from lab.model.attention import attention
from lab.transforms.precision import compute_dtype
from lab.vocab import AttentionBackend

_NEVER_REFUSED = (AttentionBackend.AUTO, AttentionBackend.EAGER, AttentionBackend.MATH)


def check_attention(cfg: RunConfig, device: torch.device) -> None:
    """Run the kernel forward and backward with the run's dtype, head_dim, heads and dropout.

    Raises ConfigError, in one line with PyTorch's own reason, where the hardware, dtype or shape is
    refused: a named backend is never replaced silently. Frees what it took.
    """
    backend, model = cfg.attention.backend, cfg.model
    if backend in _NEVER_REFUSED:
        return
    length, dtype = min(cfg.train.seq_len, 128), compute_dtype(cfg)

    def heads(count: int) -> torch.Tensor:
        return torch.zeros(1, count, length, model.head_dim, device=device, dtype=dtype, requires_grad=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            q, k, v = heads(model.num_heads), heads(model.num_kv_heads), heads(model.num_kv_heads)
            attention(q, k, v, backend, model.dropout).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except RuntimeError as error:
            reasons = [str(w.message) for w in caught if "not used because" not in str(w.message)]
            reason = " ".join(re.sub(r"\(Triggered internally at \S+\)", "", " ".join([*reasons, str(error)])).split())
            raise ConfigError(
                "attention",
                backend.value,
                f"refused here for {dtype}, model.head_dim={model.head_dim}: {reason[:300]}; attention=auto lets "
                "PyTorch choose",
            ) from None
        finally:
            q = k = v = None  # type: ignore[assignment]
            if device.type == "cuda":
                torch.cuda.empty_cache()
