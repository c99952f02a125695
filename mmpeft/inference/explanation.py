"""An explanation: heat maps over the patches, probabilities of the answer's tokens, and how far each layer moved."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from mmpeft.errors import RefusedError, UnknownNameError
from mmpeft.files import write_json
from mmpeft.models.patch_places import PatchPlaces

GRADIENT, ROLLOUT = "gradient x input", "attention rollout"
METHODS = (GRADIENT, ROLLOUT)
"""How patches are weighed."""
SIDE = 640
"""Pixels of an overlay's longer side."""


@dataclass(frozen=True)
class Deletion:
    """What the answer's log-probability loses, in nats, where the model does not read some patches."""

    removed: int
    """Patches that are not read, of all images together."""
    of: int
    """Patches there are."""
    named: float
    """Without those that the map names first."""
    random: list[float]
    """Without as many at random, draw by draw."""

    @property
    def mean_random(self) -> float:
        return fmean(self.random)

    @property
    def better_than(self) -> float:
        """The share of the draws that hurt less than the named patches do."""
        return fmean(own < self.named for own in self.random)

    def __str__(self) -> str:
        return (
            f"without the {self.removed} of {self.of} patches that it names first the answer loses {self.named:.2g} "
            f"nats, without random ones {self.mean_random:.2g}; {self.better_than:.0%} of {len(self.random)} draws "
            "hurt less"
        )


@dataclass(frozen=True)
class HeatMap:
    """What one method says of the patches."""

    values: list[np.ndarray]
    """Of every image (tokens,) float32. Of gradient x input below 0 where a patch speaks against the answer."""
    outside: float
    """The share of all values that lies on padding, and so not in the pictures; 0 to 1."""
    deletion: Deletion | None
    """None where it was not asked for, or where there is one patch alone."""


@dataclass(frozen=True)
class HeatMaps:
    """What methods say of the patches of a question's images, and where those lie."""

    heat_maps: dict[str, HeatMap]
    """By method."""
    refused: dict[str, str]
    """Method -> why this model has none; of an `Explanation` also "layers"."""
    pictures: list[Image.Image]
    """The images as they were read, before the encoder's transform."""
    places: list[PatchPlaces]
    """Where the patches of each lie."""

    def overlay(self, method: str = GRADIENT, number: int = 0, side: int = SIDE) -> Image.Image:
        """An image with the heat on it, RGB; what the encoder does not see of it is pale.

        Vermilion speaks for the answer, blue against it, in proportion to the strongest; a map without negative values
        goes from its lowest to its highest: of all images of the question, of which each counts as one area.

        Args:
            method: one of `METHODS`.
            number: of the image in the question.
            side: pixels of its longer side.

        Raises:
            UnknownNameError: no such method.
            RefusedError: this model has no such map, it was not asked for, or there is no such image.
        """
        from mmpeft.reporting.overlay import lay_over  # half a second of libraries, for whoever looks

        if method not in METHODS:
            raise UnknownNameError(f"no method {method!r}; there are: {', '.join(METHODS)}")
        if method in self.refused:
            raise RefusedError(self.refused[method])
        if method not in self.heat_maps:
            raise RefusedError(f"no heat map by {method} was asked for")
        if not 0 <= number < len(self.pictures):
            raise RefusedError(f"image {number} of a question with {len(self.pictures)}; they count from 0")
        return lay_over(self.pictures[number], self._heat(method, number, side), self._spans[method])

    def _heat(self, method: str, number: int, side: int) -> np.ndarray:
        """(height, width) of an image, by the share of its area; NaN where the encoder sees nothing of it."""
        picture = self.pictures[number]
        scale = side / max(picture.size)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        heat = self.places[number].heat(self.heat_maps[method].values[number], size)
        return heat * picture.width * picture.height

    @cached_property
    def _spans(self) -> dict[str, tuple[float, float]]:
        """Of each map the lowest and the highest heat on any image."""
        found: dict[str, tuple[float, float]] = {}
        for method in self.heat_maps:
            heats = (self._heat(method, number, SIDE) for number in range(len(self.pictures)))
            each = [own[~np.isnan(own)] for own in heats]
            found[method] = (
                min((float(own.min()) for own in each if own.size), default=0.0),
                max((float(own.max()) for own in each if own.size), default=0.0),
            )
        return found


@dataclass(frozen=True)
class TokenProbability:
    """Of one token of the answer, behind those before it."""

    text: str
    base: float
    finetune: float
    """Both 0 to 1."""


@dataclass(frozen=True)
class Explanation(HeatMaps):
    """Why a finetune gives an answer, as far as can be seen from outside."""

    question: str
    adapter: str
    """The finetune, or "base"."""
    answer: str
    tokens: list[TokenProbability]
    """Of the answer, its end included."""
    layers: list[float]
    """Of every decoder layer how far its output is from the base's where the answer is predicted: norm of the
    difference over norm of the base's. Empty where the layers are not recognised."""

    def as_json(self) -> dict[str, Any]:
        """Plain data, with the box of every patch in pixels of its image."""
        return {
            "question": self.question,
            "adapter": self.adapter,
            "answer": self.answer,
            "tokens": [asdict(token) for token in self.tokens],
            "layers": self.layers,
            "heat_maps": {name: _plain(own) for name, own in self.heat_maps.items()},
            "refused": self.refused,
            "patches": [
                {"size": own.size, "boxes": own.boxes.round(2).tolist(), "tokens": own.tokens.tolist()}
                for own in self.places
            ],
        }

    def save(self, path: str | Path) -> None:
        """Writes everything as one PNG, 1600 pixels wide, and beside it as JSON, and the folder for them."""
        from mmpeft.reporting.explanation_page import ShownMaps, draw_explanation

        Path(path).parent.mkdir(parents=True, exist_ok=True)
        told = [self.told(method) for method in self.heat_maps]
        shown = [
            ShownMaps(picture, [self.overlay(method, number) for method in self.heat_maps], told)
            for number, picture in enumerate(self.pictures)
        ]
        draw_explanation(
            path,
            f"{self.adapter}: {self.answer.strip() or '(empty)'}",
            self.question,
            shown,
            [(token.text, token.base, token.finetune) for token in self.tokens],
            self.layers,
            self.adapter,
            list(self.refused.values()),
        )
        write_json(Path(path).with_suffix(".json"), self.as_json())

    def told(self, method: str) -> str:
        """What the check by deletion says of a map, in words."""
        own = self.heat_maps[method]
        remarks = [f"{method}" + ("" if own.deletion is None else f": {own.deletion}")]
        if own.outside >= 0.005:
            remarks.append(f"{own.outside:.0%} of it lies on padding")
        return "; ".join(remarks)


def _plain(heat_map: HeatMap) -> dict[str, Any]:
    deletion = heat_map.deletion
    told = None if deletion is None else asdict(deletion)
    if deletion is not None and told is not None:
        told |= {"mean_random": deletion.mean_random, "better_than": deletion.better_than}
    return {
        "values": [own.tolist() for own in heat_map.values],
        "outside": heat_map.outside,
        "deletion": told,
    }
