"""Out of memory: smaller pieces of a batch whose gradients are added up, and the same steps."""

import json

import pytest
import torch

from mmpeft.cli import main
from mmpeft.models.multimodal import MultimodalModel
from mmpeft.models.token_losses import TokenLosses
from tests.tiny import COLOURS, make_config, run_directory, write_jsonl
from tests.training.run_life import curves, trained

ROOM = 2
"""Rows that fit."""
IA3 = {"class_path": "mmpeft.adapters.IA3Config"}
LORA = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 4, "dropout": 0.3}}


class NoRoom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, *_):
        raise torch.OutOfMemoryError("no memory in the backward")


def too_small(monkeypatch, where, rows):
    """A device without memory for more rows."""
    losses_of, met = MultimodalModel.token_losses, []

    def token_losses(self, batch, *rest, **named):
        if not torch.is_grad_enabled():
            return losses_of(self, batch, *rest, **named)
        met.append(len(batch.adapters))
        if met[-1] > rows and where == "forward":
            raise torch.OutOfMemoryError("no memory in the forward")
        found = losses_of(self, batch, *rest, **named)
        if met[-1] > rows:
            return TokenLosses(NoRoom.apply(found.nll), found.correct, found.rows, found.segments)
        return found

    monkeypatch.setattr(MultimodalModel, "token_losses", token_losses)
    return met


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_base, tiny_data, choice_data):
    """Rows with and without choices and images, and of two micro-batches a step."""
    folder = tmp_path_factory.mktemp("pieces")
    rows = [json.loads(line) for line in (choice_data / "train.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        if "choices" in row:
            row["choices"] = [*sorted(COLOURS), "a colour that is not there"]
    texts = [json.loads(line) for line in (tiny_data / "text.jsonl").read_text().splitlines()]
    texts = [
        {
            "id": row["question"],
            "conversations": [
                {"from": "human", "value": row["question"]},
                {"from": "gpt", "value": row["answer"]},
            ],
        }
        for row in texts
    ]
    path = write_jsonl(folder / "train.jsonl", [*rows, *texts])
    return make_config(
        folder / "config.yaml",
        tiny_base,
        tiny_data,
        model={
            "adapter": {"class_path": "mmpeft.adapters.HybridConfig", "init_args": {"methods": [IA3, LORA]}},
            "learning_rate": 1e-3,
            "projector_learning_rate": 1e-3,
        },
        data={
            "train": str(path),
            "image_root": str(tiny_data),
            "packing": {"batch_size": 5, "max_conversations": 2},
        },
        trainer={"max_steps": 4, "log_every_n_steps": 1, "accumulate_grad_batches": 2},
    )


@pytest.fixture(scope="module")
def whole(config):
    main(["fit", "--config", str(config)])
    return run_directory(config)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_does_not_fit_goes_in_pieces_and_the_steps_are_the_same(
    config, whole, tmp_path, monkeypatch, capsys, where
):
    met = too_small(monkeypatch, where, ROOM)
    main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"])
    for name, tensors in trained(whole).items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(trained(tmp_path)[name][key], tensor, rtol=0, atol=1e-6)
    for want, got in zip(curves(whole), curves(tmp_path), strict=True):
        assert {k: float(v) for k, v in got.items()} == pytest.approx(
            {k: float(v) for k, v in want.items()}, rel=1e-5, abs=1e-6
        )
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory")]
    assert f"at most {ROOM} are computed at once" in told[-1]
    assert len(told) <= 2, "what did not fit once is not tried again"
    assert max(met) > ROOM >= max(met[-4:])


def test_a_single_row_that_does_not_fit_is_told_with_what_to_set(config, tmp_path, monkeypatch):
    too_small(monkeypatch, "forward", 0)
    with pytest.raises(
        SystemExit, match=r"cpu has no memory for a single row of \d+ tokens: set .*gradient_check"
    ):
        main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"])
