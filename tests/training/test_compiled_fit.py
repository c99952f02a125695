"""`model.compile`: a fit is the same compiled, and says what that costs, what it saves and when it pays."""

import pytest
import torch
from safetensors.torch import load_file

from mmpeft.cli import main
from mmpeft.errors import RefusedError
from mmpeft.models.compilation import CompiledLayers
from mmpeft.training import compiled_steps
from mmpeft.training.compiled_steps import CompiledSteps, Trial
from mmpeft.training.step_losses import StepLosses
from tests.tiny import make_config, run_directory
from tests.training.test_pieces import too_small

LORA = {"class_path": "mmpeft.adapters.LoraConfig", "init_args": {"rank": 4, "alpha": 8, "dropout": 0.2}}


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch):
    """Graphs as they are traced, without a compiler of C++."""
    monkeypatch.setattr(CompiledSteps, "backend", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def fit(tmp_path, tiny_base, tiny_data):
    """Runs a fit and returns what it trained."""

    def run(compile, steps=6):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        changes = {"model": {"compile": compile, "adapter": LORA}, "trainer": {"max_steps": steps}}
        config = make_config(folder / "fit.yaml", tiny_base, tiny_data, **changes)
        main(["fit", "--config", str(config)])
        own = run_directory(config) / "adapters" / "default"
        return load_file(own / "adapter_model.safetensors") | load_file(own / "projector.safetensors")

    return run


def test_a_compiled_fit_trains_what_an_eager_one_does(fit, capsys):
    eager, compiled = fit(False), fit(True)
    told = capsys.readouterr().err
    assert told.count("compile: ") == 1
    assert "s spent" in told
    for name, each in eager.items():
        torch.testing.assert_close(compiled[name], each, rtol=1e-4, atol=1e-5)


def test_the_break_even_is_said():
    trial = Trial(30.0, 0.7, 0.6)
    assert trial.pays_after == pytest.approx(300)
    assert trial.told(2000) == (
        "compile: 30 s spent, a batch takes 0.6 s in place of 0.7 s: it pays after 300 batches, of 2,000"
    )
    assert Trial(30.0, 0.6, 0.7).told(9).endswith("0.7 s in place of 0.6 s: it never pays")


@pytest.fixture
def in_use(monkeypatch):
    """Whether layers were compiled at every step that was taken."""
    made, seen = [], []

    class Watched(CompiledLayers):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    def train(own, *arguments):
        seen.append(bool(made and made[-1]._replaced))
        return learn(own, *arguments)

    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    learn = StepLosses.train
    monkeypatch.setattr(StepLosses, "train", train)
    monkeypatch.setattr(compiled_steps, "CompiledLayers", Watched)
    return seen


def test_auto_leaves_short_runs_alone(fit, in_use, capsys):
    fit("auto", steps=3)
    assert "compile: left out, 3 batches of" in capsys.readouterr().err
    assert in_use == [False] * 3


@pytest.mark.parametrize(
    ("wanted", "after", "used"), [("auto", 0.5, True), ("auto", 2.0, False), (True, 2.0, True)]
)
def test_auto_compiles_where_it_pays(wanted, after, used, fit, in_use, capsys, monkeypatch):
    monkeypatch.setattr(compiled_steps, "USUAL_SECONDS", 0.0)

    def found(run, layers):
        layers.use()
        return Trial(1.0, 1.0, after)

    monkeypatch.setattr(compiled_steps, "try_out", found)
    fit(wanted, steps=3)
    assert in_use == [used] * 3
    assert ("it pays after 2 batches, of 3" if after < 1 else "it never pays") in capsys.readouterr().err


def test_a_model_that_torch_cannot_compile_is_refused_or_left_alone(fit, in_use, capsys, monkeypatch):
    def fails(forward, **_):
        raise RuntimeError("no compiler of C++")

    monkeypatch.setattr(compiled_steps, "USUAL_SECONDS", 0.0)
    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(
        SystemExit,
        match=r"torch cannot compile this model here .*no compiler of C.*set model\.compile to false",
    ):
        fit(True, steps=1)
    fit("auto", steps=2)
    assert in_use == [False] * 2
    assert "compile: left out, torch cannot compile this model here" in capsys.readouterr().err


def test_the_trial_takes_a_batch_that_does_not_fit_in_pieces_as_a_step_does(fit, monkeypatch, capsys):
    met = too_small(monkeypatch, "forward", 1)
    fit(True, steps=1)
    assert max(met) > 1 == met[-1]
    assert "compile: " in capsys.readouterr().err


def test_a_fit_that_is_refused_leaves_the_run_before_it_as_it_was(
    tmp_path, tiny_base, tiny_data, monkeypatch
):
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer={"max_steps": 1})
    main(["fit", "--config", str(config)])
    directory = run_directory(config)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    def fails(forward, **_):
        raise RuntimeError("no compiler of C++")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(SystemExit, match="torch cannot compile"):
        main(["fit", "--config", str(config), "--model.compile=true"])
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_other_words_are_refused(fit, capsys):
    with pytest.raises(SystemExit):
        fit("sometimes")
    assert "model.compile" in capsys.readouterr().err
    with pytest.raises(RefusedError, match=r"model\.compile is 'on'; it is true, false or auto"):
        CompiledSteps("on")  # pyright: ignore[reportArgumentType]
