"""The test link: what its schedule says, and what real sockets on loopback see of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.link_proxy import Line, LinkProxy, Phase, Schedule, main
from edge_agent.remote import Meter
from shared.errors import AddressInUse, CloudUnavailable, InvalidSetting
from shared.messages import Finished, FinishReason, Message, Open, Tokens
from shared.sampling import Sampling
from tests.scripted_target import ScriptedTarget
from tests.service import connection, serving


def one_phase(**fields: object) -> Schedule:
    return Schedule(phases=(Phase.model_validate(fields),))


# The schedule, without sockets.


def test_a_phase_holds_from_its_first_instant_and_the_last_one_for_ever():
    slow, gone, fast = Phase(for_s=10, rtt_ms=50), Phase(for_s=2, outage=True), Phase()
    schedule = Schedule(phases=(slow, gone, fast))
    assert [schedule.at(t) for t in (0, 9.99, 10, 11.99, 12, 1e6)] == [slow, slow, gone, gone, fast, fast]


def test_bytes_take_half_the_round_trip_each_way():
    assert Line(one_phase(rtt_ms=50), seed=0).arrival(3.0, 100) == pytest.approx(3.025)


def test_bytes_queue_for_the_bandwidth():
    line = Line(one_phase(rtt_ms=20, mbit_per_s=8), seed=0)
    assert line.arrival(0.0, 1000) == pytest.approx(0.001 + 0.010)
    assert line.arrival(0.0, 1000) == pytest.approx(0.002 + 0.010), "the second waits for the first"
    assert line.arrival(1.0, 1000) == pytest.approx(1.001 + 0.010), "an idle line is free at once"


def test_a_stall_holds_everything_until_its_end():
    schedule = one_phase(stalls_per_s=1, stall_ms=500)
    line = Line(schedule, seed=3)
    delays = [line.arrival(t, 1) - t for t in (i / 1000 for i in range(20_000))]
    stalled = [d for d in delays if d > 0]
    assert max(stalled) <= 0.5
    # A renewal process: one second up, half a second down, on average.
    assert len(stalled) / len(delays) == pytest.approx(1 / 3, abs=0.15)


def test_the_same_seed_gives_the_same_link():
    def arrivals(seed: int) -> list[float]:
        line = Line(one_phase(jitter_ms=30, stalls_per_s=2), seed)
        return [line.arrival(i / 100, 50) for i in range(500)]

    assert arrivals(1) == arrivals(1) != arrivals(2)


phases = st.builds(
    Phase,
    rtt_ms=st.floats(0, 500),
    jitter_ms=st.floats(0, 500),
    mbit_per_s=st.none() | st.floats(0.1, 100),
    stalls_per_s=st.floats(0, 5),
)


@given(
    first=phases,
    second=phases,
    sent=st.lists(st.tuples(st.floats(0, 2), st.integers(0, 100_000)), max_size=50),
    seed=st.integers(0, 9),
)
def test_nothing_overtakes_and_nothing_arrives_before_its_delay(first, second, sent, seed):
    schedule = Schedule(phases=(first.model_copy(update={"for_s": 1.0}), second))
    line = Line(schedule, seed)
    last = 0.0
    for now, num_bytes in sorted(sent):
        arrival = line.arrival(now, num_bytes)
        assert arrival >= max(last, now + schedule.at(now).rtt_ms / 2000)
        last = arrival


@pytest.mark.parametrize(
    ("text", "says"),
    [
        pytest.param("phases: []", "phases", id="no phase"),
        pytest.param("phases: [{rtt_ms: -1}]", "rtt_ms", id="a negative delay"),
        pytest.param("phases: [{rtt_ms: .nan}]", "rtt_ms", id="not a number"),
        pytest.param("phases: [{latency: 1}]", "latency", id="an unknown name"),
        pytest.param("phases: [{for_s: 1}]", "for_s", id="a last phase that ends"),
        pytest.param("phases: [{}, {}]", "for_s", id="a phase in the middle without an end"),
        pytest.param("phases: [{mbit_per_s: 0}]", "mbit_per_s", id="no bandwidth is an outage, and said so"),
        pytest.param("[", "YAML", id="not YAML"),
    ],
)
def test_a_bad_schedule_is_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "link.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSetting, match=says) as raised:
        Schedule.load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--listen", "here", "--to", "127.0.0.1:1"], id="an address without a port"),
        pytest.param(["--listen", "127.0.0.1:0", "--to", "127.0.0.1:99999"], id="a port out of range"),
        pytest.param(["--listen", "127.0.0.1:0", "--to", "a:1", "--rtt-ms", "-5"], id="a negative delay"),
        pytest.param(
            ["--listen", "127.0.0.1:0", "--to", "a:1", "--schedule", "gone.yaml"], id="no such file"
        ),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("duet-link: ")


# Real sockets.


@asynccontextmanager
async def echo_service() -> AsyncIterator[str]:
    """Sends back what it gets, and ends its side when the other has ended."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(4096):
                writer.write(chunk)
                await writer.drain()
        except ConnectionError:
            pass
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield f"{host}:{port}"


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = address.split(":")
    return await asyncio.open_connection(host, int(port))


async def round_trips(address: str, num: int) -> list[float]:
    reader, writer = await connect(address)
    times = []
    for _ in range(num):
        began = time.perf_counter()
        writer.write(b"ping")
        await reader.readexactly(4)
        times.append(time.perf_counter() - began)
    writer.close()
    return times


