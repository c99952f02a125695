"""Vision features, projector, language model and adapters as one model: forward on packed rows, and decoding."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache

from mmpeft.adapters import AdapterBank
from mmpeft.data.batch import PADDING, Batch
from mmpeft.data.packing import PREFIX
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN
from mmpeft.errors import RefusedError
from mmpeft.models.projector import Projector
from mmpeft.models.token_losses import TokenLosses
from mmpeft.models.virtual import VirtualTokens, virtual_tokens
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

    @property
    def device(self) -> torch.device:
        return self.projector.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.language_model.get_input_embeddings().weight.dtype

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

    @torch.no_grad()
    def generate(self, batch: Batch, eos_token_id: int, max_new_tokens: int = 32) -> list[list[list[int]]]:
        """Greedy answers to every conversation of every packed row.

        Each step appends one token per conversation to its row; a token sees what its conversation saw, so the
        image and whatever else is shared are computed once.

        Returns:
            Per row and conversation the new token ids, without the end token.
        """
        cache = DynamicCache(config=self.language_model.config)
        hidden = self.hidden_states(batch, cache)
        rows, columns = last_positions(batch)
        tokens = self.logits(hidden[rows, columns]).argmax(-1)
        answers: list[list[int]] = [[] for _ in range(len(rows))]
        done = torch.zeros_like(tokens, dtype=torch.bool)
        step = _Appended(batch, rows, columns)
        for number in range(max_new_tokens):
            done |= tokens == eos_token_id
            for answer, token, ended in zip(answers, tokens.tolist(), done.tolist(), strict=True):
                if not ended:
                    answer.append(token)
            if bool(done.all()) or number + 1 == max_new_tokens:
                break
            batch = step.append(batch, tokens)
            hidden = self.hidden_states(batch, cache, new=step.width)
            tokens = self.logits(hidden[rows, step.places]).argmax(-1)
        grouped: list[list[list[int]]] = [[] for _ in range(len(batch.input_ids))]
        for row, answer in zip(rows.tolist(), answers, strict=True):
            grouped[row].append(answer)
        return grouped

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
        columns = slice(None) if new is None else slice(batch.input_ids.shape[1] - new, None)
        self.bank.route(batch.adapters)
        embeds, positions = self._embed(batch, columns), batch.positions[:, columns]
        queries, keys = batch.segments[:, columns], batch.segments
        virtual = virtual_tokens(self.bank, len(keys), keys.device)
        skip = 0
        if virtual is not None:
            positions = positions + virtual.lengths[:, None]
            keys = torch.cat([virtual.segments, keys], 1)
            if new is None:
                cache = self._with_prefix(cache, virtual)
                if skip := virtual.num_prompts:
                    embeds = torch.cat([virtual.embeds.to(embeds.dtype), embeds], 1)
                    positions = torch.cat([virtual.positions, positions], 1)
                    queries = torch.cat([virtual.segments[:, -skip:], queries], 1)
        self._check_window(keys.shape[1])
        decoder = self.language_model.get_decoder()
        hidden = decoder(
            inputs_embeds=embeds,
            attention_mask=self._additive(attention_mask(queries, keys)),
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden[:, skip:]

    def _with_prefix(self, cache: DynamicCache | None, virtual: VirtualTokens) -> DynamicCache | None:
        """The cache with every row's trained keys and values in it; a new one where there was none."""
        if virtual.keys_values is None:
            return cache
        if self.language_model.training and self.language_model.is_activation_checkpointing:
            raise RefusedError(
                "prefix tuning keeps its keys and values in the cache, which transformers drops under gradient "
                "checkpointing; set model.language.gradient_checkpointing to false"
            )
        cache = DynamicCache(config=self.language_model.config) if cache is None else cache
        for layer, (keys, values) in enumerate(virtual.keys_values.to(self.dtype)):
            cache.update(keys, values, layer)
        return cache

    def _check_window(self, width: int) -> None:
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

    def _additive(self, allowed: Tensor) -> Tensor:
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(allowed.shape, dtype=self.dtype, device=allowed.device).masked_fill(
            ~allowed, lowest
        )


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
    q, k = query_segments[:, :, None], key_segments[:, None, :]
    visible = (k == q) | ((k == PREFIX) & (q != PADDING))
    return (visible & causal)[:, None]


def last_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the last token of every conversation, row by row, in order of the segments."""
    segments = batch.segments
    following = torch.cat([segments[:, 1:], segments.new_full((len(segments), 1), PADDING)], dim=1)
    rows, columns = ((segments > PREFIX) & (segments != following)).nonzero(as_tuple=True)
    return rows, columns


class _Appended:
    """Where the next token of every conversation goes: one new column per conversation of the fullest row."""

    def __init__(self, batch: Batch, rows: Tensor, columns: Tensor):
        counts = torch.bincount(rows, minlength=len(batch.input_ids))
        self.width = int(counts.max())
        first = torch.cumsum(counts, 0) - counts
        self.rows = rows
        self.places = torch.arange(len(rows), device=rows.device) - first[rows]
        self.segments = self._columns(batch.segments[rows, columns], PADDING)
        self.positions = self._columns(batch.positions[rows, columns], 0)

    def append(self, batch: Batch, tokens: Tensor) -> Batch:
        self.positions = self.positions + 1
        return replace(
            batch,
            input_ids=torch.cat([batch.input_ids, self._columns(tokens, 0)], dim=1),
            segments=torch.cat([batch.segments, self.segments], dim=1),
            positions=torch.cat([batch.positions, self.positions], dim=1),
        )

    def _columns(self, values: Tensor, padding: int) -> Tensor:
        num_rows = int(self.rows.max()) + 1
        out = values.new_full((num_rows, self.width), padding)
        out[self.rows, self.places] = values
        return out
