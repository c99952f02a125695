"""The module: what a step's gradient is, what is skipped, what trains and what stays."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from mmpeft.adapters import LoraConfig
from mmpeft.cli import main
from mmpeft.data.batch import Batch, collate, concatenate
from mmpeft.data.packing import pack
from mmpeft.data.template import Template
from mmpeft.models.language import LanguageConfig, load_language_model
from mmpeft.models.vision import VisionConfig
from mmpeft.training.cli import VisionLanguageCLI
from mmpeft.training.datamodule import VisionLanguageData
from mmpeft.training.module import VisionLanguageModule
from tests.tiny import make_base, make_config, run_directory

CLOSE = {"atol": 1e-6, "rtol": 1e-4}


class Recorder(VisionLanguageModule):
    """Keeps the gradients of every step as the optimiser gets them, before clipping."""

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        found = {n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None}
        self.steps = [*getattr(self, "steps", []), found]
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)


class Loader:
    """Lightning takes a plain list for several loaders."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Given(VisionLanguageData):
    """Batches that were made beforehand."""

    def __init__(self, batches: list[Batch], cache):
        super().__init__(cache=str(cache))
        self.batches = batches

    def setup(self, stage):
        pass

    def train_dataloader(self):
        return Loader(self.batches)


@pytest.fixture
def make_module(tiny_base):
    def make(**settings):
        return Recorder(
            LanguageConfig(str(tiny_base / "language"), dtype="float32"),
            VisionConfig("test_vit", str(tiny_base / "vision.safetensors"), image_size=32),
            **({"adapter": LoraConfig(rank=2), "warmup": 0.0, "schedule": "constant"} | settings),
        )

    return make


@pytest.fixture
def fit(tmp_path):
    def run(module, batches, **trainer):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        settings = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False} | quiet | trainer
        L.Trainer(**settings).fit(module, datamodule=Given(batches, tmp_path / "features"))
        return module

    return run


@pytest.fixture(scope="module")
def micro_batches(tiny_tokenizer):
    """Batches with 1, 3 and 9 labelled tokens or so, on different images."""
    template = Template(tiny_tokenizer, 4)
    batches = []
    for number, answer in enumerate(["red", "green and red", "a b c d e f g h"]):
        record = {
            "id": "1",
            "images": ["a"],
            "turns": [("<image>what?", answer)],
            "task": None,
            "where": "here",
        }
        features = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(number))
        batches.append(collate([pack([template.encode(record)])], features, ["default"]))
    return batches


def merged(batches: list[Batch]) -> Batch:
    """One batch of all rows, not the ones that a test may change."""
    return replace(concatenate(batches))


def test_accumulated_micro_batches_give_the_gradient_of_one_big_batch(make_module, fit, micro_batches):
    parts = fit(make_module(), micro_batches, accumulate_grad_batches=3)
    whole = fit(make_module(), [merged(micro_batches)])
    assert len(parts.steps) == len(whole.steps) == 1
    for name, gradient in whole.steps[0].items():
        torch.testing.assert_close(parts.steps[0][name], gradient, **CLOSE)
    assert any(gradient.abs().max() > 0 for name, gradient in whole.steps[0].items() if "lora_B" in name)


def test_the_gradient_is_the_mean_over_tokens(make_module, fit, micro_batches):
    module = fit(make_module(), [merged(micro_batches)])
    fresh = fit(make_module(), [], max_epochs=0)
    losses = fresh.model.train().token_losses(merged(micro_batches))
    losses.nll.mean().backward()
    for name, parameter in fresh.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(module.steps[0][name], parameter.grad, **CLOSE)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(make_module, fit, micro_batches):
    """Lightning divides by accumulate_grad_batches there as well, which would make the step too small."""
    module = fit(
        make_module(learning_rate=0, projector_learning_rate=0), micro_batches, accumulate_grad_batches=2
    )
    alone = fit(make_module(), micro_batches[2:])
    assert len(module.steps) == 2
    for name, gradient in alone.steps[0].items():
        torch.testing.assert_close(module.steps[1][name], gradient, **CLOSE)


