"""Tests of `server.py`, in its order: rules as functions, the rest over HTTP, as a process, in a browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import gzip
import hashlib
import importlib
import io
import itertools
import json
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient
from pytest_aiohttp.plugin import AiohttpClient

import server
from server import Config, Event, FutureError, InvalidError, Usage

HERE = Path(server.__file__).parent
NOW = 1_800_000_000
CI = os.environ.get("CI") == "true"

Client = TestClient[Any, Any]
Start = Callable[..., Awaitable[Client]]


def event(started: int = NOW - 100, seconds: int = 60, **names: str) -> Event:
    """Make an event of user1, track1 and label1, where `names` does not say otherwise."""
    user, track, label = (names.get(name, default) for name, default in zip(server.NAMES, ("user1", "track1", "label1"), strict=True))
    return Event(user, track, label, started, seconds)


def random_events(rng: random.Random, count: int) -> list[Event]:
    """Make events of few users, tracks, labels and starts, so that many of them are equal."""
    return [
        event(
            NOW - rng.randrange(5_000),
            rng.randrange(100),
            **{name: f"{name}{rng.randrange(3)}" for name in server.NAMES},
        )
        for _ in range(count)
    ]


def flat(blocks: Iterable[list[Event]]) -> list[Event]:
    """Put blocks back together."""
    return list(itertools.chain.from_iterable(blocks))


@pytest.fixture
def start(aiohttp_client: AiohttpClient) -> Start:
    """Give a function that starts the application with some events and without a simulation."""

    async def start_app(
        events: Iterable[Event] = (), clock: Callable[[], float] = lambda: NOW, **options: Any
    ) -> Client:
        app = server.create_app(Config(**({"simulate": False} | options)), clock)
        app[server.STATE].usage.add(events)
        return await aiohttp_client(app)

    return start_app


@contextlib.asynccontextmanager
async def running(*options: str, **environment: str) -> AsyncIterator[Running]:
    """Run `python server.py` with `options` on a free port, and stop it at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, HERE / "server.py", "--port=0", *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )  # fmt: skip
    program = Running(process)
    try:
        yield program
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Running:
    """A process of the program."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Take the process over."""
        self.process = process

    async def url(self) -> str:
        """Wait until the program says where it listens, and return that."""
        assert self.process.stdout
        line = (await self.process.stdout.readline()).decode()
        if not line:
            pytest.fail((await self.process.communicate())[1].decode())
        return line.removeprefix("Listening on ").strip()

    async def stop(self, number: int = signal.SIGTERM) -> tuple[int | None, str]:
        """Send a signal and return the exit status and what stood on standard error."""
        self.process.send_signal(number)
        _, errors = await asyncio.wait_for(self.process.communicate(), 20)
        return self.process.returncode, errors.decode()


# ── Events ──────────────────────────────────────────────────────────────────────────────────────


def test_an_event_is_encoded_as_the_contract_shows_it() -> None:
    made = Event("user1", "track1", "label1", 1546421951, 1290)
    assert made.json == (
        b'{"user_id":"user1","track_id":"track1","label":"label1",'
        b'"stream_started_on":1546421951,"seconds_streamed":1290}'
    )


def test_names_of_any_script_come_back_from_the_json_as_they_were() -> None:
    name = 'Sigur Rós "☃" \\ 名 \u2028 <b>'
    assert json.loads(event(label=name).json)["label"] == name
    assert "☃".encode() in event(label=name).json


@pytest.mark.parametrize("value", ["a", "a" * 128, "☃", " ", "'; DROP TABLE"])
def test_an_identifier_is_1_to_128_characters(value: str) -> None:
    assert server.check_identifier("label", value) == value


@pytest.mark.parametrize("value", ["", "a" * 129, 1, None, True, ["a"], "a\nb", "\x00", "\x7f", "\x85", "\ud800"])
def test_what_is_no_identifier_is_refused_with_the_name_of_the_field(value: object) -> None:
    with pytest.raises(InvalidError, match=r"^label must"):
        server.check_identifier("label", value)


# ── Usage ───────────────────────────────────────────────────────────────────────────────────────


def test_usage_is_in_order_of_start_and_equal_starts_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BLOCK_EVENTS", 8)
    rng = random.Random(1)
    for _ in range(200):
        usage, arrived = Usage(keep=1_000), list[Event]()
        for size in (rng.choice((0, 1, 2, 30)) for _ in range(rng.randrange(12))):
            batch = random_events(rng, size)
            usage.add(batch)
            arrived += batch
        assert [made.id for made in arrived] == list(range(1, len(arrived) + 1))
        assert flat(usage.blocks) == sorted(arrived, key=lambda made: made.stream_started_on)
        assert all(1 <= len(block) <= 8 for block in usage.blocks)
        assert usage.count == len(arrived)


