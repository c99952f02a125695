"""Vision features, projector, language model and adapters as one model: forward on packed rows."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache

from mmpeft.adapters import AdapterBank
from mmpeft.data.batch import PADDING, Batch
from mmpeft.data.packing import PREFIX
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_tensors
from mmpeft.models.positions import check_positions, table_length
from mmpeft.models.projector import Projector
from mmpeft.models.token_losses import TokenLosses
from mmpeft.models.virtual import virtual_tokens
from mmpeft.models.vision import NoVision, VisionEncoder


class MultimodalModel(nn.Module):
    """A frozen language model that reads projected image features in place of image tokens.

    Rows are never reordered, so that row b stays the row of adapter b.
    """

    def __init__(
        self, vision_encoder: VisionEncoder | NoVision, projector: Projector, language_model: nn.Module
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.language_model: Any = language_model
        self.bank = AdapterBank(language_model, (vision_encoder.num_tokens, vision_encoder.dim))
        self.projector_slots: dict[str, int] = {}
        """Adapters that own a projector; any other row uses slot 0."""
        arguments = inspect.signature(language_model.get_decoder().forward).parameters  # pyright: ignore
        self.num_positions = table_length(language_model)
        """Of models that keep a table of positions; None where any position can be computed."""
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"

    @property
    def device(self) -> torch.device:
        return self.projector.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.get_input_embeddings().weight.dtype

    def trained_hash(self) -> str:
        """Identity of what can be trained: projectors, and every tensor that an adapter's answers depend on."""
        trained = dict(self.projector.named_parameters(prefix="projector"))
        trained |= {str(number): tensor for number, tensor in enumerate(self.bank.state())}
        return hash_tensors(trained)

    def token_losses(
        self, batch: Batch, cache: DynamicCache | None = None, new: int | None = None
    ) -> TokenLosses:
        """The losses of the labelled positions. Logits are computed there and nowhere else.

        Args:
            batch: the rows.
            cache: keys and values of the columns before the last ``new``; gets those of these.
            new: how many of the last columns are looked at; None for all.
        """
        hidden = self.hidden_states(batch, cache, new)
        targets, segments = (tensor[:, -hidden.shape[1] :] for tensor in (batch.targets, batch.segments))
        labelled = targets != IGNORE_INDEX
        labels = targets[labelled]
        logits = self.logits(hidden[labelled])
        nll = F.cross_entropy(logits.float(), labels, reduction="none")
        return TokenLosses(nll, logits.argmax(-1) == labels, labelled.nonzero()[:, 0], segments[labelled])

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., dim) hidden states -> (..., vocabulary)."""
        logits = self.language_model.get_output_embeddings()(hidden)
        config = self.language_model.config
        logits = logits * getattr(config, "logit_scale", 1.0)  # Cohere
        logits = logits / getattr(config, "logits_scaling", 1.0)  # Granite
        softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
        return softcap * torch.tanh(logits / softcap) if softcap else logits

    def hidden_states(
        self, batch: Batch, cache: DynamicCache | None = None, new: int | None = None
    ) -> Tensor:
        """What the decoder makes of the last ``new`` columns, or of all, (rows, columns, dim); `logits` are computed
        from it. ``cache`` holds the columns before them and gets theirs."""
        inputs = self.inputs(batch, new)
        if batch.dropout_seeds:
            self.bank.routing.seed_dropout(batch.dropout_seeds, inputs.queries != PADDING)
        return self.read(inputs, cache)

    def inputs(self, batch: Batch, new: int | None = None) -> "Inputs":
        """What the decoder reads of the last ``new`` columns, or of all with the virtual tokens before them; routes
        the bank."""
        columns = slice(None) if new is None else slice(batch.input_ids.shape[1] - new, None)
        self.bank.route(batch.adapters)
        embeds, positions = self._embed(batch, columns), batch.positions[:, columns]
        queries, keys = batch.segments[:, columns], batch.segments
        virtual = virtual_tokens(self.bank, len(keys), keys.device)
        if virtual is None:
            return Inputs(embeds, positions, queries, keys)
        positions = positions + virtual.lengths[:, None]
        keys = torch.cat([virtual.segments, keys], 1)
        if new is not None:
            return Inputs(embeds, positions, queries, keys)
        if num_prompts := virtual.num_prompts:
            embeds = torch.cat([virtual.embeds.to(embeds.dtype), embeds], 1)
            positions = torch.cat([virtual.positions, positions], 1)
            queries = torch.cat([virtual.segments[:, -num_prompts:], queries], 1)
        return Inputs(embeds, positions, queries, keys, num_prompts, virtual.keys_values)

    def read(self, inputs: "Inputs", cache: DynamicCache | None = None) -> Tensor:
        """(rows, columns, dim) hidden states of the batch's own columns."""
        if inputs.prefix is not None:
            cache = self._with_prefix(cache, inputs.prefix)
        self.check_window(inputs.keys.shape[1])
        mask = additive(attention_mask(inputs.queries, inputs.keys), self.dtype)
        return self.decode(inputs.embeds, mask, inputs.positions, cache)[:, inputs.num_prompts :]

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None) -> Tensor:
        """The decoder's forward.

        Args:
            embeds: (rows, queries, dim)
            mask: (rows, 1, queries, keys), added to the scores.
            positions: (rows, queries)
            cache: gets the queries' keys and values, and returns all that ``mask`` speaks of.

        Returns:
            (rows, queries, dim) hidden states.

        Raises:
            RefusedError: a position that the model has not.
        """
        check_positions(self.num_positions, positions)
        return self.language_model.get_decoder()(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{self._cache_argument: cache},
        ).last_hidden_state

    def _with_prefix(self, cache: DynamicCache | None, prefix: Tensor) -> DynamicCache:
        """The cache with every row's trained keys and values in it; a new one where there was none."""
        if self.language_model.training and self.language_model.is_activation_checkpointing:
            raise RefusedError(
                "prefix tuning keeps its keys and values in the cache, which transformers drops under gradient "
                "checkpointing; set model.language.gradient_checkpointing to false"
            )
        cache = DynamicCache(config=self.language_model.config) if cache is None else cache
        for layer, (keys, values) in enumerate(prefix.to(self.dtype)):
            cache.update(keys, values, layer)
        return cache

    def check_window(self, width: int) -> None:
        """Raises:
        RefusedError: a row of so many tokens does not fit into the language model's sliding window.
        """
        window = getattr(self.language_model.config, "sliding_window", None)
        if window and width > window:
            raise RefusedError(
                f"rows of {width} tokens exceed the language model's sliding window of {window}, "
                "which packed rows do not support; lower packing.max_length"
            )

    def _embed(self, batch: Batch, columns: slice) -> Tensor:
        ids = batch.input_ids[:, columns]
        embeds = self.language_model.get_input_embeddings()(ids.clamp(min=0))
        slots = ids == IMAGE_TOKEN
        if batch.features is None or not bool(slots.any()):
            return embeds
        features = batch.features
        for method, stack in self.bank.inputs.items():
            features = stack.change_images(features, self.bank.routing.slots[method][batch.image_rows])
        owners = [self.projector_slots.get(batch.adapters[row] or "", 0) for row in batch.image_rows.tolist()]
        projected = self.projector(features, torch.tensor(owners, device=ids.device), embeds.dtype)
        if int(slots.sum()) != projected.shape[0] * projected.shape[1]:
            raise RefusedError(
                f"the rows have {int(slots.sum())} image tokens, but {projected.shape[0]} images of "
                f"{projected.shape[1]} tokens were given: template and vision encoder disagree"
            )
        return embeds.masked_scatter(slots.unsqueeze(-1), projected)


