"""``lab merge``: a saved adapter added to its base model, on the CPU, to one safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.analytic.adapters import merge_bytes
from lab.analytic.inventory import inventory
from lab.analytic.tape import BF16, FP32
from lab.cli.arguments import Parser
from lab.config import ConfigError, load
from lab.units import readable
from lab.vocab import Precision

HELP = """The base model of the configuration with the adapter of adapter.load merged into its weights, on the CPU.

  lab merge adapter=lora adapter.load=outputs/run/RUN_ID/adapter model=tiny -o merged.safetensors

Says what merging takes for a moment beside the model. Merge into the base in its own type (quantization=none), also
where the adapter was trained beside a quantized one: merged 4-bit weights would be rounded a second time.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("merge", HELP)
    parser.add_overrides()
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help="safetensors file to write")
    arguments = parser.parse(argv)
    cfg = load([*arguments.overrides, "parallel=single", "hardware=cpu"])
    if cfg.adapter.load is None:
        raise ConfigError("adapter.load", None, "the folder of the adapter to merge")
    if cfg.quantization.kind != "none":
        raise ConfigError(
            "quantization", cfg.quantization.kind, "merge into the base in its own type: quantization=none"
        )

    import torch
    from safetensors.torch import save_file

    from lab.build import build
    from lab.parallel.saving import trained_module
    from lab.transforms.adapters import merge_adapter

    engine = build(cfg, torch.device("cpu"))
    model = merge_adapter(trained_module(engine))
    named = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(named, Path(arguments.output), metadata={"format": "pt"})
    held = sum(t.nbytes for t in named.values())
    itemsize = BF16 if cfg.precision.kind is Precision.BF16_PURE else FP32
    extra = merge_bytes(inventory(cfg), cfg.adapter, itemsize)
    print(
        f"{arguments.output}: {len(named)} tensors, {readable(held)}; merging took {readable(extra)} more for a moment"
    )
    return 0