def test_between_and_matching_find_what_a_naive_filter_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BLOCK_EVENTS", 8)
    rng = random.Random(2)
    usage = Usage(keep=1_000)
    usage.add(random_events(rng, 300))
    everything = flat(usage.blocks)
    for _ in range(500):
        since, until = (rng.choice((None, NOW - rng.randrange(-10, 5_010))) for _ in range(2))
        names = {
            name: frozenset(rng.choices((f"{name}0", f"{name}1", "nobody"), k=2))
            for name in rng.sample(server.NAMES, rng.randrange(3))
        }
        assert flat(server.matching(usage.between(since, until), names)) == [
            made
            for made in everything
            if (since is None or made.stream_started_on >= since)
            and (until is None or made.stream_started_on < until)
            and all(getattr(made, name) in wanted for name, wanted in names.items())
        ]


def test_a_reader_keeps_the_moment_at_which_it_began() -> None:
    usage = Usage(keep=3_000)
    usage.add(random_events(random.Random(3), 3_000))
    blocks = usage.between(None, None)
    before = flat(blocks)
    usage.add(random_events(random.Random(4), 3_000))
    assert flat(blocks) == before


def test_the_oldest_events_go_first_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    usage, rng, everything = Usage(keep=10), random.Random(5), list[Event]()
    for size in (4, 5, 3, 1, 9, 0, 40):
        batch = random_events(rng, size)
        everything += batch
        usage.add(batch)
        everything = sorted(everything, key=server.ORDER)[-10:]
        assert flat(usage.blocks) == everything
        assert usage.count == len(everything)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--keep" in caplog.text


def test_groups_come_by_seconds_and_then_by_name() -> None:
    events = [
        event(seconds=5, label="b"), event(seconds=5, label="a"), event(seconds=9, label="c"),
        event(seconds=5, label="c", track_id="track2"), event(seconds=0, label="d"),
    ]  # fmt: skip
    *nothing, rows = server.grouped([events[:2], events[2:]], ("label",))
    assert nothing == [[], []]
    assert rows == [
        {"label": "c", "events": 2, "seconds_streamed": 14},
        {"label": "a", "events": 1, "seconds_streamed": 5},
        {"label": "b", "events": 1, "seconds_streamed": 5},
        {"label": "d", "events": 1, "seconds_streamed": 0},
    ]
    *_, rows = server.grouped([events], ("track_id", "label"))
    assert [list(row) for row in rows] == [["track_id", "label", "events", "seconds_streamed"]] * 5
    assert [(row["track_id"], row["label"]) for row in rows] == [
        ("track1", "c"), ("track1", "a"), ("track1", "b"), ("track2", "c"), ("track1", "d"),
    ]  # fmt: skip


# ── Simulation ──────────────────────────────────────────────────────────────────────────────────


def check_simulated(events: Iterable[dict[str, Any]], now: float) -> None:
    """Fail unless each has the five fields with values that the contract allows and has ended by `now`."""
    for made in events:
        assert list(made) == list(server.FIELDS)
        for name, prefix in (("user_id", "user"), ("track_id", "track"), ("label", "label")):
            assert made[name] in {f"{prefix}{number}" for number in (1, 2, 3)}
        assert type(made["stream_started_on"]) is int
        assert type(made["seconds_streamed"]) is int
        assert 30 <= made["seconds_streamed"] <= 1_800
        assert made["stream_started_on"] + made["seconds_streamed"] <= now


def test_a_batch_holds_1_to_5_streams_that_have_just_ended() -> None:
    rng = random.Random(6)
    batches = [server.simulate_batch(NOW, rng) for _ in range(2_000)]
    assert {len(batch) for batch in batches} == {1, 2, 3, 4, 5}
    check_simulated((json.loads(made.json) for made in flat(batches)), NOW)
    assert all(made.stream_started_on + made.seconds_streamed == NOW for made in flat(batches))


def test_users_tracks_and_labels_are_independent_of_each_other() -> None:
    rng = random.Random(7)
    events = flat(server.simulate_batch(NOW, rng) for _ in range(3_000))
    seen: dict[Any, int] = {}
    for made in events:
        key = (made.user_id, made.track_id, made.label)
        seen[key] = seen.get(key, 0) + 1
    expected = len(events) / 27
    assert len(seen) == 27
    assert sum((count - expected) ** 2 / expected for count in seen.values()) < 54  # chi², 26 degrees, p = 0.001


