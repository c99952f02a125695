"""``vlm = mmpeft.load(run)``: ask, caption and rank, one item or many, an adapter per item."""

from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from mmpeft.adapters.bank import RESERVED_NAME
from mmpeft.data.batch import Batch, collate
from mmpeft.data.features import encode_images
from mmpeft.data.images import ImageLike, image_key
from mmpeft.data.packing import pack
from mmpeft.data.template import IMAGE_MARKER, Encoded, Template
from mmpeft.errors import RefusedError
from mmpeft.inference.decoding import generate
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import length_normalised
from mmpeft.runs.files import load_run
from mmpeft.runs.manifest import Manifest

Images = ImageLike | tuple[ImageLike, ...] | None
"""What one question is about: an image, several, or none."""
Item = TypeVar("Item")


def load(run: str, device: str = "auto") -> "VisionLanguageModel":
    """Loads a run directory.

    Args:
        run: a directory that `mmpeft fit` wrote, such as runs/quickstart.
        device: "cpu", "cuda", or "auto" for the fastest there is.

    Raises:
        RefusedError: no run, or its base, encoder or tokenizer is not what it was trained with.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, template, manifest = load_run(run, device)
    return VisionLanguageModel(model.eval(), template, manifest)


class VisionLanguageModel:
    """A frozen vision-language base and the finetunes of a run, answering in mixed batches.

    Everywhere: one item gives one result, a list gives a list. ``adapter`` is a name of `adapters`, "base" for the
    frozen model alone, or None for the run's first; a list gives every item its own.
    """

    def __init__(self, model: MultimodalModel, template: Template, manifest: Manifest, batch_size: int = 32):
        self.model, self.template, self.manifest = model, template, manifest
        self.batch_size = batch_size

    @property
    def adapters(self) -> list[str]:
        """The finetunes that can be asked."""
        return self.model.bank.names

    @overload
    def ask(
        self,
        image: Images,
        question: str,
        adapter: str | None = None,
        max_new_tokens: int = 32,
        task: str | None = None,
    ) -> str: ...
    @overload
    def ask(
        self,
        image: Any,
        question: Any,
        adapter: Any = None,
        max_new_tokens: int = 32,
        task: str | None = None,
    ) -> list[str]: ...
    def ask(
        self,
        image: Any,
        question: Any,
        adapter: Any = None,
        max_new_tokens: int = 32,
        task: str | None = None,
    ) -> Any:
        """Answers questions about images.

        Args:
            image: path, bytes or PIL image; a tuple for several images in one question; None for text alone.
            question: the question; ``<image>`` says where in it the images stand, else they come first.
            max_new_tokens: longest answer.
            task: identifier put before the question; by default the one that the run was trained with.

        Raises:
            ImageError: an image that cannot be read.
            UnknownNameError: an unknown adapter.
        """
        images, questions, adapters, single = _aligned(image, question, adapter)
        task = task or self.manifest.default_task
        records = [_record(i, q, task, n) for n, (i, q) in enumerate(zip(images, questions, strict=True))]
        answers = self._generate(records, self._names(adapters), max_new_tokens)
        return answers[0] if single else answers

    @overload
    def caption(self, images: ImageLike, adapter: str | None = None, max_new_tokens: int = 64) -> str: ...
    @overload
    def caption(self, images: list, adapter: Any = None, max_new_tokens: int = 64) -> list[str]: ...
    def caption(self, images: Any, adapter: Any = None, max_new_tokens: int = 64) -> Any:
        """Describes images, with the instruction that the run's captions were trained with."""
        instruction = self.manifest.instructions.get("caption") or "Describe this image."
        return self.ask(images, instruction, adapter, max_new_tokens, task="caption")

    def rank(self, image: Any, question: Any, choices: Sequence[Any], adapter: Any = None) -> Any:
        """Scores given answers: the mean log-probability of a choice's tokens, its end included. The prompt and its
        image are computed once for all choices.

        Args:
            choices: at least two different, non-empty answers for every item, or a list of such lists, one for each.

        Returns:
            Per item ``[(choice, score), ...]``, the best first.
        """
        images, questions, adapters, single = _aligned(image, question, adapter)
        if all(isinstance(choice, str) for choice in choices):
            choices = [choices] * len(questions)
        if len(choices) != len(questions):
            raise RefusedError(
                f"{len(choices)} lists of choices for {len(questions)} questions; give one for each"
            )
        for number, own in enumerate(choices):
            _check_choices(own, number)
        task = self.manifest.default_task
        rows = []
        for number, (i, q, own) in enumerate(zip(images, questions, choices, strict=True)):
            prompt = self.template.encode_prompt(_record(i, q, task, number))
            rows.append([self.template.encode_answer(prompt, choice) for choice in own])
        ranked: list[list[tuple[str, float]]] = []
        names = self._names(adapters)
        for part in _filled([[number] * len(row) for number, row in enumerate(rows)], self.batch_size):
            numbers = [row[0] for row in part]
            for number, scores in zip(
                numbers, self._scores([rows[n] for n in numbers], [names[n] for n in numbers]), strict=True
            ):
                pairs = zip(choices[number], scores, strict=False)
                ranked.append(sorted(pairs, key=lambda pair: -pair[1]))
        return ranked[0] if single else ranked

    def _generate(
        self, records: list[dict[str, Any]], names: list[str | None], max_new_tokens: int
    ) -> list[str]:
        """Questions about the same image with the same adapter share a row."""
        prompts = [self.template.encode_prompt(record) for record in records]
        groups: dict[Any, list[int]] = {}
        for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            key = (tuple(image_key(image) for image in prompt.images), name) if prompt.images else number
            groups.setdefault(key, []).append(number)
        rows = [part for members in groups.values() for part in _chunks(members, self.batch_size)]
        answers: list[str] = [""] * len(records)
        for part in _filled(rows, self.batch_size):
            batch = self._batch(
                [[prompts[number] for number in row] for row in part], [names[row[0]] for row in part]
            )
            generated = generate(self.model, batch, self.template.tokenizer.eos_token_id, max_new_tokens)
            for row, texts in zip(part, generated, strict=True):
                for number, ids in zip(row, texts, strict=True):
                    answers[number] = self.template.decode(ids)
        return answers

    @torch.inference_mode()
    def _scores(self, rows: Sequence[Sequence[Encoded]], names: Sequence[str | None]) -> list[list[float]]:
        losses = self.model.token_losses(self._batch(rows, names))
        return length_normalised(losses, len(rows)).tolist()

    def _batch(self, rows: Sequence[Sequence[Encoded]], names: Sequence[str | None]) -> Batch:
        packed = [pack(row) for row in rows]
        images = [image for row in packed for image in row.images]
        return collate(packed, self._features(images), names).to(self.model.device)

    def _features(self, images: list[ImageLike]) -> Tensor | None:
        return encode_images(self.model.vision_encoder, images) if images else None

    def _names(self, adapters: list[str | None]) -> list[str | None]:
        """Unknown names are refused before anything is computed."""
        first = self.adapters[0] if self.adapters else RESERVED_NAME
        chosen = [adapter or first for adapter in adapters]
        for name in chosen:
            if name != RESERVED_NAME:
                self.model.bank.entry(name)
        return [None if name == RESERVED_NAME else name for name in chosen]


