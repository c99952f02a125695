"""`mmpeft fit --profile`: the table of where the time went, by a clock that goes on where the test says."""

import re
from types import SimpleNamespace

import pytest

from mmpeft.cli import main
from mmpeft.data import encoding, features, loader
from mmpeft.training import profile
from mmpeft.training.module import VisionLanguageModule
from mmpeft.training.profile import StepTimes
from mmpeft.training.step_losses import StepLosses
from tests.data.counting_encoder import CountingEncoder
from tests.tiny import make_config

STEPS = 6


class Clock:
    """Seconds that pass only inside of what takes them."""

    def __init__(self, monkeypatch):
        self.now, self._monkeypatch = 0.0, monkeypatch
        for module in (profile, encoding):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def takes(self, owner, name, seconds):
        told = getattr(owner, name)

        def slow(*arguments, **named):
            self.now += seconds
            return told(*arguments, **named)

        self._monkeypatch.setattr(owner, name, slow)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_table_says_what_took_how_long(tmp_path, tiny_base, tiny_data, capsys, clock, monkeypatch):
    """A step waits one second for its batch, is three in the forward and two in clipping."""
    config = make_config(tmp_path / "fit.yaml", tiny_base, tiny_data, trainer={"max_steps": STEPS})
    batches = loader.ahead

    def waits(*arguments):
        for batch in batches(*arguments):
            clock.now += 1
            yield batch

    monkeypatch.setattr(loader, "ahead", waits)
    clock.takes(StepLosses, "train", 3)
    clock.takes(StepLosses, "validate", 7)  # of no step
    clock.takes(VisionLanguageModule, "configure_gradient_clipping", 2)
    main(["fit", "--config", str(config), "--profile", "--trainer.num_sanity_val_steps=0"])
    shown = capsys.readouterr().out
    assert f"where the time of {STEPS} batches went" in shown
    rows = re.findall(r"│ (\S.*?) +│ +([\d,.]+) │ +([\d.]+%) │", shown)
    table = {name: (ms, share) for name, ms, share in rows}
    assert table.pop("encoder, beside them")  # in a thread of its own, for which the clock may jump meanwhile
    assert table == {
        "waiting on data": ("1,000.0", "16.7%"),
        "forward": ("3,000.0", "50.0%"),
        "backward": ("0.0", "0.0%"),
        "optimiser": ("2,000.0", "33.3%"),
        "callbacks": ("0.0", "0.0%"),
        "all of these": ("6,000.0", "100.0%"),
    }


def test_the_time_in_the_encoder_is_counted(tiny_data, clock):
    one, two, three, *_ = sorted((tiny_data / "images").glob("*.png"))
    cache = features.FeatureCache(None, CountingEncoder())
    clock.takes(encoding, "encode", 2)
    cache.load([one, two])
    cache.load([two, one])
    cache.load([two, three])
    assert cache.encoding.seconds == 4


def test_it_is_of_a_fit_and_without_another_profiler(tiny_config):
    with pytest.raises(SystemExit, match="--profile belongs to `mmpeft fit`"):
        main(["test", "--config", str(tiny_config), "--profile"])
    with pytest.raises(SystemExit, match=r"--profile and trainer\.profiler both time the run"):
        main(["fit", "--config", str(tiny_config), "--profile", "--trainer.profiler=simple"])


def test_a_part_inside_another_is_not_counted_twice(clock):
    times = StepTimes()
    with times.profile("run_training_batch"):
        clock.now += 1
        with times.profile("[Strategy]SingleDeviceStrategy.training_step"):
            clock.now += 2
            with times.profile("[Callback]Own.on_before_something"):
                clock.now += 4
        clock.now += 8
        with times.profile("[Strategy]SingleDeviceStrategy.backward"):
            clock.now += 16
    clock.now += 32
    assert times.seconds == {"optimiser": 9, "forward": 6, "backward": 16}
    assert times.batches == 1