def test_a_random_seed_makes_the_simulation_repeatable() -> None:
    one, two, other = ([made.json for made in server.simulate_batch(NOW, random.Random(seed))] for seed in (1, 1, 2))
    assert one == two != other


async def test_a_batch_that_fails_is_counted_and_the_next_one_comes(start: Start) -> None:
    faults = iter([OSError("no clock"), ZeroDivisionError()])

    def clock() -> float:
        for fault in faults:
            raise fault
        return NOW

    client = await start(simulate=True, interval=0.01, clock=lambda: NOW)
    state = client.app[server.STATE]
    state.clock = clock
    while state.simulation.errors < 2:
        await asyncio.sleep(0.01)
    count = state.usage.count
    while state.usage.count == count:
        await asyncio.sleep(0.01)
    health = await (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert health["simulation"]["errors"] == 2


async def test_a_simulation_whose_batches_all_fail_is_degraded(start: Start) -> None:
    client = await start(simulate=True, interval=0.01)
    client.app[server.STATE].clock = lambda: 1 / 0
    await asyncio.sleep(0.1)
    answer = await client.get("/health")
    assert answer.status == 503
    assert (await answer.json())["status"] == "degraded"
    assert (await answer.json())["simulation"]["running"] is False


async def test_batches_keep_their_rhythm_while_each_of_them_takes_time(start: Start) -> None:
    def slow_clock() -> float:
        time.sleep(0.02)
        return NOW

    client = await start(simulate=True, interval=0.05, clock=slow_clock)
    state, loop, begin = client.app[server.STATE], asyncio.get_running_loop(), asyncio.get_running_loop().time()
    first = state.usage.version
    while state.usage.version < first + 20:
        await asyncio.sleep(0.005)
    # A loop that sleeps for the interval after each batch would be 20 times 0.02 s late by now.
    assert round((loop.time() - begin) / 0.05) in range(19, 26)


async def test_history_has_the_rate_of_the_simulation_and_ends_at_the_start(start: Start) -> None:
    client = await start(history=1, random_seed=8)
    events = await (await client.get("/usage")).json()
    check_simulated(events, NOW)
    assert 25_920 * 0.97 < len(events) < 25_920 * 1.03
    starts = [made["stream_started_on"] for made in events]
    assert starts == sorted(starts)
    assert NOW - 86_400 - 1_800 <= starts[0] < NOW - 86_400 < NOW - 1_800 < starts[-1]


async def test_history_fills_no_more_than_keep(start: Start) -> None:
    client = await start(history=3_650, keep=100)
    assert len(await (await client.get("/usage")).json()) == 100


# ── HTTP: parsing, errors, safety ───────────────────────────────────────────────────────────────


def parse(*parameters: tuple[str, str]) -> server.Query:
    """Parse parameters at NOW."""
    return server.parse_query(parameters, NOW)


@pytest.mark.parametrize(
    ("text", "since"), [("0", 0), ("-5", -5), ("007", 7), (str(NOW), NOW), (str(NOW - 1), NOW - 1), ("-" + "9" * 18, 1 - 10**18)]
)  # fmt: skip
def test_a_from_that_is_an_int_and_not_in_the_future_is_taken(text: str, since: int) -> None:
    assert parse(("from", text)).since == since


@pytest.mark.parametrize("text", [str(NOW + 1), str(10**18), "9" * 100])
def test_a_from_in_the_future_is_an_error_of_its_own(text: str) -> None:
    with pytest.raises(FutureError):
        parse(("from", text))


@pytest.mark.parametrize(
    "text", ["1.5", "abc", "", "+5", " 5", "5 ", "٣", "1_000", "1e3", "0x10", "--5", "-", "9" * 5_000, "5\n", "null"]
)  # fmt: skip
def test_a_from_that_is_no_int_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidError, match=r"^from must be an int"):
        parse(("from", text))
    with pytest.raises(InvalidError, match=r"^to must be an int"):
        parse(("to", text))


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ([("from", "1"), ("from", "1")], "from is given more than once"),
        ([("format", "csv"), ("format", "csv")], "format is given more than once"),
        ([("since", "1")], "unknown parameter 'since'"),
        ([("From", "1")], "unknown parameter 'From'"),
        ([("label", "")], "label must"),
        ([("user_id", "u" * 129)], "user_id must"),
        ([("track_id", "a\nb")], "track_id must"),
        ([("format", "xml")], "format must"),
        ([("format", "")], "format must"),
        ([("group_by", "")], "group_by must"),
        ([("group_by", "label,")], "group_by must"),
        ([("group_by", "label,label")], "group_by must"),
        ([("group_by", "seconds_streamed")], "group_by must"),
        ([("from", str(NOW + 1)), ("format", "xml")], "format must"),
    ],
)
def test_a_malformed_query_is_refused_by_name(parameters: list[tuple[str, str]], named: str) -> None:
    with pytest.raises(InvalidError, match=f"^{re.escape(named)}") as raised:
        parse(*parameters)
    assert not isinstance(raised.value, FutureError)


