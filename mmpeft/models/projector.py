"""The linear projection of vision features into the language model's embedding space, one per slot."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpeft.adapters.functional import gather_slots
from mmpeft.errors import RefusedError


class Projector(nn.Module):
    """``y = W_s x + b_s``, with ``s`` the slot of the image's row.

    Shapes: ``weight`` (slots, out, in), ``bias`` (slots, out). Held in fp32; the result is in ``dtype``.
    """

    def __init__(self, in_dim: int, out_dim: int, num_slots: int = 1):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_slots, out_dim, in_dim))
        self.bias = nn.Parameter(torch.zeros(num_slots, out_dim))
        nn.init.xavier_uniform_(self.weight[0])
        with torch.no_grad():
            self.weight[1:] = self.weight[0]  # all start as one would alone

    def forward(self, features: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """(images, tokens, in) and (images,) slots -> (images, tokens, out)."""
        features = features.to(self.weight.dtype)
        if len(self.weight) == 1:
            return F.linear(features, self.weight[0], self.bias[0]).to(dtype)
        weight, bias = gather_slots(self.weight, slots), gather_slots(self.bias, slots)
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2)).to(dtype)

    @torch.no_grad()
    def reserve(self, num_slots: int) -> None:
        """Makes room for so many slots; new ones hold zeros. The Parameters are others then."""
        for name, old in list(self.named_parameters()):
            if len(old) < num_slots:
                grown = torch.cat([old, old.new_zeros(num_slots - len(old), *old.shape[1:])])
                setattr(self, name, nn.Parameter(grown, old.requires_grad))

    def tensors(self, slot: int = 0) -> dict[str, Tensor]:
        """The slot as files hold it: ``weight`` (out, in) and ``bias`` (out,)."""
        return {"weight": self.weight.detach()[slot], "bias": self.bias.detach()[slot]}

    @torch.no_grad()
    def fill(self, tensors: dict[str, Tensor], slot: int = 0) -> None:
        """Copies such tensors into a slot.

        Raises:
            RefusedError: other names or shapes; nothing is copied then.
        """
        for name, view in self.tensors(slot).items():
            if name not in tensors or tensors[name].shape != view.shape:
                found = list(tensors[name].shape) if name in tensors else "nothing"
                raise RefusedError(f"projector {name}: found {found}, wanted {list(view.shape)}")
        for name, view in self.tensors(slot).items():
            view.copy_(tensors[name])