def _record(images: Images, question: str, task: str | None, number: int) -> dict[str, Any]:
    listed = [] if images is None else list(images) if isinstance(images, tuple) else [images]
    markers = question.count(IMAGE_MARKER)
    if markers and markers != len(listed):
        raise RefusedError(
            f"question {number} has {markers} {IMAGE_MARKER} but {len(listed)} images were given"
        )
    text = question if markers else IMAGE_MARKER * len(listed) + question
    return {
        "id": str(number),
        "images": listed,
        "turns": [(text, None)],
        "task": task,
        "where": f"question {number}",
    }


def _check_choices(choices: Sequence[str], number: int) -> None:
    trimmed = [choice.strip() for choice in choices]
    if len(trimmed) < 2 or len(set(trimmed)) < len(trimmed) or not all(trimmed):
        raise RefusedError(
            f"question {number}: choices must be at least two different, non-empty answers; got {list(choices)!r}"
        )


def _aligned(image: Any, question: Any, adapter: Any) -> tuple[list[Any], list[Any], list[Any], bool]:
    """Lists of equal length, single values repeated; and whether nothing was a list."""
    values = {"image": image, "question": question, "adapter": adapter}
    lengths = {name: len(value) for name, value in values.items() if isinstance(value, list)}
    if len(set(lengths.values())) > 1:
        raise RefusedError(
            "lists of different length: " + ", ".join(f"{n} {name}s" for name, n in lengths.items())
        )
    length = next(iter(lengths.values()), 1)
    images, questions, adapters = (
        value if isinstance(value, list) else [value] * length for value in values.values()
    )
    return images, questions, adapters, not lengths


def _chunks(items: Sequence[Item], size: int) -> list[list[Item]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _filled(rows: list[list[int]], size: int) -> list[list[list[int]]]:
    """Rows gathered into batches of at most ``size`` conversations."""
    batches: list[list[list[int]]] = []
    filled = 0
    for row in rows:
        if not batches or filled + len(row) > size:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += len(row)
    return batches