def test_names_can_be_given_more_than_once() -> None:
    query = parse(("label", "a"), ("label", "b"), ("user_id", "u"))
    assert query.names == {"label": {"a", "b"}, "user_id": {"u"}}


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_csv_cell_that_a_spreadsheet_would_run_is_defused(cell: str) -> None:
    assert next(csv.reader(io.StringIO(server.encode_csv([["a", cell]]).decode(), newline=""))) == ["a", f"'{cell}"]


def test_a_csv_number_below_zero_stays_a_number() -> None:
    assert server.encode_csv([[-1, "b"]]) == b"-1,b"


async def test_usage_answers_with_the_events_in_order(start: Start) -> None:
    client = await start([event(NOW - 5, label="late"), event(NOW - 50), event(NOW - 5, label="later")])
    answer = await client.get("/usage")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert [(made["stream_started_on"], made["label"]) for made in await answer.json()] == [
        (NOW - 50, "label1"), (NOW - 5, "late"), (NOW - 5, "later"),
    ]  # fmt: skip


async def test_usage_without_events_is_an_empty_array(start: Start) -> None:
    client = await start()
    assert await (await client.get("/usage")).read() == b"[]"
    assert await (await client.get("/usage?format=ndjson")).read() == b""
    assert await (await client.get("/usage?format=csv")).text() == ",".join(server.FIELDS) + "\r\n"
    assert await (await client.get("/usage?group_by=label&format=csv")).text() == "label,events,seconds_streamed\r\n"


@pytest.mark.parametrize(
    ("query", "starts"),
    [
        ("", [1, 5, 9]), ("from=1", [1, 5, 9]), ("from=5", [5, 9]), ("from=6", [9]), ("from=10", []),
        ("from=-3", [1, 5, 9]), (f"from={NOW}", []), ("to=9", [1, 5]), ("to=1", []), ("to=0", []),
        (f"to={NOW * 9}", [1, 5, 9]), ("from=5&to=5", []), ("from=5&to=6", [5]), ("from=9&to=1", []),
        ("label=a", [1, 9]), ("label=a&label=b", [1, 5, 9]), ("label=a&user_id=u2", [9]), ("label=nobody", []),
        ("track_id=track1&from=2&label=b", [5]), ("label=%61", [1, 9]),
    ],
)  # fmt: skip
async def test_usage_filters_by_time_and_name(start: Start, query: str, starts: list[int]) -> None:
    client = await start([event(1, label="a"), event(5, label="b"), event(9, label="a", user_id="u2")])
    answer = await client.get(f"/usage?{query}")
    assert answer.status == 200
    assert [made["stream_started_on"] for made in await answer.json()] == starts


@pytest.mark.parametrize("query", [f"from={NOW + 1}", "from=1000000000000000000", f"from={NOW + 1}&format=csv"])
async def test_a_from_in_the_future_is_400_with_an_empty_body(start: Start, query: str) -> None:
    answer = await (await start([event()])).get(f"/usage?{query}")
    assert (answer.status, await answer.read(), answer.headers["Content-Length"]) == (400, b"", "0")


@pytest.mark.parametrize(
    "query",
    ["from=1.5", "from=abc", "from=", "from", "from=1&from=1", "from=%2B5", "from=+5", "from=%205", "from=٣", "from=1_000"],
)  # fmt: skip
async def test_a_malformed_from_is_400_and_named(start: Start, query: str) -> None:
    answer = await (await start([event()])).get(f"/usage?{query}")
    assert answer.status == 400
    assert re.match("from ", (await answer.json())["error"])


HOSTILE = ['a,"b"', "=cmd|' /C calc'!A0", "☃ \u2028", "{{ 1 }}", "<img src=x onerror=alert(1)>", "\u202egnp"]


