"""``vlm = mmpeft.load(run)``: ask, caption and rank, one item or many, an adapter per item."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch

from mmpeft.data.feature_cache.settings import CacheConfig
from mmpeft.data.features import FeatureCache
from mmpeft.data.image_tokens import Decode, TokensByShape
from mmpeft.data.plan import PackingConfig
from mmpeft.data.records import CAPTION_INSTRUCTION, CAPTION_TASK
from mmpeft.data.template import Template
from mmpeft.errors import RefusedError
from mmpeft.inference.adapter_check import check_adapters
from mmpeft.inference.asked import Image, Images, aligned, choices_of, conversation_of
from mmpeft.inference.decoding import Sampling
from mmpeft.inference.engine import Engine
from mmpeft.inference.explain import explain
from mmpeft.inference.explanation import Explanation
from mmpeft.inference.requests import AnswerBy, Completion, Request
from mmpeft.inference.self_check import ensure_checked
from mmpeft.models.language import LanguageConfig
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.names import RESERVED_NAME, unknown_finetune
from mmpeft.runs.cache_folder import cache_folder
from mmpeft.runs.files import LeftOut, load_run, tell_left_out
from mmpeft.runs.manifest import Manifest


def load(run: str, device: str = "auto", batch_size: int = 32) -> "VisionLanguageModel":
    """Loads a run directory. A finetune whose files are damaged, or that fails its check on this model, is left out
    and told; asking it is refused.

    Args:
        run: a directory that `mmpeft fit` wrote, such as runs/quickstart.
        device: "cpu", "cuda", or "auto" for the fastest there is.
        batch_size: questions that are answered together.

    Raises:
        RefusedError: no run, or its base, encoder or tokenizer is not what it was trained with.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise RefusedError(f"device is {device!r}; wanted cpu, cuda or auto ({error})") from None
    left_out: LeftOut = {}
    model, template, manifest = load_run(run, device, left_out=left_out)
    checked = ensure_checked(model, LanguageConfig(**manifest.language), manifest.self_check)
    check_adapters(model, checked, left_out)
    tell_left_out(run, left_out, model.bank.names)
    return VisionLanguageModel(model, template, manifest, batch_size, left_out, cache_folder(run))


def load_base(run: str, device: torch.device | str) -> MultimodalModel:
    """The frozen model of a run without its finetunes, read as it has proven to be.

    Raises:
        RefusedError: as `load`.
    """
    model, _, manifest = load_run(run, device, with_adapters=False)
    ensure_checked(model, LanguageConfig(**manifest.language), manifest.self_check)
    return model.eval()