class Snapshots(L.Callback):
    """The trained tensors and their moments before the first step and after every step."""

    def __init__(self):
        self.taken = []

    def on_train_start(self, trainer, pl_module):
        tensors = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        (optimizer,) = trainer.optimizers
        for number, state in enumerate(optimizer.state.values()):
            tensors |= {f"{number} {key}": value.clone() for key, value in state.items() if value.dim()}
        self.taken.append(tensors)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_a_step_with_a_nan_gradient_is_left_out_counted_and_told(
    make_module, fit, micro_batches, capsys, poisoned
):
    bad = merged(micro_batches[:1])
    bad.features = torch.full_like(bad.features, torch.nan)
    batches = [*micro_batches[:poisoned], bad, *micro_batches[poisoned:]]
    snapshots = Snapshots()
    module = fit(make_module(weight_decay=0.1), batches, callbacks=[snapshots])
    assert module.finetunes["default"].parameters.skipped == 1
    assert "'default' has a gradient that is not finite" in capsys.readouterr().out
    before, after = snapshots.taken[poisoned : poisoned + 2]
    for name, tensor in after.items():
        assert torch.equal(tensor, before.get(name, torch.zeros_like(tensor))), name
    last = snapshots.taken[-1]
    assert all(torch.isfinite(tensor).all() for tensor in last.values())
    assert any(not torch.equal(last[name], tensor) for name, tensor in before.items()), "later steps go on"


def test_a_step_without_any_label_changes_nothing(make_module, fit, micro_batches):
    silent = merged(micro_batches[:1])
    silent.targets = torch.full_like(silent.targets, -100)
    snapshots = Snapshots()
    fit(make_module(), [silent], callbacks=[snapshots])
    before, after = snapshots.taken
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_modes_of_training(make_module, fit, micro_batches):
    """Dropout of the adapter is on while training; what is frozen stays in eval mode."""

    class Modes(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            model = pl_module.model
            self.stacks = [stack.training for stack in model.bank.stacks.values()]
            frozen = [*model.language_model.modules(), *model.vision_encoder.modules()]
            self.frozen = any(module.training for module in frozen)

    modes = Modes()
    fit(make_module(), micro_batches[:1], callbacks=[modes])
    assert modes.stacks
    assert all(modes.stacks)
    assert not modes.frozen


def test_nothing_to_train_is_refused(make_module, fit, micro_batches):
    with pytest.raises(ValueError, match="nothing would train"):
        fit(make_module(adapter=None, train_projector=False), micro_batches)


@pytest.mark.parametrize("train_projector", [True, False])
def test_only_what_trains_is_in_the_state(make_module, fit, micro_batches, train_projector):
    module = fit(make_module(train_projector=train_projector), micro_batches[:1])
    keys = module.state_dict().keys()
    assert {key.rsplit(".", 1)[-1] for key in keys if "projector" not in key} == {"lora_A", "lora_B"}
    assert len([key for key in keys if "projector" in key]) == 2 * train_projector


def test_the_base_is_unchanged_after_fit(tiny_base, tiny_data, tmp_path):
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, trainer={"max_steps": 3})
    cli = VisionLanguageCLI.run(["fit", "--config", str(config)])
    fresh = load_language_model(LanguageConfig(str(tiny_base / "language"), dtype="float32")).state_dict()
    trained = cli.model.model.language_model.state_dict()
    after = {name.replace(".base.", "."): tensor for name, tensor in trained.items() if ".lora" not in name}
    assert after.keys() == fresh.keys()
    for name, tensor in fresh.items():
        assert torch.equal(after[name], tensor), name
    vision = load_file(tiny_base / "vision.safetensors")
    for name, tensor in cli.model.model.vision_encoder.model.state_dict().items():
        if name != "pos_embed":  # interpolated to the image size
            assert torch.equal(tensor, vision[name]), name


def test_every_validation_sees_all_of_the_data(tiny_base, tiny_data, tmp_path, monkeypatch):
    """Also the first, although Lightning's sanity check has read two of the four batches before."""
    validated, step = [], VisionLanguageModule.validation_step

    def count(self, batch, batch_idx):
        validated.extend(set(batch.conversations.examples.tolist()))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(VisionLanguageModule, "validation_step", count)
    monkeypatch.setattr(
        VisionLanguageModule,
        "on_validation_epoch_start",
        lambda self: validated.clear(),
    )
    config = make_config(
        tmp_path / "config.yaml",
        tiny_base,
        tiny_data,
        data={"val": str(tiny_data / "train.jsonl")},
        trainer={"max_epochs": 1, "max_steps": -1},
    )
    main(["fit", "--config", str(config)])
    assert sorted(validated) == list(range(24))