@pytest.mark.parametrize("query", ["", "group_by=label,user_id", "group_by=track_id"])
async def test_every_format_says_the_same(start: Start, query: str) -> None:
    rng = random.Random(9)
    client = await start([
        event(NOW - rng.randrange(999), rng.randrange(99), label=rng.choice(HOSTILE), user_id=rng.choice(HOSTILE))
        for _ in range(3_000)
    ])  # fmt: skip
    rows = await (await client.get(f"/usage?{query}")).json()
    answer = await client.get(f"/usage?format=ndjson&{query}")
    assert answer.content_type == "application/x-ndjson"
    lines = (await answer.read()).split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == rows
    answer = await client.get(f"/usage?format=csv&{query}")
    assert answer.content_type == "text/csv"
    text = await answer.text()
    assert text.count("\n") == text.count("\r\n") == len(rows) + 1
    header, *cells = csv.reader(io.StringIO(text, newline=""))
    assert header == list(rows[0])
    assert [[cell.removeprefix("'") for cell in line] for line in cells] == [[str(x) for x in row.values()] for row in rows]
    assert not any(cell.startswith("=") for line in cells for cell in line)


async def test_groups_add_up_to_the_events(start: Start) -> None:
    client = await start(random_events(random.Random(10), 5_000))
    events = await (await client.get("/usage?user_id=user_id1")).json()
    rows = await (await client.get("/usage?user_id=user_id1&group_by=label")).json()
    assert {row["label"]: (row["events"], row["seconds_streamed"]) for row in rows} == {
        label: (len(seconds := [made["seconds_streamed"] for made in events if made["label"] == label]), sum(seconds))
        for label in ("label0", "label1", "label2")
    }


async def test_an_answer_is_304_until_something_changes(start: Start) -> None:
    client = await start([event()])
    answer = await client.get("/usage")
    etag = answer.headers["ETag"]
    assert etag.startswith('W/"')
    assert (answer.headers["Cache-Control"], answer.headers["Vary"]) == ("no-cache", "Accept-Encoding")
    for known in (etag, etag.removeprefix("W/"), f'"other", {etag}', "*"):
        again = await client.get("/usage", headers={"If-None-Match": known})
        assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", etag)
    client.app[server.STATE].usage.add([event()])
    changed = await client.get("/usage", headers={"If-None-Match": etag})
    assert changed.status == 200
    assert changed.headers["ETag"] != etag
    assert len(await changed.json()) == 2


async def test_a_restarted_server_has_other_etags(start: Start) -> None:
    one, two = [(await (await start([event()])).get("/usage")).headers["ETag"] for _ in range(2)]
    assert one != two


@pytest.mark.parametrize("count", [0, 3, 5_000])
@pytest.mark.parametrize("query", ["", "format=csv", "format=ndjson", "group_by=label"])
async def test_head_has_the_headers_and_no_body(start: Start, count: int, query: str) -> None:
    client = await start(random_events(random.Random(11), count))
    head, get = await client.head(f"/usage?{query}"), await client.get(f"/usage?{query}")
    assert (head.status, await head.read()) == (200, b"")
    for name in ("ETag", "Content-Type", "Vary"):
        assert head.headers[name] == get.headers[name]
    assert (await client.get("/health")).status == 200


@pytest.mark.parametrize(
    ("accepted", "coded"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0", False), ("gzip;q=0.000", False), ("identity", False), ("xgzip", False)],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 100, 5_000])
async def test_an_answer_that_is_worth_it_is_gzipped_on_request(start: Start, accepted: str, coded: bool, count: int) -> None:
    client = await start(random_events(random.Random(12), count))
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        answer = await session.get(client.make_url("/usage"), headers={"Accept-Encoding": accepted})
        body = await answer.read()
        assert (answer.headers.get("Content-Encoding") == "gzip") == (coded and count > 1)
    assert len(json.loads(gzip.decompress(body) if coded and count > 1 else body)) == count


async def test_a_large_answer_lets_other_requests_in(start: Start) -> None:
    client = await start(random_events(random.Random(13), 200_000))
    large = await client.get("/usage?label=label1")
    during = [await (await client.get("/usage?from=0&to=1")).read() for _ in range(5)]
    assert during == [b"[]"] * 5
    assert not large.content.at_eof()
    assert len(await large.json()) > 60_000


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("POST", "/usage", 405), ("DELETE", "/", 405)])
async def test_every_error_has_the_same_shape(start: Start, method: str, path: str, status: int) -> None:
    answer = await (await start()).request(method, path)
    assert answer.status == status
    assert list(await answer.json()) == ["error"]
    assert answer.headers.get("Allow") == (None if status == 404 else "GET,HEAD")


