"""How a causal LM of transformers is read: its decoder on embeddings and masks of ours, and its own way to logits."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from mmpeft.errors import RefusedError
from mmpeft.models.decoder import EMBEDS, find_decoder
from mmpeft.models.float32_head import float32_head
from mmpeft.models.masks import Mask, Reach, additive, attention_mask, within_reach
from mmpeft.models.positions import check_positions, position_limit
from mmpeft.models.prefix_cache import PrefixCache
from mmpeft.models.prepacked import PrepackedLinears
from mmpeft.models.segment_attention import BY_SEGMENTS, attending
from mmpeft.models.segments import SIZES, SegmentMask, Segments

CACHES = ("cache", "past_key_values", "cache_params", "state")
"""What the argument that carries the state of earlier tokens is called, newest name first."""

DISTANCE = re.compile(r"window(_size)?$|attention_chunk_size|index.*(topk|budget)|^floor_scale$")
"""Names of fields that say how far a layer sees, how many tokens at most, or from which column on it sees otherwise."""
FOLLOWED = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Reading:
    """How a model must be read for its numbers to be its own; `mmpeft.inference.self_check` finds it out."""

    packed: bool = True
    """Whether conversations share a row by masks; otherwise each is read in a row of its own."""
    masks: Literal["one", "by layer type"] = "one"
    windows: bool = True
    """Whether the window of the config is the one that the layers keep; otherwise rows must fit into it."""
    cached: bool = True
    """Whether earlier tokens are kept while an answer is written; otherwise they are read again for every token."""


@dataclass
class LanguageReader:
    """A causal LM, read from embeddings.

    Raises:
        RefusedError: no module of it reads embeddings.
    """

    language_model: Any
    reading: Reading = field(default_factory=Reading)
    by_segments: bool = False
    """Whether packed rows are attended to by segments, with our attention in place of the model's own;
    `mmpeft.inference.self_check` finds out whether it may."""
    tile_sizes: tuple[int, ...] = SIZES
    last_modules: list[str] = field(default_factory=list)
    """Paths of what works token by token behind the last attention; found out there too."""
    elsewhere: float = 0.0
    """What these give for tokens that nobody reads."""

    together: bool = False
    """Whether processes hold parts of its layers, so that each takes part in every forward and backward of any."""

    def __post_init__(self):
        self.decoder: Any = find_decoder(self.language_model)
        self._inside = {id(module) for module in self.decoder.modules()}
        arguments = inspect.signature(self.decoder.forward).parameters
        self._arguments = set(arguments)
        self.cache_argument = next((name for name in CACHES if name in arguments), None)
        self.position_limit = position_limit(self.language_model)
        self.prepacked = PrepackedLinears(self.language_model)
        self._distances = {
            name: value
            for name, value in self.config.to_dict().items()
            if DISTANCE.search(name) and type(value) is int and value > 0
        }
        """Fields of the config beyond which a layer does not see."""
        self._output: Any = BaseModelOutputWithPast

    def is_in_decoder(self, module: nn.Module) -> bool:
        """Whether the decoder itself calls it; the output head is called with what it returns."""
        return id(module) in self._inside

    @property
    def takes_positions(self) -> bool:
        """Whether conversations can be told apart by position."""
        return "position_ids" in self._arguments

    @property
    def may_attend_by_segments(self) -> bool:
        """Whether it says that its attention can be replaced, as by SDPA; whether ours computes the same is tried."""
        return bool(
            getattr(self.decoder, "_supports_sdpa", False)
            and getattr(self.decoder, "_supports_attention_backend", False)
        )

    @property
    def config(self) -> Any:
        """The decoder's; a composite's is another."""
        return getattr(self.decoder, "config", self.language_model.config)

    @property
    def vocabulary_size(self) -> int:
        """Tokens that it has logits for."""
        return self.language_model.get_input_embeddings().weight.shape[0]

    @property
    def end_ids(self) -> set[int]:
        """The tokens of which each ends the model's own ``generate``."""
        ends = getattr(getattr(self.language_model, "generation_config", None), "eos_token_id", None)
        return {ends} if isinstance(ends, int) else {*(ends or ())}

    @property
    def reaches(self) -> Reach | dict[str, Reach]:
        """How far its layers see; by their types where it takes one mask for each."""
        window, chunk = (
            getattr(self.config, name, None) if self.reading.windows else None for name in FOLLOWED
        )
        kinds = getattr(self.config, "layer_types", None)
        if self.reading.masks == "one":
            return Reach() if kinds and "sliding_attention" not in kinds else Reach(window)
        known = {"sliding_attention": Reach(window=window), "chunked_attention": Reach(chunk=chunk)}
        return {kind: known.get(kind, Reach()) for kind in dict.fromkeys(kinds or ())}

    def mask(self, segments: Segments, dtype: torch.dtype) -> Mask:
        """What `decode` is given for packed rows: made once, and shared by all layers of a type."""
        reaches = self.reaches
        if not self.by_segments:
            dense = additive(attention_mask(segments.queries, segments.keys), dtype)
            return within_reach(dense, reaches, segments.query_positions, segments.key_positions)
        kinds = reaches if isinstance(reaches, dict) else {"all": reaches}
        made = {reach: SegmentMask.of(segments, reach, dtype, self.tile_sizes) for reach in {*kinds.values()}}
        masks: dict[str, Tensor] = {kind: made[reach] for kind, reach in kinds.items()}
        return masks if isinstance(reaches, dict) else masks["all"]

    def check_width(self, width: int) -> None:
        """Raises:
        RefusedError: packed rows of so many tokens are wider than what the model sees as meant.
        """
        for name, limit in self._distances.items():
            if width > limit and not (self.reading.windows and name in FOLLOWED):
                raise RefusedError(
                    f"packed rows of {width} tokens exceed {name} = {limit} of the language model, which "
                    f"{type(self.language_model).__name__} counts across conversations; lower packing.max_length"
                )

    def embed(self, ids: Tensor) -> Tensor:
        """(rows, columns) ids -> (rows, columns, dim), as the model's own embedding makes them."""
        return self.language_model.get_input_embeddings()(ids)

    def per_layer_inputs(self, ids: Tensor) -> Tensor | None:
        """What every layer reads of the ids besides the embeddings (Gemma 3n and 4); 0 is the id of what is no
        text."""
        if "per_layer_inputs" not in self._arguments or not getattr(
            self.config, "hidden_size_per_layer_input", 0
        ):
            return None
        return self.decoder.get_per_layer_inputs(ids)

    def decode(
        self,
        embeds: Tensor,
        mask: Mask | None,
        positions: Tensor,
        cache: Cache | None = None,
        ids: Tensor | None = None,
        keep: bool = False,
        last_position: int | None = None,
    ) -> tuple[Tensor, Any]:
        """The decoder's forward.

        Args:
            embeds: (rows, queries, dim)
            mask: (rows, 1, queries, keys), added to the scores or a `SegmentMask`, or one by layer type; None is
                causal.
            positions: (rows, queries)
            cache: gets the queries' keys and values, and returns all that ``mask`` speaks of.
            ids: (rows, queries), for models that read more of them than their embeddings.
            keep: whether the model makes a cache of its own where none is given.
            last_position: the highest, where the caller knows it without asking the device.

        Returns:
            (rows, queries, dim) hidden states, and the cache or None.

        Raises:
            RefusedError: a position beyond those that the model reads alike.
        """
        check_positions(self.position_limit, positions, last_position)
        if self.together and torch.is_grad_enabled() and not embeds.requires_grad:
            embeds = embeds.detach().requires_grad_()  # or the backward would not reach the first layers
        using = keep or cache is not None
        given = {
            EMBEDS: embeds,
            "attention_mask": mask,
            "position_ids": positions,
            "use_cache": using and not isinstance(cache, PrefixCache),
            "per_layer_inputs": None if ids is None else self.per_layer_inputs(ids),
        }
        if using and self.cache_argument:
            given[self.cache_argument] = cache
        some = next(iter(mask.values()), None) if isinstance(mask, dict) else mask
        with attending(self.config, BY_SEGMENTS) if isinstance(some, SegmentMask) else nullcontext():
            output = self.decoder(**{name: value for name, value in given.items() if name in self._arguments})
        self._output = type(output)
        return output[0], getattr(output, self.cache_argument or "", None)

    def logits(self, hidden: Tensor, in_float32: bool = False) -> Tensor:
        """(rows, tokens, dim) or (tokens, dim) hidden states of the decoder -> the same with the vocabulary last, by
        all that the model does after it: scales, head and caps.

        Args:
            in_float32: whether a head of 16 bits gives float32, so that its logits are not rounded; one that adapters
                change gives what it does.
        """
        flat = hidden if hidden.dim() == 3 else hidden[None]
        ids = torch.zeros(flat.shape[:2], dtype=torch.int64, device=flat.device)  # read by nobody
        with self._returning(flat), float32_head(self.language_model, in_float32):
            logits = self.language_model(input_ids=ids, use_cache=False).logits
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    @contextmanager
    def _returning(self, hidden: Tensor) -> Iterator[None]:
        """Inside, the decoder has these hidden states without reading anything."""
        replaced = self.decoder.__dict__.get("forward")
        self.decoder.forward = lambda *_, **__: self._output(last_hidden_state=hidden)
        try:
            yield
        finally:
            del self.decoder.forward
            if replaced is not None:
                self.decoder.forward = replaced
