"""The multimodal model on the tiny base, and batches for it."""

from collections.abc import Callable

import pytest
import torch

from mmpeft.data.batch import Batch, collate
from mmpeft.data.packing import pack
from mmpeft.data.template import Encoded, Template
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.vision import VisionConfig


@pytest.fixture(scope="session")
def make_model(tiny_base, make_bank, randomise) -> Callable[..., MultimodalModel]:
    """Builds the same model each time, in fp32, with a random adapter of each method ("lora", "ia3"); keywords go
    into its LanguageConfig."""
    from mmpeft.adapters import IA3Config, LoraConfig

    def make(**language) -> MultimodalModel:
        torch.manual_seed(0)
        config = LanguageConfig(str(tiny_base / "language"), **({"dtype": "float32"} | language))
        vision = VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32, crop=False)
        model = build_model(config, vision)
        for name, adapter in (("lora", LoraConfig(rank=4)), ("ia3", IA3Config())):
            model.bank.add(name, adapter)
            randomise(model.bank, name)
        return model.eval()

    return make


@pytest.fixture
def model(make_model) -> MultimodalModel:
    return make_model()


@pytest.fixture(scope="session")
def template(tiny_tokenizer) -> Template:
    return Template(tiny_tokenizer, image_tokens=4)


@pytest.fixture(scope="session")
def features_of() -> Callable[[str], torch.Tensor]:
    """(4, 64) random features of an image, a function of its name."""

    def make(name: str) -> torch.Tensor:
        return torch.randn(4, 64, generator=torch.Generator().manual_seed(ord(name[0])))

    return make


@pytest.fixture(scope="session")
def make_batch(features_of) -> Callable[..., Batch]:
    """Packs and pads rows, each a list of conversations, and puts in their images' features."""

    def make(rows: list[list[Encoded]], adapters: list[str | None] | None = None) -> Batch:
        packed = [pack(row) for row in rows]
        images = [features_of(image) for row in packed for image in row.images]
        return collate(packed, torch.stack(images) if images else None, adapters or [None] * len(rows))

    return make


@pytest.fixture(scope="session")
def conversations(template) -> Callable[..., list[Encoded]]:
    """One conversation per (question, answer), all about the same images."""

    def make(
        images: str, *pairs: tuple[str, str], task: str | None = "vqa", prompts: bool = False
    ) -> list[Encoded]:
        rows = [
            {
                "id": question,
                "images": list(images),
                "turns": [
                    (question if "<image>" in question else "<image>" * len(images) + question, answer)
                ],
                "task": task,
                "where": "here",
            }
            for question, answer in pairs
        ]
        return [(template.encode_prompt if prompts else template.encode)(row) for row in rows]

    return make
