"""Vision features, projector, language model and adapters as one model: forward on packed rows."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mmpeft.adapters import AdapterBank
from mmpeft.data.batch import PADDING, Batch
from mmpeft.data.packing import PREFIX
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN
from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_tensors
from mmpeft.models import frozen
from mmpeft.models.head import logits_of_tokens
from mmpeft.models.head_losses import losses_of_tokens
from mmpeft.models.inputs import Inputs
from mmpeft.models.invocation import invoked_columns
from mmpeft.models.last_layer import last_layer_at
from mmpeft.models.prefix_cache import PrefixCache
from mmpeft.models.projector import Projector
from mmpeft.models.reader import LanguageReader
from mmpeft.models.segments import Segments
from mmpeft.models.token_losses import TokenLosses
from mmpeft.models.unpacking import Unpacked, unpack
from mmpeft.models.virtual import virtual_tokens
from mmpeft.models.vision import NoVision, VisionEncoder
from mmpeft.transfer import to_device


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
        """The losses of the labelled positions. Logits are computed there and nowhere else, and not of all at once.

        Args:
            batch: the rows; of several processes one may have none.
            cache: keys and values of the columns before the last ``new``; gets those of these.
            new: how many of the last columns are looked at; None for all.
            in_float32: as of `LanguageReader.logits`.
        """
        if not batch.adapters:
            nothing = self.idle() if self.reader.together else torch.zeros(0, device=self.device)
            return TokenLosses.of_none(nothing)
        width, host = batch.input_ids.shape[1] if new is None else new, batch.on_host
        targets, segments = (own[:, -width:] for own in (host.targets, host.segments))
        rows, columns = (targets != IGNORE_INDEX).nonzero()
        labelled, labels = (
            to_device(own, self.device) for own in (rows * width + columns, targets[rows, columns])
        )
        hidden = self.hidden_states(batch, cache, new, labelled)
        nll, correct = losses_of_tokens(
            self.reader,
            self.bank,
            hidden.flatten(0, 1).index_select(0, labelled),
            labels,
            [batch.adapters[row] for row in rows],
            batch.dropout_seeds,
            in_float32,
            None if batch.row_numbers is None else batch.row_numbers[rows],
        )
        return TokenLosses(nll, correct, rows, segments[rows, columns])

    def idle(self) -> Tensor:
        """(0,) float32 of a forward that answers nobody, of the base and one token, with its graph: for processes whose
        layers others wait for."""
        self.bank.route([None])
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        hidden, _ = self.reader.decode(self.reader.embed(token), None, token, ids=token, last_position=0)
        return hidden.flatten()[:0].float()

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
        self,
        batch: Batch,
        cache: DynamicCache | None = None,
        new: int | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """What the decoder makes of the last ``new`` columns, or of all, (rows, columns, dim); `logits` are computed
        from it. ``cache`` holds the columns before them and gets theirs. ``places`` (n,) int64 are the only tokens,
        among rows times columns, that anybody looks at; None is all."""
        return self.read(self.inputs(batch, new), cache, places)

    def inputs(self, batch: Batch, new: int | None = None, projected: Tensor | None = None) -> Inputs:
        """What the decoder reads of the last ``new`` columns, or of all with the virtual tokens before them; routes
        the bank.

        Args:
            batch: the rows.
            new: how many of the last columns are read; None for all.
            projected: (image tokens of all, dim) what `project` gives of the batch's images, where that is known.
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
            row_numbers=batch.row_numbers,
            invoked=invoked_columns(batch, self.bank.invocations(batch.adapters), new),
            on_host=batch.on_host.segments[:, columns],
            highest=batch.on_host.positions.max(1),
        )
        virtual = virtual_tokens(self.bank, len(inputs.keys), inputs.keys.device)
        return inputs if virtual is None else inputs.behind(virtual, new is None)

    def read(self, inputs: Inputs, cache: DynamicCache | None = None, places: Tensor | None = None) -> Tensor:
        """(rows, columns, dim) hidden states of the batch's own columns, of which only ``places`` are looked at.

        Raises:
            RefusedError: trained keys and values, or kept ones, for a model whose conversations cannot share rows.
        """
        if not self.reader.reading.packed:
            return self._read_unpacked(inputs, cache)[:, inputs.num_prompts :]
        if inputs.dropout_seeds:
            tokens = torch.from_numpy(inputs.on_host != PADDING)
            self.bank.routing.seed_dropout(inputs.dropout_seeds, tokens, numbers=_tensor(inputs.row_numbers))
        self.bank.routing.act_on(inputs.invoked)
        if inputs.prefix is not None:
            cache = self._with_prefix(cache, inputs.prefix)
        self.reader.check_width(inputs.keys.shape[1])
        columns = inputs.queries.shape[1]
        positions = inputs.positions[:, -columns:]
        segments = Segments(inputs.queries, inputs.keys, positions, inputs.positions)
        mask = self.reader.mask(segments, self.dtype)
        last = int(inputs.highest.max())
        wanted = inputs.among_all(places)
        with last_layer_at(
            self.language_model, self.reader.last_modules, self.bank, wanted, self.reader.elsewhere
        ):
            hidden, _ = self.reader.decode(
                inputs.embeds, mask, positions, cache, inputs.ids, last_position=last
            )
        return hidden[:, inputs.num_prompts :]

    def unpacked(self, inputs: Inputs) -> tuple[Unpacked, Tensor, Tensor]:
        """Every conversation in a row of its own, with the embeddings (conversations, tokens, dim) and ids there.

        Raises:
            RefusedError: trained keys and values, which need a cache that conversations share.
        """
        if inputs.prefix is not None:
            raise RefusedError(
                "prefix tuning trains keys and values that conversations share, but "
                f"{type(self.language_model).__name__} reads each of them by itself; use another method"
            )
        unpacked = unpack(inputs.on_host)
        return unpacked, unpacked.take(inputs.embeds), unpacked.take(inputs.ids)

    def _read_unpacked(self, inputs: Inputs, cache: DynamicCache | None) -> Tensor:
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
            tokens = torch.from_numpy(unpacked.tokens)
            numbers = None if inputs.row_numbers is None else inputs.row_numbers[unpacked.rows]
            self.bank.routing.seed_dropout(inputs.dropout_seeds, tokens, numbers=_tensor(numbers))
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        last = ids.shape[1] - 1
        hidden, _ = self.reader.decode(embeds, None, positions, ids=ids, last_position=last)
        return unpacked.put_back(hidden, *inputs.queries.shape)

    def _with_prefix(self, cache: DynamicCache | None, prefix: Tensor) -> DynamicCache:
        """The cache with every row's trained keys and values in it; where there was none, one that is only read."""
        prefix = prefix.to(self.dtype)
        if self.training:
            frozen.check_reads_cache(self.language_model, cache is None)
        if cache is None:
            return PrefixCache(prefix)
        for layer, (keys, values) in enumerate(prefix):
            cache.update(keys, values, layer)
        return cache

    def project(self, features: Tensor, rows: Tensor, owners: Sequence[str | None]) -> Tensor:
        """(images, tokens, vision dim) -> (images, tokens, dim), as the adapters of their rows see them.

        Args:
            features: of the images.
            rows: (images,) the row of each, among those that the bank is routed for.
            owners: the adapter of each.
        """
        for method, stack in self.bank.inputs.items():
            features = stack.change_images(features, self.bank.routing.slots[method][rows])
        slots = [self.projector_slots.get(owner or "", 0) for owner in owners]
        return self.projector(features, to_device(slots, features.device), self.dtype)

    def projected(self, batch: Batch) -> Tensor:
        """(image tokens of all, dim) what a batch's images are to its rows, for which the bank is routed; `inputs`
        takes it."""
        assert batch.features is not None, "asked for where there are images"
        owners = [batch.adapters[row] for row in batch.on_host.image_rows]
        projected = self.project(batch.features, batch.image_rows, owners).flatten(0, 1)
        if batch.image_tokens is None:
            return projected
        used = np.arange(batch.features.shape[1]) < batch.image_tokens[:, None]
        return projected[to_device(np.flatnonzero(used), projected.device)]

    def _embed(self, batch: Batch, columns: slice, projected: Tensor | None = None) -> Tensor:
        ids = batch.input_ids[:, columns]
        embeds = self.reader.embed(ids.clamp(min=0))
        places = (batch.on_host.input_ids[:, columns] == IMAGE_TOKEN).flatten().nonzero()[0]
        if batch.features is None or not len(places):
            return embeds
        if projected is None:
            projected = self.projected(batch)
        if len(places) != len(projected):
            raise RefusedError(
                f"the rows have {len(places)} image tokens, but {len(batch.features)} images of "
                f"{batch.features.shape[1]} tokens were given: template and vision encoder disagree"
            )
        tokens = embeds.flatten(0, 1)
        return tokens.index_copy(0, to_device(places, ids.device), projected).view_as(embeds)


def _tensor(values: np.ndarray | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def last_positions(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) of the last token of every conversation, row by row, in order of the segments; on the host."""
    segments = batch.on_host.segments
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=PADDING)
    rows, columns = ((segments > PREFIX) & (segments != following)).nonzero()
    return rows, columns
