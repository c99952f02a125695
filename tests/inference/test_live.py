"""The live engine: every request is answered as alone, whoever comes and goes beside it."""

import pytest

from mmpeft.inference.live import LiveEngine
from mmpeft.inference.live_settings import LiveSettings
from tests.inference.test_engine import alone, mixed


@pytest.mark.parametrize("deterministic", [False, True])
def test_every_request_is_answered_as_alone(vlm, images, deterministic):
    requests = mixed(images) * 2
    want = alone(vlm.engine, requests)
    with LiveEngine(vlm.engine, LiveSettings(max_columns=192, chunk=24, deterministic=deterministic)) as live:
        tickets = [live.submit(request) for request in requests]
        found = [ticket.result(60) for ticket in tickets]
        print(live.statistics())
    assert [f.error for f in found] == [None] * len(found)
    assert [f.text for f in found] == [w.text for w in want]
    assert [f.finish_reason for f in found] == [w.finish_reason for w in want]
    for own, other in zip(found, want, strict=True):
        assert (own.scores is None) == (other.scores is None)
        assert own.scores is None or own.scores == pytest.approx(other.scores, abs=1e-5)
    pieces = ["".join(piece.text for piece in ticket.events()) for ticket in tickets]
    assert [p for p, r in zip(pieces, requests, strict=True) if not r.rank] == [
        w.text for w, r in zip(want, requests, strict=True) if not r.rank
    ]