def test_stage_two_starts_from_the_projector_of_stage_one(tiny_base, tiny_data, tmp_path):
    captions = {"train": str(tiny_data / "captions.jsonl"), "val": None, "task": None}
    first = make_config(
        tmp_path / "one" / "config.yaml",
        tiny_base,
        tiny_data,
        model={"adapter": None},
        data=captions,
        trainer={"max_steps": 2},
    )
    main(["fit", "--config", str(first)])
    stage_one = run_directory(first)
    assert not (stage_one / "adapters").exists()
    still = {"start_from": str(stage_one), "learning_rate": 0.0, "projector_learning_rate": 0.0}
    second = make_config(
        tmp_path / "two" / "config.yaml", tiny_base, tiny_data, model=still, trainer={"max_steps": 1}
    )
    main(["fit", "--config", str(second)])
    before = load_file(stage_one / "projector.safetensors")
    after = load_file(run_directory(second) / "adapters" / "default" / "projector.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert (run_directory(second) / "adapters" / "default").is_dir()


def test_start_from_another_base_is_refused(tiny_run, tiny_data, tmp_path):
    other = make_base(tmp_path / "other", seed=1)
    config = make_config(tmp_path / "config.yaml", other, tiny_data, model={"start_from": str(tiny_run)})
    with pytest.raises(SystemExit, match=r"does not belong to this base(.|\n)*language.weights"):
        main(["fit", "--config", str(config)])


def test_starting_from_an_adapter_of_another_shape_is_refused(tiny_base, tiny_data, tiny_run, tmp_path):
    lora = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 2}}
    changes = {"start_from": str(tiny_run), "adapter": lora}
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, model=changes)
    with pytest.raises(SystemExit, match="rank"):
        main(["fit", "--config", str(config)])


def test_a_budget_chooses_the_places_and_the_run_goes_on_with_them(tiny_base, tiny_data, tmp_path, capsys):
    """A rank-4 LoRA on q costs 4 * (64 + 64) = 512 numbers, and no choice may cost more than 2,000."""
    config = make_config(tmp_path / "config.yaml", tiny_base, tiny_data, trainer={"max_steps": 2})
    budget = ["--model.adapter.init_args.target_modules", "top-2000"]
    main(["fit", "--config", str(config), *budget])
    assert "parameters" in capsys.readouterr().out
    saved = load_file(run_directory(config) / "adapters" / "default" / "adapter_model.safetensors")
    assert 1000 < sum(tensor.numel() for tensor in saved.values()) <= 2000
    main(["test", "--config", str(config), *budget])
    with pytest.raises(SystemExit, match="a budget of 20 parameters pays for no site"):
        main(["fit", "--config", str(config), "--model.adapter.init_args.target_modules", "top-20"])


HYBRID = [
    {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 2, "layers": [0]}},
    {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 3, "layers": "1:"}},
    {"class_path": "mmpeft.adapters.PromptConfig", "init_args": {"num_virtual_tokens": 2}},
]
ADAPTERS = {
    "DoraConfig": {"rank": 2},
    "IA3Config": {"layers": "last 50%"},
    "BitFitConfig": {},
    "BottleneckConfig": {"width": 3},
    "FullConfig": {"target_modules": ["q_proj"]},
    "PromptConfig": {"num_virtual_tokens": 2},
    "PTuningConfig": {"num_virtual_tokens": 2},
    "PrefixConfig": {"num_virtual_tokens": 2},
    "ImagePromptConfig": {},
    "HybridConfig": {"methods": HYBRID},
}


OFTEN = ("IA3Config", "BottleneckConfig", "PrefixConfig", "HybridConfig")
"""Methods of each kind, of which the fast suite has a fit."""


@pytest.mark.parametrize(
    "name", [pytest.param(own, marks=() if own in OFTEN else pytest.mark.slow) for own in ADAPTERS]
)
def test_every_method_trains_is_tested_and_goes_on_by_the_command_line(name, tiny_base, tiny_data, tmp_path):
    adapter = {"class_path": f"mmpeft.adapters.{name}", "init_args": ADAPTERS[name]}
    config = make_config(
        tmp_path / "config.yaml", tiny_base, tiny_data, model={"adapter": adapter}, trainer={"max_steps": 2}
    )
    main(["fit", "--config", str(config)])
    main(["test", "--config", str(config)])
    more = [
        "--model.start_from",
        str(run_directory(config)),
        "--trainer.default_root_dir",
        str(tmp_path / "more"),
    ]
    if name == "PTuningConfig":
        with pytest.raises(SystemExit, match="use the same settings"):
            main(["fit", "--config", str(config), *more])
    else:
        main(["fit", "--config", str(config), *more])
