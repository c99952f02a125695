"""Prompts that a live engine is reading, in chunks and behind what is known of them already.

Between two tokens of the answers being written there is one forward of at most ``chunk`` columns. It is, in turn, of
the shortest prompts and of those that have waited longest: a short one is not kept up by long ones, nor a long one by
many short ones.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mmpeft.data.template import IGNORE_INDEX
from mmpeft.errors import RefusedError
from mmpeft.inference.chunks import Prompt, read_chunks
from mmpeft.inference.finetunes import Version
from mmpeft.inference.live_job import Job
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.reuse import BLOCK, Identity, ImageKey, Latest, PrefixCache, PrefixKey, prefix_keys
from mmpeft.models.inputs import Inputs
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.positions import check_positions

VIRTUAL = -2
"""In place of the id of a virtual token, whose finetune its key names."""


class Prompts:
    """What is being read.

    Args:
        model: whose conversations can share rows.
        settings: of the engine.
        identify: the hashes of a version.
    """

    def __init__(
        self, model: MultimodalModel, settings: LiveSettings, identify: Callable[[Version], Identity]
    ):
        self.model, self.settings, self.identify = model, settings, identify
        self.jobs: list[Job] = []
        """The longest waiting first."""
        self.images = Latest[Tensor](settings.feature_bytes)
        self.prefixes = PrefixCache(
            settings.prefix_bytes, settings.chunk if settings.deterministic else BLOCK
        )
        self._shortest_first = False

    def remove(self, job: Job) -> None:
        """It has been read, or is not wanted any more."""
        self.jobs.remove(job)
        if job.begun:
            self.prefixes.end(job.keys)

    def open(self, job: Job) -> None:
        """Looks at a prepared request, to read it from the next step on.

        Raises:
            RefusedError: it does not fit into a row.
        """
        batch = job.batch().to(self.model.device)
        identity = self.identify(job.version)
        inputs = self.model.inputs(batch, projected=self._projected(job, identity))
        self._check_size(job, inputs)
        virtual = inputs.num_prompts
        if job.request.rank:
            wanted = torch.nn.functional.pad(batch.targets[0] != IGNORE_INDEX, (virtual, 0))
        else:
            wanted = (
                torch.arange(inputs.queries.shape[1], device=self.model.device) == inputs.queries.shape[1] - 1
            )
        job.prompt = Prompt(inputs, wanted)
        job.keys = self._keys(job, identity, inputs, int(wanted.nonzero()[0, 0]))
        job.ticket.prompt_tokens = int((batch.targets[0] == IGNORE_INDEX).sum())
        self.jobs.append(job)

    def step(self) -> list[Job]:
        """One forward; those that have been read to their end are out. `chosen` says who takes part."""
        chosen = self.chosen()
        if not chosen:
            return []
        return self.read(chosen)

    def chosen(self) -> list[tuple[Job, int]]:
        """Who is to be read in the next forward, and how many columns of each."""
        self._shortest_first = not self._shortest_first
        order = sorted(self.jobs, key=_left) if self._shortest_first else self.jobs
        chosen: list[tuple[Job, int]] = []
        for job in order:
            if not self._begin(job):
                continue  # another one is reading what it begins with
            count = min(_left(job), self.settings.chunk)
            widest = max(count, *(each for _, each in chosen)) if chosen else count
            if chosen and (self.settings.deterministic or widest * (len(chosen) + 1) > self.settings.chunk):
                break
            chosen.append((job, count))
        return chosen

    def read(self, chosen: list[tuple[Job, int]]) -> list[Job]:
        """Their next columns; gives those that have been read to their end.

        Raises:
            RefusedError: as `read_chunks`.
        """
        read_chunks(self.model, [_prompt_of(job) for job, _ in chosen], [count for _, count in chosen])
        done: list[Job] = []
        for job, _ in chosen:
            prompt = _prompt_of(job)
            kept = job.keys[: prompt.done // self.prefixes.block]
            own = [(keys[:, prompt.ahead :], values[:, prompt.ahead :]) for keys, values in prompt.layers]
            self.prefixes.put(kept, own)
            self.prefixes.end(kept)
            if not prompt.left:
                self.remove(job)
                done.append(job)
        return done

    def _begin(self, job: Job) -> bool:
        if not job.begun and self.prefixes.begin(job.keys):
            job.begun, prompt = True, _prompt_of(job)
            columns, layers = self.prefixes.find(job.keys)
            prompt.begin(layers, columns)
            job.ticket.cached_tokens = max(0, columns - prompt.inputs.num_prompts)
        return job.begun

    def _projected(self, job: Job, identity: Identity) -> Tensor | None:
        """(image tokens, dim), of images as their finetune sees them, one after the other."""
        assert job.row is not None, "it is prepared"
        found: list[Tensor] = []
        for image, features in zip(job.row.images, job.features, strict=True):
            adapter = identity.adapter if identity.changes_images else ""
            key = ImageKey(identity.encoder, identity.projector, adapter, image)
            if (own := self.images.get(key)) is None:
                self.model.bank.route([job.request.adapter])
                row = torch.zeros(1, dtype=torch.int64, device=self.model.device)
                own = self.model.project(features[None].to(self.model.device), row, [job.request.adapter])[0]
                self.images.put(key, own, own.nbytes)
                self.images.trim()
            found.append(own)
        return torch.cat(found) if found else None

    def _keys(self, job: Job, identity: Identity, inputs: Inputs, limit: int) -> list[PrefixKey]:
        """Of the prefixes before column ``limit``, which has to be read in any case."""
        assert job.row is not None, "it is prepared"
        ids = [VIRTUAL] * inputs.num_prompts + job.row.ids
        acts_from = len(ids) if job.version.name is None else 0
        if inputs.invoked is not None and identity.activated:
            acts = inputs.invoked[0].nonzero()
            acts_from = int(acts[0, 0]) if len(acts) else len(ids)
        sizes = [len(features) for features in job.features]
        return prefix_keys(ids[:limit], job.row.images, sizes, acts_from, identity, self.prefixes.block)

    def _check_size(self, job: Job, inputs: Inputs) -> None:
        new = 0 if job.request.rank else job.request.sampling.max_new_tokens
        columns = inputs.keys.shape[1]
        if columns + new > self.settings.max_columns:
            raise RefusedError(
                f"the prompt has {columns} tokens and its answer may have {new}, but a row has room for "
                f"{self.settings.max_columns}; shorten the prompt, lower max_new_tokens, or raise max_columns"
            )
        last = max(0, new - 1)  # the last token of an answer is not read
        self.model.reader.check_width(columns + last)
        check_positions(self.model.reader.position_limit, inputs.positions.max() + last)


def _prompt_of(job: Job) -> Prompt:
    assert job.prompt is not None, "it is open"
    return job.prompt


def _left(job: Job) -> int:
    return _prompt_of(job).left