async def test_an_internal_error_is_logged_and_tells_nothing(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    client = await start()
    client.app[server.STATE].clock = lambda: 1 / 0
    answer = await client.get("/usage")
    assert (answer.status, await answer.json()) == (500, {"error": "internal error"})
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("path", ["/", "/usage", "/usage?from=99999999999", "/health", "/nowhere"])
async def test_every_answer_carries_the_safety_headers(start: Start, path: str) -> None:
    headers = (await (await start()).get(path)).headers
    assert {name: headers.get(name) for name in server.SAFETY_HEADERS} == server.SAFETY_HEADERS


async def test_the_page_is_read_again_when_it_has_changed(start: Start, tmp_path: Path) -> None:
    page = tmp_path / "index.html"
    page.write_bytes(b"<style>a{}</style>\r\n<script>1</script>")
    client = await start(page=page)
    first = await client.get("/")
    assert first.headers["Content-Type"] == "text/html; charset=utf-8"
    assert (await client.get("/", headers={"If-None-Match": first.headers["ETag"]})).status == 304
    page.write_text("<style>b{}</style><script>22</script>", "utf-8")
    second = await client.get("/", headers={"If-None-Match": first.headers["ETag"]})
    assert await second.text() == page.read_text("utf-8")
    for content in (b"b{}", b"22"):
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert f"'sha256-{digest}'" in second.headers["Content-Security-Policy"]
    page.unlink()
    assert await (await client.get("/")).text() == await second.text()


async def test_the_page_runs_under_a_strict_policy(start: Start) -> None:
    policy = (await (await start()).get("/")).headers["Content-Security-Policy"]
    assert "unsafe-inline" not in policy
    assert "frame-ancestors 'none'" in policy
    assert "default-src 'none'" in policy
    assert re.search(r"script-src https://\S+/vue@\d+\.\d+\.\d+/dist/vue\.global\.prod\.js 'sha256-", policy)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────


async def test_health_tells_the_events_and_the_simulation(start: Start) -> None:
    assert await (await (await start([event()])).get("/health")).json() == {
        "status": "ok",
        "events": 1,
        "simulation": {"running": False, "last_batch_age": None, "errors": 0},
        "storage": {"durable": False, "last_commit_age": None},
    }
    health = await (await (await start(simulate=True)).get("/health")).json()
    assert health["simulation"]["running"] is True
    assert 0 <= health["simulation"]["last_batch_age"] < 10
    assert 1 <= health["events"] <= 5


# ── Command line: the program as a process ──────────────────────────────────────────────────────


async def get_json(url: str) -> Any:
    """Fetch and parse `url`."""
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        return await answer.json()


async def test_a_default_start_has_four_batches_after_35_seconds() -> None:
    async with running() as program:
        url = await program.url()
        begin, seen = time.monotonic(), list[tuple[int, int]]()
        while time.monotonic() < begin + 35:
            count = (await get_json(f"{url}/health"))["events"]
            if not seen or seen[-1][1] != count:
                seen.append((round(time.monotonic() - begin, -1).__trunc__(), count))
            await asyncio.sleep(0.2)
        assert [at for at, _ in seen] == [0, 10, 20, 30]
        events = await get_json(f"{url}/usage")
        assert len(events) == seen[-1][1]
        assert 4 <= len(events) <= 20
        check_simulated(events, time.time())
        assert await program.stop() == (0, "")


async def test_readers_never_see_a_part_of_a_batch() -> None:
    async with running("--interval=0.005", "--random-seed=14") as program:
        url, rng = await program.url(), random.Random(14)
        whole = set(itertools.accumulate(len(server.simulate_batch(NOW, rng)) for _ in range(20_000)))

        async def read(session: aiohttp.ClientSession) -> set[int]:
            counts, until = set(), time.monotonic() + 3
            while time.monotonic() < until:
                async with session.get(f"{url}/usage") as answer:
                    assert answer.status == 200
                    events = await answer.json()
                check_simulated(events, time.time())
                counts.add(len(events))
            return counts

        async with aiohttp.ClientSession() as session:
            seen = set().union(*await asyncio.gather(*(read(session) for _ in range(10))))
        assert len(seen) > 10
        assert seen <= whole
        assert await program.stop() == (0, "")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
async def test_a_month_of_history_stays_below_400_bytes_an_event() -> None:
    async def memory(*options: str) -> tuple[int, int]:
        async with running("--no-simulation", *options) as program:
            events = (await get_json(f"{await program.url()}/health"))["events"]
            status = Path(f"/proc/{program.process.pid}/status").read_text("utf-8")
            return events, 1024 * int(status.split("VmRSS:")[1].split()[0])

    (none, empty), (events, full) = await memory(), await memory("--history=30")
    assert none == 0
    assert events == pytest.approx(777_600, rel=0.01)
    assert (full - empty) / events < 400


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_status_0_after_the_requests_under_way(number: int) -> None:
    async with running("--history=2", "--no-simulation") as program:
        url = await program.url()
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/usage") as answer:
                stopping = asyncio.create_task(program.stop(number))
                await asyncio.sleep(0.3)
                assert len(json.loads(await answer.read())) > 50_000
            assert await stopping == (0, "")


async def test_a_signal_ends_it_with_status_0_while_it_starts() -> None:
    async with running("--history=30") as program:
        await asyncio.sleep(2)
        begin = time.monotonic()
        status, errors = await program.stop()
        assert (status, errors) == (0, "")
        assert time.monotonic() - begin < 5  # what the contract promises


async def test_a_client_that_does_not_read_cannot_hold_up_the_end() -> None:
    async with running("--history=5", "--no-simulation") as program:
        url = await program.url()
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        assert (await program.stop())[0] == 0
        assert time.monotonic() - begin < 5  # what the contract promises
        writer.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port=http"], "--port: 'http' is no int from 0 to 65,535"),
        (["--port=65536"], "--port"),
        (["--interval=0"], "--interval"),
        (["--interval=nan"], "--interval"),
        (["--interval=inf"], "--interval"),
        (["--history=-1"], "--history"),
        (["--keep=0"], "--keep"),
        (["--keep=1.5"], "--keep"),
        (["--random-seed=x"], "--random-seed"),
        (["--hist=1"], "--hist"),
        (["--host=no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--host=192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["extra"], "extra"),
    ],
)
async def test_bad_options_end_it_with_status_2_and_one_line(options: list[str], said: str) -> None:
    async with running(*options) as program:
        out, errors = await program.process.communicate()
        assert (program.process.returncode, out) == (2, b"")
        assert errors.decode().startswith("server.py: ")
        assert said in errors.decode()
        assert errors.count(b"\n") == 1


async def test_a_taken_port_ends_it_with_status_2_and_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with running(f"--port={port}") as program:
            out, errors = await program.process.communicate()
            assert (program.process.returncode, out) == (2, b"")
            assert errors.decode().startswith(f"server.py: cannot listen on 127.0.0.1, port {port}: Address already")
            assert errors.count(b"\n") == 1


async def test_host_and_port_come_from_the_environment_and_options_win() -> None:
    options = vars(server.build_parser({"HOST": "127.0.0.9", "PORT": "5500"}).parse_args(["--port", "0"]))
    assert (options["host"], options["port"]) == ("127.0.0.9", 0)
    assert vars(server.build_parser({"PORT": "5500", "HOST": ""}).parse_args([]))["port"] == 5500
    async with running("--no-simulation", HOST="127.0.0.2") as program:
        url = await program.url()
        assert re.fullmatch(r"http://127\.0\.0\.2:\d+", url)
        assert await get_json(f"{url}/usage") == []


async def test_an_option_for_ipv6_prints_a_url_that_works() -> None:
    async with running("--no-simulation", "--host=::1") as program:
        assert await get_json(f"{await program.url()}/usage") == []


async def test_verbose_logs_each_request_in_one_line() -> None:
    async with running("--no-simulation", "-v") as program:
        await get_json(f"{await program.url()}/usage?label=a%20%22GET%20forged")
        _, errors = await program.stop()
        assert errors.count("\n") == 1
        assert "/usage?label=a%20%22GET%20forged" in errors


async def test_a_random_seed_gives_the_same_names_and_seconds_after_a_restart() -> None:
    runs = []
    for _ in range(2):
        async with running("--history=0.01", "--random-seed=15", "--no-simulation") as program:
            events = await get_json(f"{await program.url()}/usage")
            first = min(made["stream_started_on"] for made in events)
            runs.append([[*list(made.values())[:3], made["seconds_streamed"]] for made in events])
            assert first > time.time() - 4_000
    assert runs[0] == runs[1]


def test_the_inline_script_metadata_agrees_with_the_requirements() -> None:
    metadata = re.search(r"(?s)^# /// script\n(.+?)^# ///$", (HERE / "server.py").read_text("utf-8"), re.MULTILINE)
    assert metadata
    assert re.findall(r'"(aiohttp.*?)"', metadata[1]) == re.findall(
        r"^(aiohttp.*)$", (HERE / "requirements.txt").read_text("utf-8"), re.MULTILINE
    )


# ── The page, in a browser ──────────────────────────────────────────────────────────────────────

CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    """Give a page of a real browser, in which the CDN answers with the bytes of the file VUE_FILE if it is set.

    What the page or the browser complains of fails the test.
    """
    try:
        driver = importlib.import_module("playwright.async_api")
        if not CHROMIUM.exists():
            raise ImportError(f"{CHROMIUM} is not installed")
    except ImportError as error:
        if CI:
            pytest.fail(f"no browser: {error}")
        pytest.skip(f"no browser: {error}")
    async with driver.async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES.split())
        page = await browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.extend([message.text] * (message.type == "error")))
        if "VUE_FILE" in os.environ:
            vue, headers = os.environ["VUE_FILE"], {"access-control-allow-origin": "*"}
            await page.route("https://**/vue.global.prod.js", lambda route: route.fulfill(path=vue, headers=headers))
        yield page
        await browser.close()
    # What the browser itself says of a server that is away is no fault of the page.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


