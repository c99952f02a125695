"""The usual recipe: peft's LoRA in transformers' `Trainer`, a row per question, behind a linear projector."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer_pt_utils import LengthGroupedSampler

from mmpeft.data.encoding import encode_images
from mmpeft.data.images import load_image
from mmpeft.data.spans import IMAGE_TOKEN
from mmpeft.data.template import IGNORE_INDEX, Encoded


class Peer(nn.Module):
    """The usual model: peft's, behind a linear projector, over a frozen encoder where that runs in the step."""

    def __init__(self, language: Any, encoder: Any, online: bool):
        super().__init__()
        self.language = language
        self.encoder = encoder if online else None
        dim = language.get_input_embeddings().weight.shape[1]
        self.projector = None if encoder is None else nn.Linear(encoder.dim, dim)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, images: Tensor | None = None
    ) -> Any:
        embeds = self.language.get_input_embeddings()(input_ids.clamp(min=0))
        if self.projector is not None and images is not None:
            if self.encoder is not None:
                with torch.no_grad():
                    images = self.encoder(images)
            projected = self.projector(images.to(self.projector.weight.dtype)).to(embeds.dtype)  # pyright: ignore
            embeds = embeds.masked_scatter((input_ids == IMAGE_TOKEN).unsqueeze(-1), projected)
        return self.language(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels)


class Rows(torch.utils.data.Dataset):
    """A row per question, tokenised; of its image the pixels, decoded now, or its features, encoded once."""

    def __init__(self, examples: Sequence[Encoded], encoder: Any, online: bool):
        self.examples, self.encoder, self.online = examples, encoder, online
        self.features: dict[Any, Tensor] = {}
        images = list(dict.fromkeys(image for example in examples for image in example.images))
        if images and not online:
            self.features = dict(zip(images, encode_images(encoder, images), strict=True))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        example = self.examples[number]
        last = example.targets[-1:]  # what ends the answer: ours predicts it and does not read it
        read = last if last != [IGNORE_INDEX] else [0]
        return {
            "input_ids": [*example.ids, *read],
            "labels": [IGNORE_INDEX, *example.targets],  # Hugging Face shifts them itself
            "images": [self._image(own) for own in example.images],
        }

    def _image(self, image: Any) -> Tensor:
        if not self.online:
            return self.features[image]
        return self.encoder.transform(load_image(image, self.encoder.image_config))


class ByLength(transformers.Trainer):
    """`Trainer` that groups by lengths which it is told: by itself it would decode every image to count its tokens."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset
        lengths = [len(example.ids) for example in rows.examples]
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)


def collate_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Pads to the longest row."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(lists: Iterable[list[int]], value: int) -> Tensor:
        return torch.tensor([own + [value] * (width - len(own)) for own in lists])

    batch = {
        "input_ids": padded((row["input_ids"] for row in rows), 0),
        "labels": padded((row["labels"] for row in rows), IGNORE_INDEX),
        "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
    }
    images = [image for row in rows for image in row["images"]]
    return batch | ({"images": torch.stack(images)} if images else {})


class TrainerClock(transformers.TrainerCallback):
    """From the first batch's reading to the last step's end, and the last loss."""

    seconds = loss = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seconds = -time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.loss = logs.get("loss", self.loss)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds += time.perf_counter()