class VisionLanguageModel:
    """A frozen vision-language base and the finetunes of a run, answering in mixed batches.

    Everywhere: one item gives one result, a list gives a list. ``adapter`` is a name of `adapters`, "base" for the
    frozen model alone, or None for the run's first; a list gives every item its own. An item that cannot be answered
    raises once all others are done; `answer` gives each its own error instead.
    """

    def __init__(
        self,
        model: MultimodalModel,
        template: Template,
        manifest: Manifest,
        batch_size: int = 32,
        left_out: LeftOut | None = None,
        features: Path | None = None,
    ):
        self.model, self.template, self.manifest = model.eval(), template, manifest
        self.left_out = left_out or {}
        """The finetunes of the run that cannot be asked, and why."""
        packing = PackingConfig(batch_size, batch_size, template.max_length)
        cache = FeatureCache(features or CacheConfig().path, model.vision_encoder)
        self.engine = Engine(model, template, cache, packing)

    def decode_by(self, decode: Decode) -> None:
        """Has images read by something else than `load_image`, such as the ``load`` of an `ImageWorker`."""
        self.engine.features.encoding.decode = decode
        if isinstance(self.template.image_tokens, TokensByShape):
            self.template.image_tokens.decode = decode

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
        max_new_tokens: int | None = None,
        task: str | None = None,
        choices: Sequence[str] | None = None,
        answer_by: AnswerBy = "auto",
        history: Sequence[tuple[str, str]] = (),
    ) -> str: ...
    @overload
    def ask(
        self,
        image: Any,
        question: Any,
        adapter: Any = None,
        max_new_tokens: int | None = None,
        task: str | None = None,
        choices: Sequence[Any] | None = None,
        answer_by: AnswerBy = "auto",
        history: Sequence[tuple[str, str]] = (),
    ) -> list[str]: ...
    def ask(
        self,
        image: Any,
        question: Any,
        adapter: Any = None,
        max_new_tokens: int | None = None,
        task: str | None = None,
        choices: Sequence[Any] | None = None,
        answer_by: AnswerBy = "auto",
        history: Sequence[tuple[str, str]] = (),
    ) -> Any:
        """Answers questions about images: writes, or picks the best of the choices where there are some.

        Args:
            image: path, bytes, PIL image or `Video`; a tuple for several in one question; None for text alone.
            question: the question; ``<image>`` and ``<video>`` say where in it they stand, else they come first.
            max_new_tokens: longest answer in tokens; None is as long as the longest that the run was trained on, and
                at least 64.
            task: identifier put before the question; by default the one that the run was trained with.
            choices: as in `rank`; by default those that the finetune's training data listed for such a question.
            answer_by: "auto" ranks where there are choices, "generate" writes all answers, "rank" refuses questions
                without choices.
            history: earlier (question, answer) pairs of one question; the images belong to the first.

        Raises:
            RefusedError: an image that cannot be read, a question that is too long, choices that cannot be ranked.
            UnknownNameError: an unknown adapter.
        """
        sampling = self.sampling(max_new_tokens)
        requests, single = self.requests(
            image, question, adapter, task, sampling, choices, answer_by, history
        )
        texts = [completion.text for completion in _whole(self.engine.answer(requests))]
        return texts[0] if single else texts

    def stream(self, image: Images, question: str, adapter: str | None = None, **how: Any) -> Iterator[str]:
        """One answer as it is written, piece by piece; ``how`` are fields of `Sampling`. Nothing is ranked."""
        sampling = replace(self.sampling(), **how)
        requests, single = self.requests(image, question, adapter, None, sampling, answer_by="generate")
        if not single:
            raise RefusedError("a stream is of one question: give no lists, or one stream for each")
        return self.engine.tokens(requests[0])

    @overload
    def caption(
        self, images: Image, adapter: str | None = None, max_new_tokens: int | None = None
    ) -> str: ...
    @overload
    def caption(self, images: list, adapter: Any = None, max_new_tokens: int | None = None) -> list[str]: ...
    def caption(self, images: Any, adapter: Any = None, max_new_tokens: int | None = None) -> Any:
        """Describes images or videos, with the instruction that the run's captions were trained with; captions that
        were chosen in training are chosen here too, as in `ask`."""
        return self.ask(images, self.caption_instruction, adapter, max_new_tokens, task=CAPTION_TASK)

    @property
    def caption_instruction(self) -> str:
        return self.manifest.instructions.get(CAPTION_TASK) or CAPTION_INSTRUCTION

    def rank(self, image: Any, question: Any, choices: Sequence[Any], adapter: Any = None) -> Any:
        """Scores given answers: the mean log-probability of a choice's tokens, its end included. The prompt and its
        image are computed once for all choices.

        Args:
            choices: at least two different, non-empty answers for every item, or a list of such lists, one for each.

        Returns:
            Per item ``[(choice, score), ...]``, the best first.
        """
        requests, single = self.requests(image, question, adapter, None, Sampling(), choices)
        completions = _whole(self.engine.answer(requests))
        ranked = [own.ranking(request) for request, own in zip(requests, completions, strict=True)]
        return ranked[0] if single else ranked

    def explain(
        self,
        image: Images,
        question: str,
        adapter: str | None = None,
        answer: str | None = None,
        task: str | None = None,
        deletions: int = 16,
    ) -> Explanation:
        """Which patches of the images an answer rests on, and what the finetune changed; `docs/explain.md` tells how.

        Args:
            image: one or, as a tuple, several, as in `ask`.
            answer: what is explained; None is the finetune's own, as `ask` gives it.
            task: as in `ask`.
            deletions: random draws of patches that the named ones are compared with; 0 leaves this check out.

        Raises:
            RefusedError: no image, or what `ask` refuses.
            UnknownNameError: an unknown adapter.
        """
        requests, single = self.requests(image, question, adapter, task)
        if not single:
            raise RefusedError("one question is explained at a time: give no lists")
        given = [] if answer is None else [Completion(answer)]
        (own,) = given or _whole(self.engine.answer(requests))
        return explain(self.engine, requests[0], own.text, deletions, ends=not own.cut)

    def answer(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of every request, or its own error; see `requests`."""
        return self.engine.answer(requests)

    def sampling(self, max_new_tokens: int | None = None) -> Sampling:
        """Greedy, and as long as the run's answers may be."""
        return Sampling(self.manifest.max_new_tokens if max_new_tokens is None else max_new_tokens)

    def requests(
        self,
        image: Any,
        question: Any,
        adapter: Any = None,
        task: str | None = None,
        sampling: Sampling | None = None,
        choices: Sequence[Any] | None = None,
        answer_by: AnswerBy = "auto",
        history: Sequence[tuple[str, str]] = (),
    ) -> tuple[list[Request], bool]:
        """The requests of `ask` and `rank`, and whether nothing was a list. The arguments are those of `ask`.

        Raises:
            RefusedError: lists of different length, markers that do not fit the images, or unusable choices.
            UnknownNameError: an unknown adapter.
        """
        images, questions, adapters, single = aligned(image, question, adapter)
        if history and not single:
            raise RefusedError("a history goes with one question: give no lists, or ask one after the other")
        places = ["the question"] if single else [f"question {number}" for number in range(len(questions))]
        records = [
            conversation_of(*asked, task or self.manifest.default_task, history)
            for asked in zip(images, questions, places, strict=True)
        ]
        names = self._names(adapters)
        if choices is not None:
            known = choices_of(choices, places)
        else:
            known = [self.manifest.choices_of(*asked) for asked in zip(names, records, strict=True)]
        if answer_by == "generate" and choices is not None:
            raise RefusedError('choices are for ranking, but answer_by is "generate": leave one of them out')
        how = sampling or self.sampling()
        requests: list[Request] = []
        for record, name, own in zip(records, names, known, strict=True):
            if answer_by == "rank" and not own:
                raise RefusedError(
                    f"{record['where']}: no choices are known for it; answer_by rank needs some"
                )
            if own and answer_by != "generate":
                record["choices"] = own
            requests.append(Request(record, name, "choices" in record, how))
        return requests, single

    def _names(self, adapters: list[str | None]) -> list[str | None]:
        """Unknown names are refused before anything is computed."""
        known = [name for name in self.manifest.adapters if name in self.left_out or name in self.model.bank]
        first = next(iter([*known, *self.adapters]), RESERVED_NAME)
        chosen = [adapter or first for adapter in adapters]
        for name in chosen:
            if name in self.left_out:
                usable = ", ".join([*self.adapters, RESERVED_NAME])
                raise RefusedError(f"{name!r} cannot be asked, {usable} can: {self.left_out[name]}")
            if name not in (*self.adapters, RESERVED_NAME):
                raise unknown_finetune(name, [*self.adapters, RESERVED_NAME])
        return [None if name == RESERVED_NAME else name for name in chosen]


def _whole(completions: list[Completion]) -> list[Completion]:
    for completion in completions:
        if completion.refusal is not None:
            raise completion.refusal
    return completions
