"""The asyncio client against a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, Service, echo

from edgellm import AsyncClient, errors
from edgellm.scheduler.request import Finish, Request


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path) as service:
        service.engine.script = echo
        yield service


def two_words(engine: FakeEngine, request: Request) -> None:
    engine.say(request.key, b"one ")
    engine.say(request.key, b"two ")


def test_asking(service: Service) -> None:
    async def ask() -> None:
        async with AsyncClient(service.endpoint, timeout=5) as client:
            assert (await client.chat("hi")).text == "user:hi\nassistant:"
            assert (await client.generate("abc")).tokens == list(b"abc")
            assert await client.tokenize("hi") == [104, 105]
            assert (await client.health()).ready
            assert (await client.wait_ready(5)).ready
            assert (await client.status()).requests["done"] == 2
            assert (await client.model()).name == "fake-model"
            with pytest.raises(errors.TooLong):
                await client.generate("x", max_tokens=10_000)

    asyncio.run(ask())


def test_fifty_at_once_on_one_connection(service: Service) -> None:
    async def one(client: AsyncClient, number: int) -> str:
        if number % 2:
            return (await client.generate(f"text {number}")).text
        async with client.stream_generate(f"text {number}") as stream:
            return "".join([delta.text async for delta in stream])

    async def ask() -> None:
        async with AsyncClient(service.endpoint, timeout=5) as client:
            answers = await asyncio.gather(*(one(client, number) for number in range(50)))
            assert answers == [f"text {number}" for number in range(50)]
            assert (await client.status()).clients == 1

    asyncio.run(ask())


def test_leaving_and_being_cancelled_end_the_request(service: Service) -> None:
    async def ask() -> None:
        async with AsyncClient(service.endpoint, timeout=5) as client:
            service.engine.script = two_words
            async with client.stream_generate("x") as stream:
                async for delta in stream:
                    assert delta.text.startswith("one")
                    break
            task = asyncio.create_task(client.generate("y"))
            while len(service.engine.requests) < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(errors.RequestTimeout):
                await client.generate("z", timeout=0.05)
            while len(service.engine.stopped) < 3:
                await asyncio.sleep(0.001)
            assert {finish for _, finish in service.engine.stopped} == {Finish.CANCELLED}
            service.engine.script = echo
            assert (await client.generate("still here")).text == "still here"

    asyncio.run(ask())


def test_a_daemon_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    async def ask() -> None:
        service = Service(tmp_path)
        async with AsyncClient(service.endpoint, timeout=5, connect_timeout=0.2) as client:
            waiting = [asyncio.create_task(client.generate("x")) for _ in range(3)]
            while len(service.engine.requests) < 3:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(service.close)
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {errors.ShuttingDown}
            with pytest.raises((errors.Unreachable, errors.ConnectionLost)):
                await client.generate("x")
            with Service(tmp_path) as again:
                again.engine.script = echo
                await client.wait_ready(5)
                assert (await client.generate("back")).text == "back"

    asyncio.run(ask())


def test_a_draining_daemon_s_requests_go_to_the_next_and_its_open_ones_stay(tmp_path: Path) -> None:
    async def ask() -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with Service(tmp_path / "a") as first, Service(tmp_path / "b") as second:
            second.engine.script = echo
            endpoints = [first.endpoint, second.endpoint]
            async with AsyncClient(endpoints, timeout=5, connect_timeout=0.2) as client:
                slow = asyncio.create_task(client.generate("slow"))
                while not first.engine.requests:
                    await asyncio.sleep(0.001)
                first.server.drain()
                assert (await client.generate("quick")).text == "quick"
                async with client.stream_generate("more") as stream:
                    assert "".join([delta.text async for delta in stream]) == "more"
                first.engine.end(first.engine.requests[0].key, data=b"after all")
                assert (await slow).text == "after all"

    asyncio.run(ask())


def test_nobody_there(tmp_path: Path) -> None:
    async def ask() -> None:
        async with AsyncClient(f"ipc://{tmp_path}/none.sock", connect_timeout=0.05) as client:
            with pytest.raises(errors.Unreachable):
                await client.chat("hi")
            with pytest.raises(errors.RequestTimeout):
                await client.wait_ready(0.1)

    asyncio.run(ask())


def test_of_several_endpoints_the_only_one_there_speaks_for_itself(tmp_path: Path) -> None:
    async def ask() -> None:
        with Service(tmp_path, ready=False) as service:
            endpoints = [f"ipc://{tmp_path}/none.sock", service.endpoint]
            async with AsyncClient(endpoints, timeout=60, connect_timeout=60) as client:
                with pytest.raises(errors.Loading):
                    await client.chat("hi")
                assert client.endpoint == service.endpoint
                service.attach()
                service.engine.script = echo
                assert (await client.wait_ready(60)).ready
                assert (await client.chat("hi")).text
        async with AsyncClient(endpoints, connect_timeout=0.05) as client:
            with pytest.raises(errors.Unreachable) as raised:
                await client.chat("hi")
            assert all(f"nothing serves at {each}" in str(raised.value) for each in endpoints)
        for ask in (client.chat("hi"), client.wait_ready(1)):
            with pytest.raises(errors.ClientError, match="closed"):
                await ask

    asyncio.run(ask())
