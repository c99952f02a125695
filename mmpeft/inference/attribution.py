"""Attribution: how much each image token counts for an answer, by gradient x input and by attention rollout, and what
the answer loses without some of them.

A question and its answer are read as one conversation. What is attributed is the log-probability of the answer, its end
included. Deleted tokens stand where they stood and are seen by nobody; a model that reads every conversation in a row
of its own reads the others as if they had never been there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmpeft.data.batch import PADDING, Batch, collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, IMAGE_TOKEN, Encoded
from mmpeft.errors import RefusedError
from mmpeft.inference.comparison import distance, tolerance
from mmpeft.models.attention_rollout import attention_weights, check_weights, roll_out
from mmpeft.models.multimodal import MultimodalModel

ROWS = 8
"""Conversations that are read together."""
WHOLE = np.zeros(0, np.int64)
"""Nothing is removed."""


@dataclass
class Answered:
    """A question about images with its answer, as one finetune reads them."""

    model: MultimodalModel
    encoded: Encoded
    features: list[Tensor]
    """(tokens, vision dim) of its images."""
    adapter: str | None

    @property
    def answer(self) -> list[int]:
        """Its tokens, the end included."""
        return [target for target in self.encoded.targets if target != IGNORE_INDEX]

    @property
    def columns(self) -> list[int]:
        """Those that predict the answer."""
        return [place for place, target in enumerate(self.encoded.targets) if target != IGNORE_INDEX]

    @property
    def image_columns(self) -> np.ndarray:
        """(image tokens,) int64"""
        return np.flatnonzero(np.array(self.encoded.ids) == IMAGE_TOKEN)

    def batch(self, removed: Sequence[np.ndarray] = (WHOLE,)) -> Batch:
        """A row for every set of image tokens that nobody is to read."""
        rows = [pack([self.encoded]) for _ in removed]
        batch = collate(rows, self.features * len(rows), [self.adapter] * len(rows))
        for segments, tokens in zip(batch.segments, removed, strict=True):
            segments[self.image_columns[tokens]] = PADDING
        return batch.to(self.model.device)

    def logits(self, hidden: Tensor, in_float32: bool = True) -> Tensor:
        """(columns, dim) of the whole conversation -> (answer tokens, vocabulary) float32; with ``in_float32`` without
        gradients."""
        answering = hidden[torch.tensor(self.columns, device=hidden.device)]
        return self.model.logits(answering, [self.adapter] * len(answering), in_float32=in_float32).float()

    def log_probabilities(self, hidden: Tensor, in_float32: bool = True) -> Tensor:
        """(columns, dim) of the whole conversation -> (answer tokens,) float32."""
        logits = self.logits(hidden, in_float32)
        wanted = torch.tensor(self.answer, device=logits.device)
        return logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]


def gradient_times_input(answered: Answered) -> np.ndarray:
    """(image tokens,) float32: of every token the sum over its embedding of gradient times value, the first-order share
    of the answer's log-probability that goes with it. Works on any base.

    Source: Shrikumar et al. 2016, "Not Just a Black Box", section 2.
    """
    model, batch = answered.model, answered.batch()
    with torch.no_grad():
        model.bank.route(batch.adapters)
        projected = model.projected(batch)
    projected.requires_grad_()
    with torch.enable_grad():
        (hidden,) = model.read(model.inputs(batch, projected=projected))
        # a head in float32 has no gradients
        score = answered.log_probabilities(hidden, in_float32=False).sum()
        (gradient,) = torch.autograd.grad(score, projected)
    return (gradient.float() * projected.detach().float()).sum(-1).cpu().numpy()


@torch.no_grad()
def attention_rollout(answered: Answered) -> np.ndarray:
    """(image tokens,) float32: of every token how much of it reaches the columns that predict the answer, on average.

    Raises:
        RefusedError: a layer has no attention weights, or the model's eager attention gives other numbers than the one
            that it is read by.
    """
    model, batch = answered.model, answered.batch()
    usual = answered.logits(model.hidden_states(batch)[0])
    name = type(model.language_model).__name__
    try:
        with attention_weights(model.reader) as found:
            hidden = model.hidden_states(batch)[0]
        check_weights(model.reader, found)
    except RefusedError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of somebody else's code, which was not made for eager attention
        raise RefusedError(
            f"{name} cannot be asked for its attention weights: {type(error).__name__}: {error}. Take gradient x input"
        ) from error
    if not (off := distance(answered.logits(hidden), usual)) <= tolerance(model):
        raise RefusedError(
            f"the attention weights of {name} are not those it is read by: its logits are {off:.2g} off with eager "
            "attention. Take gradient x input"
        )
    own = len(answered.encoded.ids)
    before = found[0].shape[2] - own  # trained prompts
    columns = before + torch.tensor(answered.columns, device=found[0].device)
    reaching = roll_out([weights[0] for weights in found], columns).mean(0)[before:]
    return reaching.cpu().numpy()[answered.image_columns]


@torch.no_grad()
def losses_without(answered: Answered, removed: Sequence[np.ndarray]) -> list[float]:
    """What the answer's log-probability loses, in nats, where nobody reads these image tokens.

    Args:
        removed: the numbers of the tokens of each set.
    """
    every, nll = [WHOLE, *removed], list[float]()
    for start in range(0, len(every), ROWS):
        batch = answered.batch(every[start : start + ROWS])
        losses = answered.model.token_losses(batch, in_float32=True)
        of_rows = np.bincount(losses.rows, losses.nll.double().cpu().numpy(), minlength=len(batch.adapters))
        nll += of_rows.tolist()
    return [own - nll[0] for own in nll[1:]]