async def test_the_round_trip_is_the_scheduled_one_more_than_without_the_proxy():
    async with (
        echo_service() as service,
        LinkProxy(one_phase(rtt_ms=40), listen="127.0.0.1:0", to=service) as proxy,
    ):
        direct, through = await round_trips(service, 15), await round_trips(proxy.address, 15)
    # Least of many: a busy machine adds time, nothing takes any away. Two sleeps end up to 1 ms late each.
    assert min(through) >= 0.040
    assert min(through) - min(direct) <= 0.040 * 1.1 + 0.002


async def test_jitter_stays_within_its_bounds():
    async with (
        echo_service() as service,
        LinkProxy(one_phase(rtt_ms=10, jitter_ms=20), listen="127.0.0.1:0", to=service) as proxy,
    ):
        times = await round_trips(proxy.address, 20)
    assert min(times) >= 0.010
    assert max(times) - min(times) >= 0.005, "two uniform draws of up to 20 ms, twenty times"


async def test_a_transfer_takes_as_long_as_the_bandwidth_says():
    payload = bytes(100_000)
    async with (
        echo_service() as service,
        LinkProxy(one_phase(mbit_per_s=8), listen="127.0.0.1:0", to=service) as proxy,
    ):
        reader, writer = await connect(proxy.address)
        began = time.perf_counter()
        writer.write(payload)
        assert await reader.readexactly(len(payload)) == payload
        seconds = time.perf_counter() - began
        writer.close()
    assert seconds >= 0.1


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.binary(min_size=1, max_size=40_000), max_size=8), seed=st.integers(0, 99))
def test_bytes_arrive_as_they_were_sent_and_a_half_closed_connection_drains(chunks, seed):
    async def sent_and_returned() -> bytes:
        schedule = Schedule(
            phases=(Phase(rtt_ms=2, jitter_ms=2, mbit_per_s=500, stalls_per_s=20, stall_ms=2),), seed=seed
        )
        async with (
            echo_service() as service,
            LinkProxy(schedule, listen="127.0.0.1:0", to=service) as proxy,
        ):
            reader, writer = await connect(proxy.address)
            back = asyncio.create_task(reader.read())  # up to the far side's end
            for chunk in chunks:
                writer.write(chunk)
                await writer.drain()
            writer.write_eof()
            returned = await back
            writer.close()
            return returned

    assert asyncio.run(sent_and_returned()) == b"".join(chunks)


async def test_an_outage_cuts_what_runs_and_refuses_what_comes_until_it_is_over():
    schedule = Schedule(phases=(Phase(for_s=0.2), Phase(for_s=0.5, outage=True), Phase()))
    async with echo_service() as service, LinkProxy(schedule, listen="127.0.0.1:0", to=service) as proxy:
        reader, writer = await connect(proxy.address)
        writer.write(b"ping")
        assert await reader.readexactly(4) == b"ping"
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await connect(proxy.address)
        while True:
            try:
                assert len(await round_trips(proxy.address, 1)) == 1
                break
            except ConnectionRefusedError:
                await asyncio.sleep(0.02)


async def test_a_service_that_is_not_there_ends_the_connection():
    async with LinkProxy(one_phase(), listen="127.0.0.1:0", to="127.0.0.1:1") as proxy:
        reader, _ = await connect(proxy.address)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


async def test_a_port_in_use_is_said_in_one_line():
    async with echo_service() as service, LinkProxy(one_phase(), listen="127.0.0.1:0", to=service):
        with pytest.raises(AddressInUse, match=f"cannot listen on {service}"):
            async with LinkProxy(one_phase(), listen=service, to=service):
                pass


async def test_leaving_the_context_cuts_what_runs_and_leaves_no_task_behind():
    before = asyncio.all_tasks()
    async with echo_service() as service:
        async with LinkProxy(one_phase(rtt_ms=10_000), listen="127.0.0.1:0", to=service) as proxy:
            reader, writer = await connect(proxy.address)
            writer.write(b"never arrives")
            await writer.drain()
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        writer.close()
        ours = {task for task in asyncio.all_tasks() - before if "LinkProxy" in repr(task)}
        assert ours == set()


async def test_grpc_runs_through_it():
    target = ScriptedTarget(lambda text: 1 + len(text) % 250)
    request = Open(prompt=(Message("user", "x"),), sampling=Sampling(), seed=0, max_tokens=20)
    async with (
        serving(target) as (service, _),
        LinkProxy(one_phase(rtt_ms=30), listen="127.0.0.1:0", to=service) as proxy,
        connection(proxy.address) as cloud,
    ):
        assert await cloud.ping() >= 0.030
        messages = [message async for message in cloud.generate(request, Meter())]
    tokens = [id_ for message in messages if isinstance(message, Tokens) for id_ in message.token_ids]
    assert tokens == [1 + n % 250 for n in range(1, 21)]
    assert isinstance(messages[-1], Finished)
    assert messages[-1].reason is FinishReason.LENGTH


async def test_grpc_sees_an_outage_as_a_cloud_that_is_gone():
    target = ScriptedTarget(lambda text: 1)
    schedule = Schedule(phases=(Phase(for_s=0.3), Phase(outage=True)))
    request = Open(prompt=(Message("user", "x"),), sampling=Sampling(), seed=0)
    async with (
        serving(target) as (service, _),
        LinkProxy(schedule, listen="127.0.0.1:0", to=service) as proxy,
        connection(proxy.address) as cloud,
    ):
        with pytest.raises(CloudUnavailable):
            async with cloud.speculate(request, Meter()) as stream:
                await stream.receive()  # nothing was drafted: only the cut ends this
