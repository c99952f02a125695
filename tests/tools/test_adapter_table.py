"""`mmpeft adapter`: what a file would change where, and that it changes an answer."""

import pytest
import torch

from mmpeft.adapters import FullConfig, HybridConfig, LoraConfig
from mmpeft.adapters.peft_format import save_adapter
from mmpeft.cli import main
from mmpeft.tools.adapter_table import inspect_adapter
from mmpeft.tools.tiny_models import tiny_model


def test_every_method_and_name_is_a_row(make_llama, make_bank, tmp_path):
    config = HybridConfig(
        [LoraConfig(rank=4, rank_pattern={"layers.1.self_attn.q_proj": 2}), FullConfig(["lm_head"])]
    )
    bank = make_bank({"a": config})
    save_adapter(bank, "a", tmp_path, "tiny")
    rows, moved = inspect_adapter(tmp_path, make_llama())
    assert [(row.method, row.layer, row.sites) for row in rows] == [
        ("lora", "q_proj", 2),
        ("lora", "v_proj", 2),
        ("full", "lm_head", 1),
    ]
    assert rows[0].tensors[::2] == ["lora_A.weight (4, 64)", "lora_A.weight (2, 64)"]
    assert sum(row.parameters for row in rows) == sum(t.numel() for t in bank.tensors("a").values())
    assert moved
    assert moved > 0.1


def test_layers_that_the_model_never_calls_are_refused(make_llama, make_bank, tmp_path):
    """Some models read a linear's weight and never call it; an adapter there would do nothing, in silence."""
    save_adapter(make_bank({"a": LoraConfig(rank=2)}), "a", tmp_path, "tiny")
    model = make_llama()
    attention = model.model.layers[1].self_attn
    project = attention.q_proj

    class Reads(torch.nn.Linear):
        """Stands for what calls the product itself."""

    attention.q_proj = Reads(64, 64, bias=False)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (project(hidden_states), None)
    with pytest.raises(
        ValueError, match=r"changes some of .* 2 of its layers are never called, such as .*layers\.1\."
    ):
        inspect_adapter(tmp_path, model)


def test_packed_experts_are_layers_too(make_bank, tmp_path):
    experts = LoraConfig(rank=2, target_modules=["experts.gate_up_proj", "experts.down_proj"])
    save_adapter(make_bank({"a": experts}, tiny_model("qwen3_moe")), "a", tmp_path, "tiny")
    rows, moved = inspect_adapter(tmp_path, tiny_model("qwen3_moe"))
    assert [(row.layer, row.sites) for row in rows] == [("gate_up_proj", 4), ("down_proj", 4)]
    assert moved


def test_the_command_prints_the_table(tiny_base, tiny_run, capsys):
    main(["adapter", str(tiny_run / "adapters" / "default"), "--base", str(tiny_base / "language")])
    out = capsys.readouterr().out
    assert "q_proj" in out
    assert "moves the base's logits" in out
