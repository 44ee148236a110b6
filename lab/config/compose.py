"""Overrides -> the composed tree of ``configs/run.yaml`` and its groups: plainly where possible, else by Hydra."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lab.config.diagnose import check_overrides, foreign_setting, from_hydra
from lab.config.known import CONFIG_DIR, groups, options
from lab.config.plain import NotPlain, compose_plain, read_option


def compose_config(overrides: Sequence[str]) -> dict[str, Any]:
    """Hydra's composition of ``configs/run.yaml`` with overrides, as plain containers.

    The key ``choices`` holds the group choices, ``overrides`` the overrides. Raises ConfigError.
    """
    try:
        tree, choices = compose_plain(overrides)
    except NotPlain:
        tree, choices = compose_hydra(check_overrides(overrides))
    return {**tree, "choices": choices, "overrides": list(overrides)}


def compose_hydra(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(composed tree, group choices) by Hydra itself. Raises ConfigError."""
    import yaml  # type: ignore[import-untyped]
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            cfg = compose("run", overrides=list(overrides), return_hydra_config=True)
        chosen = OmegaConf.to_container(cfg.hydra.runtime.choices)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        tree: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        _raise_foreign(overrides)
        raise from_hydra(error, overrides) from None
    assert isinstance(chosen, dict)
    return tree, {str(k): v for k, v in chosen.items() if v is not None and not str(k).startswith("hydra/")}


def _raise_foreign(overrides: Sequence[str]) -> None:
    """Raise if an override is a setting that the chosen option of its group does not have."""
    known = groups()
    settings = [o for o in overrides if o.partition("=")[0] not in known]
    if not settings:
        return
    options_only = [o for o in overrides if o not in settings]
    try:
        tree, choices = compose_plain(options_only)
    except NotPlain:
        tree, choices = compose_hydra(options_only)
    for override in settings:
        key, _, value = override.partition("=")
        group = key.partition(".")[0]
        if not _has(tree, key):
            if group not in known:
                continue
            owners = [o for o in options(group) if _has({group: read_option(group, o)}, key)]
            raise foreign_setting(key, value, choices, owners)


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
