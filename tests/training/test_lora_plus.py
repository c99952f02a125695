"""LoRA+: B learns faster than A, as peft's own optimiser has it; where there is no B the ratio is refused."""

import math
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from mmpeft.adapters import DoraConfig, IA3Config, LoraConfig
from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.training.finetune import Finetune, FinetuneConfig, Settings, make_finetunes
from mmpeft.training.optim import make_optimizer
from tests.tiny import make_config

RATE, RATIO = 1e-3, 16.0
ON_Q = {"rank": 2, "target_modules": ["q_proj"]}


def finetune(bank, adapter, ratio):
    own = Finetune("one", adapter, Settings(RATE, schedule="constant", warmup=0.0, lora_b_ratio=ratio))
    own.train_in(SimpleNamespace(bank=bank, projector_slots={}), train_projector=False)
    return own


@pytest.mark.parametrize("adapter", [LoraConfig(**ON_Q), DoraConfig(**ON_Q)])
def test_b_alone_has_another_rate(make_bank, adapter):
    bank = make_bank({"one": adapter})
    rest, faster = finetune(bank, adapter, RATIO).parameters.groups(RATE, RATE, 0.0, RATIO)
    assert (rest["lr"], faster["lr"]) == (RATE, RATE * RATIO)
    assert {tuple(view.shape) for view in faster["params"]} == {(64, 2)}
    assert (2, 64) in {tuple(view.shape) for view in rest["params"]}
    (one,) = finetune(bank, adapter, 1.0).parameters.groups(RATE, RATE, 0.0)
    assert one["name"] == "one adapter", "as in checkpoints of before"


def test_a_step_is_that_of_pefts_optimiser(make_llama, make_bank):
    """The same weights and gradients on both sides, a step of AdamW each."""
    theirs = peft.get_peft_model(make_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wanted = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO)
    own = finetune(make_bank({"one": LoraConfig(**ON_Q)}), LoraConfig(**ON_Q), RATIO)
    optimizer, _ = make_optimizer("adamw", [(own.parameters, own.settings, 1)])
    views = {tuple(view.shape): view for view in own.parameters.views}
    pairs = [
        (views[tuple(parameter.shape)], parameter)
        for name, parameter in theirs.named_parameters()
        if "layers.0" in name and "lora_" in name
    ]
    assert len(pairs) == 2
    for view, parameter in pairs:
        parameter.data.copy_(view.data)
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter)))
        view.grad = parameter.grad.clone()
    optimizer.step()
    wanted.step()
    for view, parameter in pairs:
        torch.testing.assert_close(view.data, parameter.data, rtol=0, atol=1e-7)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.inf, math.nan])
def test_a_ratio_is_a_number_above_0(ratio):
    with pytest.raises(RefusedError, match=r"model\.lora_b_ratio is .*above 0"):
        Settings(lora_b_ratio=ratio)


def test_what_has_no_b_is_refused_by_name(tiny_base, tiny_data, tmp_path):
    model = {"adapter": {"class_path": "mmpeft.adapters.IA3Config"}, "lora_b_ratio": RATIO}
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, model=model)
    with pytest.raises(SystemExit, match=r"model\.lora_b_ratio is 16, .* but the finetune has IA3Config"):
        main(["fit", "--config", str(config)])
    configs = {"one": LoraConfig(), "two": IA3Config()}
    both = {name: FinetuneConfig(adapter, lora_b_ratio=4.0) for name, adapter in configs.items()}
    with pytest.raises(RefusedError, match=r"model\.adapters\.two\.lora_b_ratio is 4"):
        make_finetunes(None, "default", both, Settings())