async def figures(page: Any) -> list[Any]:
    """Return the three figures of the challenge as the page shows them."""
    shown: list[Any] = await page.evaluate("""() => {
        const get = id => [...document.querySelectorAll(`[data-testid="${id}"]`)]
        const number = element => Number(element.textContent.replaceAll(',', ''))
        return [number(get('total-seconds')[0]),
            Object.fromEntries(get('label-row').map(row => [row.dataset.label, number(row.querySelector('[data-testid="label-seconds"]'))])),
            get('top-track')[0].textContent]
    }""")
    return shown


def sums(events: list[dict[str, Any]], name: str) -> dict[str, int]:
    """Add up the seconds of `events` by a field."""
    found: dict[str, int] = {}
    for made in events:
        found[made[name]] = found.get(made[name], 0) + made["seconds_streamed"]
    return found


async def test_the_page_shows_the_three_figures_and_follows_a_new_batch(page: Any) -> None:
    async with running("--interval=4", "--random-seed=16") as program:
        url = await program.url()
        await page.goto(url)
        await page.wait_for_selector('[data-testid="label-row"]')
        before = await figures(page)
        await page.wait_for_function(
            "before => document.querySelector('[data-testid=total-seconds]').textContent !== before",
            arg=f"{before[0]:,}",
        )
        for _ in range(50):  # until no batch falls between the two readings
            shown, events = await figures(page), await get_json(f"{url}/usage")
            labels, tracks = sums(events, "label"), sums(events, "track_id")
            leaders = sorted(name for name, seconds in tracks.items() if seconds == max(tracks.values()))
            if shown == [sum(labels.values()), labels, ", ".join(leaders)]:
                break
            await asyncio.sleep(0.3)
        else:
            pytest.fail(f"{shown} is not what /usage says: {labels}, {tracks}")
        assert list(shown[1]) == sorted(labels, key=lambda label: (-labels[label], label))
        assert re.match(r"Live · updated \d+ s ago", await page.text_content('[data-testid="status"]'))


