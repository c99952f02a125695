"""The intake by itself: which bodies are waited for, and which requests get a place."""

import asyncio
import json

import pytest

from mmpeft.serving.intake import Intake
from mmpeft.serving.keys import Keys
from mmpeft.serving.limits import Limits

MOST = 3


class Client:
    """A request whose body comes once ``goes_on`` is set."""

    def __init__(self, intake: Intake):
        self.goes_on = asyncio.Event()
        self.sent: list[dict] = []
        scope = {"type": "http", "path": "/v1/score", "method": "POST", "headers": []}
        self.task = asyncio.create_task(intake(scope, self._receive, self._send))

    async def _receive(self):
        await self.goes_on.wait()
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def _send(self, event):
        self.sent.append(event)

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def message(self):
        return json.loads(self.sent[1]["body"])["error"]["message"]


def with_intake(scenario, **limits):
    """Runs a scenario with an intake whose requests are answered 200 once ``answering`` is set."""

    async def run():
        answering = asyncio.Event()

        async def app(scope, receive, send):
            await receive()
            await answering.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        intake = Intake(app, Keys(), Limits(**limits), MOST)
        await scenario(intake, answering)
        assert not intake.under_way
        assert not intake.coming

    asyncio.run(run())


async def settle():
    """Lets every task go on until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_slow_bodies_make_way_and_keep_nobody_out():
    async def scenario(intake, answering):
        answering.set()
        slow = [Client(intake) for _ in range(5)]
        await settle()
        assert [client.status for client in slow] == [408, 408, None, None, None]
        assert "made way for 3 that began to come after it" in slow[0].message
        quick = Client(intake)
        quick.goes_on.set()
        await quick.task
        assert quick.status == 200
        await settle()
        assert [client.status for client in slow] == [408, 408, 408, None, None]
        for client in slow:
            client.goes_on.set()
        await settle()
        assert [client.status for client in slow[3:]] == [200, 200]

    with_intake(scenario)


def test_a_body_that_is_still_coming_takes_no_place():
    async def scenario(intake, answering):
        slow = Client(intake)
        whole = [Client(intake) for _ in range(MOST)]
        for client in whole:
            client.goes_on.set()
        await settle()
        assert intake.under_way == MOST
        late = Client(intake)
        slow.goes_on.set()
        await settle()
        assert [slow.status, late.status] == [429, 429]
        answering.set()
        await settle()
        assert [client.status for client in whole] == [200] * MOST

    with_intake(scenario)


@pytest.mark.parametrize("others", [0, MOST - 1])
def test_a_body_has_its_time_where_there_is_room(others):
    async def scenario(intake, answering):
        answering.set()
        clients = [Client(intake) for _ in range(1 + others)]
        await asyncio.gather(*(client.task for client in clients))
        assert {client.status for client in clients} == {408}
        assert "not there within 0.02 s (limits.body_seconds)" in clients[0].message
        again = Client(intake)
        again.goes_on.set()
        await again.task
        assert again.status == 200

    with_intake(scenario, body_seconds=0.02)
