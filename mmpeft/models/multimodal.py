"""Vision features, projector, language model and adapters as one model: forward on packed rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
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
from mmpeft.hashing import hash_tensors
from mmpeft.models import frozen
from mmpeft.models.head import logits_of_tokens
from mmpeft.models.invocation import invoked_columns
from mmpeft.models.masks import additive, attention_mask, within_reach
from mmpeft.models.projector import Projector
from mmpeft.models.reader import LanguageReader
from mmpeft.models.token_losses import TokenLosses
from mmpeft.models.unpacking import Unpacked, unpack
from mmpeft.models.virtual import VirtualTokens, virtual_tokens
from mmpeft.models.vision import NoVision, VisionEncoder


class MultimodalModel(nn.Module):
    """A frozen language model that reads projected image features in place of image tokens.

    Rows are never reordered, so that row b stays the row of adapter b. It begins in eval mode, as models of
    transformers do.
    """

    def __init__(
        self, vision_encoder: VisionEncoder | NoVision, projector: Projector, language_model: nn.Module
    ):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.projector = projector
        self.language_model: Any = language_model
        self.bank = AdapterBank(language_model, (vision_encoder.num_tokens, vision_encoder.dim))
        self.bank.routing.base_says_mode = False
        self.projector_slots: dict[str, int] = {}
        """Adapters that own a projector; any other row uses slot 0."""
        self.reader = LanguageReader(language_model)
        self.eval()

    def train(self, mode: bool = True) -> "MultimodalModel":
        """The language model stays in eval mode, see `mmpeft.models.frozen`."""
        super().train(mode)
        frozen.set_mode(self.language_model, mode)
        return self

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
        self,
        batch: Batch,
        cache: DynamicCache | None = None,
        new: int | None = None,
        in_float32: bool = False,
    ) -> TokenLosses:
        """The losses of the labelled positions. Logits are computed there and nowhere else.

        Args:
            batch: the rows.
            cache: keys and values of the columns before the last ``new``; gets those of these.
            new: how many of the last columns are looked at; None for all.
            in_float32: as of `LanguageReader.logits`.
        """
        hidden = self.hidden_states(batch, cache, new)
        targets, segments = (tensor[:, -hidden.shape[1] :] for tensor in (batch.targets, batch.segments))
        labelled = targets != IGNORE_INDEX
        labels = targets[labelled]
        rows = labelled.nonzero()[:, 0]
        owners = [batch.adapters[row] for row in rows.tolist()]
        logits = self.logits(hidden[labelled], owners, batch.dropout_seeds, in_float32)
        nll = F.cross_entropy(logits.float(), labels, reduction="none")
        return TokenLosses(nll, logits.argmax(-1) == labels, rows, segments[labelled])

    def logits(
        self,
        hidden: Tensor,
        owners: Sequence[str | None],
        dropout_seeds: Mapping[str, int] = MappingProxyType({}),
        in_float32: bool = False,
    ) -> Tensor:
        """(tokens, dim) hidden states -> (tokens, vocabulary), or (rows, tokens, dim) -> (rows, tokens, vocabulary).

        Args:
            hidden: of the decoder.
            owners: the adapter of every token, or row; None is the base model.
            dropout_seeds: as of a batch.
            in_float32: as of `LanguageReader.logits`.
        """
        each = [owner for owner in owners for _ in range(hidden.shape[1])] if hidden.dim() == 3 else owners
        flat = hidden.flatten(0, -2)
        logits = logits_of_tokens(self.reader, self.bank, flat, each, dropout_seeds, in_float32)
        return logits.unflatten(0, hidden.shape[:-1])

    def hidden_states(
        self, batch: Batch, cache: DynamicCache | None = None, new: int | None = None
    ) -> Tensor:
        """What the decoder makes of the last ``new`` columns, or of all, (rows, columns, dim); `logits` are computed
        from it. ``cache`` holds the columns before them and gets theirs."""
        return self.read(self.inputs(batch, new), cache)

    def inputs(self, batch: Batch, new: int | None = None, projected: Tensor | None = None) -> "Inputs":
        """What the decoder reads of the last ``new`` columns, or of all with the virtual tokens before them; routes
        the bank.

        Args:
            batch: the rows.
            new: how many of the last columns are read; None for all.
            projected: of the batch's images, as `project` gives it, where that is known.
        """
        columns = slice(None) if new is None else slice(batch.input_ids.shape[1] - new, None)
        self.bank.route(batch.adapters)
        inputs = Inputs(
            embeds=self._embed(batch, columns, projected),
            ids=batch.input_ids[:, columns].clamp(min=0),
            queries=batch.segments[:, columns],
            keys=batch.segments,
            positions=batch.positions,
            adapters=batch.adapters,
            dropout_seeds=batch.dropout_seeds,
            invoked=invoked_columns(batch, self.bank.invocations(batch.adapters), new),
        )
        virtual = virtual_tokens(self.bank, len(inputs.keys), inputs.keys.device)
        return inputs if virtual is None else inputs.behind(virtual, new is None)

    def read(self, inputs: "Inputs", cache: DynamicCache | None = None) -> Tensor:
        """(rows, columns, dim) hidden states of the batch's own columns.

        Raises:
            RefusedError: trained keys and values, or kept ones, for a model whose conversations cannot share rows.
        """
        if not self.reader.reading.packed:
            return self._read_unpacked(inputs, cache)[:, inputs.num_prompts :]
        if inputs.dropout_seeds:
            self.bank.routing.seed_dropout(inputs.dropout_seeds, inputs.queries != PADDING)
        self.bank.routing.act_on(inputs.invoked)
        if inputs.prefix is not None:
            cache = self._with_prefix(cache, inputs.prefix)
        self.reader.check_width(inputs.keys.shape[1])
        columns = inputs.queries.shape[1]
        seen = additive(attention_mask(inputs.queries, inputs.keys), self.dtype)
        positions = inputs.positions[:, -columns:]
        mask = within_reach(seen, self.reader.reaches, positions, inputs.positions)
        hidden, _ = self.reader.decode(inputs.embeds, mask, positions, cache, inputs.ids)
        return hidden[:, inputs.num_prompts :]

    def unpacked(self, inputs: "Inputs") -> tuple[Unpacked, Tensor, Tensor]:
        """Every conversation in a row of its own, with the embeddings (conversations, tokens, dim) and ids there.

        Raises:
            RefusedError: trained keys and values, which need a cache that conversations share.
        """
        if inputs.prefix is not None:
            raise RefusedError(
                "prefix tuning trains keys and values that conversations share, but "
                f"{type(self.language_model).__name__} reads each of them by itself; use another method"
            )
        unpacked = unpack(inputs.queries)
        return unpacked, unpacked.take(inputs.embeds), unpacked.take(inputs.ids)

    def _read_unpacked(self, inputs: "Inputs", cache: DynamicCache | None) -> Tensor:
        """As `read`, every conversation in a row of its own; the bank stays routed for those."""
        if cache is not None:
            raise RefusedError(
                "kept examples are read from keys and values that conversations share, but "
                f"{type(self.language_model).__name__} reads each of them by itself"
            )
        unpacked, embeds, ids = self.unpacked(inputs)
        self.bank.route([inputs.adapters[row] for row in unpacked.rows.tolist()])
        self.bank.routing.act_on(None if inputs.invoked is None else unpacked.take(inputs.invoked))
        if inputs.dropout_seeds:
            self.bank.routing.seed_dropout(inputs.dropout_seeds, unpacked.tokens)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden, _ = self.reader.decode(embeds, None, positions, ids=ids)
        return unpacked.put_back(hidden, *inputs.queries.shape)

    def _with_prefix(self, cache: DynamicCache | None, prefix: Tensor) -> DynamicCache:
        """The cache with every row's trained keys and values in it; a new one where there was none."""
        if self.training and self.language_model.is_activation_checkpointing:
            raise RefusedError(
                "prefix tuning keeps its keys and values in the cache, which transformers drops under gradient "
                "checkpointing; set model.language.gradient_checkpointing to false"
            )
        cache = DynamicCache() if cache is None else cache
        for layer, (keys, values) in enumerate(prefix.to(self.dtype)):
            cache.update(keys, values, layer)
        return cache

    def project(self, features: Tensor, rows: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """(images, tokens, vision dim), of the ``rows`` (images,) that the bank is routed for, -> (images, tokens, dim)
        as the adapters of those rows see them."""
        for method, stack in self.bank.inputs.items():
            features = stack.change_images(features, self.bank.routing.slots[method][rows])
        owners = [self.projector_slots.get(adapters[row] or "", 0) for row in rows.tolist()]
        return self.projector(features, torch.tensor(owners, device=features.device), self.dtype)

    def _embed(self, batch: Batch, columns: slice, projected: Tensor | None = None) -> Tensor:
        ids = batch.input_ids[:, columns]
        embeds = self.reader.embed(ids.clamp(min=0))
        slots = ids == IMAGE_TOKEN
        if batch.features is None or not bool(slots.any()):
            return embeds
        if projected is None:
            projected = self.project(batch.features, batch.image_rows, batch.adapters)
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
    ids: Tensor
    """(rows, columns) int64; 0 where no text stands."""
    queries: Tensor
    """(rows, columns) int64: their segments"""
    keys: Tensor
    """(rows, keys) int64: the segments of everything in the cache and of these columns, which are the last"""
    positions: Tensor
    """(rows, keys) int64: of the same"""
    adapters: Sequence[str | None]
    """Of every row."""
    dropout_seeds: dict[str, int]
    invoked: Tensor | None
    """(rows, columns) bool: on which of them activated adapters act; None where no row has one."""
    num_prompts: int = 0
    """How many of the first columns are virtual tokens."""
    prefix: Tensor | None = None
    """(layers, 2, rows, heads, prefix columns, head dim): keys and values before all columns."""

    def behind(self, virtual: VirtualTokens, all_columns: bool) -> "Inputs":
        """The same behind virtual tokens, which are read too where these are ``all_columns`` of the batch."""
        keys = torch.cat([virtual.segments, self.keys], 1)
        positions = torch.cat([virtual.positions, self.positions + virtual.lengths[:, None]], 1)
        moved = replace(self, keys=keys, positions=positions)
        num = virtual.num_prompts
        if not all_columns:
            return moved
        if num == 0:
            return replace(moved, prefix=virtual.keys_values)
        return replace(
            moved,
            embeds=torch.cat([virtual.embeds.to(self.embeds.dtype), self.embeds], 1),
            ids=nn.functional.pad(self.ids, (num, 0)),
            queries=torch.cat([virtual.segments[:, virtual.segments.shape[1] - num :], self.queries], 1),
            invoked=None if self.invoked is None else nn.functional.pad(self.invoked, (num, 0)),
            num_prompts=num,
            prefix=virtual.keys_values,
        )


def last_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """(rows, columns) of the last token of every conversation, row by row, in order of the segments."""
    segments = batch.segments
    following = torch.cat([segments[:, 1:], segments.new_full((len(segments), 1), PADDING)], dim=1)
    rows, columns = ((segments > PREFIX) & (segments != following)).nonzero(as_tuple=True)
    return rows, columns