async def test_the_page_says_that_it_is_stale_and_catches_up_by_itself(page: Any) -> None:
    async with running("--no-simulation", "--history=0.01") as program:
        url = await program.url()
        await page.goto(url)
        await page.wait_for_selector('[data-testid="label-row"]')
        before = await figures(page)
        await program.stop()
    await page.wait_for_selector('[data-testid="status"]:has-text("Stale since")', timeout=15_000)
    assert re.fullmatch(
        r"Stale since \d\d:\d\d:\d\d · retrying in \d+ s", await page.text_content('[data-testid="status"]')
    )
    assert await figures(page) == before
    async with running("--no-simulation", "--history=0.02", f"--port={url.rsplit(':')[-1]}") as program:
        await program.url()
        await page.wait_for_selector('[data-testid="status"]:has-text("Live")', timeout=30_000)
        events = await get_json(f"{url}/usage")
        assert (await figures(page))[1] == sums(events, "label")


async def test_the_page_of_an_empty_server_says_so(page: Any) -> None:
    async with running("--no-simulation") as program:
        await page.goto(await program.url())
        await page.wait_for_selector("text=No streams yet")
        assert await page.text_content('[data-testid="total-seconds"]') == "0"


async def test_the_page_says_what_to_do_without_vue(page: Any) -> None:
    async with running("--no-simulation") as program:
        await page.route("https://**/*", lambda route: route.abort())
        await page.goto(url := await program.url())
        await page.wait_for_selector(f"text=curl {url}/usage")
        assert not await page.is_visible("#app")
