"""mmpeft: one frozen vision-language base, many finetunes - trained, measured and served side by side.

>>> vlm = mmpeft.load("runs/quickstart")
>>> vlm.ask("photo.png", "what color is the shape?")
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmpeft.adapters import AdapterBank, IA3Config, LoraConfig
    from mmpeft.data.video import Video
    from mmpeft.inference.vlm import VisionLanguageModel, load

# GNU OpenMP reads it when torch is loaded. Its threads wait for each other by spinning, by default for milliseconds: as
# soon as another process is busy, a spinning thread keeps the core from the one that it waits for, a thousand times in
# every decoding step: beside one busy process a step of 0.1 s took more than 1 s so, and takes half a second.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

__version__ = "0.1.0"
__all__ = ["AdapterBank", "IA3Config", "LoraConfig", "Video", "VisionLanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only once something is used: `mmpeft --help` stays instant."""
    if name in ("load", "VisionLanguageModel"):
        from mmpeft.inference import vlm as module
    elif name == "Video":
        from mmpeft.data import video as module
    elif name in ("AdapterBank", "IA3Config", "LoraConfig"):
        from mmpeft import adapters as module
    else:
        raise AttributeError(f"module 'mmpeft' has no attribute {name!r}")
    return getattr(module, name)