@dataclass
class Inputs:
    """What the decoder reads of a batch."""

    embeds: Tensor
    """(rows, columns, dim)"""
    positions: Tensor
    """(rows, columns) int64"""
    queries: Tensor
    """(rows, columns) int64: their segments"""
    keys: Tensor
    """(rows, keys) int64: the segments of everything in the cache and of these columns, which are the last"""
    num_prompts: int = 0
    """How many of the first columns are virtual tokens."""
    prefix: Tensor | None = None
    """(layers, 2, rows, heads, prefix columns, head dim): keys and values before all columns."""


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where ``allowed`` (bool), else the lowest number of ``dtype``."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, lowest)


def sees(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Which earlier key each query sees: (rows, queries) and (rows, keys) -> (rows, queries, keys) bool."""
    q, k = query_segments[:, :, None], key_segments[:, None, :]
    return (k == q) | ((k == PREFIX) & (q != PADDING))


def attention_mask(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Which key each query sees: earlier ones (and itself) of its own segment or of the shared prefix.

    Args:
        query_segments: (rows, queries), the last columns of the keys.
        key_segments: (rows, keys)

    Returns:
        (rows, 1, queries, keys) bool. For the segments ``0 0 1 1 2 2``::

            1 . . . . .      prefix
            1 1 . . . .
            1 1 1 . . .      first conversation
            1 1 1 1 . .
            1 1 . . 1 .      second conversation
            1 1 . . 1 1
    """
    queries, keys = query_segments.shape[1], key_segments.shape[1]
    index = torch.arange(keys, device=key_segments.device)
    causal = index[None, :] <= index[keys - queries :, None]
    return (sees(query_segments, key_segments) & causal)[:, None]


def last_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the last token of every conversation, row by row, in order of the segments."""
    segments = batch.segments
    following = torch.cat([segments[:, 1:], segments.new_full((len(segments), 1), PADDING)], dim=1)
    rows, columns = ((segments > PREFIX) & (segments != following)).nonzero(as_tuple=True)
    return rows, columns
