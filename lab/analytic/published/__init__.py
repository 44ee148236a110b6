"""Published memory formulas, re-derived from their sources, to hold against what runs measured."""

from __future__ import annotations

from lab.analytic.published.deepspeed import DEEPSPEED
from lab.analytic.published.eleutherai import ELEUTHERAI
from lab.analytic.published.formula import Formula
from lab.analytic.published.huggingface import HF_ANATOMY, HF_BLOG
from lab.analytic.published.korthikanti import KORTHIKANTI
from lab.analytic.published.zero import RULE16, ZERO_TABLE1

FORMULAS: dict[str, Formula] = {
    f.name: f for f in (RULE16, ZERO_TABLE1, KORTHIKANTI, DEEPSPEED, ELEUTHERAI, HF_ANATOMY, HF_BLOG)
}

__all__ = ["FORMULAS", "Formula"]
