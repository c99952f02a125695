"""Where the features of a run's images lie: what its fit wrote, asking and captioning read."""

from pathlib import Path

import yaml

from mmpeft.data.feature_cache.settings import CacheConfig, cache_config
from mmpeft.runs.layout import CONFIG


def cache_folder(run: str | Path) -> Path:
    """As the run's ``config.yaml`` says; the folder under the mmpeft home where it says nothing, or there is none."""
    path = Path(run) / CONFIG
    config = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    setting = (config.get("data") or {}).get("cache")
    return (CacheConfig(**setting) if isinstance(setting, dict) else cache_config(setting)).path
