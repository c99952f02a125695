"""mmpeft: one frozen vision-language base, many finetunes - trained, measured and served side by side.

>>> vlm = mmpeft.load("runs/quickstart")
>>> vlm.ask("photo.png", "what color is the shape?")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpeft.adapters import AdapterBank, IA3Config, LoraConfig
    from mmpeft.inference.vlm import VisionLanguageModel, load

__version__ = "0.1.0"
__all__ = ["AdapterBank", "IA3Config", "LoraConfig", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only once something is used: `mmpeft --help` stays instant."""
    if name in ("load", "VisionLanguageModel"):
        from mmpeft.inference import vlm as module
    elif name in ("AdapterBank", "IA3Config", "LoraConfig"):
        from mmpeft import adapters as module
    else:
        raise AttributeError(f"module 'mmpeft' has no attribute {name!r}")
    return getattr(module, name)
