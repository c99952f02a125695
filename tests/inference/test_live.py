"""The live engine: every request is answered as alone, whoever comes and goes beside it."""

import gc
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from mmpeft.adapters import (
    ALoraConfig,
    BottleneckConfig,
    DoraConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from mmpeft.adapters.peft_format import save_adapter
from mmpeft.errors import RefusedError, UnknownNameError
from mmpeft.inference import chunks, finetunes, live_prompts
from mmpeft.inference.decoding import Sampling
from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings
from mmpeft.inference.requests import Request
from mmpeft.inference.tickets import CancelledError, FailedError, OverloadedError
from mmpeft.names import RESERVED_NAME
from tests.inference.test_engine import alone, ask, mixed
from tests.tiny import make_record

SMALL = LiveSettings(max_rows=8, max_columns=256, max_waiting=64, chunk=24)
FIXED = replace(SMALL, deterministic=True)
SHORT, LONG = Sampling(6), Sampling(40)
WAIT = 120
CONFIGS = {
    "lora": LoraConfig(rank=4),
    "lora8": LoraConfig(rank=8, target_modules="all-linear"),
    "ia3": IA3Config(),
    "ia3out": IA3Config(target_modules=["o_proj", "down_proj"]),
    "prefix": PrefixConfig(4),
    "prompt": PromptConfig(3),
    "dora": DoraConfig(rank=4),
    "after": BottleneckConfig(width=6),
}


@pytest.fixture(scope="module")
def eight(vlm, randomise):
    """The run with finetunes of more methods, and one that acts from the end of the prompt on."""
    prompt = vlm.engine.encode(ask_text("why?")).conversations[0].ids
    for name, config in (CONFIGS | {"alora": ALoraConfig(invocation_tokens=prompt[-2:], rank=4)}).items():
        vlm.model.bank.add(name, config)
        randomise(vlm.model.bank, name)
    return vlm


@pytest.fixture
def live(eight):
    """A live engine with small bounds."""
    with LiveEngine(eight.engine, SMALL) as live:
        yield live


@pytest.fixture
def folder(eight, tmp_path):
    """Saves a finetune of the run under its name."""

    def save(name):
        save_adapter(eight.model.bank, name, tmp_path / name, "base")
        return tmp_path / name

    return save


def ask_text(question, adapter=None, sampling=SHORT):
    return Request(make_record(question=question, answer=None), adapter, sampling=sampling)


def answers(live, requests, **how):
    tickets = [live.submit(request, **how) for request in requests]
    return [ticket.result(WAIT) for ticket in tickets]


def numbers(live, request):
    """The tokens of an answer with their likelihoods, to the last bit."""
    ticket = live.submit(request, logprobs=3)
    assert ticket.result(WAIT).error is None
    return [each for piece in ticket.events() for each in piece.logprobs]


def beside(live, request, neighbours):
    """`numbers` of a request that joins others, of which some leave before it."""
    tickets = [live.submit(each) for each in neighbours[::2]]
    while not all(ticket.written_tokens or ticket.completion for ticket in tickets):
        time.sleep(0.001)
    late = [live.submit(each) for each in neighbours[1::2]]
    tickets[0].cancel()
    found = numbers(live, request)
    for ticket in [*tickets, *late]:
        ticket.result(WAIT)
    return found


@pytest.mark.parametrize("settings", [SMALL, FIXED, replace(SMALL, prefix_bytes=0, feature_bytes=0)])
def test_every_request_is_answered_as_alone(eight, images, settings):
    requests = [*mixed(images), *mixed(images), *[ask(images[1], adapter=name) for name in eight.adapters]]
    want = alone(eight.engine, requests)
    with LiveEngine(eight.engine, settings) as live:
        tickets = [live.submit(request) for request in requests]
        for ticket, request, own in zip(tickets, requests, want, strict=True):
            found = ticket.result(WAIT)
            assert (found.text, found.finish_reason, found.error) == (own.text, own.finish_reason, None)
            assert found.scores is None or found.scores == pytest.approx(own.scores, abs=1e-5)
            assert "".join(piece.text for piece in ticket.events()) == (own.text if not request.rank else "")
        assert live.statistics()["running"] == live.statistics()["columns"] == 0


def test_a_model_whose_conversations_share_no_rows_is_served_too(eight, images, monkeypatch):
    requests = mixed(images)
    want = alone(eight.engine, requests)
    reader = eight.model.reader
    monkeypatch.setattr(reader, "reading", replace(reader.reading, packed=False))
    with LiveEngine(eight.engine, SMALL) as live:
        found = answers(live, requests)
    assert [own.text for own in found] == [own.text for own in want]


def test_what_is_wrong_with_a_request_is_its_own_error(live, eight, images, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no image")
    bad = {
        "torn.png": ask(str(tmp_path / "torn.png")),
        "has no choices": replace(ask(images[0]), rank=True),
        "more than max_length": ask_text("red " * 3000),
        "a row has room for 256": ask_text("why?", sampling=Sampling(250)),
        "read_truth": replace(ask_text("why?"), read_truth=True),
    }
    good = mixed(images)
    found = answers(live, [*bad.values(), *good])
    for message, completion in zip(bad, found, strict=False):
        with pytest.raises(RefusedError, match=message):
            raise completion.refusal
    assert [c.text for c in found[len(bad) :]] == [c.text for c in alone(eight.engine, good)]
    with pytest.raises(UnknownNameError, match=f"no finetune 'nobody'; there are: .*{RESERVED_NAME}"):
        live.submit(ask_text("why?", "nobody"))


@pytest.mark.parametrize("name", [None, "lora", "prefix", "alora", "dora"])
def test_fixed_shapes_give_the_same_bits_beside_anybody(eight, images, name):
    request = ask(images[0], adapter=name, sampling=Sampling(9))
    long = ask_text("is it red? " * 20, "lora8", LONG)
    neighbours = [
        long,
        *(ask(images[n % 4], adapter=other, sampling=LONG) for n, other in enumerate(CONFIGS)),
    ][:7]
    with LiveEngine(eight.engine, FIXED) as live:
        want = numbers(live, request)
    with LiveEngine(eight.engine, FIXED) as live:
        assert beside(live, request, neighbours) == want
        assert numbers(live, request) == want, "now it is read from what was kept"


def test_a_prefix_of_one_finetune_is_not_anothers(eight, images):
    """Cached under one, asked under the other: as if nothing were cached, bit by bit."""
    first, second = (ask(images[0], adapter=name, sampling=Sampling(9)) for name in ("lora", "other"))
    with LiveEngine(eight.engine, SMALL) as live:
        want = numbers(live, second)
    with LiveEngine(eight.engine, SMALL) as live:
        numbers(live, first)
        ticket = live.submit(second, logprobs=3)
        ticket.result(WAIT)
        assert ticket.cached_tokens == 0
        assert [each for piece in ticket.events() for each in piece.logprobs] == want
        again = live.submit(second)
        again.result(WAIT)
        assert again.cached_tokens >= 16


def cached(live, request):
    ticket = live.submit(request)
    assert ticket.result(WAIT).error is None
    return ticket.cached_tokens


def test_the_base_and_finetunes_that_have_not_acted_yet_share_a_prefix(live, eight, images):
    question = "what color is it? " * 4
    want = alone(eight.engine, [ask(images[0], question, adapter="alora")])[0].text
    assert cached(live, ask(images[0], question)) == 0
    ticket = live.submit(ask(images[0], question, adapter="alora"))
    assert ticket.result(WAIT).text == want
    assert ticket.cached_tokens >= 16
    assert cached(live, ask(images[0], question, adapter="lora")) == 0
    assert cached(live, ask(images[1], question)) == 0, "another image"


def test_a_replaced_finetune_has_other_keys_and_requests_keep_theirs(eight, images, folder, tmp_path):
    request = ask(images[0], "is it red? " * 4, adapter="x", sampling=LONG)
    old, new = (replace(request, adapter=name) for name in ("lora", "ia3"))
    want_old, want_new = (own.text for own in alone(eight.engine, [old, new]))
    assert want_old != want_new
    before = eight.model.bank.names
    with LiveEngine(eight.engine, SMALL) as live:
        live.load("x", folder("lora"))
        assert cached(live, request) == 0
        assert cached(live, request) > 0
        running = live.submit(request)
        live.load("x", folder("ia3"))
        late = live.submit(request)
        assert (running.result(WAIT).text, late.result(WAIT).text) == (want_old, want_new)
        assert late.cached_tokens == 0
        live.unload("x")
        with pytest.raises(UnknownNameError):
            live.submit(request)
        with pytest.raises(UnknownNameError):
            live.unload("x")
        answers(live, [ask_text("why?")] * 2)
    assert eight.model.bank.names == before


def test_a_finetune_brings_its_projector(eight, images, folder, tmp_path):
    from safetensors.torch import save_file

    tensors = {key: 2 * tensor for key, tensor in eight.model.projector.tensors().items()}
    place = folder("lora")
    request = ask(images[0], adapter="seeing", sampling=Sampling(9))
    with LiveEngine(eight.engine, replace(SMALL, prefix_bytes=0)) as live:
        live.load("plain", place)
        save_file(tensors, place / "projector.safetensors")
        live.load("seeing", place)
        seeing, plain = (numbers(live, replace(request, adapter=name)) for name in ("seeing", "plain"))
        assert seeing != plain
        assert [each.token for each in plain] == [
            each.token for each in numbers(live, replace(request, adapter="lora"))
        ]
        live.unload("seeing")
        live.load("again", place)
        assert numbers(live, replace(request, adapter="again")) == seeing
        slots = len(eight.model.projector.weight)
        for name in ("plain", "again"):
            live.unload(name)
    assert slots == 2, "the slot is used again"


def test_a_finetune_is_read_and_checked_beside_the_model(live, folder, monkeypatch):
    """The steps of others wait for its tensors to be put into their places, and for nothing else."""
    threads = {}

    def told(action, *given, **named):
        threads[action.__name__] = threading.current_thread().name
        return action(*given, **named)

    for action in (finetunes.read_adapter, finetunes.add_adapter):
        monkeypatch.setattr(finetunes, action.__name__, partial(told, action))
    live.load("another", folder("ia3"))
    live.unload("another")
    assert threads == {"read_adapter": threading.current_thread().name, "add_adapter": "live engine"}


@pytest.mark.parametrize("damage", ["nothing", "nan", "zeros"])
def test_a_refused_load_changes_nothing(eight, folder, damage):
    from safetensors.torch import load_file, save_file

    place = folder("lora")
    file = place / "adapter_model.safetensors"
    value = {"nan": torch.nan, "zeros": 0.0}.get(damage)
    if value is None:
        file.unlink()
    else:
        save_file({key: torch.full_like(t, value) for key, t in load_file(file).items()}, file)
    before = eight.model.bank.names
    with LiveEngine(eight.engine, SMALL) as live:
        want = numbers(live, ask_text("why?", "lora"))
        with pytest.raises(RefusedError):
            live.load("lora", place)
        assert live.names() == eight.model.bank.names == before
        assert numbers(live, ask_text("why?", "lora")) == want


def test_a_diverged_finetune_fails_alone(eight, images, poison, monkeypatch):
    others = [ask(images[0], adapter=name, sampling=LONG) for name in ("lora", "prompt", None)]
    eight.model.bank.add("sick", LoraConfig(rank=2))
    try:
        poison(eight.model.bank, "sick")
        sick = ask(images[0], adapter="sick", sampling=LONG)
        drawn = replace(sick, sampling=Sampling(8, temperature=1.5, top_p=0.9))
        ranked = replace(sick, rank=True, record=sick.record | {"choices": ["red", "blue"]})
        with LiveEngine(eight.engine, SMALL) as live:
            found = answers(live, [others[0], sick, others[1], drawn, ranked, others[2]])
            assert live.healthy
    finally:
        eight.model.bank.remove("sick")
    for number in (1, 3, 4):
        assert isinstance(found[number].refusal, FailedError)
        assert "'sick' gives numbers that are NaN" in found[number].error
    assert [found[n].text for n in (0, 2, 5)] == [own.text for own in alone(eight.engine, others)]


def test_a_step_that_raises_fails_those_in_it_and_the_next_ones_are_answered(
    live, eight, images, monkeypatch
):
    request = ask(images[0], adapter="lora", sampling=LONG)
    first, second = (live.submit(request) for _ in range(2))
    while not first.written_tokens or not second.written_tokens:
        time.sleep(0.001)
    decode = eight.model.reader.decode

    def broken(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr(eight.model.reader, "decode", broken)
    for ticket in (first, second):
        with pytest.raises(FailedError, match=r"in this step \(RuntimeError: no memory\)"):
            raise ticket.result(WAIT).refusal
    assert not live.healthy
    monkeypatch.setattr(eight.model.reader, "decode", decode)
    assert live.submit(request).result(WAIT).text == alone(eight.engine, [request])[0].text
    assert live.healthy
    assert live.statistics()["failures"] >= 1


def test_a_long_prompt_is_read_between_the_steps_of_others(eight, images, monkeypatch):
    """At most a chunk between two tokens, and a short prompt waits for two of them at most."""
    events = []
    read, settings = chunks.read_chunks, replace(SMALL, prefix_bytes=0)

    def told(model, prompts, counts):
        events.append(sum(counts))
        return read(model, prompts, counts)

    monkeypatch.setattr(live_prompts, "read_chunks", told)
    with LiveEngine(eight.engine, settings) as live:
        writing = live.submit(
            ask_text("why?", sampling=Sampling(60)), on_event=lambda _: events.append("token")
        )
        while not writing.written_tokens:
            time.sleep(0.001)
        texts = ["is it red? " * 25, "is it blue? " * 25]
        long = [live.submit(ask_text(text, "lora", Sampling(1))) for text in texts]
        while not any(ticket.prompt_tokens for ticket in long):
            time.sleep(0.001)
        short = live.submit(ask_text("is it?", "ia3", Sampling(1)))
        for ticket in (writing, short, *long):
            assert ticket.result(WAIT).error is None
    assert sum(n for n in events if n != "token") >= sum(t.prompt_tokens for t in long)
    assert max(n for n in events if n != "token") <= settings.chunk
    first, last = events.index("token"), len(events) - events[::-1].index("token")
    between = "".join("t" if event == "token" else "c" for event in events[first:last])
    assert "cc" not in between, "a token of who is writing between any two chunks"
    assert short.ended < min(ticket.ended for ticket in long)


def test_who_is_cancelled_leaves_within_a_step(live, eight, images):
    written = []
    ticket = live.submit(ask(images[0], adapter="lora", sampling=LONG), on_event=written.append)
    other = live.submit(ask(images[1], adapter="ia3", sampling=LONG))
    while not ticket.written_tokens:
        time.sleep(0.001)
    ticket.cancel()
    steps = live.statistics()["steps"]
    assert isinstance(ticket.result(WAIT).refusal, CancelledError)
    assert live.statistics()["steps"] <= steps + 2
    assert live.statistics()["running"] <= 1
    assert other.result(WAIT).text == alone(eight.engine, [other.request])[0].text
    assert written[-1] is ticket.completion
    ticket.cancel()
    again = live.submit(ask(images[0], sampling=LONG))
    again.cancel()
    assert again.result(WAIT).finish_reason in ("error", "stop", "length")


def test_a_caller_that_raises_is_cancelled_and_harms_nobody(live, eight, images):
    def gone(_):
        raise ConnectionError

    ticket = live.submit(ask(images[0], adapter="lora", sampling=LONG), on_event=gone)
    other = live.submit(ask(images[1], adapter="ia3"))
    assert isinstance(ticket.result(WAIT).refusal, CancelledError)
    assert other.result(WAIT).error is None


def test_too_many_requests_are_refused_at_once_and_others_keep_a_share(eight, images):
    request = ask(images[0], adapter="lora", sampling=Sampling(6))
    with LiveEngine(eight.engine, replace(SMALL, max_rows=2, max_waiting=8)) as live:
        taken, refused = [], []
        for _ in range(100):
            try:
                taken.append(live.submit(request))
            except OverloadedError as error:
                refused.append(error)
        assert len(taken) >= 6
        assert len(refused) >= 50
        assert all(0 < error.retry_after < 600 for error in refused)
        other = live.submit(replace(request, adapter="ia3"))
        assert other.result(WAIT).error is None
        assert sum(ticket.completion is None for ticket in taken) >= len(taken) - 5, (
            "it was not behind them all"
        )
        assert {ticket.result(WAIT).text for ticket in taken} == {alone(eight.engine, [request])[0].text}
        assert live.submit(request).result(WAIT).error is None


def test_draining_ends_what_is_there_and_takes_nothing_more(eight, images):
    request = ask(images[0], adapter="lora")
    live = LiveEngine(eight.engine, SMALL)
    with pytest.raises(OverloadedError):
        live.submit(request)
    live.start()
    tickets = [live.submit(request) for _ in range(4)]
    assert live.drain(WAIT)
    assert [ticket.result(0).error for ticket in tickets] == [None] * 4
    with pytest.raises(OverloadedError):
        live.submit(request)
    live.start()
    slow = live.submit(ask_text("why?", sampling=Sampling(200)))
    assert not live.drain(0)
    assert isinstance(slow.result(0).refusal, CancelledError)


def test_clients_in_threads_over_finetunes_that_come_and_go(eight, images, folder):
    """32 clients, eight finetunes; beside them one more is loaded, replaced and unloaded all the time."""
    requests = {
        name: [ask(images[n], adapter=name), ask_text("is red a color?", name)]
        for n, name in enumerate(CONFIGS)
    }
    want = {name: [own.text for own in alone(eight.engine, asked)] for name, asked in requests.items()}
    places = [folder("lora"), folder("ia3")]
    moving = [ask_text("is red a color?", name) for name in ("lora", "ia3")]
    either = {own.text for own in alone(eight.engine, moving)}
    found, wrong, done = [], [], threading.Event()

    def client(number, live):
        name = list(CONFIGS)[number % len(CONFIGS)]
        for turn in range(3):
            ticket = live.submit(requests[name][turn % 2])
            found.append(ticket.result(WAIT))
            if found[-1].text != want[name][turn % 2]:
                wrong.append((name, found[-1]))

    def operator(live):
        turns = 0
        while not done.is_set() or turns < 3:
            live.load("moving", places[turns % 2])
            own = live.submit(replace(moving[0], adapter="moving"))
            if turns % 3 == 2:
                live.unload("moving")
            if own.result(WAIT).text not in either:
                wrong.append(("moving", own.completion))
            turns += 1

    with LiveEngine(eight.engine, SMALL) as live:
        clients = [threading.Thread(target=client, args=(number, live)) for number in range(32)]
        other = threading.Thread(target=operator, args=(live,))
        for thread in (*clients, other):
            thread.start()
        for thread in clients:
            thread.join()
        done.set()
        other.join()
        if "moving" in live.names():
            live.unload("moving")
        answers(live, [ask_text("why?")])
    assert len(found) == 96
    assert not wrong
    assert "moving" not in " ".join(eight.model.bank.names)


@pytest.mark.slow
def test_a_thousand_loads_leave_the_memory_where_it_was(eight, folder):
    """What the process holds after 1,000 cycles, beside what it held after the first hundred."""
    places = [folder(name) for name in ("lora", "ia3", "prefix", "dora")]

    def resident():
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1])

    before = eight.model.bank.names
    with LiveEngine(eight.engine, SMALL) as live:
        for turn in range(1000):
            live.load("moving", places[turn % 4])
            assert live.submit(ask_text("why?", "moving", Sampling(2))).result(WAIT).error is None
            live.unload("moving")
            if turn == 100:
                start = resident()
        answers(live, [ask_text("why?")])
        assert resident() <= 1.02 * start
    assert eight.model.bank.names == before
