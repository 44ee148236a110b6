"""Configuration: the typed schema, composition of Hydra's YAML groups, and every cross-group rule.

``load(overrides)`` composes and resolves; a bad configuration raises ``ConfigError`` with one line
before any process group, GPU or file is touched. Nothing here imports torch.
"""

from lab.config.compose import compose_config
from lab.config.errors import ConfigError
from lab.config.known import CONFIG_DIR
from lab.config.load import load, resolve, run_config_from_json, to_json
from lab.config.schema import (
    AdapterConfig,
    AttentionConfig,
    CheckpointingConfig,
    DataConfig,
    DDPOptions,
    EngineConfig,
    FSDPOptions,
    HardwareConfig,
    HFConfig,
    LaunchConfig,
    LossConfig,
    MeasureConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    QuantizationConfig,
    RunConfig,
    TrackerConfig,
    TrainConfig,
    ZeroOptions,
)

__all__ = [
    "CONFIG_DIR",
    "AdapterConfig",
    "AttentionConfig",
    "CheckpointingConfig",
    "ConfigError",
    "DDPOptions",
    "DataConfig",
    "EngineConfig",
    "FSDPOptions",
    "HFConfig",
    "HardwareConfig",
    "LaunchConfig",
    "LossConfig",
    "MeasureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "QuantizationConfig",
    "RunConfig",
    "TrackerConfig",
    "TrainConfig",
    "ZeroOptions",
    "compose_config",
    "load",
    "resolve",
    "run_config_from_json",
    "to_json",
]
