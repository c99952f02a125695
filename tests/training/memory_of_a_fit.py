"""Beside what a fit is estimated to need, what it then took: a process of its own, since a peak is never forgotten.

python -m tests.training.memory_of_a_fit METHOD ROWS TOKENS RECOMPUTES
"""

import json
import sys

import torch

from mmpeft.adapters import FullConfig, IA3Config, LoraConfig
from mmpeft.data.batch import Batch, collate
from mmpeft.data.packing import pack
from mmpeft.data.template import IGNORE_INDEX, Encoded
from mmpeft.inference.self_check import ensure_checked
from mmpeft.models.build import build_model
from mmpeft.models.language import LanguageConfig
from mmpeft.training.finetune import Finetune, Settings
from mmpeft.training.malloc import keep_freed_memory
from mmpeft.training.memory import estimate
from mmpeft.training.optim import make_optimizer
from mmpeft.training.run_writer import peak_memory_bytes

METHODS = {
    "lora": (LoraConfig(rank=16, alpha=32, target_modules=["q_proj", "v_proj"]), "adamw"),
    "dropping": (LoraConfig(rank=16, alpha=32, target_modules="all-linear", dropout=0.1), "adamw"),
    "tfew": (IA3Config(), "adafactor"),
    "full": (FullConfig(), "adamw"),
}
STEPS, ANSWER = 3, 10


def batch_of(rows: int, tokens: int) -> Batch:
    """Random text, of which the end carries loss."""
    packed = []
    for _ in range(rows):
        ids = torch.randint(1000, (tokens,)).tolist()
        packed.append(pack([Encoded(ids, [IGNORE_INDEX] * (tokens - ANSWER) + ids[-ANSWER:])]))
    return collate(packed, None, ["own"] * rows)


def estimated_and_measured(
    method: str, rows: int, tokens: int, recomputes: bool, device: str = "cpu"
) -> dict[str, float]:
    """Bytes of the estimate, and of the peak of some steps on the embedded language model."""
    language = LanguageConfig(dtype="bfloat16", gradient_checkpointing=recomputes)
    model = build_model(language, None, device)
    ensure_checked(model, language, {})
    config, kind = METHODS[method]
    model.bank.add("own", config)
    model.projector.requires_grad_(False)
    found = estimate(model, kind, batch_of(rows, tokens))
    finetune = Finetune("own", config, Settings(learning_rate=1e-4))
    parameters = finetune.train_in(model, False)
    optimizer, _ = make_optimizer(kind, [(parameters, finetune.settings, STEPS)])
    model.train()
    for _ in range(STEPS):
        batch = batch_of(rows, tokens)
        batch.dropout_seeds = {"own": 1}
        model.token_losses(batch.to(device)).nll.sum().backward()
        parameters.take_gradients(rows * ANSWER)
        optimizer.step()
        optimizer.zero_grad()
        for parameter in model.bank.parameters():
            parameter.grad = None
    return {"estimated": found.total, "measured": peak_memory_bytes()}


if __name__ == "__main__":
    keep_freed_memory()
    name, *numbers = sys.argv[1:]
    print(json.dumps(estimated_and_measured(name, *map(int, numbers))))
