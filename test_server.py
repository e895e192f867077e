"""Tests of `server.py`, in its order: rules as functions, the rest over HTTP, as a process, in a browser."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import csv
import gc
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal, localcontext
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast
from unittest.mock import AsyncMock, Mock
from urllib.parse import quote, urlencode

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, make_mocked_request
from pytest_aiohttp.plugin import AiohttpClient
from yarl import URL

import server
from server import Config, Event, InvalidError, Subscription, Usage

HERE = Path(server.__file__).parent
NOW = 1_800_000_000
CI = os.environ.get("CI") == "true"
ASSIGNMENT = HERE.parent / "shared" / "assignment"

T = TypeVar("T")

Client = TestClient[Any, Any]
Start = Callable[..., Awaitable[Client]]


def event(
    started: int = NOW - 100, seconds: int = 60, user_id: str = "user1", track_id: str = "track1", label: str = "label1"
) -> Event:
    """Make an event."""
    return Event(user_id, track_id, label, started, seconds)


def random_events(rng: random.Random, count: int) -> list[Event]:
    """Make events of few users, tracks, labels and starts, so that many of them are equal."""
    return [
        event(
            NOW - rng.randrange(5_000),
            rng.randrange(100),
            *(f"{name}{rng.randrange(3)}" for name in server.NAMES),
        )
        for _ in range(count)
    ]


def usage_of(keep: float) -> Usage:
    """Make usage that nobody counts."""
    return Usage(lambda *_: None, keep)


def add(usage: Usage, events: list[Event]) -> None:
    """Create events and have them kept."""
    server.number_events(events, usage.next_number(len(events)))
    usage.add(events)
    usage.sequence = usage.last_number


def flat(chunks: Iterable[list[Event]]) -> list[Event]:
    """Put chunks back together."""
    return list(itertools.chain.from_iterable(chunks))


def result(work: Generator[Any, None, T]) -> T:
    """Return what `work` returns when it is done."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return cast("T", done.value)


@pytest.fixture
def start(aiohttp_client: AiohttpClient) -> Start:
    """Give a function that starts the application with some events and without a simulation."""

    async def start_app(
        events: Iterable[Event] = (),
        clock: Callable[[], float] = lambda: NOW,
        imported: server.Import | None = None,
        **options: Any,
    ) -> Client:
        app = server.create_app(Config(**({"simulate": False} | options)), imported, clock)
        given = list(events)
        add(app[server.STATE].usage, given)
        running = TestServer(app)
        await running.start_server(lingering_time=server.LINGER_SECONDS)
        return await aiohttp_client(running)

    return start_app


@contextlib.asynccontextmanager
async def started(
    *options: str, command: Sequence[str] = (str(HERE / "server.py"),), **environment: str
) -> AsyncIterator[Program]:
    """Run `python server.py` with `options` on a free port, and stop it at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, "--port=0", *options,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment, cwd=HERE,
    )
    program = Program(process)
    try:
        yield program
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Program:
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
        """Send a signal and return the exit status and what stood on standard error, how far it is left out."""
        self.process.send_signal(number)
        _, errors = await asyncio.wait_for(self.process.communicate(), 20)
        lines = errors.decode().splitlines(keepends=True)  # on a busy machine any start is a long one
        return self.process.returncode, "".join(line for line in lines if not re.search(r" INFO .* so far: ", line))


LONG: dict[str, Callable[[Path], Coroutine[Any, Any, None]]] = {}


@pytest.fixture(scope="session")
async def long_tests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, asyncio.Task[None]]:
    """Begin the long tests that are asked for, all at once."""
    asked = {item.name for item in request.session.items} & LONG.keys()
    return {name: asyncio.create_task(LONG[name](tmp_path_factory.mktemp("long"))) for name in asked}


def beside_others(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[..., Coroutine[Any, Any, None]]:
    """Have a test that waits for processes begin with the first of its kind, so that they wait at the same time."""
    name = test.__name__
    LONG[name] = test

    async def wait(long_tests: dict[str, asyncio.Task[None]]) -> None:
        await long_tests[name]

    return wait


async def read_answer(reader: asyncio.StreamReader, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Read one answer off a socket: the status, the headers with their names in lower case, the body."""
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip("\r\n").split("\r\n")
    status = int(first.split()[1])
    if status == 100:
        return await read_answer(reader, method)
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if method == "HEAD" or status in (204, 304):
        return status, headers, b""
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readexactly(2)
        return status, headers, body
    return status, headers, await reader.readexactly(int(headers["content-length"]))


# ── Events ──────────────────────────────────────────────────────────────────────────────────────


def test_an_event_is_encoded_as_the_contract_shows_it() -> None:
    made = Event("user1", "track1", "label1", 1546421951, 1290)
    assert server.Chunk([made]).json_lines == (
        b'\n{"user_id":"user1","track_id":"track1","label":"label1",'
        b'"stream_started_on":1546421951,"seconds_streamed":1290}'
    )


def test_names_of_any_script_come_back_from_the_json_as_they_were() -> None:
    name = 'Sigur Rós "☃" \\ 名 \u2028 <b>'
    assert json.loads(server.Chunk([event(label=name)]).json_lines)["label"] == name
    assert "☃".encode() in server.Chunk([event(label=name)]).json_lines


@pytest.mark.parametrize("value", ["a", "a" * 128, "☃", " ", "'; DROP TABLE"])
def test_an_identifier_is_1_to_128_characters(value: str) -> None:
    assert server.check_text("label", value) == value


@pytest.mark.parametrize("value", ["", "a" * 129, 1, None, True, ["a"], "a\nb", "\x00", "\x7f", "\x85", "\ud800"])
def test_what_is_no_identifier_is_refused_with_the_name_of_the_field(value: object) -> None:
    with pytest.raises(InvalidError, match=r"^label must"):
        server.check_text("label", value)


# ── Usage ───────────────────────────────────────────────────────────────────────────────────────


def test_usage_is_in_order_of_start_and_equal_starts_in_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CHUNK_EVENTS", 8)
    rng = random.Random(1)
    for _ in range(200):
        usage, arrived = usage_of(keep=1_000), list[Event]()
        for size in (rng.choice((0, 1, 2, 30)) for _ in range(rng.randrange(12))):
            batch = random_events(rng, size)
            add(usage, batch)
            arrived += batch
        assert [made.id for made in arrived] == list(range(1, len(arrived) + 1))
        assert flat(usage.by_start.chunks) == sorted(arrived, key=lambda made: made.stream_started_on)
        assert flat(usage.by_id.chunks) == arrived
        assert all(1 <= len(chunk) <= 8 for chunk in [*usage.by_start.chunks, *usage.by_id.chunks])
        assert usage.count == len(arrived)


def test_between_and_matching_find_what_a_naive_filter_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CHUNK_EVENTS", 8)
    rng = random.Random(2)
    usage = usage_of(keep=1_000)
    add(usage, random_events(rng, 300))
    everything = flat(usage.by_start.chunks)
    for _ in range(500):
        since, until = (rng.choice((end, NOW - rng.randrange(-10, 5_010))) for end in (-math.inf, math.inf))
        wanted = tuple(
            (name, frozenset(rng.choices((f"{name}0", f"{name}1", "nobody"), k=2)))
            for name in rng.sample(server.NAMES, rng.randrange(3))
        )
        assert flat(server.matching(chunk, wanted) for chunk in usage.by_start.between(since, until)) == [
            made
            for made in everything
            if since <= made.stream_started_on < until
            and all(getattr(made, name) in values for name, values in wanted)
        ]


def test_a_reader_keeps_the_moment_at_which_it_began() -> None:
    usage = usage_of(keep=3_000)
    add(usage, random_events(random.Random(3), 3_000))
    chunks = usage.by_start.between()
    before = flat(chunks)
    add(usage, random_events(random.Random(4), 3_000))
    assert flat(chunks) == before


def test_the_oldest_events_go_first_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    usage, rng, everything = usage_of(keep=10), random.Random(5), list[Event]()
    for size in (4, 5, 3, 1, 9, 0, 40):
        batch = random_events(rng, size)
        everything += batch
        add(usage, batch)
        everything = sorted(everything, key=attrgetter("stream_started_on", "id"))[-10:]
        assert flat(usage.by_start.chunks) == everything
        assert usage.count == len(everything)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--keep" in caplog.text


def test_groups_come_by_seconds_and_then_by_name() -> None:
    events = [
        event(seconds=5, label="b"), event(seconds=5, label="a"), event(seconds=9, label="c"),
        event(seconds=5, label="c", track_id="track2"), event(seconds=0, label="d"),
    ]
    chunks = [server.Chunk(events[:2]), server.Chunk(events[2:])]
    rows = [*result(server.aggregate(chunks, ("label",), None, (), None))]
    assert rows == [("c", 2, 14), ("a", 1, 5), ("b", 1, 5), ("d", 1, 0)]
    rows = [*result(server.aggregate(chunks, ("track_id", "label"), None, (), None))]
    assert [row[:2] for row in rows] == [
        ("track1", "c"), ("track1", "a"), ("track1", "b"), ("track2", "c"), ("track1", "d"),
    ]


@pytest.mark.parametrize(
    ("window", "started", "began"),
    [
        ("minute", 1_551_398_399, 1_551_398_340), ("hour", 1_551_398_399, 1_551_394_800), ("day", 1_551_398_399, 1_551_312_000),
        ("month", 1_551_398_399, 1_548_979_200), ("month", 1_551_398_400, 1_551_398_400), ("month", 0, 0), ("day", 0, 0),
    ],
)
def test_a_window_begins_in_utc(window: str, started: int, began: int) -> None:
    assert server.windows_of([event(started)], window) == [began]


@pytest.mark.parametrize("window", [None, "minute", "hour", "day", "month"])
@pytest.mark.parametrize("by", [(), ("label",), ("user_id", "label")])
@pytest.mark.parametrize("wanted", [(), ("label",), ("track_id", "user_id")])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_groups_and_windows_add_up_to_what_a_naive_sum_finds(
    window: str | None, by: tuple[str, ...], wanted: tuple[str, ...], limit: int | None
) -> None:
    events = random_events(random.Random(31), 900)
    for made in events:
        made.stream_started_on -= random.Random(made.json_fields).randrange(3) * 86_400 * 20
    events.sort(key=attrgetter("stream_started_on"))
    chunks = [server.Chunk(events[:40]), *(server.Chunk(events[at : at + 100]) for at in range(40, 900, 100))]
    values = tuple((name, frozenset((f"{name}0", f"{name}2"))) for name in wanted)
    for _ in range(2):  # the second time the chunks know their totals
        rows = [*result(server.aggregate(chunks, by, window, values, limit))]
    naive: dict[tuple[Any, ...], list[int]] = {}
    for made in events:
        if any(getattr(made, name) == f"{name}1" for name in wanted):
            continue
        moment = datetime.fromtimestamp(made.stream_started_on, UTC)
        start = moment.replace(second=0)
        start = start.replace(minute=0) if window in ("hour", "day", "month") else start
        start = start.replace(hour=0) if window in ("day", "month") else start
        start = start.replace(day=1) if window == "month" else start
        key = (*([int(start.timestamp())] if window else []), *(getattr(made, name) for name in by))
        total = naive.setdefault(key, [0, 0])
        total[0] += 1
        total[1] += made.seconds_streamed
    in_order = sorted(naive, key=lambda key: (key[:1] if window else (), -naive[key][1], key))
    assert rows == [(*key, *naive[key]) for key in in_order][:limit]


def test_more_rows_than_an_answer_may_have_are_refused_and_a_limit_lets_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_ROWS", 100)
    for count in (100, 101):
        chunks = [server.Chunk([event(user_id=f"user{number}") for number in range(count)])]
        if count > 100:
            with pytest.raises(InvalidError, match=r"100 rows.*limit"):
                result(server.aggregate(chunks, ("user_id",), None, (), None))
        else:
            assert len([*result(server.aggregate(chunks, ("user_id",), None, (), None))]) == 100
        assert [*result(server.aggregate(chunks, ("user_id",), None, (), 3))] == [("user0", 1, 60), ("user1", 1, 60), ("user10", 1, 60)]
        assert [*result(server.aggregate(chunks, ("user_id",), None, (("user_id", {"user7"}),), None))] == [("user7", 1, 60)]


# ── Royalties ───────────────────────────────────────────────────────────────────────────────────


def books_of(usage: Usage, subscriptions: dict[str, Subscription]) -> server.Books:
    """Make books of the totals of some usage."""
    books = server.Books(subscriptions)
    books.record(flat(usage.by_start.chunks))
    return books


def close(books: server.Books, month: str) -> None:
    """Close a month that can be closed."""
    assert books.obstacle(month, "closed", NOW) == ""
    books.closed[month] = result(server.account_of(books.snapshot(), month, NOW))


def row_of(books: server.Books, month: str) -> dict[str, Any]:
    """Return the row of a month."""
    return result(server.month_rows(books.snapshot(), month))[0]


def report_of(books: server.Books, month: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the report and its CSV's rows."""
    rows = result(server.report_by_month(books.snapshot(), month))
    return result(server.report(books.snapshot(), month)), [dict(zip(server.REPORT_COLUMNS, row, strict=True)) for row in rows]


def statement_of(books: server.Books, month: str, label: str) -> dict[str, Any]:
    """Return a statement."""
    return result(server.statement(books.snapshot(), month, label))


def share(cents: int, weights: dict[str, int]) -> dict[str, int]:
    """Share out cents by weights that are exact."""
    claims = {name: weight << server.CLAIM_BITS for name, weight in weights.items()}
    return result(server.share_out(cents if any(weights.values()) else 0, sum(weights.values()) or 1, claims))


def naive_sharing(cents: int, claims: dict[str, Fraction]) -> dict[str, int]:
    """Share out by the largest remainder, in fractions."""
    whole = sum(claims.values())
    if whole == 0:
        return dict.fromkeys(claims, 0)
    quotas = {name: Fraction(cents) * claim / whole for name, claim in claims.items()}
    shares = {name: quota.numerator // quota.denominator for name, quota in quotas.items()}
    order = sorted(quotas, key=lambda name: (shares[name] - quotas[name], name))
    for name in order[: cents - sum(shares.values())]:
        shares[name] += 1
    return shares


def naive_month(events: list[Event], subscriptions: dict[str, Subscription]) -> tuple[int, Any, Any]:
    """Return the revenue and both columns of one month, from the events and the contract's words alone."""
    factors = {"app_store": Fraction("0.70"), "web": Fraction("0.90")}
    net = {user: Fraction(found.fee) * factors[found.origin] for user, found in subscriptions.items()}
    revenue = int(sum(net.values()) + Fraction(1, 2))
    labels = sorted({made.label for made in events})

    def seconds(user: str | None = None, label: str | None = None) -> int:
        return sum(e.seconds_streamed for e in events if user in (None, e.user_id) and label in (None, e.label))

    pro_rata = {label: Fraction(seconds(label=label)) for label in labels}
    centric = dict.fromkeys(labels, Fraction(0))
    for user, money in net.items() if seconds() else ():
        heard = user if seconds(user) else None
        for label in labels:
            centric[label] += money * Fraction(seconds(heard, label), seconds(heard))
    return revenue, naive_sharing(revenue, pro_rata), naive_sharing(revenue, centric)


def test_both_columns_agree_with_a_naive_calculation_over_10_000_ledgers() -> None:
    rng = random.Random(23)
    starts = [1_551_398_399, 1_551_398_400, 1_554_076_799, 1_554_076_800]  # the edges of March 2019
    for _ in range(10_000):
        labels = [f"label {number}" for number in range(rng.choice((0, 1, 2, 3, 3, 10, 50)))]
        users = [f"user {number}" for number in range(rng.randrange(1, 9))]
        subscriptions = {
            user: Subscription("premium", rng.choice((0, 1, 5, 100, 799, 1499, rng.randrange(10**6 + 1))), rng.choice(("web", "app_store")))
            for user in rng.sample(users, rng.randrange(len(users) + 1))
        }
        lengths = rng.choice(((0,), (0, 1), (60,), range(86_401)))
        usage = usage_of(keep=1_000)
        add(usage, [
            event(rng.choice(starts[: rng.choice((1, 4))]), rng.choice(lengths), rng.choice(users), label=rng.choice(labels))
            for _ in range(rng.choice((0, 1, 3, 20)) if labels else 0)
        ])
        data, lines = report_of(books_of(usage, subscriptions))
        revenue = distributed = 0
        for month in {line["month"] for line in lines}:
            events = [made for made in flat(usage.by_start.chunks) if time.strftime("%Y-%m", time.gmtime(made.stream_started_on)) == month]
            of_month, *columns = naive_month(events, subscriptions)
            found = [line for line in lines if line["month"] == month]
            for name, naive in zip(("amount", "amount_user_centric"), columns, strict=True):
                assert {line["label"]: round(100 * float(line[name])) for line in found} == naive
                assert sum(naive.values()) == (of_month if any(made.seconds_streamed for made in events) else 0)
            revenue += of_month
            distributed += sum(columns[0].values())
        assert (data["revenue"], data["distributed"]) == (server.euros(revenue), server.euros(distributed))
        for name in ("amount", "amount_user_centric"):
            assert sum(round(100 * float(row[name])) for row in data["labels"]) == distributed


def test_no_share_differs_from_the_exact_one_by_a_cent() -> None:
    rng = random.Random(24)
    for _ in range(2_000):
        weights = {f"{number}": rng.choice((0, 1, 7, rng.randrange(10**12))) for number in range(rng.randrange(1, 50))}
        cents = rng.randrange(10**6)
        shares = share(cents, weights)
        whole = sum(weights.values())
        assert sum(shares.values()) == (cents if whole else 0)
        assert all(abs(shares[name] - Fraction(cents * weight, whole or 1)) < 1 for name, weight in weights.items() if whole)


def test_a_very_small_share_is_a_plain_decimal_in_the_csv() -> None:
    books = server.Books({})
    books.record([event(1, 1, label="a"), event(1, 99_998, label="b")])
    rows = result(server.report_by_month(books, None))
    assert [server.encode_cells(*row).split(",")[2:6] for row in rows] == [["a", "1", "1", "0.00001"], ["b", "1", "99998", "0.99999"]]


def test_three_equal_labels_share_100_euros_as_33_34_33_33_and_33_33() -> None:
    assert share(10_000, {"c": 5, "a": 5, "b": 5}) == {"a": 3_334, "b": 3_333, "c": 3_333}


def test_a_subscriber_pays_once_however_many_streams_there_are() -> None:
    usage = usage_of(keep=100)
    add(usage, [event(user_id="user1", label=f"label{number % 2}") for number in range(50)])
    data, _ = report_of(books_of(usage, {"user1": Subscription("premium", 799, "app_store")}))
    assert (data["revenue"], data["distributed"]) == ("5.59", "5.59")


def test_the_report_has_the_shape_of_the_contract() -> None:
    usage = usage_of(keep=100)
    add(usage, [event(1_551_398_400, 600, "user1", label="a"), event(1_551_398_400, 400, "user2", label="b")])
    data, lines = report_of(books_of(usage, server.SUBSCRIPTIONS))
    none = {"adjustment": "0.00", "adjustment_user_centric": "0.00"}
    assert data == {
        "currency": "EUR", "months": ["2019-03"], "subscribers": 3, "revenue": "26.28", "distributed": "26.28",
        "adjusted": "0.00", "seconds_streamed": 1_000,
        "labels": [
            {"label": "a", "streams": 1, "seconds_streamed": 600, "share": 0.6, "amount": "15.77", "amount_user_centric": "9.91"} | none,
            {"label": "b", "streams": 1, "seconds_streamed": 400, "share": 0.4, "amount": "10.51", "amount_user_centric": "16.37"} | none,
        ],
    }
    assert list(lines[0]) == list(server.REPORT_COLUMNS)
    # By hand: 7.99 x 0.70 = 5.593, 14.99 x 0.90 = 13.491 and 7.99 x 0.90 = 7.191 make 26.275. user3 did
    # not stream: 7.191 go pro rata. a: 5.593 + 0.6 x 7.191 = 9.9076; b: 13.491 + 0.4 x 7.191 = 16.3674.


def ledger_of(totals: dict[str, dict[str, int]], fees: dict[str, tuple[int, str]]) -> server.Ledger:
    """Make the ledger of seconds by user and label, and of fees in cents with their origins."""
    counted = {user: {label: (1, seconds) for label, seconds in own.items()} for user, own in totals.items()}
    return result(server.tally(counted, {user: Subscription("p", *fee) for user, fee in fees.items()}))


def naive_shares(totals: dict[str, dict[str, int]], fees: dict[str, tuple[int, str]]) -> dict[str, tuple[int, int]]:
    """Share out the same in fractions, by the contract's words alone."""
    events: list[Any] = [
        SimpleNamespace(user_id=user, label=label, seconds_streamed=seconds) for user, own in totals.items() for label, seconds in own.items()
    ]
    _, pro_rata, centric = naive_month(events, {user: Subscription("p", *fee) for user, fee in fees.items()})
    return {label: (pro_rata[label], centric[label]) for label in pro_rata}


def test_ties_and_near_ties_are_shared_out_as_fractions_would_be_in_3_000_ledgers() -> None:
    rng = random.Random(31)
    for _ in range(3_000):
        labels = [f"l{number}" for number in range(rng.randrange(1, 7))]
        lengths = rng.choice(((1, 2), (60,), range(1, 8), range(100_000)))
        totals: dict[str, dict[str, int]] = {}
        fees: dict[str, tuple[int, str]] = {}
        for number in range(rng.randrange(1, 9)):
            fee = rng.choice((0, 1, 5, 10, 500, 799, 1000)), rng.choice(("web", "app_store"))
            own = {label: rng.choice(lengths) for label in labels if rng.randrange(3)}
            turned = labels[rng.randrange(len(labels)):] + labels
            for copy in range(rng.choice((1, 2))):  # the second streams the same of other labels: sums that tie
                fees[f"u{number} {copy}"] = fee
                totals[f"u{number} {copy}"] = {turned[labels.index(label)] if copy else label: seconds for label, seconds in own.items()}
        found = ledger_of(totals, fees).labels
        assert {label: (line.amount, line.amount_user_centric) for label, line in found.items()} == naive_shares(totals, fees)


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_a_near_tie_far_behind_the_point_is_decided_exactly(difference: int) -> None:
    # Six prime denominators, and by the Chinese remainder theorem numerators whose fractions add up to a
    # whole number and 1 / their product, 2^-186. "z" and "a" both end in half a cent, one with that on top.
    primes = [2_147_483_647, 2_147_483_629, 2_147_483_587, 2_147_483_579, 2_147_483_563, 2_147_483_549]
    product = math.prod(primes)
    fees = dict.fromkeys([*"123456"], (1_000, "web")) | {"half": (5, "web"), "other half": (5, "web")}
    totals = {"half": {"a": 7}, "other half": {"z": 7}}
    for user, prime in zip("123456", primes, strict=True):
        part = pow(product // prime, -1, prime)
        gets = {-1: "a", 0: "c", 1: "z"}[difference]
        totals[user] = {gets: part, "d": prime - part} if difference else {"c": prime}
    ledger = ledger_of(totals, fees)
    found = {label: line.amount_user_centric for label, line in ledger.labels.items()}
    assert found == {label: amounts[1] for label, amounts in naive_shares(totals, fees).items()}
    assert (found["a"] % 10, found["z"] % 10) == ((4, 5) if difference == 1 else (5, 4))  # equal: "a" is first


def test_100_000_subscribers_are_shared_out_exactly_and_with_little_memory() -> None:
    rng, names = random.Random(32), [f"label {number}" for number in range(300)]
    totals = {f"user {number}": {label: (1, rng.randrange(30, 500_000)) for label in rng.sample(names, 5)} for number in range(100_000)}
    subscriptions = {user: Subscription("p", rng.choice((799, 999, 1_499)), rng.choice(("web", "app_store"))) for user in totals}
    books = server.Books(subscriptions, defaultdict(dict, {"2019-03": totals}))
    tracemalloc.start()
    data, _ = report_of(books, "2019-03")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000_000
    with localcontext(prec=60):
        claims = Counter[str]()
        for user, own in totals.items():
            heard = sum(seconds for _, seconds in own.values())
            for label, (_, seconds) in own.items():
                claims[label] += Decimal(subscriptions[user].net * seconds) / heard  # type: ignore[assignment]
        revenue = int(sum(each.net for each in subscriptions.values()) / 100 + 0.5)
        quotas = {label: revenue * claim / sum(claims.values()) for label, claim in claims.items()}
        left = revenue - sum(map(int, quotas.values()))
        best = sorted(quotas, key=lambda label: quotas[label] % 1, reverse=True)
        assert quotas[best[left - 1]] % 1 - quotas[best[left]] % 1 > Decimal("1e-20")  # no tie
    naive = {label: int(quota) + (label in best[:left]) for label, quota in quotas.items()}
    assert {line["label"]: line["amount_user_centric"] for line in data["labels"]} == {label: server.euros(cents) for label, cents in naive.items()}


@pytest.mark.parametrize(("cents", "text"), [(-12, "-0.12"), (-1, "-0.01"), (-100, "-1.00"), (-1_234, "-12.34"), (0, "0.00"), (5, "0.05")])
def test_money_below_nothing_is_written_with_its_sign_first(cents: int, text: str) -> None:
    assert server.euros(cents) == text


JANUARY, FEBRUARY = 1_546_421_951, 1_549_100_000  # moments of 2019-01 and 2019-02


def example() -> server.Books:
    """Make the books of the README's example."""
    books = server.Books(dict(server.SUBSCRIPTIONS))
    books.record([event(JANUARY, 600, "user1", label="a"), event(JANUARY, 400, "user2", label="b")])
    return books


def test_the_statement_has_the_shape_and_the_numbers_of_the_contract() -> None:
    books = example()
    paid = server.Account(0, {}, {}, 0, 0, {"a": server.Line(0, 0, 12, -3)}, {})  # in 2018-12, too much and too little
    books.closed["2018-12"] = paid
    found = statement_of(books, "2019-01", "a")
    wanted = {
        "month": "2019-01", "status": "open", "currency": "EUR",
        "line": {"label": "a", "streams": 1, "seconds_streamed": 600, "share": 0.6, "amount": "15.77", "amount_user_centric": "9.91", "adjustment": "-0.12", "adjustment_user_centric": "0.03"},
        "pro_rata": {"revenue": "26.28", "seconds_streamed": 600, "of_seconds": 1000, "exact": "15.768000", "rounded_down": "15.76", "cent_added": True},
        "user_centric": {
            "subscribers": [
                {"user_id": "user1", "product_type": "premium", "fee": "7.99", "origin": "app_store", "net": "5.593000", "seconds_streamed": 600, "of_seconds": 600, "part": "5.593000"},
                {"user_id": None, "product_type": None, "fee": None, "origin": None, "net": "7.191000", "seconds_streamed": 600, "of_seconds": 1000, "part": "4.314600"},
            ],
            "sum": "9.907600", "of_sum": "26.275000", "revenue": "26.28", "exact": "9.909485", "rounded_down": "9.90", "cent_added": True,
        },
        "listeners_without_subscription": {"users": 0, "seconds_streamed": 0},
        "adjustments": [{"month": "2018-12", "amount": "-0.12", "amount_user_centric": "0.03"}],
    }  # fmt: skip
    assert json.dumps(found) == json.dumps(wanted)  # the order of the keys, too
    assert [server.encode_cells(*row.values()) for row in found["user_centric"]["subscribers"]] == [
        "user1,premium,7.99,app_store,5.593000,600,600,5.593000", ",,,,7.191000,600,1000,4.314600",
    ]  # fmt: skip
    with pytest.raises(server.MissingError, match="'c' in 2019-01"):
        statement_of(books, "2019-01", "c")


def test_the_row_of_a_month_has_the_keys_of_the_contract_in_order() -> None:
    books = example()
    row = row_of(books, "2019-01")
    assert json.dumps(row) == json.dumps({
        "month": "2019-01", "status": "open", "closed_on": None, "subscribers": 3, "streams": 2, "seconds_streamed": 1000,
        "fees": "30.97", "revenue": "26.28", "distributed": "26.28", "adjusted": "0.00", "late": 0,
    })  # fmt: skip
    close(books, "2019-01")
    assert row_of(books, "2019-01") == row | {"status": "closed", "closed_on": NOW}


def test_a_late_stream_is_paid_as_an_adjustment_and_the_closed_month_stays_as_it_is() -> None:
    books = example()
    close(books, "2019-01")
    before = report_of(books, "2019-01")
    books.record([event(JANUARY, 200, "user3", label="c")])
    books.subscriptions["user1"] = Subscription("premium", 10_000, "web")
    assert report_of(books, "2019-01") == before
    assert row_of(books, "2019-01")["late"] == 3
    assert [line["label"] for line in report_of(books, "2019-02")[0]["labels"]] == ["a", "b", "c"]  # by adjustments alone
    books.record([event(FEBRUARY, 100, "user2", label="b")])
    close(books, "2019-02")
    lines = {line["label"]: line for line in report_of(books, "2019-02")[0]["labels"]}
    assert lines["a"] == {"label": "a", "streams": 0, "seconds_streamed": 0, "share": 0.0, "amount": "0.00", "amount_user_centric": "0.00", "adjustment": "-2.63", "adjustment_user_centric": "-4.31"}
    assert lines["c"] == lines["a"] | {"label": "c", "adjustment": "4.38", "adjustment_user_centric": "7.19"}
    assert (lines["b"]["adjustment"], lines["b"]["adjustment_user_centric"]) == ("-1.75", "-2.88")
    every, _ = report_of(books)
    assert (every["months"], every["adjusted"], every["seconds_streamed"]) == (["2019-01", "2019-02"], "0.00", 1_100)
    assert row_of(books, "2019-01")["late"] == 3  # what was paid for the month is not what it would be now
    assert result(server.unpaid(books)) == {}
    assert statement_of(books, "2019-02", "c")["adjustments"] == [{"month": "2019-01", "amount": "4.38", "amount_user_centric": "7.19"}]


def test_the_month_of_the_readme_is_as_it_says() -> None:
    books = example()

    def figures(month: str) -> dict[str, tuple[str, ...]]:
        return {line["label"]: tuple(line[name] for name in server.LABEL_COLUMNS[4:]) for line in report_of(books, month)[0]["labels"]}

    assert books.obstacle("2019-01", "closed", 1_548_979_199) == "2019-01 is not over"
    books.closed["2019-01"] = result(server.account_of(books.snapshot(), "2019-01", 1_549_008_000))
    assert json.dumps(row_of(books, "2019-01"), separators=(",", ":")) == (
        '{"month":"2019-01","status":"closed","closed_on":1549008000,"subscribers":3,"streams":2,"seconds_streamed":1000,'
        '"fees":"30.97","revenue":"26.28","distributed":"26.28","adjusted":"0.00","late":0}'
    )
    books.record([event(JANUARY, 250, "user3", label="b")])
    assert row_of(books, "2019-01")["late"] == 2
    assert figures("2019-01") == {"a": ("15.77", "9.91", "0.00", "0.00"), "b": ("10.51", "16.37", "0.00", "0.00")}
    books.record([event(FEBRUARY, 500, "user1", label="a"), event(FEBRUARY, 500, "user3", label="b")])
    february = {"a": ("13.14", "12.34", "-3.16", "-4.32"), "b": ("13.14", "13.94", "3.16", "4.32")}
    assert figures("2019-02") == february
    close(books, "2019-02")
    assert figures("2019-02") == february
    at_once = server.Books(dict(server.SUBSCRIPTIONS), defaultdict(dict, {"2019-01": books.months["2019-01"]}))
    lines = report_of(at_once, "2019-01")[0]["labels"]
    assert {line["label"]: (line["amount"], line["amount_user_centric"]) for line in lines} == {"a": ("12.61", "5.59"), "b": ("13.67", "20.69")}


def test_what_came_late_is_worked_out_once_and_not_after_each_other_change() -> None:
    books, months = example(), [f"2018-{month:02}" for month in range(1, 13)]
    for month in months:
        books.record([event(server.month_start(month), 9, f"user{number}", label=f"label {number % 7}") for number in range(300)])
        close(books, month)
    books.record([event(server.month_start(month), 5, "user2", label="label 3") for month in months])
    first = sum(1 for _ in server.month_rows(books.snapshot()))
    late = report_of(books)[0]
    books.record([event(FEBRUARY, 1, "user1", label="a")])
    assert sum(1 for _ in server.month_rows(books.snapshot())) < first / 10
    books.record([event(FEBRUARY, 1, "user1", label="a")], -1)
    assert report_of(books)[0] == late
    books.record([event(server.month_start(months[3]), 5, "user1", label="label 4")])
    assert report_of(books)[0] != late
    books.record([event(server.month_start(months[3]), 5, "user1", label="label 4")], -1)
    assert report_of(books)[0] == late


def test_a_closed_month_without_a_stream_is_not_worked_out_again() -> None:
    books = server.Books({f"user{number}": server.SUBSCRIPTIONS["user1"] for number in range(300)})
    close(books, "2018-01")
    assert sum(1 for _ in server.unpaid(books.snapshot())) < 300


def test_what_stands_in_the_way_of_closing_and_opening_is_said() -> None:
    books, now = example(), 1_549_065_600  # 2019-02-02
    books.record([event(FEBRUARY, 1, "user1", label="a")])
    assert books.obstacle("2019-01", "closed", 1_548_979_199) == "2019-01 is not over"
    assert books.obstacle("2019-02", "closed", now) == "2019-02 is not over"
    assert books.obstacle("2019-02", "closed", NOW) == "2019-01 has streams and is open: close it first"
    close(books, "2018-05")  # nothing was streamed: it distributes nothing
    close(books, "2019-01")
    assert books.obstacle("2018-05", "open", now) == "2019-01 is closed: open it first"
    for month, status in (("2018-05", "closed"), ("2019-01", "closed"), ("2019-01", "open"), ("2019-02", "open"), ("2019-02", "closed")):
        assert books.obstacle(month, status, NOW) == ""
    assert report_of(books)[0]["months"] == ["2019-01", "2019-02"]
    books.record([event(server.month_start("2018-05"), 1, "user1", label="a")])
    assert report_of(books)[0]["months"] == ["2018-05", "2019-01", "2019-02"]  # a stream is there, and what was paid was nothing
    books.record([event(server.month_start("2018-05"), 1, "user1", label="a")], -1)
    del books.closed["2019-01"]
    assert report_of(books, "2019-01")[0]["status"] == "open"
    assert report_of(books)[0]["months"] == ["2019-01", "2019-02"]


def test_a_month_with_nothing_in_it_distributes_nothing_but_can_be_closed() -> None:
    for totals, subscriptions in (({}, {}), ({}, server.SUBSCRIPTIONS), ({"u": {"a": (2, 0)}}, server.SUBSCRIPTIONS), ({"u": {"a": (2, 5)}}, {})):
        books = server.Books(dict(subscriptions), defaultdict(dict, {"2019-01": dict(totals)}))
        for _ in range(2):
            data, _ = report_of(books, "2019-01")
            assert (data["distributed"], data["adjusted"]) == ("0.00", "0.00")
            assert [line["amount"] for line in data["labels"]] == ["0.00"] * len(totals)
            for label in ("a",) if totals else ():
                found = statement_of(books, "2019-01", label)
                assert [found[column]["exact"] for column in ("pro_rata", "user_centric")] == ["0.000000"] * 2
            books.closed["2019-01"] = result(server.account_of(books.snapshot(), "2019-01", NOW))


def steps_of(steps: server.Steps[Any]) -> Iterator[Any]:
    """Yield None for each step, and then the result."""
    yield (yield from steps)


def test_who_reads_in_steps_sees_one_moment() -> None:
    rng = random.Random(33)
    books = server.Books(dict(server.SUBSCRIPTIONS))

    def make(number: int) -> list[Event]:
        moment = rng.choice([*CLOSABLE.values()])
        return [event(moment, number, f"user{number % 300}", label=rng.choice("abc")), event(moment, 7, f"user{rng.randrange(300)}", label="b")]

    known = [made for number in range(300) for made in make(number)]
    books.record(known)
    close(books, min(CLOSABLE))
    for _ in range(50):
        (wanted, _), result = report_of(books), steps_of(server.report(books.snapshot(), None))
        for number in itertools.count():  # a change after each step
            if number % 3:
                known += (new := make(number))
                books.record(new)
            else:
                books.record([known.pop(rng.randrange(len(known)))], -1)
            books.subscriptions[f"user{number % 300}"] = Subscription("p", number, "web")
            if (seen := next(result, None)) is not None:
                assert seen == wanted
                break
        again = server.Books(books.subscriptions, closed=books.closed)
        again.record(known)
        assert report_of(books) == report_of(again)  # nothing that was found out in between is remembered


class Payroll:
    """What the contract says of closing, in fractions, from a list of events and what was paid."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.subscriptions: dict[str, Subscription] = {}
        self.frozen: dict[str, dict[str, Subscription]] = {}
        self.amounts: dict[str, dict[str, list[int]]] = {}  # of each closed month
        self.adjustments: dict[str, dict[str, list[int]]] = {}

    def month(self, name: str, subscriptions: dict[str, Subscription]) -> dict[str, list[int]]:
        """Return both amounts of each label."""
        _, *columns = naive_month([each for each in self.events if month_of(each) == name], subscriptions)
        return {label: [column[label] for column in columns] for label in columns[0]}

    def due(self) -> dict[str, list[int]]:
        """Return what all closed months would give now less what they have given."""
        due = defaultdict[str, list[int]](lambda: [0, 0])
        given = [(-1, of) for of in (*self.amounts.values(), *self.adjustments.values())]
        for sign, of in [*given, *((1, self.month(name, frozen)) for name, frozen in self.frozen.items())]:
            for label, amounts in of.items():
                due[label] = [before + sign * amount for before, amount in zip(due[label], amounts, strict=True)]
        return {label: amounts for label, amounts in due.items() if any(amounts)}

    def target(self) -> str:
        """Return the month that gets what is due."""
        if streamed := sorted({month_of(each) for each in self.events} - set(self.frozen)):
            return streamed[0]
        last = max(self.frozen, default="2018-12")
        return f"{int(last[:4]) + 1}-01" if last.endswith("12") else f"{last[:5]}{int(last[5:]) + 1:02}"

    def close(self, name: str) -> None:
        """Freeze."""
        due = self.due() if name == self.target() else {}
        self.amounts[name], self.adjustments[name] = self.month(name, self.subscriptions), due
        self.frozen[name] = dict(self.subscriptions)

    def open(self, name: str) -> None:
        """Forget what was frozen."""
        del self.amounts[name], self.adjustments[name], self.frozen[name]


def month_of(made: Event) -> str:
    """Return the month of an event."""
    return f"{datetime.fromtimestamp(made.stream_started_on, UTC):%Y-%m}"


CLOSABLE = {f"2019-{number:02}": int(datetime(2019, number, 5, tzinfo=UTC).timestamp()) for number in range(1, 5)}


class History:
    """Random changes of books, and of a payroll beside them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.books = server.Books({})
        self.payroll = Payroll()
        self.imports: list[tuple[list[Event], list[str]]] = []
        self.were: dict[str, str] = {}  # closed months as they were when they were closed
        self.done = Counter[str]()

    def make(self, count: int) -> list[Event]:
        """Make events."""
        lengths = self.rng.choice(((0, 1), (60,), (1, 2, 3), range(5_000)))
        return [
            event(self.rng.choice([*CLOSABLE.values()]), self.rng.choice(lengths), f"u{self.rng.randrange(4)}", label=self.rng.choice("abc"))
            for _ in range(count)
        ]

    def put(self, gone: list[Event], new: list[Event]) -> None:
        """Take events away and bring others."""
        self.payroll.events = [each for each in self.payroll.events if not any(each is old for old in gone)] + new
        self.books.record(gone, -1)
        self.books.record(new)

    def subscribe(self, users: list[str]) -> None:
        """Set subscriptions."""
        for user in users:
            found = Subscription("p", self.rng.choice((0, 1, 99, 799, 1_000, 10**6)), self.rng.choice(("web", "app_store")))
            self.books.subscriptions[user] = self.payroll.subscriptions[user] = found

    def step(self) -> None:
        """Do anything."""
        rng, events = self.rng, self.payroll.events
        change, month = rng.choice(("create", "change", "move", "remove", "fee", "import", "undo", "close", "close", "open")), rng.choice([*CLOSABLE])
        old = rng.choice(events) if events else None
        if change == "create":
            self.put([], self.make(rng.randrange(1, 4)))
        elif change in ("change", "move") and old:
            new = Event(*(getattr(old, name) for name in server.FIELDS))
            if change == "move":
                new.stream_started_on = CLOSABLE[month]
            else:
                new.label, new.user_id, new.seconds_streamed = rng.choice("abc"), rng.choice((old.user_id, "u0")), rng.randrange(100)
            self.put([old], [new])
        elif change == "remove" and old:
            self.put([old], [])
        elif change == "fee":
            self.subscribe([f"u{rng.randrange(5)}"])
        elif change == "import":
            made, users = self.make(rng.randrange(1, 6)), rng.sample([f"u{number}" for number in range(5)], 2)
            self.put([], made)
            self.subscribe(users)
            self.imports.append((made, users))
        elif change == "undo" and self.imports:
            made, users = self.imports[-1]
            if any(month_of(each) in self.payroll.frozen for each in made):
                return
            self.imports.pop()
            self.put([each for each in made if any(each is found for found in events)], [])
            for user in users:
                self.books.subscriptions.pop(user, None)
                self.payroll.subscriptions.pop(user, None)
        elif change in ("close", "open"):
            self.set_status(month, change)
        else:
            return
        self.done[change] += 1

    def set_status(self, month: str, change: str) -> None:
        """Close or open a month, where nothing stands in the way."""
        frozen = self.payroll.frozen
        if (month in frozen) == (change == "close"):
            return
        stands = max(frozen) > month if change == "open" else any(month_of(each) < month and month_of(each) not in frozen for each in self.payroll.events)
        assert bool(self.books.obstacle(month, {"close": "closed", "open": "open"}[change], NOW)) == stands
        if stands:
            self.done["refused"] += 1
        elif change == "open":
            del self.books.closed[month]
            self.payroll.open(month)
            del self.were[month]
        else:
            self.payroll.close(month)
            close(self.books, month)
            self.were[month] = self.figures(month)
            for line in report_of(self.books, month)[0]["labels"]:
                paid = [self.payroll.amounts[month].get(line["label"], [0, 0]), self.payroll.adjustments[month].get(line["label"], [0, 0])]
                assert [line[name] for name in server.LABEL_COLUMNS[4:]] == [server.euros(cents) for cents in itertools.chain(*paid)]

    def figures(self, month: str) -> str:
        """Return all that a closed month shows."""
        data, lines = report_of(self.books, month)
        row = row_of(self.books, month)
        statements = [statement_of(self.books, month, line["label"]) for line in data["labels"]]
        return json.dumps([data, lines, row | {"late": 0}, statements])

    def check(self) -> None:
        """Compare the closed months with what they were, and what is due with the payroll."""
        for month, were in self.were.items():
            assert self.figures(month) == were
        payroll, due = self.payroll, defaultdict[str, list[int]](lambda: [0, 0])
        for (_, label), cents in result(server.unpaid(self.books.snapshot())).items():
            due[label] = [due[label][0] + cents[0], due[label][1] + cents[1]]
        assert {label: cents for label, cents in due.items() if any(cents)} == payroll.due()
        assert not payroll.frozen or self.books.paying_month() == payroll.target()
        for month, frozen in payroll.frozen.items():
            now, then = payroll.month(month, frozen), payroll.amounts[month]
            assert row_of(self.books, month)["late"] == sum(now.get(label, [0, 0]) != then.get(label, [0, 0]) for label in {*now, *then})

    def end(self) -> None:
        """Close everything, and compare what each label has got with what it would have got at once."""
        while (month := min({month_of(each) for each in self.payroll.events} - set(self.payroll.frozen), default="")) or self.payroll.due():
            self.set_status(month or self.payroll.target(), "close")
        paid, known = (defaultdict[str, list[int]](lambda: [0, 0]) for _ in range(2))
        for month, frozen in self.payroll.frozen.items():
            for line in report_of(self.books, month)[0]["labels"]:
                cents = [round(100 * Fraction(line[name])) for name in server.LABEL_COLUMNS[4:]]
                paid[line["label"]] = [paid[line["label"]][0] + cents[0] + cents[2], paid[line["label"]][1] + cents[1] + cents[3]]
            for label, amounts in self.payroll.month(month, frozen).items():
                known[label] = [known[label][0] + amounts[0], known[label][1] + amounts[1]]
        assert {label: of for label, of in paid.items() if any(of)} == {label: of for label, of in known.items() if any(of)}
        self.check()


def test_closed_months_stay_and_everyone_is_paid_in_the_end_over_2_000_histories() -> None:
    done = Counter[str]()
    for seed in range(2_000):
        history = History(seed)
        for _ in range(history.rng.choice((5, 15, 40))):
            history.step()
            if history.rng.randrange(3) == 0:
                history.check()
        history.end()
        done += history.done
    assert min(done[change] for change in ("create", "change", "move", "remove", "fee", "import", "undo", "close", "open", "refused")) > 300


def cut(number: Fraction, places: int) -> str:
    """Write a number with so many places, as a calculator that cuts the rest off."""
    units = math.floor(number * 10**places)
    return f"{units // 10**places}.{units % 10**places:0{places}}"


def walk(found: dict[str, Any]) -> None:
    """Check a statement with nothing but what it says, and the four rules of arithmetic."""
    tiny, revenue, factors = Fraction(1, 10**6), Fraction(found["pro_rata"]["revenue"]), {"web": Fraction("0.9"), "app_store": Fraction("0.7")}
    centric, added = found["user_centric"], Fraction(0)
    for row in centric["subscribers"]:
        net = Fraction(row["net"])
        if row["user_id"] is not None:
            assert net == Fraction(row["fee"]) * factors[row["origin"]]
        added += Fraction(row["part"])
        if row["of_seconds"]:
            assert row["part"] == cut(net * row["seconds_streamed"] / row["of_seconds"], 6)
    names = [row["user_id"] for row in centric["subscribers"]]
    assert None not in names[:-1]
    subscribers = [(-Fraction(row["part"]), row["user_id"]) for row in centric["subscribers"] if row["user_id"] is not None]
    assert subscribers == sorted(subscribers)
    listeners = sum(row["seconds_streamed"] for row in centric["subscribers"] if row["user_id"] is not None)
    assert listeners + found["listeners_without_subscription"]["seconds_streamed"] == found["pro_rata"]["seconds_streamed"]
    assert added <= Fraction(centric["sum"]) <= added + len(names) * tiny
    assert revenue == math.floor(Fraction(centric["of_sum"]) * 100 + Fraction(1, 2)) / Fraction(100)
    if Fraction(centric["of_sum"]):
        near = revenue * Fraction(centric["sum"]) / Fraction(centric["of_sum"])
        assert near - tiny < Fraction(centric["exact"]) < near + 3 * tiny
    for column, name in (("pro_rata", "amount"), ("user_centric", "amount_user_centric")):
        part = found[column]
        if column == "pro_rata" and part["of_seconds"]:
            assert part["exact"] == cut(revenue * part["seconds_streamed"] / part["of_seconds"], 6)
        assert part["rounded_down"] == cut(Fraction(part["exact"]), 2)
        assert Fraction(found["line"][name]) == Fraction(part["rounded_down"]) + Fraction(1, 100) * part["cent_added"]
        assert Fraction(found["line"][name.replace("amount", "adjustment")]) == sum(Fraction(each[name]) for each in found["adjustments"])


def test_a_person_with_a_calculator_comes_to_the_same_amounts_over_2_000_ledgers() -> None:
    walked = 0
    for seed in range(2_000):
        history = History(seed)
        for _ in range(12):
            history.step()
        history.check()
        for month in sorted(history.books.months):
            data, _ = report_of(history.books, month)
            found = [statement_of(history.books, month, line["label"]) for line in data["labels"]]
            for each in found:
                walk(each)
            walked += len(found)
            for column in ("pro_rata", "user_centric"):
                if Fraction(data["distributed"]):  # the cents that are left go to those who lost most
                    lost = sorted(found, key=lambda each: (-(Fraction(each[column]["exact"]) * 100 % 1), each["line"]["label"]))
                    added = [each[column]["cent_added"] for each in lost]
                    left = Fraction(data["revenue"]) - sum(Fraction(each[column]["rounded_down"]) for each in found)
                    assert sum(added) == 100 * left
                    assert added == sorted(added, reverse=True)
    assert walked > 5_000


@pytest.mark.parametrize(
    ("fee", "cents"),
    [("0", 0), ("7.99", 799), ("7.9", 790), ("10000", 10**6), ("10000.00", 10**6), ("007.50", 750), ("0.05", 5)],
)
def test_a_fee_is_a_decimal_text(fee: str, cents: int) -> None:
    assert server.parse_subscription({"product_type": "p", "fee": fee, "origin": "web"}).fee == cents


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("fee", fee) for fee in ("", "7,99", "-1", "+1", "1e3", "7.999", "10000.01", "99999", "NaN", ".5", "5.", " 5", "٣", 7.99, 8, None, True)),
        *[("origin", origin) for origin in ("", "play_store", "Web", None, 1, ["web"])],
        *(("product_type", product) for product in ("", "p" * 129, "a\nb", None, 1)),
    ],
)
def test_a_subscription_that_is_none_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidError, match=field):
        server.parse_subscription({"product_type": "p", "fee": "1", "origin": "web"} | {field: value})


def test_totals_stay_right_after_any_mix_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CHUNK_EVENTS", 4)
    rng = random.Random(25)
    for _ in range(150):
        books, model = server.Books({}), dict[int, Event]()
        usage = Usage(books.record, keep=25)
        for _ in range(60):
            made = random_events(rng, 1)[0]
            made.stream_started_on -= rng.choice((0, 40 * 86_400))
            if model and (change := rng.randrange(3)) < 2:
                old = usage.find(rng.choice(list(model)))
                if change:
                    made = server.ChangedEvent(**asdict(made) | {"id": old.id, "version": usage.next_number()})
                    usage.replace(old, made)
                    model[old.id] = made
                else:
                    usage.remove([old], usage.next_number())
                    del model[old.id]
            else:
                add(usage, [made])
                model[made.id] = made
                for oldest in sorted(model.values(), key=attrgetter("stream_started_on", "id"))[:-25]:
                    del model[oldest.id]
        assert flat(usage.by_start.chunks) == sorted(model.values(), key=attrgetter("stream_started_on", "id"))
        assert flat(usage.by_id.chunks) == sorted(model.values(), key=attrgetter("id"))
        fresh = server.Books({})
        fresh.record(list(model.values()))
        assert {name: users for name, users in books.months.items() if users} == fresh.months
        assert books.tracks == fresh.tracks
        assert usage.count == len(model)


# ── Import ──────────────────────────────────────────────────────────────────────────────────────

USERS = "user_id;product_type;fee;origin\nuser 1;premium;7,99;app_store\nuser 2;platinum;14,99;web\n"
STREAMS = "date;user_id;region;track id;seconds\n01/03/2019;user 1;NL;track 1;60\n31/03/2019;user 2;DE;track 2;0\n01/04/2019;nobody;;track 1;86400\n"
TRACKS = [{"track_id": "track 1", "label": "label 1", "name": "One"}, {"label_name": "label;2", "track_id": "track 2"}]


def write_import(directory: Path, users: str = USERS, streams: str = STREAMS, tracks: object = TRACKS, bom: bool = False) -> Path:
    """Write the three files."""
    encoding = "utf-8-sig" if bom else "utf-8"
    directory.mkdir(exist_ok=True)
    (directory / "users.csv").write_text(users, encoding)
    (directory / "streaming.csv").write_text(streams, encoding, errors="surrogateescape")
    (directory / "tracks.json").write_text(json.dumps(tracks), encoding)
    return directory


def read_import(directory: Path) -> server.Import:
    """Import the three files."""
    return server.Import(directory, (directory / "tracks.json").read_bytes(), NOW)


def test_both_spellings_are_imported_alike(tmp_path: Path) -> None:
    one = read_import(write_import(tmp_path / "one"))
    users = USERS.replace(",", ".").replace(";", ",").replace("7.99", '"7,99"')
    streams = STREAMS.replace(";", ",").replace("track id", "Track_ID").replace("\n", "\r\n").replace(",NL,", ", NL , ") + "\r\n \r\n"
    two = read_import(write_import(tmp_path / "two", users, streams, bom=True))
    assert one.subscriptions == two.subscriptions == {
        "user 1": Subscription("premium", 799, "app_store"), "user 2": Subscription("platinum", 1499, "web"),
    }
    assert [made.json_fields for made in one.events] == [made.json_fields for made in two.events]
    assert [(made.stream_started_on, made.label) for made in one.events] == [
        (1_551_398_400, "label 1"), (1_553_990_400, "label;2"), (1_554_076_800, "label 1"),
    ]


BAD_ROWS = {
    "1/03/2019;user 1;NL;track 1;60": "date '1/03/2019' is no day",
    "31/02/2019;user 1;NL;track 1;60": "date '31/02/2019' is no day",
    '01/03/2019;"user" 1;NL;track 1;60': "';' expected after",
    "01/03/2019;\udcff;NL;track 1;60": "user_id must not contain control characters, and must be UTF-8",
    "2019-03-01;user 1;NL;track 1;60": "date",
    "01/03/2999;user 1;NL;track 1;60": "date '01/03/2999' is before 1970 or in the future",
    "01/03/1969;user 1;NL;track 1;60": "date '01/03/1969' is before 1970 or in the future",
    "01/03/2019;;NL;track 1;60": "user_id must",
    "01/03/2019;user 1;NL;track 9;60": "track 'track 9' is not among the tracks",
    "01/03/2019;user 1;NL;track 1;-1": "seconds_streamed must",
    "01/03/2019;user 1;NL;track 1;2147483648": "seconds_streamed must",
    f"01/03/2019;user 1;NL;{'x' * 65_000};60": "track 'xxx",
    "٠١/٠٣/٢٠١٩;user 1;NL;track 1;60": "date '٠١/٠٣/٢٠١٩' is no day",
    "1 /03/2019;user 1;NL;track 1;60": "date '1 /03/2019' is no day",
    "01/03/0019;user 1;NL;track 1;60": "date '01/03/0019' is",
    "01/03/19;user 1;NL;track 1;60": "date '01/03/19' is no day",
    "01/03/2019 ;user 1;NL;track 1;60:": "seconds '60:' is no int",
    "01/03/2019;user 1;NL;track 1;1,5": "seconds '1,5' is no int",
    "01/03/2019;user 1;NL;track 1;": "seconds '' is no int",
    "01/03/2019;user 1;NL;track 1": "4 columns instead of 5",
    "01/03/2019;user 1;NL;track 1;60;": "6 columns instead of 5",
}


@pytest.mark.parametrize(("row", "fault"), BAD_ROWS.items())
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: str, fault: str) -> None:
    with pytest.raises(server.ImportFailedError, match=re.escape(f"streaming.csv:5: {fault}")) as raised:
        read_import(write_import(tmp_path, streams=STREAMS + row + "\n"))
    assert str(raised.value).count("\n") == 0
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"users": USERS + "user 1;premium;1;web\n"}, "users.csv:4: user 'user 1' is there twice"),
        ({"users": USERS + "user 3;premium;1;store\n"}, "users.csv:4: origin must"),
        ({"users": USERS + "user 3;premium;-1;web\n"}, "users.csv:4: fee must"),
        ({"users": USERS + "user 3;premium\n"}, "users.csv:4: 2 columns instead of 4"),
        ({"users": USERS + ";;;\n\n \n;;;;\n"}, "users.csv:7: 5 columns instead of 4"),
        ({"users": USERS + '"user 3'}, "users.csv:4: unexpected end of data"),
        ({"users": "user;fee\n"}, "users.csv: the first line must name the columns"),
        ({"users": ""}, "users.csv: the first line must name the columns"),
        ({"tracks": {}}, "tracks.json: it must hold a list"),
        ({"tracks": [*TRACKS, 5]}, "tracks.json, track 3: track_id is missing"),
        ({"tracks": [*TRACKS, {"track_id": "t"}]}, "tracks.json, track 3: label must"),
        ({"tracks": [*TRACKS, {"track_id": "t", "label\nserver.py: all is well\x1b[2J": 5}]}, "tracks.json, track 3: label must"),
        ({"tracks": [*TRACKS, {"track_id": "track 1", "label": "x"}]}, "tracks.json, track 3: track 'track 1' is there twice"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, files: dict[str, Any], fault: str) -> None:
    with pytest.raises(server.ImportFailedError, match=re.escape(fault)):
        read_import(write_import(tmp_path, **files))


def test_an_import_that_an_earlier_version_stored_is_known_again(tmp_path: Path) -> None:
    assert read_import(write_import(tmp_path)).hash.hex() == "e4be0ef4becc3a90200f4023aa15ba9e7710965ad9449cbbdd242c37019b857a"


@pytest.mark.parametrize("name", ["users.csv", "streaming.csv"])
def test_a_file_of_an_import_is_a_regular_one(tmp_path: Path, name: str) -> None:
    write_import(tmp_path)
    (tmp_path / name).unlink()
    for make, remove in ((os.mkfifo, Path.unlink), (Path.mkdir, Path.rmdir), (lambda path: path.symlink_to("/dev/zero"), Path.unlink)):
        make(tmp_path / name)
        with pytest.raises(server.ImportFailedError, match=f"(?m)^{name}: (it is no regular file|Is a directory)$"):
            read_import(tmp_path)
        remove(tmp_path / name)


def test_a_file_of_an_import_has_256_mib_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_import(tmp_path)
    assert server.IMPORT_BYTES == 256 * 1024 * 1024
    monkeypatch.setattr(server, "IMPORT_BYTES", 2 * 1024 * 1024)
    row = STREAMS.splitlines()[1] + "\n"
    for count, fault in ((2_000, None), (2 * 1024 * 1024 // len(row), "streaming.csv: it is larger than 2 MiB")):
        (tmp_path / "streaming.csv").write_text(STREAMS + row * count, "utf-8")
        with pytest.raises(server.ImportFailedError, match=fault) if fault else contextlib.nullcontext():
            read_import(tmp_path)
    (tmp_path / "streaming.csv").write_text(STREAMS, "utf-8")
    os.truncate(tmp_path / "streaming.csv", 1 << 40)  # a sparse file takes no room on the disk
    with pytest.raises(server.ImportFailedError, match=r"streaming.csv: it is larger than 2 MiB"):
        read_import(tmp_path)


def test_files_that_are_missing_or_no_text_are_named(tmp_path: Path) -> None:
    write_import(tmp_path)
    (tmp_path / "users.csv").unlink()
    (tmp_path / "streaming.csv").write_bytes(b"\xff" + STREAMS.encode())
    with pytest.raises(server.ImportFailedError) as raised:
        server.Import(tmp_path, b"[" * 100_000, NOW)
    named = [line.split(":")[0] for line in str(raised.value).splitlines()]
    assert {"users.csv", "streaming.csv", "tracks.json"} <= {name.split(",")[0] for name in named}


# ── Storage ─────────────────────────────────────────────────────────────────────────────────────

HOSTILE = ['a,"b"', "=cmd|' /C calc'!A0", "☃ \u2028", "{{ 1 }}", "<img src=x onerror=alert(1)>", "\u202egnp"]
STREAM = {"user_id": "user1", "track_id": "track1", "label": "label1", "stream_started_on": NOW - 9, "seconds_streamed": 5}


async def snapshot(client: Client) -> list[bytes]:
    """Return all that the API tells."""
    paths = ("/usage", "/api/v1/streams?limit=1000", "/api/v1/users", "/api/v1/report", "/api/v1/report?format=csv")
    return [await (await client.get(path)).read() for path in paths]


async def test_everything_is_there_again_after_a_restart(start: Start, tmp_path: Path) -> None:
    client, rng = await start(db=tmp_path / "usage.db"), random.Random(28)
    ids: list[int] = []
    for number in range(200):
        made = STREAM | {"label": f"label{rng.randrange(4)}", "stream_started_on": NOW - rng.randrange(9), "seconds_streamed": rng.randrange(99)}
        change = rng.randrange(4)
        if change == 0 or not ids:
            answer = await client.post("/api/v1/streams", json=[made, made], headers={"Idempotency-Key": f"key {number}"})
            ids += [stream["id"] for stream in (await answer.json())["data"]]
        elif change == 1:
            await client.put(f"/api/v1/streams/{rng.choice(ids)}", json=made)
        elif change == 2:
            await client.patch(f"/api/v1/streams/{rng.choice(ids)}", json={"label": "changed"})
        else:
            await client.delete(f"/api/v1/streams/{ids.pop()}")
    await client.put("/api/v1/users/user1", json={"product_type": "none", "fee": "0.10", "origin": "web"})
    last = (await (await client.post("/api/v1/streams", json=STREAM, headers={"Idempotency-Key": "last"})).json())["data"]["id"]
    await client.delete(f"/api/v1/streams/{last}")
    before = await snapshot(client)
    await client.close()
    client = await start(db=tmp_path / "usage.db")
    assert await snapshot(client) == before
    again = await client.post("/api/v1/streams", json=STREAM, headers={"Idempotency-Key": "last"})
    assert (again.headers["Idempotent-Replayed"], (await again.json())["data"]["id"]) == ("true", last)
    assert (await (await client.post("/api/v1/streams", json=STREAM)).json())["data"]["id"] == last + 2  # its removal took a number, too


async def test_writers_that_wait_together_share_a_commit(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    database, sizes = client.app[server.STATE].journal.database, list[int]()
    commit = database.commit

    def counting(statements: server.Statements) -> None:
        sizes.append(len(statements))
        commit(statements)

    database.commit = counting
    answers = await asyncio.gather(*(client.post("/api/v1/streams", json=STREAM) for _ in range(60)))
    assert {answer.status for answer in answers} == {201}
    assert len(sizes) < 30
    assert len(await (await client.get("/usage")).json()) == 60


async def test_the_same_key_at_the_same_time_stores_once(start: Start, tmp_path: Path) -> None:
    client, headers = await start(db=tmp_path / "usage.db"), {"Idempotency-Key": "k"}
    answers = await asyncio.gather(*(client.post("/api/v1/streams", json=STREAM, headers=headers) for _ in range(20)))
    assert {await answer.read() for answer in answers} == {await answers[0].read()}
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 19
    assert (await (await client.get("/health")).json())["events"] == 1


async def test_changes_of_one_stream_at_the_same_time_lose_nothing(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    await client.post("/api/v1/streams", json=STREAM)
    changes = [{"label": "x"}, {"track_id": "y"}, {"user_id": "z"}, {"seconds_streamed": 9}]
    answers = await asyncio.gather(*(client.patch("/api/v1/streams/1", json=change) for change in changes))
    assert {answer.status for answer in answers} == {200}
    changed = await (await client.get("/usage")).json()
    assert changed == [STREAM | {"label": "x", "track_id": "y", "user_id": "z", "seconds_streamed": 9}]
    answers = await asyncio.gather(*(client.delete("/api/v1/streams/1") for _ in range(5)))
    assert sorted(answer.status for answer in answers) == [200, 404, 404, 404, 404]


async def test_what_cannot_be_stored_is_503_and_not_visible(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    await client.post("/api/v1/streams", json=STREAM)
    before = await snapshot(client)
    connection = client.app[server.STATE].journal.database.connection
    connection.execute("PRAGMA query_only = ON")
    key = {"Idempotency-Key": "k"}
    for answer in (
        await client.post("/api/v1/streams", json=[STREAM, STREAM], headers=key),
        await client.put("/api/v1/streams/1", json=STREAM | {"label": "x"}),
        await client.patch("/api/v1/streams/1", json={"label": "x"}),
        await client.delete("/api/v1/streams/1"),
        await client.put("/api/v1/users/user9", json={"product_type": "p", "fee": "1", "origin": "web"}),
    ):
        assert (answer.status, list(await answer.json())) == (503, ["error"])
    health = await client.get("/health")
    assert (health.status, (await health.json())["status"]) == (503, "degraded")
    assert await snapshot(client) == before
    connection.execute("PRAGMA query_only = OFF")
    answer = await client.post("/api/v1/streams", json=[STREAM, STREAM], headers=key)
    assert (answer.status, answer.headers.get("Idempotent-Replayed")) == (201, None)
    assert (await client.get("/health")).status == 200


async def test_a_file_that_is_removed_or_replaced_takes_no_more_writes(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    client = await start(db=path)
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 201
    path.rename(tmp_path / "other.db")
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 503
    path.touch()
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 503
    (tmp_path / "other.db").rename(path)
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 201
    assert (await (await client.get("/health")).json())["events"] == 2


async def test_a_stream_may_have_lasted_2147483647_seconds(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    lasted = [7_200, 7_201, 86_400, 86_401, 2_147_483_647]
    assert (await client.post("/api/v1/streams", json=[STREAM | {"seconds_streamed": seconds} for seconds in lasted])).status == 201
    assert (await client.patch("/api/v1/streams/1", json={"seconds_streamed": 2_147_483_648})).status == 400
    before = await snapshot(client)
    await client.close()
    client = await start(db=tmp_path / "usage.db")
    assert await snapshot(client) == before
    assert [made["seconds_streamed"] for made in json.loads(before[0])] == lasted


async def test_names_are_stored_to_the_letter(start: Start, tmp_path: Path) -> None:
    names = [*HOSTILE, "123", "1e5", "0.10", "null", "true", "'", '"', "\\", "[0]", "\U0001f3b5" * 64, "é", "e\u0301", "x" * 128]
    client = await start(db=tmp_path / "usage.db")
    assert (await client.post("/api/v1/streams", json=[STREAM | {"user_id": name, "label": name} for name in names])).status == 201
    await client.close()
    client = await start(db=tmp_path / "usage.db")
    assert [made["label"] for made in await (await client.get("/usage")).json()] == names
    assert {user["user_id"] for user in (await (await client.get("/api/v1/users")).json())["data"]} >= set(names)


async def test_another_process_that_locks_the_file_costs_a_503_and_no_stall(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        write, others = asyncio.create_task(client.post("/api/v1/streams", json=STREAM)), 0
        while not write.done():
            assert (await client.get("/usage")).status == 200
            others += 1
        assert (await write).status == 503
        assert others > 20
        other.execute("ROLLBACK")
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 201


async def test_simulated_events_are_stored_and_history_only_into_an_empty_file(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db", history=0.1, simulate=True)
    async with asyncio.timeout(10):
        while (health := await (await client.get("/health")).json())["simulation"]["last_batch_age"] is None:
            await asyncio.sleep(0.01)
    assert health["storage"]["durable"] is True
    assert health["storage"]["last_commit_age"] < 10
    before = await snapshot(client)
    await client.close()
    client = await start(db=tmp_path / "usage.db", history=0.1)
    assert (await snapshot(client))[0] == before[0]


SCHEMA_1 = """
    CREATE TABLE streams (
        user_id TEXT NOT NULL, track_id TEXT NOT NULL, label TEXT NOT NULL,
        stream_started_on INTEGER NOT NULL, seconds_streamed INTEGER NOT NULL,
        id INTEGER PRIMARY KEY AUTOINCREMENT);
    CREATE TABLE subscriptions (
        user_id TEXT PRIMARY KEY, product_type TEXT NOT NULL, fee INTEGER NOT NULL, origin TEXT NOT NULL, import INTEGER);
    CREATE TABLE keys (key TEXT PRIMARY KEY, hash BLOB NOT NULL, first_id INTEGER NOT NULL);
    CREATE TABLE imports (id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, first_id INTEGER NOT NULL, size INTEGER NOT NULL);
    INSERT INTO streams VALUES ('user1', 'track1', 'label1', 1546421951, 1290, 7);
    INSERT INTO subscriptions VALUES ('user9', 'family', 1799, 'web', NULL);
    PRAGMA application_id = 0x73656373; PRAGMA user_version = 1;
"""


async def test_a_file_of_every_earlier_version_is_opened(start: Start, tmp_path: Path) -> None:
    for version, schema in enumerate(["", SCHEMA_1]):
        path = tmp_path / f"{version}.db"
        path.touch()
        with contextlib.closing(sqlite3.connect(path)) as old:
            old.executescript(schema)
        client = await start(db=path)
        events = await (await client.get("/usage")).json()
        assert [made["seconds_streamed"] for made in events] == [1290] * bool(version)
        assert (await (await client.post("/api/v1/streams", json=STREAM)).json())["data"]["id"] == (1, 8)[version]
        rows = [json.loads(line) for line in (await (await client.get("/api/v1/changes")).text()).splitlines()]
        assert [(row["version"], row["id"], "deleted" in row) for row in rows[:-1]] == [[], [(7, 7, False)]][version]
        assert (await client.get("/api/v1/users/user9")).status == (200 if version else 404)
        await client.close()
        with contextlib.closing(sqlite3.connect(path)) as new:
            assert new.execute("PRAGMA user_version").fetchone() == (len(server.MIGRATIONS),)
    assert version == len(server.MIGRATIONS) - 1


async def test_a_file_of_the_version_before_gives_the_same_money_and_once_a_month_is_closed_an_older_program_refuses_it(start: Start, tmp_path: Path) -> None:
    path, rng = tmp_path / "usage.db", random.Random(43)
    made = [event(rng.choice([*CLOSABLE.values()]), rng.randrange(999), f"user{rng.randrange(12)}", label=rng.choice("abcd")) for _ in range(500)]
    subscriptions = {f"user{number}": Subscription("p", rng.randrange(2_000), rng.choice(("web", "app_store"))) for number in range(9)}
    with contextlib.closing(sqlite3.connect(path)) as old:
        old.executescript(SCHEMA_1)
        old.executescript("DELETE FROM streams; DELETE FROM subscriptions")
        old.executemany("INSERT INTO streams VALUES (?, ?, ?, ?, ?, NULL)", [[getattr(each, name) for name in server.FIELDS] for each in made])
        old.executemany("INSERT INTO subscriptions VALUES (?, ?, ?, ?, NULL)", [(user, each.product_type, each.fee, each.origin) for user, each in subscriptions.items()])
        old.commit()
    client = await start(db=path)
    for month in CLOSABLE:
        revenue, *columns = naive_month([each for each in made if month_of(each) == month], server.SUBSCRIPTIONS | subscriptions)
        for body in (OPEN, CLOSE):
            await set_month(client, month, body)
            data = json.loads((await money(client, f"report?month={month}"))[0])["data"]
            assert (data["revenue"], data["distributed"], data["adjusted"]) == (server.euros(revenue), server.euros(revenue), "0.00")
            for name, naive in zip(server.AMOUNTS, columns, strict=True):
                assert {line["label"]: line[name] for line in data["labels"]} == {label: server.euros(cents) for label, cents in naive.items()}
    await client.close()
    with contextlib.closing(sqlite3.connect(path)) as newer:
        ((version,),) = newer.execute("PRAGMA user_version")
        assert version == len(server.MIGRATIONS) > 1  # the version before was of 1, and refused what is above
        newer.executescript(f"PRAGMA user_version = {version + 1}; PRAGMA wal_checkpoint(TRUNCATE)")
    content = path.read_bytes()
    async with started("--db", str(path)) as program:
        _, errors = await program.process.communicate()
        assert (program.process.returncode, errors.decode()) == (2, f"server.py: cannot use the database {path}: it is of version {version + 1}, this program is of {version}\n")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("damage", "following"),
    [
        ("DELETE FROM sqlite_sequence; DELETE FROM streams", 7),  # the sequence knows of 6
        ("UPDATE sequence SET number = 0", 7),
        ("UPDATE sequence SET number = 0; DELETE FROM sqlite_sequence", 7),
        ("UPDATE sequence SET number = 0; DELETE FROM sqlite_sequence; DELETE FROM streams WHERE id > 4", 6),  # the key knows of 5
        ("UPDATE sequence SET number = 0; DELETE FROM sqlite_sequence; DELETE FROM streams; DELETE FROM keys", 5),  # the import took 4
        ("CREATE TABLE others (id INTEGER PRIMARY KEY AUTOINCREMENT); INSERT INTO others VALUES (100)", 101),
    ],
)
async def test_an_id_that_any_table_knows_of_is_not_given_again(start: Start, tmp_path: Path, damage: str, following: int) -> None:
    path = tmp_path / "usage.db"
    client = await start(db=path, imported=read_import(write_import(tmp_path / "import")))
    answer = await client.post("/api/v1/streams", json=[STREAM, STREAM], headers={"Idempotency-Key": "k"})
    assert [made["id"] for made in (await answer.json())["data"]] == [5, 6]
    await client.close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.executescript(damage)
    client = await start(db=path)
    before = (await (await client.get("/api/v1/streams")).json())["data"]
    created = (await (await client.post("/api/v1/streams", json=STREAM)).json())["data"]
    assert created["id"] == following
    await client.close()
    client = await start(db=path)
    assert (await (await client.get("/api/v1/streams")).json())["data"] == [*before, created]


async def test_a_new_stream_never_replaces_one_that_is_stored(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 201
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as other:
        other.execute("INSERT INTO streams SELECT 'another', track_id, label, stream_started_on, seconds_streamed, 2, 2 FROM streams")
        other.commit()
        assert (await client.post("/api/v1/streams", json=STREAM)).status == 503
        assert other.execute("SELECT user_id FROM streams ORDER BY id").fetchall() == [("user1",), ("another",)]


def test_a_long_import_and_a_long_start_say_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(time, "monotonic", itertools.count(0, 1.5).__next__)  # a second and a half at each look
    imported = read_import(write_import(tmp_path / "import", streams=STREAMS + STREAMS.splitlines()[1].join("\n\n") * 3_000))
    database = server.Database(tmp_path / "usage.db")
    database.take_in(imported)
    database.load(usage_of(math.inf), server.Books({}))
    said = Counter(re.sub(r"[0-9][0-9,.]*", "N", record.getMessage()) for record in caplog.records)
    assert said["reading streaming.csv, lines so far: N after N s"] > 3_000
    assert said["storing, streams so far: N after N s"] == said["loading, streams so far: N after N s"] == 3_003
    database.close()


async def test_importing_the_same_directory_again_changes_nothing(start: Start, tmp_path: Path) -> None:
    directory = write_import(tmp_path / "import")
    client = await start(db=tmp_path / "usage.db", imported=read_import(directory))
    await client.post("/api/v1/streams", json=STREAM)
    before = await snapshot(client)
    assert [user["user_id"] for user in json.loads(before[2])["data"] if user["subscription"]] == ["user 1", "user 2"]
    await client.close()
    client = await start(db=tmp_path / "usage.db", imported=read_import(directory))
    assert await snapshot(client) == before


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
    check_simulated((json.loads(server.Chunk([made]).json_lines) for made in flat(batches)), NOW)
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
    one, two, other = ([made.json_fields for made in server.simulate_batch(NOW, random.Random(seed))] for seed in (1, 1, 2))
    assert one == two != other


async def test_a_batch_that_fails_is_counted_and_the_next_one_comes(start: Start) -> None:
    client = await start(simulate=True, interval=0.01)
    state = client.app[server.STATE]
    state.clock = Mock(side_effect=itertools.chain([OSError("no clock"), ZeroDivisionError()], itertools.repeat(NOW)))
    async with asyncio.timeout(10):
        while state.batch_errors < 2:
            await asyncio.sleep(0.01)
        count = state.usage.count
        while state.usage.count == count:
            await asyncio.sleep(0.01)
    health = await (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert health["simulation"]["errors"] == 2


async def test_until_its_first_batch_is_late_a_simulation_is_running(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.State, "create", AsyncMock(side_effect=asyncio.Event().wait))
    client = await start(simulate=True)
    await asyncio.sleep(0)
    answer = await client.get("/health")
    assert (answer.status, (await answer.json())["simulation"]["running"]) == (200, True)


async def test_a_simulation_whose_batches_all_fail_is_degraded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "LATE_SECONDS", 0.1)
    client = await start(simulate=True, interval=0.01)
    client.app[server.STATE].clock = Mock(side_effect=ZeroDivisionError)
    await asyncio.sleep(0.3)
    answer = await client.get("/health")
    assert answer.status == 503
    assert (await answer.json())["status"] == "degraded"
    assert (await answer.json())["simulation"]["running"] is False


async def begin_batches(monkeypatch: pytest.MonkeyPatch, lasting: Iterable[float]) -> list[float]:
    """Return when batches of which each lasts so long begin, one every 10 s from 100 on, in a time that need not pass."""
    now, began, each = 100.0, list[float](), iter(lasting)

    async def tick(*_: Any) -> None:
        nonlocal now
        began.append(now)
        if (seconds := next(each, None)) is None:
            raise asyncio.CancelledError
        now += seconds

    async def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds

    monkeypatch.setattr(server, "tick", tick)
    monkeypatch.setattr(server, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(server, "asyncio", SimpleNamespace(sleep=sleep))
    with pytest.raises(asyncio.CancelledError):
        await server.run_simulation(cast("server.State", Mock(config=Config(interval=10))))
    return began


@pytest.mark.parametrize(("now", "due"), [(100, 110), (100.4, 110), (109.9, 110), (110.1, 120), (125, 130), (3_699.9, 3_700), (3_700.1, 3_710)])
async def test_batches_keep_their_rhythm_however_late_one_is(monkeypatch: pytest.MonkeyPatch, now: float, due: float) -> None:
    assert await begin_batches(monkeypatch, [now - 100, 0]) == pytest.approx([100, due, due + 10])


async def test_an_hour_has_360_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(17)
    began = await begin_batches(monkeypatch, [rng.random() * 9 for _ in range(360)])
    assert began == pytest.approx([100 + 10 * number for number in range(361)])


async def test_a_clock_that_jumps_changes_neither_the_rhythm_nor_what_is_in_the_future(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, came, tick, interval = [NOW], list[float](), server.tick, 0.05

    async def counted(*arguments: Any) -> None:
        came.append(asyncio.get_running_loop().time())
        await tick(*arguments)

    monkeypatch.setattr(server, "tick", counted)
    client = await start(simulate=True, interval=interval, clock=lambda: clock[0])
    usage = client.app[server.STATE].usage
    for now in (NOW, NOW - 3_600, NOW, NOW + 3_600):
        clock[0] = now
        batches, last_id, before = len(came), usage.sequence, flat(usage.by_start.chunks)
        async with asyncio.timeout(10):
            while len(came) < batches + 5:
                await asyncio.sleep(0.01)
        assert {made.stream_started_on + made.seconds_streamed for made in flat(usage.by_id.between(last_id + 1))} == {now}
        # What was there before the clock went back stays, and can be asked for; nothing new comes there.
        later = await (await client.get(f"/usage?from={now}")).json()
        assert later == [json.loads(server.Chunk([made]).json_lines) for made in before if made.stream_started_on >= now]
        assert now != NOW - 3_600 or later
        starts = [made["stream_started_on"] for made in await (await client.get("/usage")).json()]
        assert starts == sorted(starts)
        future = await client.get(f"/usage?from={now + 1}")
        assert (future.status, await future.read()) == (400, b"")
        for moment, status in ((now, 201), (now + 1, 400)):
            answer = await client.post("/api/v1/streams", json=STREAM | {"stream_started_on": moment})
            assert answer.status == status
        health = await (await client.get("/health")).json()
        assert (health["status"], health["simulation"]["errors"]) == ("ok", 0)
        assert health["simulation"]["last_batch_age"] < 3_000
    assert all(moment > came[0] + interval * number - 0.01 for number, moment in enumerate(came))  # none made up for


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


@pytest.mark.parametrize("now", [0, 1, 29, 30, 600, 1_799, 1_800, 2_000])
async def test_no_simulated_stream_starts_before_1970(start: Start, now: int) -> None:
    client = await start(clock=lambda: now, simulate=True, history=1, random_seed=9, interval=1)
    await asyncio.sleep(0)
    events = await (await client.get("/usage")).json()
    assert events
    for made in events:
        assert made["stream_started_on"] >= 0
        assert made["stream_started_on"] + made["seconds_streamed"] <= now
        assert 30 <= made["seconds_streamed"] <= 1_800 or now < 1_800
    assert (len(events) > 100) == (now >= 2_000)


async def test_a_long_history_says_once_a_second_how_far_it_is() -> None:
    async with started("--history=100", "--keep=10000000", "--interval=2", "--no-simulation") as program:
        assert program.process.stderr
        async with asyncio.timeout(20):
            lines = [(await program.process.stderr.readline()).decode() for _ in range(3)]  # it is no terminal
        said = [re.search(r" INFO simulating the history, batches so far: ([0-9,]+) after [1-9][0-9]* s$", line) for line in lines]
        counts = [int(found[1].replace(",", "")) for found in said if found]
        assert len(set(counts)) == 3
        assert counts == sorted(counts)


# ── HTTP: parsing, errors, safety ───────────────────────────────────────────────────────────────


def parse(**parameters: str | list[str]) -> Mapping[str, Any]:
    """Parse the parameters of /usage."""
    query = urlencode({name.rstrip("_"): value for name, value in parameters.items()}, doseq=True)
    return server.parse_query(query, *server.FILTERS, "group_by", "window", "format")


@pytest.mark.parametrize(
    ("text", "since"),
    [("0", 0), ("-5", -5), ("007", 7), (str(NOW), NOW), ("-" + "9" * 18, 1 - 10**18), ("9" * 100, 10**100 - 1)],
)
def test_a_from_that_is_an_int_is_taken(text: str, since: int) -> None:
    assert parse(from_=text) == {"from": since}


@pytest.mark.parametrize(
    "text", ["1.5", "abc", "", "+5", " 5", "5 ", "٣", "1_000", "1e3", "0x10", "--5", "-", "9" * 5_000, "5\n", "null"]
)
@pytest.mark.parametrize("name", ["from", "to"])
def test_a_from_or_to_that_is_no_int_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(InvalidError, match=f"^{name} must be an int$"):
        parse(**{f"{name}_": text})


@pytest.mark.parametrize("path", ["/usage", "/api/v1/streams", "/api/v1/changes"])
async def test_a_limit_of_very_many_digits_is_400(start: Start, path: str, caplog: pytest.LogCaptureFixture) -> None:
    client = await start()
    answer = await client.get(f"{path}?limit={'0' * 4_400}1")
    assert (answer.status, "limit" in (await answer.json())["error"], caplog.text) == (400, True, "")


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("from=1&from=1", "from is given more than once"),
        ("format=csv&format=csv", "format is given more than once"),
        ("since=1", "unknown parameter 'since'"),
        ("From=1", "unknown parameter 'From'"),
        ("label=", "label must"),
        (f"user_id={'u' * 129}", "user_id must"),
        ("track_id=a%0Ab", "track_id must"),
        ("label=%FF", "label must not contain control characters, and must be UTF-8"),
        ("from=%FF", "from must"),
        ("%FF=1", "unknown parameter '\\udcff'"),
        ("format=xml", "format must"),
        ("format", "format must"),
        ("group_by=", "group_by must"),
        ("group_by=label,", "group_by must"),
        ("group_by=label,label", "group_by must"),
        ("group_by=seconds_streamed", "group_by must"),
        ("window=week", "window must"),
        ("window=", "window must"),
        ("window=day&window=day", "window is given more than once"),
        (f"from={10**18}&format=xml", "format must"),
    ],
)
def test_a_malformed_query_is_refused_by_name(query: str, named: str) -> None:
    with pytest.raises(InvalidError, match=f"^{re.escape(named)}"):
        server.parse_query(query, *server.FILTERS, "group_by", "window", "format")


def test_names_can_be_given_more_than_once() -> None:
    assert parse(label=["a", "b"], user_id="ü") == {"label": {"a", "b"}, "user_id": {"ü"}}


@pytest.mark.parametrize("by", [by for size in (1, 2, 3) for by in itertools.permutations(server.NAMES, size)])
def test_group_by_takes_the_names_in_any_order(by: tuple[str, ...]) -> None:
    assert parse(group_by=",".join(by)) == {"group_by": by}


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_csv_cell_that_a_spreadsheet_would_run_is_defused(cell: str) -> None:
    assert next(csv.reader(io.StringIO(server.encode_cells("a", cell), newline=""))) == ["a", f"'{cell}"]


def test_a_csv_number_below_zero_stays_a_number() -> None:
    assert server.encode_cells(-1, "b") == "-1,b"
    assert server.encode_cells(server.euros(-12), "-0.12") == "-0.12,'-0.12"
    assert server.encode_cells("-0.12", server.euros(-12)) == "'-0.12,-0.12"


async def test_usage_answers_with_the_events_in_order(start: Start) -> None:
    client = await start([event(NOW - 5, label="late"), event(NOW - 50), event(NOW - 5, label="later")])
    answer = await client.get("/usage")
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert [(made["stream_started_on"], made["label"]) for made in await answer.json()] == [
        (NOW - 50, "label1"), (NOW - 5, "late"), (NOW - 5, "later"),
    ]


@pytest.mark.parametrize("query", ["", "label=label1", f"from={NOW - 3_000}&to={NOW - 500}", "user_id=user_id0&track_id=track_id2", "label=nobody"])
@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
async def test_order_and_limit_give_the_first_of_either_end(start: Start, query: str, kind: str) -> None:
    client = await start(random_events(random.Random(44), 3_000))

    async def rows(more: str) -> list[str]:
        text = await (await client.get(f"/usage?{query}&format={kind}&{more}")).text()
        return [json.dumps(row) for row in json.loads(text)] if kind == "json" else text.splitlines()[kind == "csv" :]

    everything = await rows("order=asc")
    assert everything == await rows("")
    assert await rows("order=desc") == everything[::-1]
    for limit in (1, 12, 1_024, 1_025, 2_999, 100_000):
        assert await rows(f"limit={limit}") == everything[:limit]
        assert await rows(f"order=desc&limit={limit}") == everything[::-1][:limit]


@pytest.mark.parametrize("query", ["group_by=user_id", "window=hour", "window=minute&group_by=label,user_id", "group_by=track_id&label=label1"])
async def test_limit_gives_the_first_rows_of_totals(start: Start, query: str) -> None:
    client = await start(random_events(random.Random(45), 3_000))
    everything = await (await client.get(f"/usage?{query}")).json()
    for limit in (1, 2, len(everything), 100_000):
        assert await (await client.get(f"/usage?{query}&limit={limit}")).json() == everything[:limit]
    for order in ("asc", "desc"):
        answer = await client.get(f"/usage?{query}&order={order}")
        assert (answer.status, "order" in (await answer.json())["error"]) == (400, True)


async def test_more_than_100_000_rows_are_400_and_limit_is_the_way_out(start: Start) -> None:
    client = await start((event(NOW - number % 7, number % 50, user_id=f"user{number}") for number in range(100_001)), keep=200_000)
    answer = await client.get("/usage?group_by=user_id")
    assert (answer.status, "limit" in (await answer.json())["error"]) == (400, True)
    first = await (await client.get("/usage?group_by=user_id&limit=2")).json()
    assert [(row["user_id"], row["seconds_streamed"]) for row in first] == [("user10049", 49), ("user10099", 49)]
    assert len(await (await client.get("/usage?group_by=user_id&limit=100000")).json()) == 100_000
    assert len(await (await client.get(f"/usage?group_by=user_id&to={NOW}")).json()) < 100_000
    assert len(await (await client.get("/usage?group_by=user_id&user_id=user7")).json()) == 1


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
)
async def test_usage_filters_by_time_and_name(start: Start, query: str, starts: list[int]) -> None:
    client = await start([event(1, label="a"), event(5, label="b"), event(9, label="a", user_id="u2")])
    answer = await client.get(f"/usage?{query}")
    assert answer.status == 200
    assert [made["stream_started_on"] for made in await answer.json()] == starts


@pytest.mark.parametrize("query", [f"from={NOW + 1}", "from=1000000000000000000", f"from={NOW + 1}&format=csv"])
async def test_a_from_in_the_future_is_400_with_an_empty_body(start: Start, query: str) -> None:
    client = await start([event()], clock=lambda: NOW + 0.9)
    answer = await client.get(f"/usage?{query}")
    assert (answer.status, await answer.read(), answer.headers["Content-Length"]) == (400, b"", "0")
    assert (await client.get(f"/usage?from={NOW}")).status == 200


@pytest.mark.parametrize("query", ["from=", "from", "from=1&from=1", "from=+5", "from=%2B5", "from=1.5"])
async def test_a_malformed_from_is_400_and_named(start: Start, query: str) -> None:
    answer = await (await start([event()])).get(f"/usage?{query}")
    assert answer.status == 400
    assert re.match("from ", (await answer.json())["error"])


@pytest.mark.parametrize("query", ["", "group_by=label,user_id", "group_by=track_id", "window=minute", "window=hour&group_by=label"])
async def test_every_format_says_the_same(start: Start, query: str) -> None:
    rng = random.Random(9)
    client = await start([
        event(NOW - rng.randrange(999), rng.randrange(99), label=rng.choice(HOSTILE), user_id=rng.choice(HOSTILE))
        for _ in range(3_000)
    ])
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
    add(client.app[server.STATE].usage, [event()])
    changed = await client.get("/usage", headers={"If-None-Match": etag})
    assert changed.status == 200
    assert changed.headers["ETag"] != etag
    assert len(await changed.json()) == 2


@pytest.mark.parametrize("known", ["*", "that of another address"])
async def test_what_would_be_an_error_is_one_whatever_the_client_has_already(start: Start, monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    monkeypatch.setattr(server, "MOST_ROWS", 2)
    client = await start([event(label=name) for name in "abc"])
    etag = (await client.get("/usage")).headers["ETag"]
    for path, status in (("/api/v1/report/nobody?month=2027-01", 404), ("/usage?group_by=label", 400), ("/usage?group_by=label&limit=3", 304), ("/usage", 304)):
        answer = await client.get(path, headers={"If-None-Match": "*" if known == "*" else etag})
        assert (path, answer.status) == (path, status)


async def test_etags_outlive_a_restart_with_a_file_and_only_with_one(start: Start, tmp_path: Path) -> None:
    paths = ("/usage", "/usage?group_by=label&format=csv", "/api/v1/report", "/api/v1/users", "/api/v1/months")

    client = await start(db=tmp_path / "usage.db")
    assert (await client.post("/api/v1/streams", json=STREAM)).status == 201
    before = {path: (await client.get(path)).headers["ETag"] for path in paths}
    await client.close()
    client = await start(db=tmp_path / "usage.db")
    for path, tag in before.items():
        answer = await client.get(path, headers={"If-None-Match": tag})
        assert (answer.status, answer.headers["ETag"]) == (304, tag)
    await client.put("/api/v1/users/user1", json={"product_type": "p", "fee": "1", "origin": "web"})
    for path, tag in before.items():
        assert (await client.get(path, headers={"If-None-Match": tag})).status == 200
    seen = [*before.values()]
    for options in ({}, {}, {"db": tmp_path / "other.db"}):
        client = await start([event()], **options)
        for path in paths:
            answer = await client.get(path, headers={"If-None-Match": ", ".join(seen)})
            assert answer.status == 200
        seen.append(answer.headers["ETag"])


@pytest.mark.parametrize(
    ("known", "status"),
    [('"*"', 200), ('W/"*"', 200), ("ETAG", 304), ('"x" , ETAG', 304), ("*", 304), ("*, ETAG2", 200), ("", 200), ("x", 200)],
)
async def test_what_if_none_match_lists_may_be_weak_and_in_several_lines_and_a_star_in_quotes_is_a_tag(start: Start, known: str, status: int) -> None:
    client = await start([event()])
    for path in ("/usage", "/api/v1/streams/1"):
        tag = (await client.get(path)).headers["ETag"]
        for spelled in (tag.removeprefix("W/"), f"W/{tag.removeprefix('W/')}"):
            text = known.replace("ETAG2", '"2"').replace("ETAG", spelled)
            assert (await client.get(path, headers={"If-None-Match": text})).status == status
            lines = [("If-None-Match", '"other"'), ("If-None-Match", spelled)]
            assert (await client.get(path, headers=lines)).status == 304


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
)
@pytest.mark.parametrize("count", [1, 100, 5_000])
async def test_an_answer_that_is_worth_it_is_gzipped_on_request(start: Start, accepted: str, coded: bool, count: int) -> None:
    client = await start(random_events(random.Random(12), count))
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        answer = await session.get(client.make_url("/usage"), headers={"Accept-Encoding": accepted})
        body = await answer.read()
        assert (answer.headers.get("Content-Encoding") == "gzip") == (coded and count > 1)
    assert len(json.loads(gzip.decompress(body) if coded and count > 1 else body)) == count


@pytest.mark.parametrize("query", ["group_by=label", "label=nobody", "label=label1", "format=csv"])
async def test_a_large_answer_lets_other_requests_in(start: Start, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SLICE_SECONDS", 0)
    client = await start(random_events(random.Random(13), 60_000))

    async def download() -> bytes:
        return await (await client.get(f"/usage?{query}")).read()

    large, others = asyncio.create_task(download()), 0
    while not large.done():
        assert await (await client.get("/usage?from=0&to=1")).read() == b"[]"
        others += 1
    assert others >= 10
    assert len(await large) > 1


async def test_many_large_answers_take_turns(start: Start) -> None:
    client = await start(random_events(random.Random(18), 20_000))
    answers = await asyncio.gather(*(client.get("/usage?user_id=user_id1") for _ in range(20)))
    bodies = await asyncio.gather(*(answer.read() for answer in answers))
    assert set(map(len, bodies)) == {len(bodies[0])}


async def test_a_long_answer_is_streamed_and_a_short_one_is_whole(start: Start) -> None:
    client = await start(random_events(random.Random(19), 20_000))
    long, short = await client.get("/usage"), await client.get("/usage?to=0")
    assert long.headers["Transfer-Encoding"] == "chunked"
    assert (short.headers["Content-Length"], await short.read()) == ("2", b"[]")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give a list of the moments of usage, one for each answer that has been begun to be made."""
    begun: list[str] = []
    between = server.Order.between

    def noting(chunks: server.Order, *args: Any) -> Any:
        begun.append("read")
        return between(chunks, *args)

    monkeypatch.setattr(server.Order, "between", noting)
    return begun


@pytest.mark.parametrize("query", ["", "?group_by=label,track_id", "?window=day", "?label=nobody", "?format=csv&to=9"])
async def test_an_answer_is_made_once_for_all_who_ask_until_something_changes(start: Start, query: str, read: list[Any]) -> None:
    client = await start([event(label="label1"), event(1, label="label2")])

    async def ask(**headers: str) -> str:
        return await (await client.get(f"/usage{query}", headers=headers)).text()

    first = await asyncio.gather(*(ask() for _ in range(20)), *(ask(**{"Accept-Encoding": "gzip"}) for _ in range(20)))
    assert set(first) == {await ask()}
    assert len(read) == 1
    add(client.app[server.STATE].usage, [event(1), event(2), event(NOW, label="label3")])
    assert (await ask() == first[0]) == (query == "?label=nobody")
    assert len(read) == 2


async def test_a_long_answer_is_made_for_each_and_holds_no_other_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEPT_BYTES", 9_000)
    monkeypatch.setattr(server, "PIECE_BYTES", 3_000)
    events = [event(NOW - 9_999 + number, user_id=f"user{number}") for number in range(300)]
    client = await start(events)
    for query, count in (("", 300), ("group_by=user_id", 300), ("group_by=user_id&window=day", 300), ("to=1", 0)):
        for _ in range(2):
            answers = await asyncio.gather(*(client.get(f"/usage?{query}") for _ in range(9)))
            assert {len(await answer.json()) for answer in answers} == {count}


async def test_an_answer_that_is_too_long_to_be_kept_keeps_no_events_alive(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(found, Event) for found in gc.get_objects())

    monkeypatch.setattr(server, "KEPT_BYTES", 9_000)
    before = alive()
    client = await start([event(NOW - number, user_id=f"user{number}") for number in range(300)], keep=300)
    for query in ("", "?group_by=user_id"):
        await (await client.get(f"/usage{query}")).read()
        add(client.app[server.STATE].usage, [event(NOW, user_id=f"user{number}") for number in range(300)])
        await asyncio.sleep(0.1)
        assert alive() == before + 300


async def test_a_short_answer_does_not_wait_behind_long_ones(start: Start) -> None:
    client = await start([event()])
    for _ in range(server.MOST_LONG_WORK):
        await client.app[server.STATE].slices.long_work.acquire()
    async with asyncio.timeout(5):
        assert (await client.get("/usage")).status == 200


async def test_a_poll_over_many_events_does_not_wait_behind_long_answers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await start(random_events(random.Random(46), 20_000))
    monkeypatch.setattr(server, "SLICE_SECONDS", 0)  # so it takes some twenty slices
    for _ in range(server.MOST_LONG_WORK):
        await client.app[server.STATE].slices.long_work.acquire()
    async with asyncio.timeout(5):
        assert len(await (await client.get("/usage?group_by=label")).json()) == 3


def test_a_chunk_remembers_a_few_groupings_and_not_all_that_are_asked_for() -> None:
    chunk = server.Chunk(sorted(random_events(random.Random(47), 1_000), key=attrgetter("stream_started_on")))
    for by in [(), *(by for size in (1, 2, 3) for by in itertools.permutations(server.NAMES, size))]:
        for window in (None, "minute", "hour", "day", "month"):
            first, again = ([*result(server.aggregate([chunk], by, window, (), None))] for _ in range(2))
            assert first == again
    assert len(chunk.known) <= server.KNOWN_TOTALS


async def test_what_is_long_is_not_kept(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "KEPT_BYTES", 9_000)
    client = await start([event(label=f"label{number}") for number in range(300)])
    for path in ("/api/v1/report", "/usage?group_by=label") * 2:
        answer = await client.get(path, headers={"Accept-Encoding": "identity"})
        assert len(await answer.read()) > server.KEPT_BYTES
    assert not client.app[server.STATE].answers.kept


async def test_no_more_answers_are_kept_than_fit_and_the_latest_ones(start: Start) -> None:
    client = await start([event(NOW - number) for number in range(30)])
    for number in range(3 * server.KEPT_ANSWERS):
        await client.get(f"/usage?to={NOW - number}")
    kept = client.app[server.STATE].answers.kept
    assert len(kept) == server.KEPT_ANSWERS
    await client.get(f"/usage?to={NOW - 3 * server.KEPT_ANSWERS + 1}")
    assert client.app[server.STATE].answers.kept is kept
    add(client.app[server.STATE].usage, [event()])
    await client.get("/usage", headers={"Accept-Encoding": "identity"})
    assert len(client.app[server.STATE].answers.kept) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("label=label1", "%6Cabel=%6cabel1&format=json"), ("from=7&to=9", "to=09&from=007"), ("order=asc", ""),
        ("label=a&label=b", "label=b&label=a&label=a"), ("group_by=label&limit=5", "limit=05&group_by=%6cabel"),
    ],
)
async def test_one_query_is_one_answer_however_it_is_spelled(start: Start, read: list[Any], one: str, other: str) -> None:
    client = await start([event()])
    bodies = {await (await client.get(URL(f"/usage?{query}", encoded=True))).text() for query in (one, other)}
    assert (len(bodies), len(read)) == (1, 1)


async def test_an_answer_that_failed_is_made_again(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await start([event()])
    with monkeypatch.context() as patch:
        patch.setattr(server, "write_list", Mock(side_effect=RuntimeError))
        assert (await client.get("/usage")).status == 500
        patch.setattr(server.TimeSlices, "finish", AsyncMock(side_effect=RuntimeError))
        assert (await client.get("/usage?to=9")).status == 500
    assert (await client.get("/usage")).status == 200
    assert (await client.get("/usage?to=9")).status == 200


@pytest.mark.parametrize("known", [None, "*"])
async def test_an_answer_has_the_same_head_however_the_connection_goes_on(start: Start, known: str | None) -> None:
    client = await start([event()])
    heads = []
    for closing in ("keep-alive", "close"):
        headers = {"Connection": closing} | ({"If-None-Match": known} if known else {})
        answer = await client.get("/usage", headers=headers)
        assert answer.status == (304 if known else 200)
        heads.append({name: value for name, value in answer.headers.items() if name not in ("Connection", "Server", "Date")})
        assert datetime.strptime(answer.headers["Date"], "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
        heads[-1]["body"] = await answer.text()
    assert heads[0] == heads[1]


async def test_a_client_that_asks_on_without_reading_is_not_answered_on(start: Start) -> None:
    client = await start(random_events(random.Random(24), 500))
    url = client.make_url("/usage")
    _, writer = await asyncio.open_connection(url.host, url.port, limit=1)
    for _ in range(2_000):  # 100 MB of answers: far more than the sockets hold between the two
        writer.write(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.sleep(2)
    runner = client.server.runner
    assert runner
    assert runner.server
    assert runner.server.requests_count < 1_000
    writer.transport.abort()


@pytest.mark.parametrize(("events", "requests"), [(200_000, 1), (400, 1_000)])
async def test_a_client_that_takes_nothing_is_cut_off(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, events: int, requests: int
) -> None:
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.2)
    client = await start(random_events(random.Random(22), events))
    url = client.make_url("/usage")
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=1)
    writer.write(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n" * requests)
    await asyncio.sleep(2)
    async with asyncio.timeout(10):
        assert not (await reader.read()).endswith(b"\r\n0\r\n\r\n")
    writer.close()
    assert caplog.text == ""


@pytest.mark.parametrize("path", ["/usage?label=nobody", "/usage?group_by=user_id", "/api/v1/report", "/api/v1/users", "/api/v1/streams?label=nobody"])
async def test_work_for_clients_that_have_disconnected_ends_without_a_word(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The work is cut into so many steps that it cannot be done before it is cancelled."""
    steps, yield_to_others = 0, server.TimeSlices.yield_to_others

    async def count_step(slices: server.TimeSlices) -> None:
        nonlocal steps
        steps += 1
        await yield_to_others(slices)

    monkeypatch.setattr(server, "SLICE_SECONDS", 0)
    monkeypatch.setattr(server, "CHUNK_EVENTS", 16)
    monkeypatch.setattr(server.TimeSlices, "yield_to_others", count_step)
    client = await start(event(NOW - number, user_id=f"user{number}") for number in range(20_000))
    url = client.make_url(path)
    writers = [(await asyncio.open_connection(url.host, url.port))[1] for _ in range(30)]
    for writer in writers:
        writer.write(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
    async with asyncio.timeout(10):
        while steps < 2:
            await asyncio.sleep(0)
    for writer in writers:
        writer.transport.abort()
    await asyncio.sleep(0.1)
    before = steps
    await asyncio.sleep(0.1)
    assert steps == before
    answers = client.app[server.STATE].answers
    assert (len(answers.flights), len(answers.waiters), len(answers.kept)) == (0, 0, 0)
    assert caplog.text == ""


async def test_a_client_that_disconnects_takes_the_answer_from_nobody_else(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SLICE_SECONDS", 0)
    client = await start(random_events(random.Random(20), 50_000))
    url = client.make_url("/usage")
    _, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /usage?group_by=label HTTP/1.1\r\nHost: localhost\r\n\r\n")
    while not client.app[server.STATE].answers.flights:
        await asyncio.sleep(0)
    other = asyncio.create_task(client.get("/usage?group_by=label"))
    await asyncio.sleep(0.02)
    writer.transport.abort()
    assert len(await (await other).json()) == 3


async def test_http_1_0_gets_a_large_answer_and_its_end(start: Start) -> None:
    client = await start(random_events(random.Random(21), 20_000))
    url = client.make_url("/usage")
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"GET /usage HTTP/1.0\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
    async with asyncio.timeout(10):
        _, body = (await reader.read()).split(b"\r\n\r\n", 1)
    assert len(json.loads(body)) == 20_000
    writer.close()


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


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
@pytest.mark.parametrize("path", ["/", "/usage", "/usage?from=99999999999", "/health", "/nowhere"])
async def test_every_answer_carries_the_safety_headers(start: Start, method: str, path: str) -> None:
    client = await start(random_events(random.Random(22), 2_000))
    etag = (await client.get("/usage")).headers["ETag"]
    for headers in ({}, {"If-None-Match": etag}, {"Expect": "what aiohttp refuses by itself"}):
        answer = await client.request(method, path, headers=headers)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert (answer.headers["Connection"] == "close") == ("Expect" in headers)  # whose body may not have come


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("localhost", True), ("LOCALHOST:80", True), ("localhost.", True), ("app.localhost:1", True), ("127.0.0.1:8080", True),
        ("192.0.2.7", True), ("localhost:", True), ("[::1]:", True), ("[::1]:8080", True), ("[::1]", True), ("known.example:80", True), ("Known.Example.", True),
        ("", False), ("evil.example", False), ("localhost.evil.example", False), ("evillocalhost", False), ("127.0.0.1.evil.example", False),
        ("user@localhost", False), ("localhost/evil", False), ("localhost:x", False), ("[::1", False), ("known.example.evil", False), ("a b", False),
    ],
)
async def test_only_a_name_of_its_own_is_answered(start: Start, host: str, own: bool) -> None:
    assert server.is_own_name(host, ("known.example",)) is own
    client = await start(allow_host=("known.example",))
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(f"GET /usage HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    assert answer.split()[1] == (b"200" if own else b"421")
    assert own or b"--allow-host" in answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"", 400), (b"Host: localhost\r\nHost: localhost\r\n", 400), (b"Host: localhost\r\nHost: evil.example\r\n", 400), (b"Host: evil.example\r\nhost: localhost\r\n", 400),
        (b"Host : localhost\r\n", 400), (b"Host: local\r\n host\r\n", 400), (b"Host:\r\n", 421), (b"Host: localhost, evil.example\r\n", 421), (b"Host: evil.example\r\n", 421),
        (b"Host: evil.example\r\nX-Forwarded-Host: localhost\r\nForwarded: host=localhost\r\n", 421), (b"hOST:\tLOCALHOST.:80 \r\n", 200), (b"Host: [::1]:80\r\n", 200), (b"Host: [::ffff:127.0.0.1]\r\n", 200),
    ],
)
async def test_a_request_has_one_host_and_it_is_known(head: bytes, status: int, start: Start) -> None:
    client = await start()
    for target in (b"/usage", b"http://localhost/usage"):
        reader, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(b"GET " + target + b" HTTP/1.1\r\n" + head + b"\r\n")
        assert (await read_answer(reader))[0] == status
        writer.close()


@pytest.mark.parametrize(
    "path",
    [
        "/server.py", "/index.html", "/.git/config", "/../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "/..%5cserver.py", "/./server.py", "//server.py", "/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "//etc/passwd", "/usage/../server.py", "/api/v1/users/..%2f..%2fserver.py", "/api/v1/streams/..%2fserver.py", "/api/v1/../../server.py", "file:///etc/passwd", "/%00", "/usage%00", "/\0", "/server.py%00.html",
        "/" + "a" * 8_000, "/" + "a" * 65_536, "/" + "../" * 2_000 + "etc/passwd", "/api/v1/streams/" + "9" * 8_000, "/usage?label=" + "a" * 65_536, "/api/v1/users/" + "%2e" * 2_000,
    ],
)
async def test_no_path_leads_to_a_file(path: str, start: Start, caplog: pytest.LogCaptureFixture) -> None:
    client = await start()
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    status, _, body = await read_answer(reader)
    writer.close()
    assert status in (400, 404)
    assert b"import" not in body
    assert b"root:" not in body
    assert b"<html" not in body


async def test_no_cell_of_a_csv_answer_is_a_formula(start: Start) -> None:
    names = ["=1+1", "+1", "-1", "@SUM(A1)", '=HYPERLINK("http://evil.example";"x")', "'=1", "=a,b"]
    client = await start(event(label=name, user_id=name, track_id=name) for name in names)
    for path, cells in (("/usage?", 3), ("/usage?group_by=label,user_id&", 2), ("/usage?window=day&group_by=track_id&", 1), ("/api/v1/report?", 1)):
        text = await (await client.get(f"{path}format=csv")).text()
        rows = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
        assert not [cell for cell in rows if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
        for name in names:
            assert rows.count(name if name == "'=1" else f"'{name}") == cells


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 201), ({"Sec-Fetch-Site": "same-origin"}, 201), ({"Sec-Fetch-Site": "none"}, 201),
        ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403), ({"Sec-Fetch-Site": ""}, 403),
        ({"Origin": "http://{host}"}, 201), ({"Origin": "https://{host}"}, 201), ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403), ({"Origin": "http://localhost:1"}, 403), ({"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"}, 403),
    ],
)
async def test_a_page_of_another_origin_cannot_write(start: Start, headers: dict[str, str], status: int) -> None:
    client = await start()
    headers = {name: value.format(host=f"{client.host}:{client.port}") for name, value in headers.items()}
    answer = await client.post("/api/v1/streams", json=STREAM, headers=headers)
    assert answer.status == status
    assert (await client.get("/usage", headers=headers)).status == 200
    assert not [name for name in answer.headers if name.startswith("Access-Control")]


@pytest.mark.parametrize("origin", ["http://[", "http://[zz]", "http://℀", "null", "localhost", "://", "http://localhost@evil.example"])
async def test_an_origin_that_is_none_is_refused_and_leaves_nothing_in_the_log(
    start: Start, origin: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = await start()
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(f"POST /api/v1/streams HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\nContent-Length: 0\r\n\r\n".encode())
    status, _, body = await read_answer(reader)
    assert (status, list(json.loads(body))) == (403, ["error"])
    assert caplog.text == ""
    writer.close()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [("Bearer s3cret", 201), ("bearer s3cret", 201), ("Bearer wrong", 401), ("Bearer", 401), ("Basic s3cret", 401), ("s3cret", 401), (None, 401), ("Bearer s3cret2", 401)],
)
async def test_with_a_token_a_write_needs_it_and_reading_does_not(start: Start, authorization: str | None, status: int, caplog: pytest.LogCaptureFixture) -> None:
    client = await start(token="s3cret")  # noqa: S106
    headers = {"Authorization": authorization} if authorization else {}
    answer = await client.post("/api/v1/streams", json=STREAM, headers=headers)
    assert (answer.status, answer.headers.get("WWW-Authenticate")) == (status, "Bearer" if status == 401 else None)
    assert (await client.get("/usage")).status == 200
    assert "s3cret" not in caplog.text + repr(client.app[server.STATE].config)


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
    third = await client.get("/")
    assert (third.headers["ETag"], third.status) == (second.headers["ETag"], 200)


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


async def test_a_stream_is_created_read_replaced_changed_and_removed(start: Start) -> None:
    client = await start()
    answer = await client.post("/api/v1/streams", json=STREAM)
    assert (answer.status, answer.headers["Location"]) == (201, "/api/v1/streams/1")
    assert await answer.json() == {"message": "Stream Created", "data": {"id": 1} | STREAM}
    assert list((await answer.json())["data"]) == ["id", *server.FIELDS]
    assert (await (await client.get("/api/v1/stream/1")).json())["data"] == {"id": 1} | STREAM
    for path in ("/api/v1/streams/1", "/api/v1/stream/1"):
        assert (await client.head(path)).status == 200
        other = STREAM | {"label": path, "stream_started_on": 0}
        assert (await (await client.put(path, json=other)).json())["data"] == {"id": 1} | other
        assert (await (await client.patch(path, json={"seconds_streamed": 7})).json())["data"] == {"id": 1} | other | {"seconds_streamed": 7}
        assert await (await client.get("/usage")).json() == [other | {"seconds_streamed": 7}]
    answer = await client.delete("/api/v1/stream/1")
    assert (answer.status, (await answer.json())["message"]) == (200, "Stream Removed")
    assert await (await client.get("/usage")).json() == []
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        answer = await client.request(method, "/api/v1/streams/1", json=STREAM)
        assert (answer.status, await answer.json()) == (404, {"error": "there is no stream 1"})
    assert (await (await client.post("/api/v1/streams", json=STREAM)).json())["data"]["id"] == 7  # the seventh change


async def test_an_array_is_stored_as_a_whole_and_seen_by_usage(start: Start) -> None:
    client = await start()
    streams = [STREAM | {"stream_started_on": NOW - number} for number in range(1_000)]
    answer = await client.post("/api/v1/streams", json=streams)
    assert answer.status == 201
    assert "Location" not in answer.headers
    assert (await answer.json())["data"] == [{"id": number + 1} | made for number, made in enumerate(streams)]
    assert await (await client.get("/usage")).json() == streams[::-1]


BAD_VALUES: dict[str, tuple[object, ...]] = {
    "user_id": ("", "u" * 129, 1, None, True, [], {}, "a\nb", "\ud800", "\x00"),
    "track_id": ("", 1.5, "\x7f"),
    "label": ("", None, "\x85"),
    "stream_started_on": (-1, NOW + 1, True, 1.0, "1", None, 10**400, math.nan, math.inf, [1]),
    "seconds_streamed": (-1, 2_147_483_648, False, 5.0, "5", None, 10**400, math.nan),
    "extra": (1,),
    "id": (1,),
}
BAD_BODIES: list[tuple[bytes, str]] = [
    *((body, "no JSON") for body in (b"", b"{", b"\xff", b"nul", b"[1,]", b"[" * 100_000, b'{"a":' * 100_000, b'"\xed\xa0\x80"', "{}".encode("utf-16"))),
    *((body, "object") for body in (b"null", b"1", b'"text"', b"true", b"NaN", b"-Infinity", b"1e999")),
    *(
        (json.dumps({**STREAM, field: value}).encode(), field)
        for field, values in BAD_VALUES.items()
        for value in values
    ),
]


@pytest.mark.parametrize(("body", "named"), BAD_BODIES)
async def test_a_bad_body_is_400_on_every_route_and_nothing_is_stored(start: Start, body: bytes, named: str) -> None:
    client = await start([event()])
    before = await (await client.get("/usage")).read()
    json_type = {"Content-Type": "application/json"}
    for method, path in (("POST", "/api/v1/streams"), ("PUT", "/api/v1/streams/1"), ("PATCH", "/api/v1/stream/1"), ("PUT", "/api/v1/users/user1")):
        answer = await client.request(method, path, data=body, headers=json_type)
        assert answer.status == 400
        error = await answer.json()
        assert list(error) == ["error"]
        assert named in error["error"] or "users" in path
    answer = await client.post("/api/v1/streams", data=b"[%b,%b]" % (json.dumps(STREAM).encode(), body or b" "), headers=json_type)
    assert answer.status == 400
    assert re.match(r"\[1\]: |the body is no JSON", (await answer.json())["error"])
    assert await (await client.get("/usage")).read() == before


async def test_missing_fields_and_wrong_sizes_of_arrays_are_refused(start: Start) -> None:
    client = await start()
    for field in server.FIELDS:
        body = {name: value for name, value in STREAM.items() if name != field}
        answer = await client.post("/api/v1/streams", json=body)
        assert (answer.status, field in (await answer.json())["error"]) == (400, True)
    for streams in ([], [STREAM] * 1_001, [[STREAM]]):
        assert (await client.post("/api/v1/streams", json=streams)).status == 400
    answer = await client.post("/api/v1/streams", json=[STREAM, STREAM, STREAM | {"label": ""}])
    assert (await answer.json())["error"] == "[2]: label must be a text of 1 to 128 characters"
    assert (await (await client.get("/health")).json())["events"] == 0


@pytest.mark.parametrize(("kind", "status"), [("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("", 415), ("application/json; charset=utf-8", 201)])
async def test_a_write_needs_json(start: Start, kind: str, status: int) -> None:
    answer = await (await start()).post("/api/v1/streams", data=json.dumps(STREAM).encode(), headers={"Content-Type": kind})
    assert answer.status == status
    assert ("error" in await answer.json()) == (status != 201)


async def test_a_body_above_1_mib_is_413(start: Start) -> None:
    client = await start()
    for size, status in ((1024 * 1024, 400), (1024 * 1024 + 1, 413)):
        answer = await client.post("/api/v1/streams", data=io.BytesIO(b" " * size), headers={"Content-Type": "application/json"})
        assert (answer.status, list(await answer.json())) == (status, ["error"])


async def test_a_body_that_says_it_is_too_large_is_413_before_it_comes(start: Start) -> None:
    client = await start()
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"POST /api/v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1048577\r\n\r\n")
    async with asyncio.timeout(2):
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"], await reader.read()) == (413, "close", b"")
    writer.close()


def raw_write(body: bytes, what: str = "POST /api/v1/streams", more: str = "") -> bytes:
    """Return a write as it goes over the connection; each line of `more` headers has its end."""
    return f"{what} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def test_a_read_comes_in_between_many_writes_that_come_all_at_once(start: Start) -> None:
    client = await start()
    (reader, writer), *others = [await asyncio.open_connection(client.host, client.port) for _ in range(101)]
    body = json.dumps(STREAM).encode()
    for _, other in others:
        other.write(raw_write(body))
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    _, _, answer = await read_answer(reader)
    assert json.loads(answer)["events"] < 50  # they are not all stored before it
    assert {(await read_answer(each))[0] for each, _ in others} == {201}
    for _, each in [(reader, writer), *others]:
        each.close()


async def test_requests_that_come_all_at_once_let_the_event_loop_go_round(start: Start) -> None:
    # On Python 3.12 or newer aiohttp begins a request at once, and the next one of the connection if nothing had to be waited for.
    client = await start()
    request = make_mocked_request("GET", "/health", {"Host": "localhost"}, app=client.app)
    for _ in range(20_000):
        answering = server.guard(request, server.get_health)
        try:
            answering.send(None)
        except StopIteration:
            continue
        with pytest.raises(StopIteration):
            answering.send(None)  # it has only waited for the event loop
        return
    pytest.fail("20,000 requests were answered in one round of the event loop")


@contextlib.asynccontextmanager
async def counting_rounds() -> AsyncIterator[list[int]]:
    """Count the rounds of the event loop, in the one item of a list."""
    rounds = [0]

    async def count() -> None:
        while True:
            rounds[0] += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count())
    yield rounds
    task.cancel()


@pytest.mark.parametrize("durable", [False, True])
async def test_large_bodies_that_end_at_once_are_parsed_in_rounds_of_their_own(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    client = await start(**({"db": tmp_path / "usage.db"} if durable else {}))
    body, parse, parsed_in = json.dumps([STREAM] * 900).encode(), server.parse_json, list[int]()
    async with counting_rounds() as rounds:

        def note_round(body: bytes) -> object:
            parsed_in.append(rounds[0])
            return parse(body)

        monkeypatch.setattr(server, "parse_json", note_round)
        connections = [await asyncio.open_connection(client.host, client.port) for _ in range(9)]
        for _, writer in connections:
            writer.write(raw_write(body)[:-1])
            await writer.drain()
        await asyncio.sleep(0.1)
        for _, writer in connections:
            writer.write(body[-1:])
        for reader, writer in connections:
            assert (await read_answer(reader))[0] == 201
            writer.close()
    assert len(set(parsed_in)) == len(parsed_in) == 9


async def test_long_work_goes_on_beside_many_writers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await start(random_events(random.Random(48), 20_000))
    monkeypatch.setattr(server, "SLICE_SECONDS", 0)
    body = json.dumps(STREAM).encode()
    request = raw_write(body)

    async def write_on() -> None:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        with contextlib.closing(writer):
            while True:
                writer.write(request)
                assert (await read_answer(reader))[0] == 201

    writers = [asyncio.create_task(write_on()) for _ in range(64)]
    await asyncio.sleep(0.1)
    async with counting_rounds() as rounds:
        before = rounds[0]
        assert len(await (await client.get("/usage?group_by=label")).json()) == 3
        assert rounds[0] - before < 400  # it takes some 20 time slices
    for task in writers:
        task.cancel()
    await asyncio.gather(*writers, return_exceptions=True)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
async def test_a_write_goes_on_when_its_client_disconnects(start: Start, tmp_path: Path, method: str) -> None:
    client = await start(db=tmp_path / "usage.db")
    await client.post("/api/v1/streams", json=STREAM)
    journal = client.app[server.STATE].journal
    assert journal
    let = threading.Event()
    commit = journal.database.commit

    def slowly(statements: server.Statements) -> None:
        let.wait(10)
        commit(statements)

    journal.database.commit = slowly  # a disk that is slow
    body = json.dumps(STREAM | {"label": "changed"}).encode()
    path = "/api/v1/streams" if method == "POST" else "/api/v1/streams/1"
    for key in ("k", "k"):  # the second is the retry, while the first still waits for the disk
        _, writer = await asyncio.open_connection(client.host, client.port)
        writer.write(raw_write(body, f"{method} {path}", f"Idempotency-Key: {key}\r\n"))
        await asyncio.sleep(0.2)
        writer.transport.abort()
        await asyncio.sleep(0.1)
    let.set()
    async with asyncio.timeout(5):
        while (events := await (await client.get("/usage")).json()) == [STREAM]:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert await (await client.get("/usage")).json() == events
    assert sorted(made["label"] for made in events) == {"POST": ["changed", "label1"], "DELETE": []}.get(method, ["changed"])


async def test_a_body_that_does_not_arrive_is_408(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    client = await start()
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"POST /api/v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
    assert b" 408 " in await reader.readline()
    writer.close()


async def test_an_answer_before_the_body_has_come_closes_the_connection_within_2_s(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.1)
    client = await start([event()])

    async def ask(head: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection(client.host, client.port)
        first, *lines = (head if "\r\n" in head else f"{head} HTTP/1.1").split("\r\n")
        lines += [] if "Content-Length" in head else ["Content-Length: 1000"]
        lines += [] if "Content-Type" in head else ["Content-Type: application/json"]
        writer.write("\r\n".join([first, "Host: localhost", *lines, "\r\n{"]).encode())
        status, headers, _ = await read_answer(reader)
        async with asyncio.timeout(2):
            assert await reader.read() == b"", head
        writer.close()
        return status, headers["connection"]

    wanted = {
        "POST /api/v1/streams": 408, "PUT /api/v1/users/user1": 408, "POST /usage": 405, "POST /nowhere": 404,
        "PUT /api/v1/streams/9": 404, "POST /api/v1/streams HTTP/1.1\r\nOrigin: http://evil.example": 403,
        "POST /api/v1/streams HTTP/1.1\r\nContent-Type: text/plain": 415, "GET /usage": 200, "GET /usage?from=x": 400,
        "POST /api/v1/streams HTTP/1.1\r\nContent-Length: 1048577": 413, "GET /usage HTTP/1.1\r\nIf-None-Match: *": 304,
    }
    answers = await asyncio.gather(*map(ask, wanted))
    assert dict(zip(wanted, answers, strict=True)) == {head: (status, "close") for head, status in wanted.items()}


async def test_a_body_that_has_come_leaves_the_connection_open(start: Start) -> None:
    client = await start()
    reader, writer = await asyncio.open_connection(client.host, client.port)
    for path in (b"/usage", b"/api/v1/streams", b"/nowhere"):
        writer.write(b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 3\r\n\r\n{ }" % path)
        status, headers, _ = await read_answer(reader)
        assert (status, headers["connection"]) == ({b"/usage": 405, b"/nowhere": 404}.get(path, 415), "keep-alive")
    writer.close()


@pytest.mark.parametrize(
    ("stream_id", "status"), [("0", 404), ("2", 404), ("1" + "0" * 30, 404), ("9" * 5_000, 404), ("0" * 99 + "2", 404), ("abc", 400), ("-1", 400), ("1.0", 400), ("٣", 400), ("1%20", 400), ("%00", 400), ("%7B1%7D", 400)]
)
async def test_an_id_that_is_none_is_4xx(start: Start, stream_id: str, status: int) -> None:
    client = await start([event()])
    for path in (f"/api/v1/streams/{stream_id}", f"/api/v1/stream/{stream_id}"):
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            answer = await client.request(method, path, json=STREAM)
            assert (answer.status, list(await answer.json())) == (status, ["error"])
    assert (await (await client.get("/health")).json())["events"] == 1


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/api/v1/streams", "GET,HEAD,POST"), ("DELETE", "/api/v1/streams", "GET,HEAD,POST"),
        ("POST", "/api/v1/streams/1", "DELETE,GET,HEAD,PATCH,PUT"), ("POST", "/api/v1/stream/1", "DELETE,GET,HEAD,PATCH,PUT"),
        ("POST", "/api/v1/users", "GET,HEAD"), ("DELETE", "/api/v1/users/user1", "GET,HEAD,PUT"), ("POST", "/api/v1/report", "GET,HEAD"),
    ],
)
async def test_a_wrong_method_is_405_and_says_what_is_allowed(start: Start, method: str, path: str, allowed: str) -> None:
    answer = await (await start([event()])).request(method, path, json=STREAM)
    assert (answer.status, answer.headers["Allow"], list(await answer.json())) == (405, allowed, ["error"])


async def test_a_stream_that_keep_would_drop_at_once_is_409_and_nothing_is_stored(start: Start) -> None:
    client = await start([event(NOW - number) for number in range(3)], keep=3)
    before = [await (await client.get(path)).read() for path in ("/usage", "/api/v1/changes", "/api/v1/report")]
    for starts in ([NOW - 3], [NOW, NOW - 3], [NOW, NOW, NOW - 1], [NOW] * 4, [NOW - 3, NOW - 4]):
        streams = [STREAM | {"stream_started_on": started} for started in starts]
        answer = await client.post("/api/v1/streams", json=streams if len(streams) > 1 else streams[0], headers={"Idempotency-Key": "k"})
        index = "" if len(starts) == 1 else f"[{starts.index(min(starts))}]: "
        assert (answer.status, await answer.json()) == (409, {"error": f"{index}--keep would drop it at once, as one of the oldest"})
        assert [await (await client.get(path)).read() for path in ("/usage", "/api/v1/changes", "/api/v1/report")] == before
    answer = await client.post("/api/v1/streams", json=STREAM | {"stream_started_on": NOW - 2}, headers={"Idempotency-Key": "k"})
    assert answer.status == 201
    assert (await client.get(answer.headers["Location"])).status == 200


def test_what_is_too_old_is_what_keep_would_drop() -> None:
    rng = random.Random(43)
    for _ in range(3_000):
        usage = usage_of(keep=rng.randrange(1, 8))
        add(usage, random_events(rng, rng.randrange(8)))
        new = [event(NOW - rng.randrange(5_000) // 1_000 * 1_000) for _ in range(rng.randrange(1, 5))]
        too_old = usage.find_too_old(new)
        add(usage, new)
        dropped = {*new} - {*flat(usage.by_start.chunks)}
        assert too_old in dropped if dropped else too_old is None


@pytest.mark.parametrize("kind", ["application/json", "application/merge-patch+json", "application/merge-patch+json; charset=utf-8"])
async def test_a_patch_may_say_what_it_is(start: Start, kind: str) -> None:
    client = await start([event()])
    answer = await client.patch("/api/v1/streams/1", data=b'{"label":"other"}', headers={"Content-Type": kind})
    assert (answer.status, (await answer.json())["data"]["label"]) == (200, "other")
    refused = await client.put("/api/v1/streams/1", data=json.dumps(STREAM), headers={"Content-Type": kind})
    assert refused.status == (200 if kind == "application/json" else 415)


async def test_streams_come_in_pages_in_order_of_id(start: Start) -> None:
    client = await start(random_events(random.Random(26), 250))
    for query, wanted in (("", 250), ("label=label1&", None), (f"from={NOW - 2_000}&", None), ("user_id=user_id0&track_id=track_id1&", None)):
        after, seen, totals = 0, list[int](), set[int]()
        while after is not None:
            page = await (await client.get(f"/api/v1/streams?{query}limit=40&after={after}")).json()
            assert list(page) == ["message", "data", "total", "next"]
            seen += [made["id"] for made in page["data"]]
            totals.add(page["total"])
            after = page["next"]
        assert seen == sorted(seen)
        assert totals == {len(seen)} == {len(await (await client.get(f"/usage?{query}".rstrip("&"))).json())}
        assert wanted in (None, len(seen))
    assert len((await (await client.get("/api/v1/streams")).json())["data"]) == 100


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after=-1", "after=x", "from=x", f"from={NOW + 1}", "group_by=label", "format=csv", "limit=1&limit=1", "label=", "x=1"])
async def test_a_malformed_page_is_400_and_named(start: Start, query: str) -> None:
    answer = await (await start()).get(f"/api/v1/streams?{query}")
    assert answer.status == 400
    assert query.split("=", maxsplit=1)[0] in (await answer.json())["error"]


async def test_an_idempotency_key_makes_a_retry_harmless(start: Start) -> None:
    client = await start()
    for body in (STREAM, [STREAM, STREAM | {"label": "b"}]):
        headers = {"Idempotency-Key": f"key {type(body)}"}
        first = await client.post("/api/v1/streams", json=body, headers=headers)
        again = await client.post("/api/v1/streams", json=body, headers=headers)
        assert (first.status, again.status) == (201, 201)
        assert await first.read() == await again.read()
        assert (first.headers.get("Idempotent-Replayed"), again.headers.get("Idempotent-Replayed")) == (None, "true")
        assert first.headers.get("Location") == again.headers.get("Location")
        other = await client.post("/api/v1/streams", json=STREAM | {"label": "c"}, headers=headers)
        assert (other.status, list(await other.json())) == (422, ["error"])
    await client.delete("/api/v1/streams/1")
    again = await client.post("/api/v1/streams", json=STREAM, headers={"Idempotency-Key": f"key {dict}"})
    assert (await again.json())["data"]["id"] == 1
    assert (await (await client.get("/health")).json())["events"] == 2
    bad = await client.post("/api/v1/streams", json=STREAM | {"label": ""}, headers={"Idempotency-Key": "k"})
    good = await client.post("/api/v1/streams", json=STREAM, headers={"Idempotency-Key": "k"})
    assert (bad.status, good.status) == (400, 201)


@pytest.mark.parametrize("body", [b"{}", b"[]", b"no JSON", b"", b'{"label":"\xff"}', json.dumps(STREAM | {"stream_started_on": NOW * 2}).encode()])
async def test_a_known_key_with_any_other_body_is_422(start: Start, body: bytes) -> None:
    client, headers = await start(), {"Idempotency-Key": "key", "Content-Type": "application/json"}
    assert (await client.post("/api/v1/streams", data=json.dumps(STREAM), headers=headers)).status == 201
    answer = await client.post("/api/v1/streams", data=body, headers=headers)
    assert (answer.status, await answer.json()) == (422, {"error": "this Idempotency-Key came with another body before"})
    assert (await client.post("/api/v1/streams", data=body, headers=headers | {"Idempotency-Key": "new"})).status == 400


async def test_a_retry_stores_nothing_twice_however_many_keys_came_since_and_whatever_keep_dropped(start: Start) -> None:
    client = await start(keep=3)
    for number, started in enumerate((NOW - 1, NOW - 50, NOW - 49, NOW - 48, NOW - 1)):
        body, headers = STREAM | {"user_id": f"user{number % 4}", "stream_started_on": started}, {"Idempotency-Key": str(number % 4)}
        answer = await client.post("/api/v1/streams", json=body, headers=headers)
        assert (answer.status, "Idempotent-Replayed" in answer.headers) == (201, number == 4)
    assert [made["user_id"] for made in await (await client.get("/usage")).json()].count("user0") == 1


async def test_a_stream_can_be_changed_when_the_clock_has_been_set_back_and_only_a_new_start_is_in_the_future(start: Start) -> None:
    client = await start([event(NOW)])
    client.app[server.STATE].clock = lambda: NOW - 3_600
    for change, status in (({"label": "b"}, 200), ({"stream_started_on": NOW}, 200), ({"stream_started_on": NOW + 1}, 400), ({"stream_started_on": NOW - 3_600}, 200), ({"stream_started_on": NOW}, 400)):
        assert (await client.patch("/api/v1/streams/1", json=change)).status == status


async def test_a_retry_gets_the_first_answer_when_the_clock_has_been_set_back(start: Start) -> None:
    clock = [NOW]
    client = await start(clock=lambda: clock[0])
    answers = []
    for now in (NOW, NOW - 3_600):
        clock[0] = now
        answer = await client.post("/api/v1/streams", json=STREAM, headers={"Idempotency-Key": "key"})
        answers.append((answer.status, await answer.read()))
    assert answers[0] == answers[1]
    for key, body, status in (("new", STREAM, 400), ("key", STREAM | {"label": "b"}, 422)):
        assert (await client.post("/api/v1/streams", json=body, headers={"Idempotency-Key": key})).status == status


@pytest.mark.parametrize("key", ["", "k" * 256, "ü", "a\tb"])
async def test_an_idempotency_key_is_printable_ascii(start: Start, key: str) -> None:
    answer = await (await start()).post("/api/v1/streams", json=STREAM, headers={"Idempotency-Key": key})
    assert answer.status == 400
    assert "Idempotency-Key" in (await answer.json())["error"]


async def test_users_are_those_who_stream_or_subscribe(start: Start) -> None:
    client = await start([
        event(seconds=5, user_id="nobody"), event(0, 7, "user1", "t2", "b"), event(seconds=8, user_id="user1"), event(seconds=1, user_id="user1"),
    ])
    user1 = {
        "user_id": "user1", "streams": 3, "seconds_streamed": 16, "labels": {"b": 7, "label1": 9}, "tracks": {"t2": 7, "track1": 9},
        "subscription": {"product_type": "premium", "fee": "7.99", "origin": "app_store"},
    }
    answer = await (await client.get("/api/v1/users/user1")).json()
    assert answer == {"message": "Found User Stream Report", "data": user1}
    assert list(answer["data"]) == list(user1)
    users = (await (await client.get("/api/v1/users")).json())["data"]
    assert [user["user_id"] for user in users] == ["nobody", "user1", "user2", "user3"]
    assert users[1] == user1
    assert users[0]["subscription"] is None
    assert (users[2]["streams"], users[2]["labels"]) == (0, {})


@pytest.mark.parametrize(("user", "status"), [("user9", 404), ("u" * 129, 400), ("%0A", 400), ("%C2%85", 400), ("a%2Fb", 404), ("%20", 404), ("%FF", 400), ("%7Ba%7D", 404)])
async def test_a_user_who_is_unknown_or_none_is_4xx(start: Start, user: str, status: int) -> None:
    answer = await (await start()).get(URL(f"/api/v1/users/{user}", encoded=True))
    assert answer.status == status
    assert list(error := await answer.json()) == ["error"]
    assert status == 404 or error == {"error": "User ID Invalid"}


async def test_a_subscription_that_is_set_counts_in_the_report(start: Start) -> None:
    client = await start([event(user_id="new/user")])
    path = URL("/api/v1/users/new%2Fuser", encoded=True)
    answer = await client.put(path, json={"product_type": "family", "fee": "100", "origin": "web"})
    assert answer.status == 200
    assert (await answer.json())["data"]["subscription"] == {"product_type": "family", "fee": "100.00", "origin": "web"}
    report = (await (await client.get("/api/v1/report")).json())["data"]
    assert (report["subscribers"], report["revenue"]) == (4, "116.28")
    assert report["labels"][0]["amount_user_centric"] == "116.28"


async def test_a_report_is_for_a_month_or_for_all_and_in_two_formats(start: Start) -> None:
    client = await start([event(1_551_398_400, 10, label="=a"), event(1_554_076_800, 10, label="b"), event(1_554_076_800, 30, label="=a")])
    every = await (await client.get("/api/v1/report")).json()
    assert every["message"] == "Found Label Stream Report"
    assert (every["data"]["months"], every["data"]["revenue"], every["data"]["distributed"]) == (["2019-03", "2019-04"], "52.56", "52.56")
    april = (await (await client.get("/api/v1/report?month=2019-04")).json())["data"]
    assert [(row["label"], row["amount"], row["share"]) for row in april["labels"]] == [("=a", "19.71", 0.75), ("b", "6.57", 0.25)]
    empty = (await (await client.get("/api/v1/report?month=2018-01")).json())["data"]
    assert (empty["months"], empty["revenue"], empty["distributed"], empty["labels"]) == (["2018-01"], "26.28", "0.00", [])
    answer = await client.get("/api/v1/report?format=csv")
    header, *lines = csv.reader(io.StringIO(await answer.text(), newline=""))
    assert header == ["month", "currency", "label", "streams", "seconds_streamed", "share", "amount", "amount_user_centric", "adjustment", "adjustment_user_centric"]
    assert [line[:3] + line[6:7] for line in lines] == [["2019-03", "EUR", "'=a", "26.28"], ["2019-04", "EUR", "'=a", "19.71"], ["2019-04", "EUR", "b", "6.57"]]


async def test_a_closed_month_does_not_change_with_a_subscription_and_what_it_then_owes_is_a_number_in_the_csv(start: Start, tmp_path: Path) -> None:
    client = await start([event(1_551_398_400, 10, label="a"), event(1_551_398_400, 30, label="b"), event(1_554_076_800, 10, label="a")], db=tmp_path / "usage.db")
    assert (await client.put("/api/v1/months/2019-03", json={"status": "closed"})).status == 200
    paths = ("/api/v1/report?month=2019-03", "/api/v1/report/a?month=2019-03", "/api/v1/report/a?month=2019-03&format=csv")
    before = [await (await client.get(path)).text() for path in paths]
    await client.put("/api/v1/users/user1", json={"product_type": "p", "fee": "100", "origin": "web"})
    await client.put("/api/v1/users/new", json={"product_type": "p", "fee": "100", "origin": "web"})
    late = {"user_id": "user1", "track_id": "t", "label": "b", "stream_started_on": 1_551_398_401, "seconds_streamed": 20}
    assert (await client.post("/api/v1/streams", json=late)).status == 201
    assert [await (await client.get(path)).text() for path in paths] == before
    lines = (await (await client.get("/api/v1/report?month=2019-04&format=csv")).text()).splitlines()
    assert [line.split(",")[2::6] for line in lines[1:]] == [["a", "-2.19"], ["b", "2.19"]]


@pytest.mark.parametrize("query", ["report?", "users?"])
async def test_reports_hold_up_no_answer_that_is_to_be_compressed(
    start: Start, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    done = False

    def for_ever(*_: object) -> Iterator[None]:
        while not done:
            yield None
        raise server.MissingError

    for name in ("report", "write_users"):
        monkeypatch.setattr(server, name, for_ever)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(server.SWITCH_SECONDS)  # as the program does
    client = await start([event(NOW - number) for number in range(99)])
    asked = [asyncio.create_task(client.get(f"/api/v1/{query}{'&' * number}")) for number in range(50)]
    try:
        await asyncio.sleep(0.5)
        async with asyncio.timeout(20):  # and not for ever
            for number in range(40):  # each is another answer, compressed in a thread
                answer = await client.get(f"/usage?limit={40 + number}", headers={"Accept-Encoding": "gzip"})
                assert answer.headers["Content-Encoding"] == "gzip"
    finally:
        done = True
        sys.setswitchinterval(interval)
        await asyncio.gather(*asked)


async def test_a_report_over_many_subscribers_lets_others_in(start: Start) -> None:
    client, rng = await start(), random.Random(30)
    state = client.app[server.STATE]
    state.books.subscriptions.update({f"u{number}": Subscription("p", 999, "web") for number in range(4_000)})
    add(state.usage, [event(0, rng.randrange(86_400), f"u{number}") for number in range(4_000)])
    for path in ("/api/v1/report", "/api/v1/users"):
        slow, others = asyncio.create_task(client.get(path)), 0
        while not slow.done():
            assert (await client.get("/usage?to=0")).status == 200
            others += 1
        assert others >= 2
        assert (await slow).status == 200


@pytest.mark.parametrize("query", ["month=2019-13", "month=2019-3", "month=", "month=2019-03-01", "format=ndjson", "format=xml", "from=0", "month=2019-03&month=2019-03"])
async def test_a_malformed_report_is_400_and_named(start: Start, query: str) -> None:
    answer = await (await start()).get(f"/api/v1/report?{query}")
    assert answer.status == 400
    assert query.split("=", maxsplit=1)[0] in (await answer.json())["error"]


async def test_the_report_is_that_of_usage_after_any_mix_of_requests(start: Start) -> None:
    client, rng = await start(), random.Random(27)
    ids: list[int] = []
    for _ in range(400):
        made = {name: f"{name[0]}{rng.randrange(3)}" for name in server.NAMES} | {
            "stream_started_on": rng.choice((0, 1_551_398_399, 1_551_398_400, NOW)), "seconds_streamed": rng.choice((0, 1, 86_400)),
        }
        change = rng.randrange(5)
        if change < 2 or not ids:
            streams = [made] * rng.randrange(1, 4)
            ids += [stream["id"] for stream in (await (await client.post("/api/v1/streams", json=streams)).json())["data"]]
        elif change == 2:
            assert (await client.put(f"/api/v1/streams/{rng.choice(ids)}", json=made)).status == 200
        elif change == 3:
            field = rng.choice(server.FIELDS)
            assert (await client.patch(f"/api/v1/streams/{rng.choice(ids)}", json={field: made[field]})).status == 200
        else:
            assert (await client.delete(f"/api/v1/streams/{ids.pop(rng.randrange(len(ids)))}")).status == 200
        if rng.randrange(10) == 0:
            user, fee = f"u{rng.randrange(4)}", rng.choice(("0", "0.01", "9.99"))
            assert (await client.put(f"/api/v1/users/{user}", json={"product_type": "p", "fee": fee, "origin": "web"})).status == 200
    events = [Event(**made) for made in await (await client.get("/usage")).json()]
    subscribers = {
        user["user_id"]: Subscription("p", round(100 * float(user["subscription"]["fee"])), user["subscription"]["origin"])
        for user in (await (await client.get("/api/v1/users")).json())["data"] if user["subscription"]
    }
    by_month: dict[str, list[Event]] = {}
    for stream in events:
        by_month.setdefault(time.strftime("%Y-%m", time.gmtime(stream.stream_started_on)), []).append(stream)
    report = (await (await client.get("/api/v1/report")).json())["data"]
    assert report["months"] == sorted(by_month)
    assert report["seconds_streamed"] == sum(stream.seconds_streamed for stream in events)
    for month, of_month in by_month.items():
        data = (await (await client.get(f"/api/v1/report?month={month}")).json())["data"]
        _, *columns = naive_month(of_month, subscribers)
        for name, naive in zip(("amount", "amount_user_centric"), columns, strict=True):
            assert {row["label"]: round(100 * float(row[name])) for row in data["labels"]} == naive


CLOSE, OPEN = {"status": "closed"}, {"status": "open"}
JANUARY, FEBRUARY, MARCH = 1_546_421_951, 1_549_100_000, 1_551_500_000
EXAMPLE = [
    STREAM | {"label": "a", "stream_started_on": JANUARY, "seconds_streamed": 600},
    STREAM | {"user_id": "user2", "label": "b", "stream_started_on": JANUARY, "seconds_streamed": 400},
]
MONEY = ("report?month=2019-01", "report?month=2019-01&format=csv", "report/a?month=2019-01", "report/a?month=2019-01&format=csv")


async def with_example(start: Start, tmp_path: Path, now: int = NOW) -> Client:
    """Start with the README's example in a file."""
    client = await start(db=tmp_path / "usage.db", clock=lambda: now)
    assert (await client.post("/api/v1/streams", json=EXAMPLE)).status == 201
    return client


async def set_month(client: Client, month: str, body: dict[str, str]) -> dict[str, Any]:
    """Close a month or open it again, and return its row."""
    answer = await client.put(f"/api/v1/months/{month}", json=body)
    assert answer.status == 200, await answer.text()
    return cast("dict[str, Any]", (await answer.json())["data"])


async def money(client: Client, *paths: str) -> list[bytes]:
    """Return the bodies of answers of the API."""
    answers = [await client.get(f"/api/v1/{path}") for path in paths]
    assert {answer.status for answer in answers} == {200}
    return [await answer.read() for answer in answers]


async def sequence(client: Client) -> tuple[str, str]:
    """Return the number of the latest change, and the ETag that names it."""
    metrics = await (await client.get("/metrics")).text()
    return re.findall(r"^usage_sequence (\d+)$", metrics, re.MULTILINE)[0], (await client.get("/usage")).headers["ETag"]


async def test_a_month_is_closed_opened_and_listed_as_the_contract_shows_it(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path, 1_549_008_000)
    was = (
        '{"month":"2019-01","status":"open","closed_on":null,"subscribers":3,"streams":2,"seconds_streamed":1000,'
        '"fees":"30.97","revenue":"26.28","distributed":"26.28","adjusted":"0.00","late":0}'
    )
    assert await money(client, "months") == [f'{{"message":"Found Months","data":[{was}]}}'.encode()]
    report = (await (await client.get("/api/v1/report?month=2019-01")).json())["data"]
    closed = was.replace('"open"', '"closed"').replace("null", "1549008000")
    answer = await client.put("/api/v1/months/2019-01", json=CLOSE)
    assert (answer.status, await answer.text()) == (200, f'{{"message":"Month Closed","data":{closed}}}')
    assert answer.headers["Cache-Control"] == "no-store"
    assert await money(client, "months") == [f'{{"message":"Found Months","data":[{closed}]}}'.encode()]
    assert (await (await client.get("/api/v1/report?month=2019-01")).json())["data"] == report | {"status": "closed"}
    answer = await client.put("/api/v1/months/2019-01", json=OPEN)
    assert (answer.status, await answer.text()) == (200, f'{{"message":"Month Open","data":{was}}}')
    assert (await (await client.get("/api/v1/report?month=2019-01")).json())["data"] == report
    await set_month(client, "2018-05", CLOSE)  # without a stream it distributes nothing
    await client.post("/api/v1/streams", json=STREAM | {"stream_started_on": 1_548_979_200})
    rows = json.loads((await money(client, "months"))[0])["data"]
    assert [(row["month"], row["status"], row["distributed"]) for row in rows] == [
        ("2019-02", "open", "26.28"), ("2019-01", "open", "26.28"), ("2018-05", "closed", "0.00"),
    ]  # fmt: skip


async def test_the_readmes_month_goes_over_http_as_it_says(start: Start, tmp_path: Path) -> None:
    now = 1_549_008_000
    client = await start(db=tmp_path / "usage.db", clock=lambda: now)
    await client.post("/api/v1/streams", json=EXAMPLE)
    await set_month(client, "2019-01", CLOSE)
    now += 4 * 86_400
    before = await money(client, *MONEY)
    late = STREAM | {"user_id": "user3", "label": "b", "stream_started_on": 1_548_930_000, "seconds_streamed": 250}
    assert (await client.post("/api/v1/streams", json=late)).status == 201
    assert await money(client, *MONEY) == before
    assert late in await (await client.get("/usage?from=1546300800&to=1548979200")).json()  # it is usage like any other
    february, january = json.loads((await money(client, "months"))[0])["data"]
    assert (january["status"], january["late"], january["streams"]) == ("closed", 2, 2)
    assert (february["month"], february["streams"], february["distributed"], february["adjusted"]) == ("2019-02", 0, "0.00", "0.00")
    own = [STREAM | {"user_id": user, "label": label, "stream_started_on": 1_549_200_000, "seconds_streamed": 500} for user, label in (("user1", "a"), ("user3", "b"))]
    assert (await client.post("/api/v1/streams", json=own)).status == 201
    now = 1_551_400_000
    for status in ("open", "closed"):
        data = json.loads((await money(client, "report?month=2019-02"))[0])["data"]
        assert (data["status"], data["adjusted"], data["distributed"]) == (status, "0.00", "26.28")
        cells = [[line[name] for name in server.LABEL_COLUMNS[4:]] for line in data["labels"]]
        assert cells == [["13.14", "12.34", "-3.16", "-4.32"], ["13.14", "13.94", "3.16", "4.32"]]
        assert (await money(client, "report?month=2019-02&format=csv"))[0].decode().splitlines() == [
            "month,currency,label,streams,seconds_streamed,share,amount,amount_user_centric,adjustment,adjustment_user_centric",
            "2019-02,EUR,a,1,500,0.5,13.14,12.34,-3.16,-4.32", "2019-02,EUR,b,1,500,0.5,13.14,13.94,3.16,4.32",
        ]  # fmt: skip
        statement = json.loads((await money(client, "report/a?month=2019-02"))[0])["data"]
        assert statement["adjustments"] == [{"month": "2019-01", "amount": "-3.16", "amount_user_centric": "-4.32"}]
        if status == "open":
            await set_month(client, "2019-02", CLOSE)
    every = json.loads((await money(client, "report"))[0])["data"]
    assert (every["months"], every["distributed"], every["adjusted"], "status" in every) == (["2019-01", "2019-02"], "52.56", "0.00", False)


async def test_what_stands_in_the_way_of_a_close_or_an_open_is_409_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    now = 1_548_979_199  # the last second of January
    client = await start(db=tmp_path / "usage.db", clock=lambda: now)
    await client.post("/api/v1/streams", json=EXAMPLE)

    async def refused(month: str, body: dict[str, str], said: str) -> None:
        before = await sequence(client), await snapshot(client), await money(client, "months")
        answer = await client.put(f"/api/v1/months/{month}", json=body)
        assert (answer.status, await answer.json()) == (409, {"error": said})
        assert (await sequence(client), await snapshot(client), await money(client, "months")) == before
        assert (await client.get("/health")).status == 200

    await refused("2019-01", CLOSE, "2019-01 is not over")
    await refused("9999-12", CLOSE, "9999-12 is not over")
    now = NOW
    await refused("2019-02", CLOSE, "2019-01 has streams and is open: close it first")
    await set_month(client, "2018-05", CLOSE)
    await set_month(client, "2019-01", CLOSE)
    await refused("2018-05", OPEN, "2019-01 is closed: open it first")
    await set_month(client, "2019-02", CLOSE)
    await refused("2019-01", OPEN, "2019-02 is closed: open it first")
    for month in ("2019-02", "2019-01", "2018-05"):
        assert (await set_month(client, month, OPEN))["closed_on"] is None


async def test_without_a_file_no_month_is_closed(start: Start) -> None:
    client = await start(event(JANUARY + number, 10, label=label) for number, label in enumerate("ab"))
    answer = await client.put("/api/v1/months/2019-01", json=CLOSE)
    assert (answer.status, await answer.json()) == (409, {"error": "without --db no month can be closed: nothing could be kept"})
    assert (await set_month(client, "2019-01", OPEN))["status"] == "open"  # that is so already
    assert [row["status"] for row in json.loads((await money(client, "months"))[0])["data"]] == ["open"]
    assert json.loads((await money(client, "report/a?month=2019-01"))[0])["data"]["line"]["amount"] == "13.14"


@pytest.mark.parametrize("month", ["%7B2019-01%7D", "2019-13", "2019-00", "2019-1", "2019", "2019-01-01", "0000-01", "1969-12", "x", "%20", "%D9%A2%D9%A0%D9%A1%D9%A9-01", "2019-01%0A", "%FF"])
async def test_a_month_that_is_none_is_400(start: Start, tmp_path: Path, month: str) -> None:
    client = await with_example(start, tmp_path)
    for path in (f"months/{month}", f"report?month={month}", f"report/a?month={month}"):
        answer = await client.request("PUT" if "months" in path else "GET", URL(f"/api/v1/{path}", encoded=True), json=CLOSE)
        assert (answer.status, list(error := await answer.json())) == (400, ["error"])
        assert "month must be a month as in 2019-03" in error["error"] or "%FF" in path


async def test_a_write_that_is_refused_when_its_client_has_gone_leaves_nothing_in_the_log(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await with_example(start, tmp_path)
    for month in ("2019-01", "2019-02"):
        assert (await client.put(f"/api/v1/months/{month}", json=CLOSE)).status == 200
    url, body = client.make_url("/"), json.dumps(OPEN).encode()
    for number in range(50):
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(raw_write(body, "PUT /api/v1/months/2019-01"))
        await asyncio.sleep(number / 20_000)
        writer.transport.abort()
        await asyncio.sleep(0.01)
    gc.collect()
    assert caplog.text == ""


BAD_STATUSES: list[Any] = [None, 1, "closed", [], {}, [CLOSE], {"status": "CLOSED"}, {"status": "close"}, {"status": ""}, {"status": None}, {"status": True}, {"status": []}, CLOSE | {"more": 1}]


async def test_what_is_no_status_of_a_month_is_400_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path)
    before = await sequence(client)
    bodies = [json.dumps(value).encode() for value in BAD_STATUSES]
    for body in (*bodies, b"", b"{", b"\xff", b"[" * 100_000, b'{"status":NaN}'):
        answer = await client.put("/api/v1/months/2019-01", data=body, headers={"Content-Type": "application/json"})
        assert (answer.status, list(await answer.json())) == (400, ["error"])
    assert await sequence(client) == before
    assert [row["status"] for row in json.loads((await money(client, "months"))[0])["data"]] == ["open"]


@pytest.mark.parametrize(
    ("path", "status", "named"),
    [
        ("report/a", 400, "month is missing"), ("report/a?month=", 400, "month"), ("report/a?month=2019-01&format=ndjson", 400, "format"),
        ("report/a?month=2019-01&format=xml", 400, "format"), ("report/a?month=2019-01&label=a", 400, "label"), ("report/a?month=2019-01&month=2019-01", 400, "month"),
        ("report?month=2019-01&format=ndjson", 400, "format"), ("months?limit=3", 400, "limit"), ("months?month=2019-01", 400, "month"),
        (f"report/{'x' * 129}?month=2019-01", 400, "Label Invalid"), ("report/%00?month=2019-01", 400, "Label Invalid"), ("report/%FF?month=2019-01", 400, "Label Invalid"),
        ("report/c?month=2019-01", 404, "'c' in 2019-01"), ("report/a?month=2019-02", 404, "'a' in 2019-02"), ("report/c?month=2019-01&format=csv", 404, "'c' in 2019-01"),
    ],
)  # fmt: skip
async def test_a_question_about_money_that_has_no_answer_is_4xx_and_named(start: Start, tmp_path: Path, path: str, status: int, named: str) -> None:
    client = await with_example(start, tmp_path)
    answer = await client.get(URL(f"/api/v1/{path}", encoded=True))
    assert (answer.status, list(error := await answer.json())) == (status, ["error"])
    assert named in error["error"]


async def test_asking_for_what_is_so_already_changes_nothing(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path)
    for body in (OPEN, CLOSE):
        row = await set_month(client, "2019-01", body)
        before = await sequence(client), (tmp_path / "usage.db-wal").read_bytes(), client.app[server.STATE].usage.last_number
        assert await set_month(client, "2019-01", body) == row
        assert (await sequence(client), (tmp_path / "usage.db-wal").read_bytes(), client.app[server.STATE].usage.last_number) == before


async def test_many_who_close_or_open_a_month_at_the_same_time_do_it_once(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path)
    for number, body in enumerate((CLOSE, OPEN, CLOSE), 3):
        answers = await asyncio.gather(*(client.put("/api/v1/months/2019-01", json=body) for _ in range(20)))
        assert [(answer.status, await answer.read()) for answer in answers] == [(200, await answers[0].read())] * 20
        assert await sequence(client) == (str(number), f'W/"{client.app[server.STATE].usage.sequence_name}-{number}"')
    bodies = [(CLOSE, OPEN)[number % 2] for number in range(40)]
    answers = await asyncio.gather(*(client.put("/api/v1/months/2019-01", json=body) for body in bodies))
    assert [(answer.status, (await answer.json())["data"]["status"]) for answer in answers] == [(200, body["status"]) for body in bodies]


async def test_a_closed_month_stays_as_it_is_whatever_is_changed_and_restarted(start: Start, tmp_path: Path) -> None:
    client, rng = await with_example(start, tmp_path), random.Random(40)
    labels = [*HOSTILE, "a", "b"]
    made = [
        STREAM | {"user_id": rng.choice(["user1", "user2", "user3", *HOSTILE]), "label": rng.choice(labels), "stream_started_on": rng.choice((JANUARY, FEBRUARY)), "seconds_streamed": rng.randrange(999)}
        for _ in range(200)
    ]
    await client.post("/api/v1/streams", json=made)
    for user in HOSTILE:
        assert (await client.put(URL(f"/api/v1/users/{quote(user, '')}", encoded=True), json={"product_type": user, "fee": "3.33", "origin": "web"})).status == 200
    await set_month(client, "2019-01", CLOSE)
    await client.delete("/api/v1/streams/1")
    await set_month(client, "2019-02", CLOSE)
    paths = [f"report?month={month}&format={kind}" for month in ("2019-01", "2019-02") for kind in ("json", "csv")]
    paths += [f"report/{quote(label, '')}?month={month}&format={kind}" for label in labels for month in ("2019-01", "2019-02") for kind in ("json", "csv")]

    async def told() -> list[tuple[bytes, str]]:
        answers = [await client.get(URL(f"/api/v1/{path}", encoded=True)) for path in paths]
        return [(await answer.read(), answer.headers.get("Content-Disposition", "")) for answer in answers]

    before = await told()
    for number in range(60):
        change = rng.randrange(4)
        if change == 0:
            assert (await client.post("/api/v1/streams", json=rng.choice(made) | {"user_id": f"new{number}"})).status == 201
        elif change == 1:
            await client.patch(f"/api/v1/streams/{rng.randrange(2, 200)}", json={"stream_started_on": rng.choice((JANUARY, FEBRUARY, MARCH)), "label": rng.choice(labels)})
        elif change == 2:
            await client.delete(f"/api/v1/streams/{rng.randrange(2, 200)}")
        else:
            user = rng.choice(["user1", "user2", f"new{number}"])
            assert (await client.put(f"/api/v1/users/{user}", json={"product_type": "new", "fee": f"{number}", "origin": "app_store"})).status == 200
        if number % 10 == 0:
            assert await told() == before
        if number % 20 == 5:
            more = "report", "report?month=2019-03", "report?month=2019-03&format=csv", "months", "users"
            moment, etags = await money(client, *more), [(await client.get(f"/api/v1/{path}")).headers["ETag"] for path in more]
            await client.close()
            client = await start(db=tmp_path / "usage.db")
            assert await money(client, *more) == moment
            assert [(await client.get(f"/api/v1/{path}")).headers["ETag"] for path in more] == etags
    assert await told() == before


@pytest.mark.parametrize("path", [*MONEY, "months", "report", "report?format=csv"])
async def test_money_is_304_until_something_changes_and_has_a_head(start: Start, tmp_path: Path, path: str) -> None:
    client = await with_example(start, tmp_path)
    answer = await client.get(f"/api/v1/{path}")
    etag = answer.headers["ETag"]
    head = await client.head(f"/api/v1/{path}")
    told = {name: value for name, value in answer.headers.items() if name != "Date"}
    assert (head.status, await head.read(), {name: value for name, value in head.headers.items() if name != "Date"}) == (200, b"", told)
    again = await client.get(f"/api/v1/{path}", headers={"If-None-Match": etag})
    assert (again.status, await again.read(), again.headers["ETag"]) == (304, b"", etag)
    for body in (CLOSE, OPEN):
        await set_month(client, "2019-01", body)
        answer = await client.get(f"/api/v1/{path}", headers={"If-None-Match": etag})
        assert (answer.status, answer.headers["ETag"] != etag) == (200, True)
        etag = answer.headers["ETag"]


async def test_a_statement_leads_to_the_amount_in_two_formats(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path)
    label = "Größe/Ltd & Co"
    user = "=cmd|' /C calc'!A0"
    await client.post("/api/v1/streams", json=[STREAM | {"user_id": each, "label": label, "stream_started_on": JANUARY} for each in ("user3", "nobody", user)])
    await client.put(URL(f"/api/v1/users/{quote(user, '')}", encoded=True), json={"product_type": "+1", "fee": "1", "origin": "web"})
    found = json.loads((await money(client, "report/a?month=2019-01"))[0])
    assert found["message"] == "Found Label Statement"
    for status in (None, CLOSE):
        if status:
            await set_month(client, "2019-01", status)
        answer = await client.get(URL(f"/api/v1/report/{quote(label, '')}?month=2019-01", encoded=True))
        assert "Content-Disposition" not in answer.headers
        data = (await answer.json())["data"]
        assert (data["line"]["label"], data["status"]) == (label, "closed" if status else "open")
        walk(data)
        answer = await client.get(URL(f"/api/v1/report/{quote(label, '')}?month=2019-01&format=csv", encoded=True))
        assert (answer.headers["Content-Type"], answer.headers["Content-Disposition"]) == (
            "text/csv; charset=utf-8; header=present",
            f"attachment; filename=\"statement-2019-01-groe-ltd-co.csv\"; filename*=UTF-8''statement-2019-01-{quote(label.lower().replace(' ', '-'), '')}.csv",
        )
        header, *rows = csv.reader(io.StringIO(await answer.text(), newline=""))
        assert header == ["user_id", "product_type", "fee", "origin", "net", "seconds_streamed", "of_seconds", "part"]
        cells = [["" if cell is None else str(cell) for cell in row.values()] for row in data["user_centric"]["subscribers"]]
        assert rows == [[f"'{cell}" if cell[:1] in ("=", "+") else cell for cell in row] for row in cells]
    for path, name in (("report?format=csv", "report"), ("report?format=csv&month=2019-01", "report-2019-01"), ("report/a?month=2019-01&format=csv", "statement-2019-01-a")):
        assert (await client.get(f"/api/v1/{path}")).headers["Content-Disposition"] == f"attachment; filename=\"{name}.csv\"; filename*=UTF-8''{name}.csv"


async def test_a_month_is_closed_only_by_a_write_that_may_be_one(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db", token="s3cret")  # noqa: S106
    for headers, status in (
        ({}, 401), ({"Authorization": "Bearer wrong"}, 401), ({"Origin": "http://evil.example"}, 403), ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example"}, 421), ({"Authorization": "Bearer s3cret", "Content-Type": "text/plain"}, 415), ({"Authorization": "Bearer s3cret"}, 200),
    ):  # fmt: skip
        answer = await client.put("/api/v1/months/2019-01", data=json.dumps(CLOSE).encode(), headers={"Content-Type": "application/json"} | headers)
        assert (answer.status, list(await answer.json())) == (status, ["message", "data"] if status == 200 else ["error"])
    answer = await client.put("/api/v1/months/2019-01", data=io.BytesIO(b" " * (1024 * 1024 + 1)), headers={"Content-Type": "application/json", "Authorization": "Bearer s3cret"})
    assert answer.status == 413
    assert [row["status"] for row in json.loads((await money(client, "months"))[0])["data"]] == ["closed"]
    for method, path, allowed in (("GET", "months/2019-01", "PUT"), ("DELETE", "months/2019-01", "PUT"), ("POST", "months", "GET,HEAD"), ("PUT", "report/a", "GET,HEAD")):
        answer = await client.request(method, f"/api/v1/{path}", json=CLOSE, headers={"Authorization": "Bearer s3cret"})
        assert (answer.status, answer.headers["Allow"]) == (405, allowed)


async def test_a_close_or_an_open_that_cannot_be_stored_is_503_and_changes_nothing(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path)
    connection = client.app[server.STATE].journal.database.connection
    for body, other in ((CLOSE, "open"), (OPEN, "closed")):
        before = await sequence(client), await money(client, *MONEY, "months")
        connection.execute("PRAGMA query_only = ON")
        answer = await client.put("/api/v1/months/2019-01", json=body)
        assert (answer.status, list(await answer.json())) == (503, ["error"])
        assert (await client.get("/health")).status == 503
        assert (await sequence(client), await money(client, *MONEY, "months")) == before
        connection.execute("PRAGMA query_only = OFF")
        assert json.loads(before[1][-1])["data"][0]["status"] == other
        assert (await set_month(client, "2019-01", body)) == json.loads(before[1][-1])["data"][0] | body | {"closed_on": NOW if body == CLOSE else None}


async def test_nothing_is_late_because_a_later_version_would_share_out_other_cents(start: Start, tmp_path: Path) -> None:
    client = await with_example(start, tmp_path)
    await set_month(client, "2019-01", CLOSE)
    await client.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db", isolation_level=None)) as file:
        file.execute("UPDATE closed_labels SET amount = amount + CASE label WHEN 'a' THEN 1 ELSE -1 END WHERE label IN ('a', 'b')")
    client = await start(db=tmp_path / "usage.db")
    months, february = map(json.loads, await money(client, "months", "report?month=2019-02"))
    assert [row["late"] for row in months["data"]] == [0]
    assert february["data"]["labels"] == []


async def test_a_statement_over_10_000_subscribers_takes_less_than_a_second_and_lets_others_in(start: Start, tmp_path: Path) -> None:
    client, rng = await start(db=tmp_path / "usage.db"), random.Random(41)
    state = client.app[server.STATE]
    state.books.subscriptions.update({f"u{number}": Subscription("p", rng.randrange(999), "web") for number in range(10_000)})
    add(state.usage, [event(JANUARY, rng.randrange(86_400), f"u{number % 10_000}", label=rng.choice("abcde")) for number in range(50_000)])
    for label in "abcde":
        if label == "c":
            await set_month(client, "2019-01", CLOSE)
        began, waits = time.monotonic(), list[float]()
        slow = asyncio.create_task(client.get(f"/api/v1/report/{label}?month=2019-01"))
        while not slow.done():
            asked = time.monotonic()
            assert (await client.get("/usage?to=0")).status == 200
            waits.append(time.monotonic() - asked)
        assert time.monotonic() - began < 1
        assert len(waits) >= 5
        data = (await (await slow).json())["data"]
        assert len(data["user_centric"]["subscribers"]) > 5_000
        walk(data)


async def test_a_close_which_all_writes_wait_for_waits_for_no_other_long_work(start: Start, tmp_path: Path) -> None:
    client = await start(db=tmp_path / "usage.db")
    state = client.app[server.STATE]
    state.books.subscriptions.update({f"u{number}": Subscription("p", number, "web") for number in range(10_000)})
    add(state.usage, [event(JANUARY, 60, f"u{number}", label=f"label {number % 5}") for number in range(10_000)])
    for _ in range(server.MOST_LONG_WORK):
        await state.slices.long_work.acquire()
    try:
        async with asyncio.timeout(10):
            row = await set_month(client, "2019-01", CLOSE)
            assert (row["status"], row["late"]) == ("closed", 0)
            assert (await client.post("/api/v1/streams", json=STREAM)).status == 201
    finally:
        for _ in range(server.MOST_LONG_WORK):
            state.slices.long_work.release()


class Office(Payroll):
    """A payroll beside the real program, which is closed, restarted, and imported into."""

    def __init__(self, start: Start, directory: Path, seed: int) -> None:
        """Begin with the built-in subscribers and no streams."""
        super().__init__()
        self.start, self.directory, self.rng = start, directory, random.Random(seed)
        self.client: Client
        self.streams: dict[int, Event] = {}  # by id
        self.imports: list[tuple[int, range, dict[str, tuple[Subscription, int]]]] = []  # number, ids, what was replaced
        self.stored: dict[str, tuple[Subscription, int]] = {}  # with the import that it is of, or 0
        self.were: dict[str, list[bytes]] = {}
        self.done = Counter[str]()
        self.written = 0

    async def restart(self, imported: server.Import | None = None) -> None:
        """Start again, with an import or none."""
        await self.client.close()
        self.client = await self.start(db=self.directory / "usage.db", imported=imported)

    def remember(self, streams: list[dict[str, Any]]) -> None:
        """Take in streams as the program shows them."""
        self.streams |= {each["id"]: Event(*(each[name] for name in server.FIELDS)) for each in streams}

    def count(self) -> None:
        """Bring the payroll up to date."""
        self.events = [*self.streams.values()]
        built_in = {} if self.imports else server.SUBSCRIPTIONS
        self.subscriptions = {**built_in} | {user: found for user, (found, _) in self.stored.items()}

    def make(self) -> dict[str, Any]:
        """Make a stream."""
        names = {"user_id": f"user{self.rng.randrange(1, 5)}", "track_id": f"t{self.rng.randrange(3)}", "label": self.rng.choice("abc")}
        return names | {"stream_started_on": self.rng.choice([*CLOSABLE.values()]), "seconds_streamed": self.rng.choice((0, 1, 2, 60, self.rng.randrange(5_000)))}

    async def step(self) -> None:
        """Do anything."""
        rng, ids = self.rng, [*self.streams]
        change = rng.choice(("create", "create", "change", "move", "remove", "fee", "import", "undo", "close", "close", "close", "open", "restart"))
        if change == "create":
            answer = await self.client.post("/api/v1/streams", json=[self.make() for _ in range(rng.randrange(1, 4))])
            self.remember((await answer.json())["data"])
        elif change in ("change", "move", "remove") and ids:
            body = {"change": {name: cell for name, cell in self.make().items() if rng.randrange(2)}, "move": {"stream_started_on": rng.choice([*CLOSABLE.values()])}}
            method = "DELETE" if change == "remove" else "PATCH"
            answer = await self.client.request(method, f"/api/v1/streams/{rng.choice(ids)}", json=body.get(change))
            self.remember([(data := (await answer.json())["data"])])
            if change == "remove":
                del self.streams[data["id"]]
        elif change == "fee":
            user, found = f"user{rng.randrange(1, 6)}", Subscription("p", rng.choice((0, 1, 99, 799, 10**6)), rng.choice(("web", "app_store")))
            subscription = {"product_type": "p", "fee": server.euros(found.fee), "origin": found.origin}
            assert (await self.client.put(f"/api/v1/users/{user}", json=subscription)).status == 200
            self.stored[user] = found, 0
        elif change == "import":
            await self.bring_in()
        elif change == "undo" and self.imports:
            await self.take_back()
        elif change in ("close", "open"):
            await self.set_status(rng.choice([*(self.frozen if change == "open" and self.frozen else CLOSABLE)]), change)
            return
        elif change == "restart":
            await self.restart()
        self.done[change] += 1

    async def bring_in(self) -> None:
        """Import three files at a restart."""
        self.written += 1
        streams, users = [self.make() for _ in range(self.rng.randrange(1, 5))], self.rng.sample([f"user{number}" for number in range(1, 6)], 2)
        rows = [f"05/{month_of(event(made['stream_started_on']))[5:]}/2019;{made['user_id']};{self.written};{made['label']};{made['seconds_streamed']}\n" for made in streams]
        found = {user: Subscription("i", self.rng.choice((0, 500, 1_499)), self.rng.choice(("web", "app_store"))) for user in users}
        of_users = "".join(f"{user};i;{server.euros(each.fee)};{each.origin}\n" for user, each in found.items())
        tracks = [{"track_id": label, "label": label} for label in "abc"]
        directory = write_import(self.directory / "import", "user_id;product_type;fee;origin\n" + of_users, "date;user_id;region;track_id;seconds\n" + "".join(rows), tracks)
        await self.restart(read_import(directory))
        page = (await (await self.client.get("/api/v1/streams?limit=1000")).json())["data"]
        new = [each for each in page if each["id"] not in self.streams]
        assert len(new) == len(rows)
        self.remember(new)
        self.imports.append((self.written, range(new[0]["id"], new[-1]["id"] + 1), {user: self.stored[user] for user in users if user in self.stored}))
        self.stored |= {user: (each, self.written) for user, each in found.items()}

    async def take_back(self) -> None:
        """Undo the latest import, or have that refused."""
        number, ids, replaced = self.imports[-1]
        touched = {month_of(self.streams[each]) for each in ids if each in self.streams} & set(self.frozen)
        await self.client.close()
        database = server.Database(self.directory / "usage.db", "r+b")
        with pytest.raises(server.StorageError, match="is closed: open it first") if touched else contextlib.nullcontext():
            database.undo_import()
        database.close()
        self.done["undo refused"] += bool(touched)
        if not touched:
            self.imports.pop()
            self.streams = {each: made for each, made in self.streams.items() if each not in ids}
            self.stored = replaced | {user: of for user, of in self.stored.items() if of[1] != number}
        self.client = await self.start(db=self.directory / "usage.db")

    async def set_status(self, month: str, change: str) -> None:
        """Close or open a month, or have that refused."""
        self.count()
        is_so = (month in self.frozen) == (change == "close")
        earlier = [month_of(each) for each in self.events if month_of(each) < month and month_of(each) not in self.frozen]
        refused = not is_so and bool(earlier if change == "close" else max(self.frozen) > month)
        answer = await self.client.put(f"/api/v1/months/{month}", json=CLOSE if change == "close" else OPEN)
        assert answer.status == (409 if refused else 200)
        self.done["so" if is_so else "refused" if refused else change] += 1
        if is_so or refused:
            return
        if change == "open":
            self.open(month)
            del self.were[month]
            return
        self.close(month)
        self.were[month] = await self.figures(month)
        for line in json.loads(self.were[month][0])["data"]["labels"]:
            paid = [self.amounts[month].get(line["label"], [0, 0]), self.adjustments[month].get(line["label"], [0, 0])]
            assert [line[name] for name in server.LABEL_COLUMNS[4:]] == [server.euros(cents) for cents in itertools.chain(*paid)]

    async def figures(self, month: str) -> list[bytes]:
        """Return all that is told of a closed month."""
        (report,) = await money(self.client, f"report?month={month}")
        labels = [line["label"] for line in json.loads(report)["data"]["labels"]]
        return [report, *await money(self.client, f"report?month={month}&format=csv", *(f"report/{label}?month={month}" for label in labels))]

    async def check(self) -> None:
        """Compare the closed months with what they were, and what is late and due with the payroll."""
        self.count()
        for month, were in self.were.items():
            assert await money(self.client, f"report?month={month}") == were[:1]
            if self.rng.randrange(3) == 0:
                assert await self.figures(month) == were
        rows = {row["month"]: row for row in json.loads((await money(self.client, "months"))[0])["data"]}
        for month, frozen in self.frozen.items():
            now, then = self.month(month, frozen), self.amounts[month]
            assert rows[month]["late"] == sum(now.get(label, [0, 0]) != then.get(label, [0, 0]) for label in {*now, *then})
        (report,) = await money(self.client, f"report?month={self.target()}")
        due = {line["label"]: [line[name] for name in server.ADJUSTMENTS] for line in json.loads(report)["data"]["labels"]}
        assert {label: cents for label, cents in due.items() if cents != ["0.00"] * 2} == {label: [server.euros(each) for each in cents] for label, cents in self.due().items()}

    async def end(self) -> None:
        """Close everything, and compare what each label has got with what it would have got at once."""
        self.count()
        while (month := min({month_of(each) for each in self.events} - set(self.frozen), default="")) or self.due():
            await self.set_status(month or self.target(), "close")
        paid, known = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for month, frozen in self.frozen.items():
            for line in json.loads((await money(self.client, f"report?month={month}"))[0])["data"]["labels"]:
                for at, name in enumerate(server.LABEL_COLUMNS[4:]):
                    paid[line["label"], at % 2] += round(100 * Fraction(line[name]))
            for label, amounts in self.month(month, frozen).items():
                for at, cents in enumerate(amounts):
                    known[label, at] += cents
        assert {key: cents for key, cents in paid.items() if cents} == {key: cents for key, cents in known.items() if cents}
        await self.check()
        await self.client.close()


async def test_closed_months_stay_to_the_byte_over_300_histories_of_requests_restarts_and_imports(start: Start, tmp_path: Path) -> None:
    done = Counter[str]()
    for seed in range(300):
        (tmp_path / str(seed)).mkdir()
        office = Office(start, tmp_path / str(seed), seed)
        office.client = await start(db=tmp_path / str(seed) / "usage.db")
        for _ in range(office.rng.choice((6, 12, 20))):
            await office.step()
            await office.check()
        await office.end()
        done += office.done
    assert min(done[change] for change in ("create", "change", "move", "remove", "fee", "import", "undo", "undo refused", "close", "open", "restart", "refused", "so")) > 20


# ── One sequence: versions, and the feed of changes ─────────────────────────────────────────────


async def change(client: Any, method: str, path: str, value: Any = None, status: int = 200, **headers: str) -> Any:
    """Send a write, and return its answer."""
    answer = await client.request(method, f"/api/v1/{path}", json=value, headers={name.replace("_", "-"): text for name, text in headers.items()})
    assert answer.status == status, await answer.text()
    return answer


async def all_streams(client: Any) -> dict[int, dict[str, Any]]:
    """Return all streams, by id."""
    streams: dict[int, dict[str, Any]] = {}
    after: int | None = 0
    while after is not None:
        page = await (await client.get(f"/api/v1/streams?limit=1000&after={after}")).json()
        streams |= {each["id"]: each for each in page["data"]}
        after = page["next"]
    return streams


class Follower:
    """Who keeps a copy: stores each row of the feed under its id, and lets the highest version win."""

    def __init__(self, told: dict[int, dict[str, Any]] | None = None) -> None:
        """Begin with nothing; `told` is what any follower has been told under a version."""
        self.rows: dict[int, dict[str, Any]] = {}
        self.cursor = "0"
        self.told = {} if told is None else told
        self.begun = 0  # how often anew

    async def poll(self, client: Any, limit: int | None = None) -> int:
        """Ask once, and return how many rows came."""
        query = f"after={self.cursor}" + (f"&limit={limit}" if limit else "")
        async with client.get(f"/api/v1/changes?{query}") as answer:
            if answer.status == 410:
                self.rows, self.cursor, self.begun = {}, "0", self.begun + 1
                return await self.poll(client, limit)
            assert answer.status == 200
            rows = [json.loads(line) for line in (await answer.text()).splitlines()]
            (cursor,) = re.findall(r'^</api/v1/changes\?after=([0-9a-f]+-[0-9]+(?:-[0-9]+)?)>; rel="next"$', answer.headers["Link"])
        versions = [row["version"] for row in rows]
        assert versions == sorted(set(versions))
        assert len({row["id"] for row in rows}) == len(rows) <= (limit or len(rows))
        before = int(self.cursor.split("-")[1] if "-" in self.cursor else self.cursor)
        assert not versions or before < versions[0] <= versions[-1] <= int(cursor.split("-")[1])
        for row in rows:
            assert self.told.setdefault(row["version"], row) == row
            assert list(row) == (["version", "id", "deleted"] if "deleted" in row else ["version", "id", *server.FIELDS])
            if row["version"] > self.rows.get(row["id"], {"version": 0})["version"]:
                self.rows[row["id"]] = row
        self.cursor = cursor
        return len(rows)

    async def catch_up(self, client: Any, limit: int | None = None) -> dict[int, dict[str, Any]]:
        """Ask until nothing comes, and return the streams."""
        while await self.poll(client, limit):
            pass
        return self.streams()

    def streams(self) -> dict[int, dict[str, Any]]:
        """Return what there is now, as the API shows it."""
        return {
            number: {name: value for name, value in row.items() if name != "version"}
            for number, row in sorted(self.rows.items()) if "deleted" not in row
        }

    def copy(self) -> Follower:
        """Return another who is as far."""
        other = Follower(self.told)
        other.rows, other.cursor = {**self.rows}, self.cursor
        return other


@pytest.mark.parametrize("durable", [False, True])
async def test_ids_and_versions_grow_with_every_change_and_none_is_used_twice(start: Start, tmp_path: Path, durable: bool) -> None:
    options = {"db": tmp_path / "usage.db"} if durable else {}
    client, rng, given, ids = await start(**options), random.Random(61), [0], list[int]()
    for number in range(300):
        kind = rng.randrange(6)
        if kind < 2 or not ids:
            made = (await (await change(client, "POST", "streams", [STREAM] * rng.randrange(1, 4), 201)).json())["data"]
            ids += [each["id"] for each in made]
            given += [each["id"] for each in made]
        elif kind == 2:
            answer = await change(client, *rng.choice((("PUT", f"streams/{rng.choice(ids)}", STREAM), ("PATCH", f"streams/{rng.choice(ids)}", {"label": "x"}))))
            given.append(int(answer.headers["ETag"].strip('"')))
        elif kind == 3:
            await change(client, "DELETE", f"streams/{ids.pop(rng.randrange(len(ids)))}")
            rows = [json.loads(line) for line in (await (await client.get("/api/v1/changes")).text()).splitlines()]
            assert rows[-1].keys() == {"version", "id", "deleted"}
            given.append(rows[-1]["version"])
        elif kind == 4:  # what is refused is no change
            await change(client, "PATCH", f"streams/{rng.choice(ids)}", {"label": ""}, 400)
            await change(client, "DELETE", f"streams/{rng.choice(ids)}", None, 412, If_Match='"0"')
        else:
            await change(client, "PUT", "users/user1", {"product_type": "p", "fee": "1", "origin": "web"})
        if durable and number % 60 == 59:
            await client.close()
            client = await start(**options)
        assert given == sorted(set(given))


async def test_every_answer_that_shows_one_stream_has_its_strong_etag(start: Start) -> None:
    client = await start()
    answer = await change(client, "POST", "streams", STREAM, 201)
    assert (answer.headers["ETag"], answer.headers["Location"]) == ('"1"', "/api/v1/streams/1")
    assert "ETag" not in (await change(client, "POST", "streams", [STREAM], 201)).headers
    keyed = await change(client, "POST", "streams", STREAM, 201, Idempotency_Key="k")
    answer = await change(client, "PUT", "streams/1", STREAM)
    assert answer.headers["ETag"] == '"4"'
    answer = await change(client, "PATCH", "stream/3", {"label": "changed"})
    assert answer.headers["ETag"] == '"5"'
    for path, tag in (("stream/1", '"4"'), ("streams/1", '"4"'), ("streams/3", '"5"')):
        for method in ("GET", "HEAD"):
            answer = await change(client, method, path)
            assert answer.headers["ETag"] == tag
            again = await change(client, method, path, None, 304, If_None_Match=tag)
            assert (again.headers["ETag"], await again.read()) == (tag, b"")
    replayed = await change(client, "POST", "streams", STREAM, 201, Idempotency_Key="k")  # the first answer again, with the version of then
    assert (replayed.headers["ETag"], replayed.headers["Location"]) == (keyed.headers["ETag"], keyed.headers["Location"]) == ('"3"', "/api/v1/streams/3")
    await change(client, "PATCH", "streams/3", {"label": "lost"}, 412, If_Match=replayed.headers["ETag"])
    answer = await change(client, "DELETE", "streams/3")
    assert (answer.headers["ETag"], (await answer.json())["data"]["label"]) == ('"5"', "changed")


@pytest.mark.parametrize(
    ("known", "is_met"),
    [
        ('"2"', True), ("*", True), ('"1", "2"', True), ('"1","2" ', True), ('"1" ,  "2", "9"', True),
        ('"1"', False), ('W/"2"', False), ('w/"2"', False), ('"*"', False), ('W/"*"', False), ("2", False), ("", False), ('"', False),
        ('"2', False), ("'2'", False), ('"02"', False), ('"2 "', False), ('"1", *', False), ('"1;2"', False), ('"\xff"', False), ('"1" "2"', False),
    ],
)
async def test_a_write_with_if_match_changes_that_version_or_nothing(start: Start, known: str, is_met: bool) -> None:
    for method, value in (("PUT", STREAM), ("PATCH", {"label": "other"}), ("DELETE", None)):
        client = await start([event()])
        await change(client, "PATCH", "streams/1", {"label": "first"})
        before = await snapshot(client), await (await client.get("/api/v1/changes")).text()
        answer = await change(client, method, "streams/1", value, 200 if is_met else 412, If_Match=known)
        after = await snapshot(client), await (await client.get("/api/v1/changes")).text()
        if is_met:
            assert after[1] != before[1]
        else:
            assert after == before
            assert list(await answer.json()) == ["error"]
            assert '"2"' in (await answer.json())["error"]


async def test_if_match_in_several_lines_is_one_list(start: Start) -> None:
    client = await start([event()])
    for lines, status in ((['"7"', '"1"'], 200), (['"2"', '"7"'], 200), (['"1"', 'W/"3"'], 412)):
        answer = await client.patch("/api/v1/streams/1", json={"label": "x"}, headers=[("If-Match", line) for line in lines])
        assert answer.status == status


async def test_what_is_not_there_or_malformed_is_said_before_a_version_that_does_not_match(start: Start) -> None:
    client = await start([event()])
    for method in ("PUT", "PATCH", "DELETE"):
        for known in ("*", '"1"'):
            await change(client, method, "streams/2", STREAM, 404, If_Match=known)
            await change(client, method, "streams/x", STREAM, 400, If_Match=known)
    for method, value in (("PUT", {}), ("PATCH", {"label": ""}), ("PUT", STREAM | {"stream_started_on": NOW + 1})):
        await change(client, method, "streams/1", value, 400, If_Match='"9"')
    await change(client, "DELETE", "streams/1", None, 412, If_Match='"9"')
    await change(client, "DELETE", "streams/1", None, 200, If_Match='"1"')
    await change(client, "DELETE", "streams/1", None, 404, If_Match='"1"')


@pytest.mark.parametrize("durable", [False, True])
async def test_of_two_clients_that_change_one_version_at_the_same_time_one_gets_412(start: Start, tmp_path: Path, durable: bool) -> None:
    client = await start([], db=tmp_path / "usage.db" if durable else None)
    rng, tag, stream = random.Random(62), (await change(client, "POST", "streams", STREAM, 201)).headers["ETag"], 1
    for number in range(300):
        writes = [rng.choice((("PUT", STREAM | {"label": f"{number} {who}"}), ("PATCH", {"label": f"{number} {who}"}), ("DELETE", None))) for who in (1, 2)]
        answers = await asyncio.gather(*(
            client.request(method, f"/api/v1/streams/{stream}", json=value, headers={"If-Match": tag}) for method, value in writes
        ))
        statuses = [answer.status for answer in answers]
        won = statuses.index(200)
        assert statuses[1 - won] == (404 if writes[won][0] == "DELETE" else 412)
        if writes[won][0] == "DELETE":
            answer = await change(client, "POST", "streams", STREAM, 201)
            stream = int(answer.headers["Location"].rsplit("/", 1)[1])
        else:
            answer = await change(client, "GET", f"streams/{stream}")
            assert (await answer.json())["data"] == (await answers[won].json())["data"]
            assert answer.headers["ETag"] == answers[won].headers["ETag"] != tag
        tag = answer.headers["ETag"]


async def test_the_feed_tells_each_stream_once_as_it_is_now(start: Start) -> None:
    client = await start()
    assert await (await client.get("/api/v1/changes")).read() == b""
    await change(client, "POST", "streams", [STREAM] * 4, 201)
    await change(client, "PATCH", "streams/2", {"label": 'a "☃"\\'})
    await change(client, "DELETE", "streams/3")
    await change(client, "PUT", "users/user1", {"product_type": "p", "fee": "1", "origin": "web"})
    fields = f'"stream_started_on":{NOW - 9},"seconds_streamed":5'
    lines = [
        f'{{"version":1,"id":1,"user_id":"user1","track_id":"track1","label":"label1",{fields}}}\n',
        f'{{"version":4,"id":4,"user_id":"user1","track_id":"track1","label":"label1",{fields}}}\n',
        f'{{"version":5,"id":2,"user_id":"user1","track_id":"track1","label":"a \\"☃\\"\\\\",{fields}}}\n',
        '{"version":6,"id":3,"deleted":true}\n',
    ]
    name = client.app[server.STATE].usage.sequence_name
    for query, first, end, cursor in (
        ("", 0, 4, 7), ("?after=0", 0, 4, 7), ("?after=1", 1, 4, 7), ("?after=2", 1, 4, 7), ("?after=4", 2, 4, 7), (f"?after={name}-5", 3, 4, 7), ("?after=6", 4, 4, 7),
        ("?after=7", 4, 4, 7), ("?limit=1", 0, 1, "1-7"), ("?limit=3", 0, 3, "5-7"), ("?limit=4", 0, 4, "6-7"), ("?limit=5", 0, 4, 7), ("?limit=2&after=1", 1, 3, 5),
        ("?after=0007", 4, 4, 7), (f"?after={name}-1-7&limit=2", 1, 3, "5-7"), (f"?after={name}-5-7", 3, 4, 7),
    ):
        answer = await client.get(f"/api/v1/changes{query}")
        assert (answer.status, await answer.text()) == (200, "".join(lines[first:end])), query
        assert answer.headers["Link"] == f'</api/v1/changes?after={name}-{cursor}>; rel="next"'
        assert answer.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        head = await client.head(f"/api/v1/changes{query}")
        assert (head.status, head.headers["Link"], await head.read()) == (200, answer.headers["Link"], b"")


@pytest.mark.parametrize(
    "query",
    ["after=", "after=-1", "after=x", "after=1.0", "after=%2B1", "after=1&after=1", "after=-", "after=ab-", "after=ab-x", "after=ab-1-1-1", "after=1-1-x", "after=%D9%A3",
     "limit=0", "limit=100001", "limit=x", "limit=", "limit=1&limit=1", "x=1", "from=1", "format=json", "label=a", "after=" + "1" * 101],
)
async def test_a_malformed_question_for_changes_is_400_and_named(start: Start, query: str) -> None:
    answer = await (await start([event()])).get(f"/api/v1/changes?{query}")
    assert (answer.status, list(await answer.json())) == (400, ["error"])
    assert query.split("=", maxsplit=1)[0] in (await answer.json())["error"]


async def test_a_cursor_that_leads_nowhere_is_410(start: Start, tmp_path: Path) -> None:
    cursors: list[str] = []
    for options in ({}, {}, {"db": tmp_path / "usage.db"}, {"db": tmp_path / "other.db"}):
        client = await start([event(), event()], **options)
        name = client.app[server.STATE].usage.sequence_name
        for cursor in ("3", f"{name}-3", "9" * 100, "0-0", "abc-1", *cursors):
            answer = await client.get(f"/api/v1/changes?after={cursor}")
            assert (answer.status, list(await answer.json())) == (410, ["error"])
            assert "after=0" in (await answer.json())["error"]
        cursors += [f"{name}-{number}" for number in range(3)]
        for cursor in ("0", "2", *cursors[-3:]):
            assert (await client.get(f"/api/v1/changes?after={cursor}")).status == 200


async def test_a_long_feed_is_compressed_on_request_and_is_one_moment(start: Start) -> None:
    client = await start(random_events(random.Random(63), 30_000))
    plain = await (await client.get("/api/v1/changes", headers={"Accept-Encoding": "identity"})).read()
    packed = await client.get("/api/v1/changes", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert await packed.read() == plain
    rows = [json.loads(line) for line in plain.splitlines()]
    assert [row["version"] for row in rows] == list(range(1, 30_001))
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(b"GET /api/v1/changes HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await asyncio.sleep(0.05)  # it has begun, and waits for us
    for number in range(1, 200):
        await change(client, "DELETE", f"streams/{number * 150}")
    status, headers, body = await read_answer(reader)
    assert (status, body) == (200, plain)
    assert headers["link"].endswith('-30000>; rel="next"')
    writer.close()


async def test_what_keep_drops_is_told_as_deleted_until_that_is_forgotten(start: Start) -> None:
    client, follower = await start(keep=3), Follower()
    for _ in range(3):
        await change(client, "POST", "streams", [STREAM, STREAM], 201)
        assert await follower.catch_up(client) == await all_streams(client)
    assert sum("deleted" in row for row in follower.rows.values()) == 3
    late, early = follower.copy(), Follower()
    await early.poll(client, 1)
    for number in range(4):
        await change(client, "POST", "streams", STREAM | {"stream_started_on": NOW - 8 + number}, 201)
        assert await follower.catch_up(client, 1) == await all_streams(client)
    assert follower.begun == 0
    for other in (late, early):
        assert await other.catch_up(client) == await all_streams(client)
        assert other.begun == 1


async def test_removals_that_are_forgotten_do_not_keep_anyone_from_reading_from_the_start_in_pages(start: Start) -> None:
    client = await start([event(NOW - number) for number in range(5)], keep=5)
    for number in range(20):
        made = await change(client, "POST", "streams", STREAM | {"stream_started_on": NOW - 2}, 201)
        if number % 2:
            await change(client, "DELETE", made.headers["Location"].removeprefix("/api/v1/"))
    for limit in (1, 2, 3, 4, 100, None):
        async with asyncio.timeout(5):
            follower = Follower()
            assert await follower.catch_up(client, limit) == await all_streams(client)
    # What goes while one reads is missed by nobody, or the reading begins anew.
    for removed in (1, 20):
        follower = Follower()
        await follower.poll(client, 1)
        for _ in range(removed):
            made = await change(client, "POST", "streams", STREAM | {"stream_started_on": NOW}, 201)
        async with asyncio.timeout(5):
            assert await follower.catch_up(client, 1) == await all_streams(client)
        assert follower.begun == (removed == 20)


@pytest.mark.parametrize(("durable", "keep"), [(True, 1), (False, 1_000_000), (False, 25), (False, 5)])
async def test_whoever_applies_the_feed_has_the_streams_after_any_mix_of_requests(
    start: Start, tmp_path: Path, durable: bool, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "CHUNK_EVENTS", 8)
    options: dict[str, Any] = {"db": tmp_path / "usage.db"} if durable else {"keep": keep}
    client, rng, clock = await start(**options), random.Random(keep), NOW - 10_000
    followers = [Follower()]
    for number in range(240):
        streams, kind, clock = await all_streams(client), rng.randrange(8), clock + 1
        made = STREAM | {"label": f"label{rng.randrange(4)}", "stream_started_on": clock - rng.choice((0, 0, 3)), "seconds_streamed": rng.randrange(9)}
        if kind < 3 or not streams:
            answer = await client.post("/api/v1/streams", json=[made] * rng.choice((1, 2, 3)))
            assert answer.status in (201, 409)
        elif kind == 3:
            await change(client, "PUT", f"streams/{rng.choice([*streams])}", made)
        elif kind == 4:
            await change(client, "PATCH", f"streams/{rng.choice([*streams])}", {"label": made["label"]})
        elif kind == 5:
            await change(client, "PUT", "users/user1", {"product_type": "p", "fee": "1", "origin": "web"})
        else:
            await change(client, "DELETE", f"streams/{rng.choice([*streams])}")
        if durable and number % 60 == 59:
            await client.close()
            client = await start(**options)
        follower = rng.choice(followers).copy()  # of any moment: just begun, or far behind
        if rng.randrange(3):
            await follower.poll(client, rng.choice((None, 1, 2, 5)))
        followers = [*rng.sample(followers, min(len(followers), 8)), follower]
        if rng.randrange(6) == 0:
            streams = await all_streams(client)
            for each in [*followers, Follower(followers[0].told)]:
                assert await each.copy().catch_up(client, rng.choice((None, 1, 3, 7, 100_000))) == streams
    assert any(each.copy().rows for each in followers)


@pytest.mark.parametrize("durable", [True, False])
async def test_a_reader_that_goes_on_from_its_cursor_misses_nothing_beside_many_writers(start: Start, tmp_path: Path, durable: bool) -> None:
    client, rng = await start(db=tmp_path / "usage.db" if durable else None), random.Random(64)
    acknowledged: dict[int, int] = {}  # id -> the version that was answered last
    working, told = [True], dict[int, dict[str, Any]]()

    async def write() -> None:
        mine: dict[int, str] = {}
        for _ in range(120):
            kind = rng.randrange(5)
            if kind < 2 or not mine:
                for each in (await (await change(client, "POST", "streams", [STREAM] * rng.randrange(1, 9), 201)).json())["data"]:
                    mine[each["id"]] = f'"{each["id"]}"'
                    acknowledged[each["id"]] = each["id"]
                continue
            number = rng.choice([*mine])
            if kind == 4:
                await change(client, "DELETE", f"streams/{number}", None, If_Match=mine.pop(number))
                acknowledged[number] += 1  # its number is not told, but it is higher
            else:
                mine[number] = (await change(client, "PATCH", f"streams/{number}", {"label": f"l{rng.randrange(9)}"}, If_Match=mine[number])).headers["ETag"]
                acknowledged[number] = int(mine[number].strip('"'))

    async def read(limit: int | None) -> Follower:
        follower = Follower(told)
        while working:
            before = {**acknowledged}
            while await follower.poll(client, limit) == limit:
                pass
            assert all(follower.rows[number]["version"] >= version for number, version in before.items())
        return follower

    readers = [asyncio.create_task(read(limit)) for limit in (None, 1_000, 7)]
    await asyncio.gather(*(write() for _ in range(10)))
    working.clear()
    streams = await all_streams(client)
    for follower in [*await asyncio.gather(*readers), Follower(told)]:
        assert await follower.catch_up(client) == streams


async def test_an_import_and_its_undo_are_in_the_feed_and_a_restart_keeps_it(start: Start, tmp_path: Path) -> None:
    path, follower = tmp_path / "usage.db", Follower()
    client = await start(db=path)
    await change(client, "POST", "streams", [STREAM] * 3, 201)
    await change(client, "DELETE", "streams/2")
    assert await follower.catch_up(client) == await all_streams(client)
    feed = await (await client.get("/api/v1/changes")).read()
    early, name = follower.copy(), client.app[server.STATE].usage.sequence_name
    for imported in (None, read_import(write_import(tmp_path / "import"))):
        await client.close()
        client = await start(db=path, imported=imported)
        assert client.app[server.STATE].usage.sequence_name == name
        assert await (await client.get("/api/v1/changes?limit=3")).read() == feed
        assert await follower.catch_up(client) == await all_streams(client)
    assert len(follower.streams()) == 5
    await change(client, "PATCH", "streams/6", {"label": "changed"})
    await change(client, "DELETE", "streams/7")
    middle = follower.copy()
    await client.close()
    assert (await undo(path))[0] == 0
    client = await start(db=path)
    for each in (follower, early, middle, Follower()):
        assert await each.catch_up(client) == await all_streams(client)
        assert each.begun == 0
    assert list(follower.streams()) == [1, 3]
    deleted = [row["version"] for row in follower.rows.values() if "deleted" in row]
    assert len(deleted) == 4
    created = int((await change(client, "POST", "streams", STREAM, 201)).headers["ETag"].strip('"'))
    assert created > max(deleted)


METRICS = {
    "usage_events": "gauge", "usage_sequence": "counter", "usage_requests_total": "counter", "usage_simulation_errors_total": "counter",
    "process_resident_memory_bytes": "gauge", "usage_last_commit_age_seconds": "gauge",
}


async def metrics(client: Any) -> dict[str, float]:
    """Return the samples; as strict as the format is: a HELP and a TYPE, once and in this order, before a family's samples."""
    answer = await client.get("/metrics")
    text = await answer.text()
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert text.endswith("\n")
    samples: dict[str, float] = {}
    families: dict[str, str] = {}
    lines = iter(text.splitlines())
    for line in lines:
        if helped := re.fullmatch(r"# HELP ([a-z_]+) \S.*", line):
            typed = re.fullmatch(r"# TYPE ([a-z_]+) (counter|gauge)", next(lines))
            assert typed
            assert typed[1] == helped[1] not in families
            families[typed[1]] = typed[2]
            continue
        sample = re.fullmatch(r'([a-z_]+)(\{[a-z]+="[^"\\]*"\})? ([0-9.]+)', line)
        assert sample, line
        assert sample[1] == [*families][-1]
        assert sample[1] + (sample[2] or "") not in samples
        samples[sample[1] + (sample[2] or "")] = float(sample[3])
    assert families == {name: kind for name, kind in METRICS.items() if name in families}
    assert {name.partition("{")[0] for name in samples} == set(families)
    return samples


async def test_the_metrics_are_what_prometheus_reads_and_count_what_happens(start: Start, tmp_path: Path) -> None:
    client = await start([event(), event()])
    first = await metrics(client)
    assert first.keys() == METRICS.keys() - {"usage_requests_total", "usage_last_commit_age_seconds"} | {f'usage_requests_total{{status="{n}xx"}}' for n in range(2, 6)}
    assert (first["usage_events"], first["usage_sequence"], first["usage_simulation_errors_total"]) == (2, 2, 0)
    assert first["process_resident_memory_bytes"] > 10_000_000
    for path, headers in (("/usage?from=x", {}), ("/nowhere", {}), ("/usage", {"Host": "evil.example"}), ("/usage", {"If-None-Match": "*"}), ("/usage", {})):
        await client.get(path, headers=headers)
    await change(client, "DELETE", "streams/1")
    second = await metrics(client)
    counted = {name: second[name] - first[name] for name in second if name.startswith("usage_requests")}
    assert [*counted.values()] == [3, 1, 3, 0]  # the first question for them is among the 2xx
    assert (second["usage_events"], second["usage_sequence"]) == (1, 3)
    assert (await client.head("/metrics")).status == 200
    client = await start(db=tmp_path / "usage.db")
    assert "usage_last_commit_age_seconds" not in await metrics(client)
    await change(client, "POST", "streams", STREAM, 201)
    assert 0 <= (await metrics(client))["usage_last_commit_age_seconds"] < 60


# ── Command line: the program as a process ──────────────────────────────────────────────────────


async def get_json(url: str) -> Any:
    """Fetch and parse `url`."""
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.status == 200
        return await answer.json()


@beside_others
async def test_a_default_start_has_four_batches_after_35_seconds(tmp_path: Path) -> None:
    async with started() as program:
        url = await program.url()
        begin, seen = time.monotonic(), list[tuple[int, int]]()
        while time.monotonic() < begin + 35:
            count = (await get_json(f"{url}/health"))["events"]
            if not seen or seen[-1][1] != count:
                seen.append((10 * round((time.monotonic() - begin) / 10), count))
            await asyncio.sleep(0.2)
        assert [at for at, _ in seen] == [0, 10, 20, 30]
        events = await get_json(f"{url}/usage")
        assert len(events) == seen[-1][1]
        assert 4 <= len(events) <= 20
        check_simulated(events, time.time())
        assert await program.stop() == (0, "")


async def test_readers_never_see_a_part_of_a_batch() -> None:
    async with started("--interval=0.005", "--random-seed=14") as program:
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


def memory(program: Program) -> int:
    """Return the bytes of memory that a process of the program has."""
    status = Path(f"/proc/{program.process.pid}/status").read_text("utf-8")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@needs_proc
@pytest.mark.parametrize("path", ["/usage", "/api/v1/streams?limit=1000"])
async def test_an_open_connection_holds_no_answer(path: str) -> None:
    async with started("--no-simulation") as program:
        url = URL(await program.url())
        async with aiohttp.ClientSession() as session:
            events = [STREAM | {"track_id": f"{number:0100}", "stream_started_on": 1} for number in range(250)]
            async with session.post(url.with_path("/api/v1/streams"), json=events) as answer:
                assert answer.status == 201
        connections = [await asyncio.open_connection(url.host, url.port) for _ in range(200)]

        async def ask_all(path: str) -> int:
            for reader, writer in connections:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(re.findall(rb"content-length: (\d+)", head.lower())[0])
                await reader.readexactly(size)
            return size

        await ask_all("/health")
        before = memory(program)
        size = await ask_all(path)
        assert size > 40_000
        assert memory(program) - before < 200 * size / 2
        for _, writer in connections:
            writer.close()


@needs_proc
async def test_a_month_of_events_takes_400_bytes_each_and_100_slow_readers_little_more() -> None:
    async with started("--no-simulation", "--history=30") as program:
        url = URL(await program.url())
        events = await get_json(f"{url}/usage")
        assert len(events) == pytest.approx(777_600, rel=0.01)
        full = memory(program)
        assert full / len(events) < 400  # what is promised, and the interpreter is in it
        readers = [await asyncio.open_connection(url.host, url.port, limit=1_000) for _ in range(100)]
        for reader, writer in readers:
            writer.write(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readexactly(9_000)
        async with aiohttp.ClientSession() as session:
            for day in range(30):  # every chunk changes, while the readers hold what it was
                started_on = events[0]["stream_started_on"] + 86_400 * day
                batch = [STREAM | {"stream_started_on": started_on + 85 * number} for number in range(1_000)]
                async with session.post(f"{url}/api/v1/streams", json=batch) as answer:
                    assert len((await answer.json())["data"]) == 1_000
        assert memory(program) - full < 200e6
        for _, writer in readers:
            writer.transport.abort()
        await get_json(f"{url}/usage")
        assert memory(program) - full < 100e6  # the 30,000 new ones, and memory that Python keeps for the next ones


async def test_a_month_as_ndjson_gives_duckdb_the_same_sums() -> None:
    if importlib.util.find_spec("duckdb") is None:
        if CI:
            pytest.fail("no duckdb")
        pytest.skip("duckdb is not installed")
    (pipe,) = re.findall(r"^(curl .*\bduckdb\b.*)$", (HERE / "README.md").read_text("utf-8"), re.MULTILINE)
    async with started("--no-simulation", "--history=30") as program:
        url = await program.url()
        command = pipe.replace("http://127.0.0.1:8080", url).replace(".venv/bin/python", sys.executable)
        shell = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
        table = (await shell.communicate())[0].decode()
        rows = await get_json(f"{url}/usage?group_by=label")
    assert re.findall(r"│ (label\d) +│ +(\d+) │", table) == [(row["label"], str(row["seconds_streamed"])) for row in rows]
    assert len(rows) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_status_0_after_the_requests_under_way(number: int) -> None:
    async with started("--history=2", "--no-simulation") as program:
        url = await program.url()
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/usage") as answer:
                stopping = asyncio.create_task(program.stop(number))
                await asyncio.sleep(0.3)
                assert len(json.loads(await answer.read())) > 50_000
            assert await stopping == (0, "")


async def test_a_report_over_very_many_subscribers_holds_up_neither_the_others_nor_the_end(tmp_path: Path) -> None:
    rng, users = random.Random(15), [f"user {number}" for number in range(40_000)]
    days = ["01/03/2019", "31/03/2019", *(f"{day:02}/04/2019" for day in range(1, 9))]
    rows = [f"{day};{user};NL;track 1;{rng.randrange(86_400)}\n" for user in users for day in days]
    write_import(
        tmp_path,
        "user_id;product_type;fee;origin\n" + "".join(f"{user};premium;7.99;web\n" for user in users),
        "date;user_id;region;track_id;seconds\n" + "".join(rows),
        [{"track_id": "track 1", "label": "label 1"}],
    )
    async with started("--no-simulation", f"--import={tmp_path}") as program:
        url = await program.url()
        begin = time.monotonic()
        paths = ("report?month=2019-03", "report?month=2019-04", "report", "users", "report/label%201?month=2019-03")
        march, waits = sum(int(row.split(";")[-1]) for row in rows if "/03/" in row), list[float]()
        for number in range(4):
            report = asyncio.gather(*(get_json(f"{url}/api/v1/{path}") for path in paths))
            while not report.done():
                asked = time.monotonic()
                await get_json(f"{url}/health")
                waits.append(time.monotonic() - asked)
                await asyncio.sleep(0.01)
            assert (await report)[0]["data"]["seconds_streamed"] == march
            async with aiohttp.ClientSession() as session:  # a change, so that all is made anew
                await session.put(f"{url}/api/v1/users/new", json={"product_type": "p", "fee": str(number), "origin": "web"})
        assert max(waits) < (time.monotonic() - begin) / 8
        again = asyncio.create_task(get_json(f"{url}/api/v1/report"))
        await asyncio.sleep(0.02)
        begin = time.monotonic()
        assert await program.stop() == (0, "")
        assert time.monotonic() - begin < 5  # what the contract promises
        assert (await again)["data"]["seconds_streamed"] > march


async def test_a_signal_ends_it_with_status_0_while_it_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with started("--history=3650", "--keep=100000000", f"--port={port}") as program:
        async with asyncio.timeout(20):
            while True:  # the port is open from the beginning of the work on
                with contextlib.suppress(OSError):
                    (await asyncio.open_connection("127.0.0.1", port))[1].close()
                    break
                await asyncio.sleep(0.05)
        begin = time.monotonic()
        assert await program.stop() == (0, "")
        assert time.monotonic() - begin < 5  # what the contract promises


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_it_with_status_0_while_it_imports_its_packages(number: int) -> None:
    # Before its first line runs, Python itself is what a signal ends. So the delays begin with its imports.
    for delay in (0, 0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4):
        async with started("--no-simulation", command=("-X", "importtime", str(HERE / "server.py"))) as program:
            assert program.process.stderr
            while not (await program.process.stderr.readline()).endswith((b" argparse\n", b" gettext\n")):
                pass
            await asyncio.sleep(delay)
            status, errors = await program.stop(number)
            assert [line for line in errors.splitlines() if not line.startswith("import time:")] == []
            assert status == 0


@pytest.mark.parametrize("pause", [0, 0.001, 0.01, 0.1])
async def test_more_signals_than_one_change_nothing(pause: float) -> None:
    async with started("--no-simulation") as program:
        await program.url()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ProcessLookupError):
                program.process.send_signal(number)
            await asyncio.sleep(pause)
        assert (await program.process.communicate())[1] == b""
        assert program.process.returncode == 0


async def test_a_client_that_reads_late_gets_the_end_of_its_answer_after_a_signal() -> None:
    small = "import server, socket; listen = server.listen; server.listen = lambda *where: small(listen(*where))"
    small += "\ndef small(listener): listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096); return listener"
    small += "\nserver.main()"
    async with started("--no-simulation", "--history=0.01", command=("-c", small)) as program:
        url = URL(await program.url())
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((url.host, url.port))
            client.sendall(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(0.5)  # it is answered, and most of that is in no buffer of the system
            stopping = asyncio.create_task(program.stop())
            await asyncio.sleep(0.2)
            assert not stopping.done()
            head, _, body = client.makefile("rb").read().partition(b"\r\n\r\n")
        assert len(body) == int(head.partition(b"Content-Length: ")[2].split()[0])
        assert await stopping == (0, "")


async def test_a_client_that_does_not_read_cannot_hold_up_the_end() -> None:
    async with started("--history=5", "--no-simulation") as program:
        url = await program.url()
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1)
        writer.write(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await asyncio.sleep(0.5)
        begin = time.monotonic()
        assert (await program.stop())[0] == 0
        assert 1 < time.monotonic() - begin < 5  # it was waited for, and what the contract promises
        writer.close()


def full_device(_: contextlib.ExitStack) -> int:
    """Return what takes nothing."""
    return os.open("/dev/full", os.O_WRONLY)


def closed_pipe(_: contextlib.ExitStack) -> int:
    """Return the end to write to of a pipe that has no other."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_pipe(stack: contextlib.ExitStack) -> int:
    """Return the end to write to of a pipe that is full and that nobody reads."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b" " * 4096)
    os.set_blocking(writer, True)
    return writer


@pytest.mark.parametrize(
    ("make", "closed"),
    [(full_device, ""), (closed_pipe, ""), (full_pipe, ""), (full_pipe, ">&-"), (full_pipe, "2>&-"), (full_device, ">&- 2>&- <&-")],
)
async def test_what_cannot_be_printed_stops_nothing(make: Callable[[contextlib.ExitStack], int], closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, output := make(stack))
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, HERE / "server.py", f"--port={URL(url).port}", "-v",
            stdout=output, stderr=output,
        )
        try:
            async with asyncio.timeout(20), aiohttp.ClientSession() as session:
                while True:
                    with contextlib.suppress(aiohttp.ClientConnectionError):
                        await get_json(f"{url}/health")
                        break
                    await asyncio.sleep(0.05)
                for _ in range(200):
                    async with session.get(f"{url}/{'x' * 1_000}") as answer:
                        assert answer.status == 404
                begin = time.monotonic()
                process.terminate()
                assert await process.wait() == 0
                assert time.monotonic() - begin < 5  # what the contract promises
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def test_no_file_gets_the_number_of_an_output_that_is_closed(tmp_path: Path) -> None:
    shell = ("sh", "-c", 'exec "$@" >&- 2>&- <&-', "sh", sys.executable, HERE / "server.py", "--port=0", "--db=usage.db")
    process = await asyncio.create_subprocess_exec(*shell, cwd=tmp_path)
    async with asyncio.timeout(20):
        while not (tmp_path / "usage.db").exists():
            await asyncio.sleep(0.05)
    assert {Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)} == {Path("/dev/null")}
    process.terminate()
    assert await process.wait() == 0


async def test_help_and_version_are_printed_whoever_reads_them() -> None:
    for option, said in (("--help", "HOST PORT USAGE_TOKEN python server.py --db usage.db"), ("--version", f"server.py {server.__version__}")):
        async with started(option) as program:
            out, errors = await asyncio.wait_for(program.process.communicate(), 20)
            assert (program.process.returncode, errors) == (0, b"")
            assert set(said.split()) <= set(re.split(r"[\s=]+", out.decode()))
        for make in (closed_pipe, full_pipe):
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, pipe := make(stack))
                process = await asyncio.create_subprocess_exec(sys.executable, HERE / "server.py", option, stdout=pipe, stderr=asyncio.subprocess.PIPE)
                try:
                    assert (await asyncio.wait_for(process.communicate(), 20))[1] == b""
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                assert process.returncode == 0


RUN = f"runpy.run_path({str(HERE / 'server.py')!r}, run_name='__main__')"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["-c", f"import runpy, sys; sys.version_info = (3, 10, 12, 'final', 0); sys.modules['argparse'] = None; {RUN}"], "it needs Python 3.11 or newer"),
        (["-I", "-S", str(HERE / "server.py")], "python3 -m pip install -r requirements.txt"),
        (["-c", f"import runpy, sys; sys.modules['yarl'] = None; {RUN}"], "python3 -m pip install -r requirements.txt"),
        (["-c", f"import runpy, aiohttp; aiohttp.__version__ = '3.9.5'; {RUN}"], "aiohttp 3.9.5 is too old; install it: python3 -m pip install"),
        (["-c", f"import runpy, aiohttp; aiohttp.__version__ = '3.14.2'; {RUN}"], "aiohttp 3.14.2 is too old; install it: python3 -m pip install"),
        (["-c", f"import runpy, aiohttp; aiohttp.__version__ = '3.14.0rc9'; {RUN}"], "aiohttp 3.14.0rc9 is too old; install it: python3 -m pip install"),
    ],
)
async def test_without_what_it_needs_it_ends_with_status_2_and_one_line(command: list[str], said: str) -> None:
    async with started(command=command) as program:
        out, errors = await asyncio.wait_for(program.process.communicate(), 20)
        assert (program.process.returncode, out) == (2, b"")
        assert errors.decode().startswith("server.py: ")
        assert said in errors.decode()
        assert errors.count(b"\n") == 1


OLD_PYTHONS = [str(found) for found in (*Path.home().glob(".pyenv/versions/3.10.*/bin/python"), *Path("/usr/bin").glob("python3.10"))]


@pytest.mark.skipif(not OLD_PYTHONS, reason="there is no Python 3.10 here")
async def test_a_real_python_3_10_ends_it_with_status_2_and_one_line() -> None:
    process = await asyncio.create_subprocess_exec(OLD_PYTHONS[0], HERE / "server.py", stderr=asyncio.subprocess.PIPE)
    try:
        assert (await asyncio.wait_for(process.communicate(), 20))[1].startswith(b"server.py: it needs Python 3.11 or newer, this is 3.10.")
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 2


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
        (["--port=1\n2"], "--port"),
        (["--host=a\nb"], "cannot listen on a b"),
        (["a\nb"], "a b"),
        (["--host="], "cannot listen on"),
        *((["--allow-host", name], f"--allow-host: {name!r} is no plain host name") for name in ("x.com.", "x.com:80", "*.x.com", ".x.com", "http://x.com", "x.com/", "", " ", "a b", "[::1", "münchen.de")),
        (["--host=no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--host=192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--host=.."], "cannot listen on .."),
        (["--tracks=x"], "--tracks goes with --import"),
        (["extra"], "extra"),
    ],
)
async def test_bad_options_end_it_with_status_2_and_one_line(options: list[str], said: str) -> None:
    async with started(*options) as program:
        out, errors = await asyncio.wait_for(program.process.communicate(), 20)
        assert (program.process.returncode, out) == (2, b"")
        assert errors.decode().startswith("server.py: ")
        assert said in errors.decode()
        assert errors.count(b"\n") == 1


async def test_a_taken_port_ends_it_with_status_2_and_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started(f"--port={port}") as program:
            out, errors = await program.process.communicate()
            assert (program.process.returncode, out) == (2, b"")
            assert errors.decode().startswith(f"server.py: cannot listen on 127.0.0.1, port {port}: Address already")
            assert errors.count(b"\n") == 1
            assert (errors.count(b"127.0.0.1"), errors.count(b"--port")) == (1, 1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PORT": "abc"}, "PORT in the environment: 'abc' is no int from 0 to 65,535"),
        ({"PORT": "65536"}, "PORT in the environment: '65536' is no int from 0 to 65,535"),
        ({"HOST": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid, port 0: "),
        *(({"USAGE_TOKEN": token}, "USAGE_TOKEN is empty or no printable text") for token in ("", " \n", "a\nb", "a\x1bb", os.fsdecode(b"\xff"))),
    ],
)
async def test_a_bad_environment_ends_it_with_status_2_and_one_line(environment: dict[str, str], said: str) -> None:
    port = [] if "PORT" in environment else ["--port=0"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, HERE / "server.py", *port, env=os.environ | environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (2, b"")
    assert errors.decode().startswith(f"server.py: {said}")
    assert (errors.count(b"\n"), b"--port:" in errors) == (1, False)


async def test_a_port_in_the_environment_does_not_matter_when_the_option_is_given() -> None:
    async with started("--no-simulation", PORT="abc") as program:
        assert await get_json(f"{await program.url()}/usage") == []


@pytest.mark.parametrize("token", ["s3cret\n", " s3cret\t", "s3cret\r\n", "zwei Wörter"])
async def test_a_token_is_what_stands_between_the_white_space(token: str) -> None:
    async with started("--no-simulation", USAGE_TOKEN=token) as program, aiohttp.ClientSession() as session:
        url = f"{await program.url()}/api/v1/streams"
        for given, status in ((token.strip(), 201), ("other", 401)):
            headers = {"Authorization": f"Bearer {given}"}
            async with session.post(url, json=STREAM | {"stream_started_on": 1}, headers=headers) as answer:
                assert answer.status == status


async def test_host_and_port_come_from_the_environment_and_options_win() -> None:
    options = server.parse_options({"HOST": "127.0.0.9", "PORT": "5500"}, ["--port", "0"])
    assert (options.host, options.port) == ("127.0.0.9", 0)
    assert server.parse_options({"PORT": "5500", "HOST": ""}, []).port == 5500
    async with started("--no-simulation", HOST="127.0.0.2") as program:
        url = await program.url()
        assert re.fullmatch(r"http://127\.0\.0\.2:\d+", url)
        assert await get_json(f"{url}/usage") == []


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="there is no IPv6 here")
async def test_an_option_for_ipv6_prints_a_url_that_works() -> None:
    async with started("--no-simulation", "--host=::1") as program:
        assert await get_json(f"{await program.url()}/usage") == []


async def test_listening_beyond_loopback_without_a_token_is_warned_of_once() -> None:
    for environment, lines in (({}, 1), ({"USAGE_TOKEN": "s3cret"}, 0)):
        async with started("--no-simulation", "--host=0.0.0.0", **environment) as program:
            await program.url()
            status, errors = await program.stop()
            assert (status, errors.count("\n"), errors.count("USAGE_TOKEN")) == (0, lines, lines)


async def test_verbose_logs_each_request_in_one_line() -> None:
    async with started("--no-simulation", "-v") as program:
        address = (await program.url()).removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b'GET /usage?label=a%20%22GET%20forged HTTP/1.1\r\nHost: localhost\r\nUser-Agent: \xc2\x85 \xc2\x9b "forged"\r\nReferer: forged\r\n\r\n')
        assert (await read_answer(reader))[0] == 200
        writer.write(b"GET /%0a%0dforged?%0aforged=%0d HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await read_answer(reader))[0] == 404
        writer.close()
        _, errors = await program.stop()
        requests = [line.split("127.0.0.1 ", 1)[1] for line in errors.splitlines()]
        assert [re.sub(r"\d+$", "N", line) for line in requests] == [
            '"GET /usage?label=a%20%22GET%20forged HTTP/1.1" 200 N',
            '"GET /%0a%0dforged?%0aforged=%0d HTTP/1.1" 404 N',
        ]


async def test_a_random_seed_gives_the_same_names_and_seconds_after_a_restart() -> None:
    runs = []
    for _ in range(2):
        async with started("--history=0.01", "--random-seed=15", "--no-simulation") as program:
            events = await get_json(f"{await program.url()}/usage")
            first = min(made["stream_started_on"] for made in events)
            runs.append([[*list(made.values())[:3], made["seconds_streamed"]] for made in events])
            assert first > time.time() - 4_000
    assert runs[0] == runs[1]


async def test_an_import_takes_the_place_of_the_subscribers_and_not_of_the_simulation(tmp_path: Path) -> None:
    async with started("--import", str(write_import(tmp_path))) as program:
        url = await program.url()
        report = (await get_json(f"{url}/api/v1/report?month=2019-03"))["data"]
        assert (report["subscribers"], report["revenue"], report["seconds_streamed"]) == (2, "19.08", 60)
        assert (await get_json(f"{url}/health"))["events"] > 3


async def test_what_was_imported_is_in_memory_only_once(tmp_path: Path) -> None:
    program = """
import gc, server
async def serve(*_): print(sum(type(each) is server.Import for each in gc.get_objects()))
server.serve = serve
server.main()
"""
    async with started("--import", str(write_import(tmp_path)), "--db", str(tmp_path / "usage.db"), command=("-c", program)) as importing:
        out, _ = await importing.process.communicate()
        assert (importing.process.returncode, out) == (0, b"0\n")


async def test_a_compressed_body_is_refused_and_not_unpacked() -> None:
    async with started("--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        for body in (b"hello", gzip.compress(b" " * 10**8)):
            headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
            async with session.post(f"{url}/api/v1/streams", data=io.BytesIO(body), headers=headers) as answer:
                assert (answer.status, (await answer.json())["error"]) == (415, "a write needs Content-Type: application/json, and no Content-Encoding")
        for coding in ("identity", "Identity", ""):
            headers = {"Content-Type": "application/json", "Content-Encoding": coding}
            async with session.post(f"{url}/api/v1/streams", data=io.BytesIO(json.dumps(STREAM | {"stream_started_on": 1}).encode()), headers=headers) as answer:
                assert answer.status == 201
        assert await program.stop() == (0, "")


async def test_what_is_no_http_is_400_and_leaves_no_traceback_in_the_log() -> None:
    async with started("--no-simulation") as program:
        address = (await program.url()).removeprefix("http://").split(":")
        for message in (b"GET /\xff HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nno header\r\n\r\n", b"\x16\x03\x01\r\n\r\n", b"GET /" + b"x" * 65_536 + b" HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(message)
            assert (await read_answer(reader))[0] == 400
            writer.close()
        assert await program.stop() == (0, "")


async def test_a_client_that_goes_instead_of_waiting_leaves_no_traceback_in_the_log() -> None:
    async with started("--no-simulation") as program:
        address = (await program.url()).removeprefix("http://").split(":")
        for number in range(60):
            _, writer = await asyncio.open_connection(*address)
            writer.write(b"POST /api/v1/streams HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n" * (1 + number % 3))
            rude = writer.transport.abort if number % 2 else writer.close
            rude()
        assert await program.stop() == (0, "")


async def test_it_takes_as_many_connections_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
    try:
        async with started("--no-simulation") as program:
            await program.url()
            assert resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_file_descriptors_those_who_are_in_are_answered_and_the_others_wait() -> None:
    async with started("--no-simulation") as program, contextlib.AsyncExitStack() as stack:
        address = (await program.url()).removeprefix("http://").split(":")

        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(*address)
            stack.callback(writer.close)
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return reader, writer

        reader, writer = await connect()
        assert (await read_answer(reader))[0] == 200
        resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        others = [await connect() for _ in range(100)]
        await asyncio.sleep(2.5)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await read_answer(reader))[0] == 200
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(others[-1][0].readexactly(1), 0.1)
        for _, other in others[:90]:
            other.close()
        async with asyncio.timeout(5):
            assert (await read_answer(others[-1][0]))[0] == 200
        status, errors = await program.stop()
        assert status == 0
        assert 1 <= errors.count("\n") <= 30  # one a second
        assert {line.split(" ERROR ")[1] for line in errors.splitlines()} == {"no connection can be taken: all file descriptors are in use (ulimit -n)"}


class Model:
    """The API in the contract's words, as plain as can be: what it holds, and what a request gets."""

    def __init__(self, keep: float, durable: bool) -> None:
        """Begin with nothing but the three subscribers."""
        self.keep = keep
        self.durable = durable
        self.number = 0  # the last of the sequence that was given
        self.visible = 0  # the last that a change is known by
        self.forgotten = 0  # a follower from before this one has to begin anew
        self.cursors: dict[str, tuple[int, int]] = {}  # that the feed has told: so far, and what began then needs no more
        self.cursor = 0, 0  # that the latest answer tells
        self.streams: dict[int, dict[str, Any]] = {}
        self.versions: dict[int, int] = {}  # of the streams
        self.gone: dict[int, int] = {}  # and of those that were removed
        self.keys: dict[str, tuple[bytes, Any]] = {}
        self.subscriptions: Subscribers = {
            "user1": {"product_type": "premium", "fee": "7.99", "origin": "app_store"},
            "user2": {"product_type": "platinum", "fee": "14.99", "origin": "web"},
            "user3": {"product_type": "premium", "fee": "7.99", "origin": "web"},
        }
        self.closed: dict[str, Closed] = {}
        self.told: dict[str, str] = {}  # headers that the answer must have

    @staticmethod
    def is_text(value: object) -> bool:
        """Tell whether this is an identifier."""
        return isinstance(value, str) and 1 <= len(value) <= 128 and not {unicodedata.category(c) for c in value} & {"Cc", "Cs"}

    def is_event(self, value: object) -> bool:
        """Tell whether this is an event."""
        return (
            isinstance(value, dict)
            and value.keys() == set(STREAM)
            and all(self.is_text(value[name]) for name in server.NAMES)
            and type(value["stream_started_on"]) is int
            and 0 <= value["stream_started_on"] <= time.time()
            and type(value["seconds_streamed"]) is int
            and 0 <= value["seconds_streamed"] <= 2_147_483_647
        )

    def is_subscription(self, value: object) -> bool:
        """Tell whether this is a subscription."""
        return (
            isinstance(value, dict)
            and value.keys() == {"product_type", "fee", "origin"}
            and self.is_text(value["product_type"])
            and self.is_text(value["fee"])
            and re.fullmatch("[0-9]+([.][0-9]{1,2})?", value["fee"]) is not None
            and Fraction(value["fee"]) <= 10_000
            and value["origin"] in ("app_store", "web")
        )

    def predict(self, method: str, path: list[str], query: list[tuple[str, str]], headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        """Do what is asked, and return the status and what the answer says."""
        asked, self.told = dict[str, Any](), {}
        for name, text in query:
            asked.setdefault(name, []).append(text)
        value: Any = None
        if method in ("POST", "PUT", "PATCH"):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(body.decode())
        match path:
            case ["usage"]:
                return self.usage(asked)
            case ["metrics"]:
                return 200, {"usage_events": len(self.streams), "usage_sequence": self.visible}
            case ["changes"]:
                return self.feed(asked)
            case ["report"]:
                return self.report(asked.get("month", [""])[0], asked)
            case ["report", label]:
                return self.statement(asked["month"][0], label, asked)
            case ["months"]:
                return 200, [self.month(name) for name in reversed(self.accounts())]
            case ["months", name]:
                return self.put_month(name, value)
            case ["users"]:
                return 200, [self.user(user)[1] for user in sorted({*self.subscriptions, *(each["user_id"] for each in self.streams.values())})]
            case ["users", user]:
                return self.put_user(user, value) if method == "PUT" else self.user(user)
            case ["streams"]:
                return self.post(value, headers.get("Idempotency-Key"), body) if method == "POST" else self.page(asked)
        return self.one_stream(method, path[1], headers, value)

    def one_stream(self, method: str, text: str, headers: dict[str, str], value: Any) -> tuple[int, Any]:
        """Show, replace, change or remove a stream."""
        if not re.fullmatch("[0-9]+", text):
            return 400, None
        stream = self.streams.get(int(text))
        if stream is None:
            return 404, None
        tag = f'"{self.versions[int(text)]}"'
        if method == "GET":
            self.told = {"etag": tag}
            return (304, None) if headers.get("If-None-Match") in (tag, "*") else (200, stream)
        if method == "PATCH" and isinstance(value, dict):
            value = {name: stream[name] for name in STREAM} | value
        if method != "DELETE" and not self.is_event(value):
            return 400, None
        if "If-Match" in headers and not {tag, "*"} & {*headers["If-Match"].split(", ")}:
            return 412, None
        if method == "DELETE":
            self.told = {"etag": tag}
            self.remove(stream["id"])
            return 200, stream
        self.versions[stream["id"]] = self.change()
        self.told = {"etag": f'"{self.number}"'}
        changed: dict[str, Any] = {"id": stream["id"]} | {name: value[name] for name in STREAM}
        self.streams[stream["id"]] = changed
        return 200, changed

    def change(self) -> int:
        """Give the next number."""
        self.number += 1
        self.visible = self.number
        return self.number

    def remove(self, stream_id: int) -> None:
        """Remove a stream; of what is gone as much is told as is kept."""
        del self.streams[stream_id], self.versions[stream_id]
        self.gone[stream_id] = self.change()
        if len(self.gone) > self.keep:
            self.forgotten = self.gone.pop(next(iter(self.gone)))

    def post(self, value: Any, key: str | None, body: bytes) -> tuple[int, Any]:
        """Store one event or some."""
        if key in self.keys and self.keys[key][0] != body:
            return 422, None
        events = value if isinstance(value, list) else [value]
        if not 1 <= len(events) <= 1_000 or not all(map(self.is_event, events)):
            return 400, None
        first = self.number + 1
        if key in self.keys:
            made, self.told = self.keys[key][1], {"idempotent-replayed": "true"}
        else:
            made = [{"id": number} | {name: each[name] for name in STREAM} for number, each in enumerate(events, first)]
            both = sorted([*self.streams.values(), *made], key=lambda each: (each["stream_started_on"], each["id"]))
            dropped = both[: max(0, len(both) - int(min(self.keep, 10**9)))]
            if any(each["id"] >= first for each in dropped):
                return 409, None
            for each in made:
                self.streams[each["id"]], self.versions[each["id"]] = each, self.change()
            for each in dropped:
                self.remove(each["id"])
            if key is not None:
                self.keys[key] = body, made
        if isinstance(value, list):
            return 201, made
        self.told |= {"etag": f'"{made[0]["id"]}"', "location": f"/api/v1/streams/{made[0]['id']}"}
        return 201, made[0]

    def feed(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Tell each stream that has changed after a number, once."""
        text = asked.get("after", ["0"])[0]
        number = int(text) if text.isdecimal() else -1  # of another sequence
        number, began = self.cursors.get(text, (number, number or self.visible))
        if not self.forgotten <= began <= self.visible or number < 0:
            return 410, None
        told = [{"version": self.versions[stream_id]} | stream for stream_id, stream in self.streams.items()]
        told += [{"version": version, "id": stream_id, "deleted": True} for stream_id, version in self.gone.items()]
        rows = sorted((each for each in told if each["version"] > number), key=lambda each: each["version"])
        limit = int(asked.get("limit", [10**9])[0])
        number = self.visible if len(rows) < limit else rows[limit - 1]["version"]
        self.cursor = number, max(number, began)
        return 200, rows[:limit]

    def put_user(self, user: str, value: Any) -> tuple[int, Any]:
        """Set a subscription."""
        if not self.is_subscription(value):
            return 400, None
        self.change()
        self.subscriptions = self.subscriptions | {user: value | {"fee": f"{float(value['fee']):.2f}"}}
        return self.user(user)

    def user(self, user: str) -> tuple[int, Any]:
        """Return what a user streamed."""
        mine = [each for each in self.streams.values() if each["user_id"] == user]
        if not mine and user not in self.subscriptions:
            return 404, None
        return 200, {
            "user_id": user, "streams": len(mine), "seconds_streamed": sum(each["seconds_streamed"] for each in mine),
            "labels": sums(mine, "label"), "tracks": sums(mine, "track_id"), "subscription": self.subscriptions.get(user),
        }

    def filtered(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the streams that are asked for, in order of id."""
        low, high = (int(asked[name][0]) if name in asked else end for name, end in (("from", -math.inf), ("to", math.inf)))
        return [
            each for _, each in sorted(self.streams.items())
            if low <= each["stream_started_on"] < high and all(each[name] in asked.get(name, [each[name]]) for name in server.NAMES)
        ]

    def page(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Return a page of streams, their number, and what comes next."""
        if int(asked.get("from", [0])[0]) > time.time():
            return 400, None
        found, limit = self.filtered(asked), int(asked["limit"][0])
        later = [each for each in found if each["id"] > int(asked["after"][0])]
        return 200, [later[:limit], len(found), later[limit - 1]["id"] if len(later) > limit else None]

    def usage(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Return the events, or the sums over them, as rows."""
        events = sorted(self.filtered(asked), key=lambda each: each["stream_started_on"])
        window, by = asked.get("window", [None])[0], [name for name in asked.get("group_by", [""])[0].split(",") if name]
        limit = int(asked.get("limit", [10**9])[0])
        if "order" in asked and (window or by):
            return 400, None
        if int(asked.get("from", [0])[0]) > time.time():
            return 400, b""
        if not window and not by:
            listed = [{name: each[name] for name in STREAM} for each in events]
            return 200, (listed[::-1] if asked.get("order") == ["desc"] else listed)[:limit]
        rows: dict[tuple[Any, ...], list[int]] = {}
        for each in events:
            began = datetime.fromtimestamp(each["stream_started_on"], UTC).replace(second=0)
            for unit, field, lowest in (("minute", "minute", 0), ("hour", "hour", 0), ("day", "day", 1)):
                if window and window != unit:
                    began = began.replace(**{field: lowest})  # type: ignore[arg-type]
                else:
                    break
            row = rows.setdefault((*([int(began.timestamp())] if window else []), *(each[name] for name in by)), [0, 0])
            row[0] += 1
            row[1] += each["seconds_streamed"]
        if len(rows) > FUZZ_ROWS and "limit" not in asked:
            return 400, None
        columns = [*(["window_start"] if window else []), *by]
        found: list[dict[str, Any]] = [
            dict(zip(columns, of, strict=True)) | {"events": row[0], "seconds_streamed": row[1]} for of, row in rows.items()
        ]
        return 200, sorted(found, key=lambda row: (row.get("window_start"), -row["seconds_streamed"], [row[name] for name in by]))[:limit]

    # Money: what an account holds is what a closed month has frozen, or what an open one would.

    def account(self, month: str) -> Closed:
        """Return the account of a month, as it was closed or as it is now."""
        if month in self.closed:
            return self.closed[month]
        streams = self.streams_of(month)
        due = self.due() if month == self.target() else {}
        return Closed(None, streams, self.subscriptions, figures_of(streams, self.subscriptions), due)

    def streams_of(self, month: str) -> list[dict[str, Any]]:
        """Return the streams of a month."""
        return [each for each in self.streams.values() if month_in(each) == month]

    def open_months(self) -> list[str]:
        """Return the open months with a stream."""
        return sorted({month_in(each) for each in self.streams.values()} - {*self.closed})

    def target(self) -> str:
        """Return the month that what is late is paid with."""
        if months := self.open_months():
            return months[0]
        if not self.closed:
            return ""
        year, number = map(int, max(self.closed).split("-"))
        return f"{year + number // 12:04}-{number % 12 + 1:02}"

    def now(self, month: str) -> dict[str, list[int]]:
        """Return what a closed month would give each label now."""
        return {label: of[2:] for label, of in figures_of(self.streams_of(month), self.closed[month].subscriptions).items()}

    def due(self) -> dict[str, dict[str, list[int]]]:
        """Return what is to be paid for each month: what the closed would give now less what they have given."""
        due = defaultdict[str, dict[str, list[int]]](dict)
        parts = [(name, 1, self.now(name)) for name in self.closed]
        parts += [(name, -1, {label: of[2:] for label, of in account.figures.items()}) for name, account in self.closed.items()]
        parts += [(name, -1, labels) for account in self.closed.values() for name, labels in account.adjustments.items()]
        for name, sign, labels in parts:
            for label, of in labels.items():
                due[name][label] = [before + sign * cents for before, cents in zip(due[name].get(label, [0, 0]), of, strict=True)]
        found = {name: {label: of for label, of in labels.items() if any(of)} for name, labels in sorted(due.items())}
        return {name: labels for name, labels in found.items() if labels}

    def accounts(self, *, all_closed: bool = True) -> dict[str, Closed]:
        """Return the months with a stream or an adjustment, and all that are closed, in order."""
        found = {name: self.account(name) for name in sorted({*self.closed, *self.open_months(), self.target()} - {""})}
        return {name: of for name, of in found.items() if of.streams or of.adjustments or (all_closed and name in self.closed)}

    def month(self, name: str) -> dict[str, Any]:
        """Return the row of a month in the list of months."""
        account = self.account(name)
        now, then = self.now(name) if name in self.closed else {}, {label: of[2:] for label, of in account.figures.items()}
        return {
            "month": name, "status": account.status, "closed_on": account.closed_on, "subscribers": len(account.subscriptions),
            "streams": len(account.streams), "seconds_streamed": account.seconds(),
            "fees": euros(sum(round(100 * Fraction(of["fee"])) for of in account.subscriptions.values())), "revenue": euros(account.revenue()),
            "distributed": euros(sum(of[0] for of in then.values())), "adjusted": euros(account.adjusted()),
            "late": sum(now.get(label, [0, 0]) != then.get(label, [0, 0]) for label in {*now, *then}) if name in self.closed else 0,
        }

    def put_month(self, name: str, value: Any) -> tuple[int, Any]:
        """Close a month or open it again."""
        if not re.fullmatch("[0-9]{4}-(0[1-9]|1[0-2])", name) or not isinstance(value, dict) or value.keys() != {"status"} or value["status"] not in ("open", "closed"):
            return 400, None
        if (name in self.closed) == (value["status"] == "closed"):
            return 200, self.month(name)
        if not self.durable:
            return 409, None
        over = name < time.strftime("%Y-%m", time.gmtime())
        if max(self.closed) > name if name in self.closed else not over or min(self.open_months(), default=name) < name:
            self.number += 1  # a write that is refused may leave a gap
            return 409, None
        if name in self.closed:
            del self.closed[name]
        else:
            account = self.account(name)
            account.closed_on = int(time.time())
            self.closed[name] = account
        self.change()
        return 200, self.month(name)

    def report(self, month: str, asked: dict[str, Any]) -> tuple[int, Any]:
        """Return what the labels are owed."""
        accounts = {month: self.account(month)} if month else self.accounts(all_closed=False)
        if asked.get("format") == ["csv"]:
            return 200, [{"month": name, "currency": "EUR"} | line for name, of in accounts.items() for line in write_lines(of.lines())]
        lines = defaultdict[str, list[int]](lambda: [0] * 6)
        for account in accounts.values():
            for label, of in account.lines().items():
                lines[label] = [a + b for a, b in zip(lines[label], of, strict=True)]
        subscribers = len(accounts[month].subscriptions if month else self.subscriptions)
        return 200, {
            "currency": "EUR", "months": [*accounts], **({"status": accounts[month].status} if month else {}), "subscribers": subscribers,
            "revenue": euros(sum(of.revenue() for of in accounts.values())), "distributed": euros(sum(of[2] for of in lines.values())),
            "adjusted": euros(sum(of.adjusted() for of in accounts.values())), "seconds_streamed": sum(of.seconds() for of in accounts.values()),
            "labels": write_lines(lines),
        }

    def statement(self, month: str, label: str, asked: dict[str, Any]) -> tuple[int, Any]:
        """Return why a label is owed what it is owed."""
        account = self.account(month)
        lines, subscriptions, nets = account.lines(), account.subscriptions, nets_of(account.subscriptions)
        if label not in lines:
            return 404, None
        mine, heard = sums([each for each in account.streams if each["label"] == label], "user_id"), sums(account.streams, "user_id")
        _, seconds, *amounts, _, _ = lines[label]
        whole, revenue, net, silent = account.seconds(), Fraction(account.revenue(), 100), sum(nets.values(), Fraction(0)) / 100, [user for user in nets if not heard.get(user)]
        parts = {user: nets[user] / 100 * mine[user] / heard[user] for user in nets if mine.get(user)}
        rows: list[dict[str, Any]] = [
            {"user_id": user, **subscriptions[user], "net": cut(nets[user] / 100, 6), "seconds_streamed": mine[user], "of_seconds": heard[user], "part": cut(part, 6)}
            for user, part in sorted(parts.items(), key=lambda item: (-math.floor(item[1] * 10**6), item[0]))
        ]
        claim = sum(parts.values(), Fraction(0))
        if silent:
            spare = sum((nets[user] for user in silent), Fraction(0)) / 100
            claim += spare * seconds / (whole or 1)
            terms = dict.fromkeys(("user_id", "product_type", "fee", "origin"))
            rows.append({**terms, "net": cut(spare, 6), "seconds_streamed": seconds, "of_seconds": whole, "part": cut(spare * seconds / (whole or 1), 6)})
        if asked.get("format") == ["csv"]:
            return 200, rows

        def rounding(exact: Fraction, cents: int) -> dict[str, Any]:
            return {"exact": cut(exact, 6), "rounded_down": cut(exact, 2), "cent_added": cents > math.floor(100 * exact)}

        others = [spent for user, spent in mine.items() if spent and user not in nets]
        return 200, {
            "month": month, "status": account.status, "currency": "EUR",
            "line": next(line for line in write_lines(lines) if line["label"] == label),
            "pro_rata": {"revenue": euros(account.revenue()), "seconds_streamed": seconds, "of_seconds": whole} | rounding(revenue * seconds / (whole or 1), amounts[0]),
            "user_centric": {"subscribers": rows, "sum": cut(claim, 6), "of_sum": cut(net, 6), "revenue": euros(account.revenue())} | rounding(revenue * claim / (net or 1), amounts[1]),
            "listeners_without_subscription": {"users": len(others), "seconds_streamed": sum(others)},
            "adjustments": [
                {"month": of_month, "amount": euros(of[label][0]), "amount_user_centric": euros(of[label][1])}
                for of_month, of in account.adjustments.items() if label in of
            ],
        }


Subscribers = dict[str, dict[str, str]]


@dataclass
class Closed:
    """What a month has frozen: the figures of a label are its streams, its seconds and two amounts in cents."""

    closed_on: int | None
    streams: list[dict[str, Any]]
    subscriptions: Subscribers
    figures: dict[str, list[int]]
    adjustments: dict[str, dict[str, list[int]]]  # by the month that they are for, and by label

    @property
    def status(self) -> str:
        """Tell which it is."""
        return "open" if self.closed_on is None else "closed"

    def seconds(self) -> int:
        """Return the seconds of all labels."""
        return sum(each["seconds_streamed"] for each in self.streams)

    def revenue(self) -> int:
        """Return the revenue, rounded half up to cents."""
        return math.floor(sum(nets_of(self.subscriptions).values()) + Fraction(1, 2))

    def adjusted(self) -> int:
        """Return the sum of the adjustments pro rata."""
        return sum(of[0] for labels in self.adjustments.values() for of in labels.values())

    def lines(self) -> dict[str, list[int]]:
        """Return the figures of each label, and after them its adjustments."""
        lines = {label: [*of, 0, 0] for label, of in self.figures.items()}
        for labels in self.adjustments.values():
            for label, of in labels.items():
                line = lines.setdefault(label, [0] * 6)
                line[4], line[5] = line[4] + of[0], line[5] + of[1]
        return lines


def month_in(stream: dict[str, Any]) -> str:
    """Return the month of a stream."""
    return time.strftime("%Y-%m", time.gmtime(stream["stream_started_on"]))


def nets_of(subscriptions: Subscribers) -> dict[str, Fraction]:
    """Return what is left of each fee, in cents."""
    return {user: 100 * Fraction(of["fee"]) * {"app_store": Fraction("0.7"), "web": Fraction("0.9")}[of["origin"]] for user, of in subscriptions.items()}


def figures_of(streams: list[dict[str, Any]], subscriptions: Subscribers) -> dict[str, list[int]]:
    """Return each label's streams, seconds and both amounts, from the contract's words alone."""
    nets, heard, labels = nets_of(subscriptions), sums(streams, "user_id"), sums(streams, "label")
    whole = sum(labels.values())
    silent = sum((net for user, net in nets.items() if not heard.get(user)), Fraction(0))
    claims = {label: silent * seconds / (whole or 1) for label, seconds in labels.items()}
    for user, net in nets.items():
        if heard.get(user):
            for label, seconds in sums([each for each in streams if each["user_id"] == user], "label").items():
                claims[label] += net * seconds / heard[user]
    revenue = math.floor(sum(nets.values()) + Fraction(1, 2))
    pro_rata, centric = naive_sharing(revenue, {label: Fraction(seconds) for label, seconds in labels.items()}), naive_sharing(revenue, claims)
    return {label: [sum(each["label"] == label for each in streams), labels[label], pro_rata[label], centric[label]] for label in labels}


def euros(cents: int) -> str:
    """Write an amount."""
    return f"{'-' if cents < 0 else ''}{abs(cents) // 100}.{abs(cents) % 100:02}"


def write_lines(lines: Mapping[str, list[int]]) -> list[dict[str, Any]]:
    """Write the lines of a report, the highest amount first."""
    whole = sum(of[1] for of in lines.values()) or 1
    return [
        {"label": label, "streams": of[0], "seconds_streamed": of[1], "share": round(of[1] / whole, 6)}
        | dict(zip(("amount", "amount_user_centric", "adjustment", "adjustment_user_centric"), map(euros, of[2:]), strict=True))
        for label, of in sorted(lines.items(), key=lambda item: (-item[1][2], item[0]))
    ]


HEAD_TOKENS = [
    b"\r\n", b"\n", b"\0", b"\xff", b":", b" ", b"%", b"%00", b"%2e%2e/", b"/", b"?", b"#", b"[", b"A" * 9_000, b"HTTP/9.9", b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Length: 7\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n", b"Content-Encoding: br\r\n",
    b"Expect: 100-continue\r\n", b"Expect: 2\r\n", b"Host: x\r\n", b'Cookie: "=\\\r\n', b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"If-None-Match: \"\r\n", b"If-None-Match: *\r\n", b"If-Match: \"\xff\r\n",
    b"Range: bytes=9-1\r\n", b"Accept-Encoding: gzip;q=x\r\n", b"Authorization: \xff\r\n",
]
BODY_TOKENS = [b"\0", b"\n", b"\xff", b"\xef\xbb\xbf", b"[", b"{", b'"', b"\\", b"\\ud800", b",", b"NaN", b"1e999", b"-0", b"1.0", b"true", b"null", b"9" * 5_000, b"[" * 5_000]
ODD_VALUES: list[Any] = [True, False, None, 1.0, -1, 2_147_483_648, 10**12, 10**30, "", "1", "x" * 129, "a\n", "\x85", "\ud800", [], {}, ["web"], "10000.01", "7.999", "1e3", "-1"]
PATCH_TYPES = ["application/json", "application/merge-patch+json", "application/merge-patch+json; charset=utf-8"]
REFUSED_HEADERS = [
    ({"Host": "evil.example"}, 421), ({"Origin": "http://evil.example"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Content-Type": "text/plain"}, 415), ({"Content-Type": ""}, 415), ({"Content-Type": PATCH_TYPES[1]}, 415), ({"Idempotency-Key": "k" * 256}, 400), ({"Idempotency-Key": "a\tb"}, 400),
]
REFUSED_PARAMETERS = [("from", "x"), ("limit", "0"), ("limit", "100001"), ("after", "-1"), ("month", "2019-13"), ("group_by", "id"), ("order", "up"), ("", ""), ("label", ""), ("to", "1.0")]
FUZZ_NAMES = ["user1", "b", "☃ ", "=1+1", "x" * 128]
FUZZ_ROWS = 60
FUZZ_LIMITS = f"MOST_ROWS, server.CHUNK_EVENTS, server.KEPT_BYTES, server.PIECE_BYTES, server.GZIP_BYTES = {FUZZ_ROWS}, 16, 4_000, 2_000, 200"


def mutate(rng: random.Random, text: bytes, tokens: list[bytes]) -> bytes:
    """Change some bytes: one is another, or some are gone, there twice, or between new ones."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(text) + 1)
        end = at + rng.choice((1, 1, 4, 40))
        new = rng.choice((bytes([rng.randrange(256)]), b"", 2 * text[at:end], text[at:end] + rng.choice(tokens), rng.choice(tokens)))
        text = text[:at] + new + text[end:]
    return text


class Fuzzer:
    """A client that asks for anything, and knows from the model what it has to get."""

    def __init__(self, url: str, rng: random.Random, model: Model) -> None:
        """Take the address of the server."""
        self.address = url.removeprefix("http://").split(":")
        self.rng = rng
        self.model = model
        self.connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.etag = ("", -1)  # and the number of the change that it is about
        self.cursors = ["0"]
        self.followed: dict[int, dict[str, Any]] = {}  # what the feed has told, by id
        self.cursor = "0"  # and so far
        self.done = Counter[tuple[str, int]]()

    def stream(self) -> dict[str, Any]:
        """Make a stream of few names and starts; some of the starts are at the edge of a month."""
        names = {name: self.rng.choice(FUZZ_NAMES) for name in server.NAMES}
        started = self.rng.choice([1_551_398_399, 1_551_398_400, self.rng.randrange(1_551_000_000, 1_552_000_000)])
        return names | {"stream_started_on": started, "seconds_streamed": self.rng.choice([0, 60, self.rng.randrange(86_401), 2_147_483_647])}

    def filters(self) -> list[tuple[str, str]]:
        """Make some of the parameters that both lists of streams have."""
        rng = self.rng
        found = [(name, rng.choice(["user1", "b", "☃ ", "nobody"])) for name in rng.choices(server.NAMES, k=rng.choice((0, 0, 1, 3)))]
        times = [*[str(rng.randrange(1_551_000_000, 1_552_000_000))] * 8, "-1", "0", str(10**30)]
        return found + [(name, rng.choice(times)) for name in ("from", "to") if rng.random() < 0.3]

    def months(self) -> list[str]:
        """Return some months, most of them with something in them."""
        return [*self.model.open_months()[:3], *list(self.model.closed)[-3:], "2019-01", "2019-02", "2019-03", "2019-04", "9999-12"]

    def read(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Make a path and a query."""
        rng, formats = self.rng, [("format", self.rng.choice(["json", "csv"]))] * self.rng.randrange(2)
        limit = [("limit", str(rng.choice([1, 2, 16, rng.randint(1, 300), 100_000])))] * (rng.random() < 0.3)
        if (kind := rng.random()) < 0.45:
            query = self.filters() + limit + [("format", rng.choice(["json", "ndjson", "csv"]))] * (rng.random() < 0.7)
            if rng.random() < 0.6:
                query += [("group_by", ",".join(rng.sample(server.NAMES, rng.randint(1, 3))))]
            if rng.random() < 0.4:
                query += [("window", rng.choice(["minute", "hour", "day", "month"]))]
            if rng.random() < (0.05 if len(query) > 2 else 0.3):
                query += [("order", rng.choice(["asc", "desc"]))]
            return ["usage"], query
        if kind < 0.57:
            return ["streams"], [*self.filters(), ("limit", str(rng.choice([1, rng.randint(1, 50), 1_000]))), ("after", str(rng.randrange(self.model.number + 9)))]
        if kind < 0.62:
            return ["users", *rng.choice([[], [rng.choice([*FUZZ_NAMES, "nobody"])]])], []
        if kind < 0.7:
            return ["report"], formats + [("month", rng.choice(self.months()))] * (rng.random() < 0.7)
        if kind < 0.78:
            return ["report", rng.choice([*FUZZ_NAMES, "nobody"])], [*formats, ("month", rng.choice(self.months()))]
        if kind < 0.85:
            return [rng.choice(["months", "months", "metrics"])], []
        if kind < 0.92:
            return [rng.choice(["streams", "stream"]), self.number()], []
        after = rng.choice([rng.choice(self.cursors), str(rng.randrange(self.model.number + 9)), "9" * 100, "abc-1"])
        return ["changes"], limit + [("after", after)] * (rng.random() < 0.9)

    def number(self) -> str:
        """Make what may be the number of a stream."""
        return str(self.rng.choice([*self.model.streams] * 5 + [*self.model.gone] + [0, self.model.number + 9, 10**30, "1x", "²"]))

    def write(self) -> tuple[str, list[str], dict[str, str], bytes]:
        """Make a method, a path, headers and a body, many of the bodies not quite right."""
        rng, known, headers, key = self.rng, self.model.streams, dict[str, str](), None
        value: Any = self.stream()
        path = [rng.choice(["streams", "stream"]), self.number()]
        method = rng.choice(["POST", "POST", "PUT", "PATCH", "DELETE" if len(known) < 400 else "POST"])
        if len(known) > 300 and rng.random() < 0.5:
            method = "DELETE"
        elif method == "POST":
            path = ["streams"]
            value = rng.choice([value, value, [self.stream() for _ in range(rng.choice((0, 1, 5, 20, 90)))]])
            key = rng.choice([None, None, f"key {rng.randrange(10**9)}", rng.choice([*self.model.keys, "key"])])
        elif method == "PATCH":
            value = {name: value[name] for name in rng.sample(list(value), rng.randrange(6))}
            headers["Content-Type"] = rng.choice(PATCH_TYPES)
        elif method == "PUT" and rng.random() < 0.3:
            path = ["users", rng.choice(["user1", "b", "☃ ", "new"])]
            value = {"product_type": rng.choice("p="), "fee": f"{rng.randrange(9_999)}.{rng.randrange(100):02}", "origin": rng.choice(["web", "app_store"])}
        elif method == "PUT" and rng.random() < 0.4:
            path = ["months", rng.choice([*self.months(), time.strftime("%Y-%m", time.gmtime()), "2019-13", "x"])]
            value = {"status": rng.choice(["closed", "closed", "open"])}
        if path[0] in ("stream", "streams") and path[1:] and rng.random() < 0.4:
            tag = f'"{self.model.versions.get(int(path[1]), 1)}"' if path[1].isascii() and path[1].isdecimal() else '"1"'
            headers["If-Match"] = rng.choice([tag, tag, "*", f"W/{tag}", f'"0", {tag}', '"0"', '"1"', tag[:-1], "x"])
        if key is not None:
            headers["Idempotency-Key"] = key
        if isinstance(value, dict) and value and rng.random() < 0.25:
            value[rng.choice([*value, *value, "more"])] = rng.choice(ODD_VALUES)
        body = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if key in self.model.keys and rng.random() < 0.7:
            body = self.model.keys[key][0]
        elif rng.random() < 0.3:
            body = rng.choice([mutate(rng, body, BODY_TOKENS), rng.choice(BODY_TOKENS)])
        return method, path, headers, b"" if method == "DELETE" else body

    async def send(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request in one of the ways that HTTP has for it, and return the answer."""
        rng = self.rng
        headers = {"Host": "localhost", "Content-Type": "application/json"} | headers
        if rng.random() < 0.3:
            headers["Transfer-Encoding"] = "chunked"
            cut = rng.randrange(len(body) + 1)
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:cut], body[cut:]) if part) + b"0\r\n\r\n"
        else:
            headers["Content-Length"] = str(len(body))
        if rng.random() < 0.1:
            headers["Expect"] = "100-continue"
        if rng.random() < 0.2:
            headers["Accept-Encoding"] = "gzip"
        change: Any = rng.choice([str, str.lower, str.upper])
        pairs = rng.sample(list(headers.items()), len(headers))
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{change(name)}: {value}\r\n" for name, value in pairs)
        message = head.encode() + b"\r\n" + body
        cut = rng.randrange(len(message)) if rng.random() < 0.2 else 0
        return await self.exchange(method, message[:cut], message[cut:])

    async def exchange(self, method: str, *parts: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a message in parts, and return the answer; the connection lives on just as long as the answer says."""
        reader, writer = self.connection or await asyncio.open_connection(*self.address)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.001 if parts[0] else 0)
        answer = await read_answer(reader, method)
        self.connection = reader, writer
        if answer[1]["connection"] == "close":
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
            self.connection = None
        return answer

    async def close(self) -> None:
        """Close the connection."""
        if self.connection:
            self.connection[1].close()
            await self.connection[1].wait_closed()
            self.connection = None

    async def send_too_much(self) -> None:
        """Promise a body that is too large, and get the answer without having sent it."""
        async with asyncio.timeout(5):
            head = f"{self.rng.choice(['POST /api/v1/streams', 'PUT /api/v1/users/user1'])} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {1024 * 1024 + 1}\r\n\r\n"
            status, answer, _ = await self.exchange("POST", head.encode(), b"{")
            assert (status, answer["connection"]) == (413, "close")

    async def ask(self) -> None:
        """Send what is proper HTTP, and check the answer against the model's."""
        rng, before = self.rng, self.model.visible
        wanted: Any = None
        body, method, headers, query = b"", "GET", dict[str, str](), list[tuple[str, str]]()
        if rng.random() < 0.5:
            path, query = self.read()
            if path[0] in ("stream", "streams") and path[1:] and rng.random() < 0.5:
                known = self.model.versions.get(int(path[1]), 1) if path[1].isascii() and path[1].isdecimal() else 1
                headers["If-None-Match"] = rng.choice([f'"{known}"', f'"{known}"', '"1"', "*"])
        else:
            method, path, headers, body = self.write()
        kind = dict(query).get("format", "json")
        self.model.told = {}
        if method == "POST" and rng.random() < 0.1:
            fault, status = rng.choice(REFUSED_HEADERS)
            headers |= fault
        elif query and rng.random() < 0.1:
            query, status = [*query, rng.choice(REFUSED_PARAMETERS)], 400
        else:
            status, wanted = self.model.predict(method, path, query, headers, body)
            method = "HEAD" if method == "GET" and rng.random() < 0.1 else method
        of_all = method in ("GET", "HEAD") and (path[0] in ("usage", "report", "months") or path == ["users"])
        if of_all and rng.random() < 0.3:
            headers["If-None-Match"], number = self.etag
            if status == 200:  # an error is one whatever the client has already
                status = 304 if number == before else 200
        self.done[f"{method} {path[0]}{'/' * len(path[1:])}", status] += 1
        target = ("/" if path[0] in ("usage", "metrics") else "/api/v1/") + "/".join(quote(part, safe="") for part in path)
        asked = f"{method} {target} {query} {headers} {body[:500]!r}"
        try:
            async with asyncio.timeout(5):
                found, answer, text = await self.send(method, f"{target}?{urlencode(query)}", headers, body)
        except TimeoutError:
            pytest.fail(f"no answer within 5 s: {asked}")
        if answer.get("content-encoding") == "gzip" and text:
            text = gzip.decompress(text)
        assert found == status, f"{asked}: {text!r}"
        assert {name: answer.get(name) for name in self.model.told} == self.model.told, asked
        if of_all and status == 200:
            self.etag = answer["etag"], before
        if "link" in answer:
            self.cursors = [answer["link"].split("after=")[1].split(">")[0], *self.cursors[:9]]
            self.model.cursors[self.cursors[0]] = self.model.cursor
        if method != "HEAD" and status in (200, 201):
            if method == "PUT" and path[0] == "months" and wanted["status"] == "closed":  # when, the server decides
                closed = self.model.closed[path[1]]
                closed.closed_on = json.loads(text)["data"]["closed_on"]
                assert 0 <= (closed.closed_on or 0) - wanted["closed_on"] <= 5
                wanted["closed_on"] = closed.closed_on
            assert self.parse(path, kind, text) == (as_cells(wanted) if kind == "csv" else wanted), asked
        elif status >= 400 and method != "HEAD" and wanted == b"":
            assert text == b"", asked
        elif status >= 400 and method != "HEAD":
            assert list(json.loads(text)) == ["error"], asked

    @staticmethod
    def parse(path: list[str], kind: str, text: bytes) -> Any:
        """Return what an answer says, in the model's words."""
        if kind == "ndjson" or path == ["changes"]:
            return [json.loads(line) for line in text.splitlines()]
        if kind == "csv":
            return [*csv.reader(io.StringIO(text.decode(), newline=""))][1:]
        if path == ["metrics"]:
            return {name: int(value) for name, value in re.findall(r"^(usage_events|usage_sequence) ([0-9]+)$", text.decode(), re.MULTILINE)}
        value = json.loads(text)
        if path == ["usage"]:
            return value
        return [value["data"], value["total"], value["next"]] if "total" in value else value["data"]

    async def break_http(self, rng: random.Random) -> None:
        """Send what is no proper HTTP, or half of it: nothing that could change anything, and no 5xx."""
        body = b"{broken" * rng.randrange(2)
        method = rng.choice(["GET", "HEAD", "OPTIONS", "TRACE", "CONNECT", "POST", "PUT", "PATCH"])
        target = rng.choice([
            "/", "/usage?from=1&format=csv", "/usage?group_by=label&window=day", "/health", "/metrics", "/api/v1/streams?limit=9", "/api/v1/streams/1", "/api/v1/users/user1",
            "/api/v1/report?month=2019-03", "/api/v1/report/b?month=2019-03", "/api/v1/months", "/api/v1/months/2019-03", "/api/v1/changes?after=7",
        ])
        head = raw_write(body, f"{method} {target}").removesuffix(body)
        message = mutate(rng, head, HEAD_TOKENS) + body
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(message)
        received = b""
        with contextlib.suppress(OSError):  # TimeoutError is one: it may wait for the other half
            async with asyncio.timeout(rng.choice((0, 0.1, 0.5))):
                while part := await reader.read(65_536):
                    received += part
        rng.choice([writer.close, writer.transport.abort])()
        statuses = re.findall(rb"^HTTP/1\.[01] ([0-9]{3}) ", received, re.MULTILINE)
        assert not [status for status in statuses if status[:1] not in b"1234"], (message[:500], received[:500])
        assert b"Traceback" not in received

    async def compare(self) -> None:
        """Check everything that is held against the model's, and what a follower has against that."""
        for path, query in ((["usage"], []), (["streams"], [("limit", "1000"), ("after", "0")]), (["users"], []), (["months"], []), (["report"], [])):
            url = f"http://{':'.join(self.address)}{'/' if path == ['usage'] else '/api/v1/'}{path[0]}?{urlencode(query)}"
            assert self.parse(path, "json", json.dumps(await get_json(url)).encode()) == self.model.predict("GET", path, query, {}, b"")[1]
        async with aiohttp.ClientSession() as session:
            url = f"http://{':'.join(self.address)}/api/v1/changes?after="
            answer = await session.get(url + self.cursor)
            if answer.status == 410:
                self.followed.clear()
                answer = await session.get(url + "0")
            for line in (await answer.text()).splitlines():
                row = json.loads(line)
                assert row["version"] >= self.followed.get(row["id"], row)["version"]
                self.followed[row["id"]] = row
            self.cursor = answer.headers["Link"].split("after=")[1].split(">")[0]
        kept = {number: {name: row[name] for name in ("id", *STREAM)} for number, row in self.followed.items() if "deleted" not in row}
        assert kept == self.model.streams


def as_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Write rows as the cells of a CSV, no text a formula; an amount is no text, and a share a plain decimal."""

    def as_cell(name: str, cell: Any) -> str:
        if isinstance(cell, float):
            return f"{cell:.6f}".rstrip("0") + "0" * cell.is_integer()
        is_text = isinstance(cell, str) and not name.startswith(("amount", "adjustment"))
        return "" if cell is None else f"'{cell}" if is_text and cell[0] in "=+-@\t\r" else str(cell)

    return [list(itertools.starmap(as_cell, row.items())) for row in rows]


@pytest.mark.parametrize("durable", [False, True])
async def test_whatever_is_sent_gets_what_a_plain_model_says_and_never_a_5xx(tmp_path: Path, durable: bool) -> None:
    options, keep = (["--db", str(tmp_path / "usage.db")], math.inf) if durable else (["--keep=200"], 200)
    rng, number = random.Random(int(os.environ.get("FUZZ_SEED", "33"))), int(os.environ.get("FUZZ_REQUESTS", "1500"))
    # Limits that are low are reached with few streams.
    command = "-c", f"import server; server.{FUZZ_LIMITS}; server.main()"
    async with started("--no-simulation", *options, command=command) as program:
        fuzzer = Fuzzer(await program.url(), rng, Model(keep, durable))
        broken = set[asyncio.Task[None]]()
        for at in range(number):
            if at % 250 == 0:
                await fuzzer.compare()
            if (kind := rng.random()) < 0.3:
                broken.add(asyncio.create_task(fuzzer.break_http(random.Random(at))))
                if len(broken) >= 20:
                    done, broken = await asyncio.wait(broken, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            elif kind < 0.302:
                await fuzzer.send_too_much()
            else:
                await fuzzer.ask()
        await asyncio.gather(*broken)
        await fuzzer.compare()
        await fuzzer.close()
        status, errors = await program.stop()
        assert status == 0
        assert re.sub(".* WARNING .*--keep.*\n", "", errors) == ""
    assert len(fuzzer.done) > 60  # ways in which requests ended: the model expects more than refusals
    if durable:
        async with started("--no-simulation", *options, command=command) as program:
            fuzzer.address = (await program.url()).removeprefix("http://").split(":")
            await fuzzer.compare()
            for _ in range(50):
                await fuzzer.ask()
            await fuzzer.close()


async def test_a_bad_import_prints_20_faults_and_ends_with_status_2(tmp_path: Path) -> None:
    rows = list(itertools.islice(itertools.cycle(BAD_ROWS), 25))
    async with started("--import", str(write_import(tmp_path, streams=STREAMS + "\n".join(rows)))) as program:
        out, errors = await program.process.communicate()
        assert (program.process.returncode, out) == (2, b"")
        lines = errors.decode().splitlines()
        assert [line.split(": ")[0] for line in lines] == [f"streaming.csv:{number}" for number in range(5, 25)]
        assert all(BAD_ROWS[row] in line for row, line in zip(rows, lines, strict=False))


@pytest.mark.skipif(not ASSIGNMENT.is_dir(), reason=f"{ASSIGNMENT} is not there")
@pytest.mark.parametrize("spelling", ["commas", "semicolons"])
async def test_the_assignments_own_data_come_in_as_they_are(spelling: str) -> None:
    async with started("--import", str(ASSIGNMENT / spelling), "--no-simulation") as program:
        report = (await get_json(f"{await program.url()}/api/v1/report?month=2019-03"))["data"]
        assert (report["revenue"], report["seconds_streamed"], report["subscribers"]) == ("178.94", 1_557_150, 20)
        assert sum(row["streams"] for row in report["labels"]) == 76
        assert {row["label"]: row["amount"] for row in report["labels"]} == {"label 1": "72.73", "label 2": "32.90", "label 3": "73.31"}


async def test_very_many_bad_rows_take_no_more_memory_than_twenty(tmp_path: Path) -> None:
    write_import(tmp_path, streams=STREAMS + "x\n" * 5_000_000)
    limited = f"ulimit -v 500000; exec {sys.executable} {HERE / 'server.py'} --port=0 --import {tmp_path}"
    process = await asyncio.create_subprocess_exec("sh", "-c", limited, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert errors.decode().splitlines() == [f"streaming.csv:{line}: 1 columns instead of 5" for line in range(5, 25)]
    assert process.returncode == 2


async def test_a_line_whose_cells_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    write_import(tmp_path, streams=STREAMS + ";" * 100_000_000)
    limited = f"ulimit -v 900000; exec {sys.executable} {HERE / 'server.py'} --port=0 --import {tmp_path}"
    process = await asyncio.create_subprocess_exec("sh", "-c", limited, stderr=asyncio.subprocess.PIPE)
    _, errors = await process.communicate()
    assert errors.decode() == "streaming.csv:5: a line is longer than 65,536 characters\n"
    assert process.returncode == 2


async def test_tracks_without_an_end_or_from_no_regular_file_are_refused(tmp_path: Path) -> None:
    write_import(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for source, reason in (("/dev/zero", "no regular file"), (str(tmp_path / "fifo"), "no regular file"), (str(tmp_path), "Is a directory")):
        limited = f"ulimit -v 500000; exec {sys.executable} {HERE / 'server.py'} --port=0 --import {tmp_path} --tracks {source}"
        process = await asyncio.create_subprocess_exec("sh", "-c", limited, stderr=asyncio.subprocess.PIPE)
        try:
            _, errors = await asyncio.wait_for(process.communicate(), 20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert errors.decode().startswith(f"server.py: cannot read the tracks from {source}: ")
        assert (reason in errors.decode(), errors.count(b"\n"), process.returncode) == (True, 1, 2)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("endless", "it is larger than 2 MiB"),
        ("bomb", "it is compressed (gzip)"),
        ("silent", "it took longer than 0.2 s"),
        ("trickle", "it took longer than 0.2 s"),
        ("broken", "payload is not completed"),
        ("missing", "404"),
    ],
)
async def test_a_server_of_tracks_that_does_harm_is_left_with_the_reason(
    kind: str, reason: str, aiohttp_server: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "IMPORT_BYTES", 2 * 1024 * 1024)
    monkeypatch.setattr(server, "FETCH_SECONDS", 0.2)
    monkeypatch.setattr(server, "FETCH_WAITS", (0, 0.001, 0.002, 0.004, 0.008))
    asked, bomb = 0, gzip.compress(bytes(20_000_000))

    async def tracks(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if kind == "missing":
            raise web.HTTPNotFound
        answer = web.StreamResponse(headers={"Content-Encoding": "gzip"} if kind == "bomb" else {})
        if kind == "broken":
            answer.content_length = 1_000
        if kind != "silent":
            await answer.prepare(request)
            await answer.write(bomb if kind == "bomb" else b"[")
        with contextlib.suppress(ConnectionError):
            while kind == "endless":
                await answer.write(b" " * 65_536)
            while kind in ("silent", "trickle"):
                await asyncio.sleep(0.05)
                if kind == "trickle":
                    await answer.write(b" ")
        assert request.transport
        request.transport.close()
        return answer

    app = web.Application()
    app.router.add_get("/", tracks)
    remote = await aiohttp_server(app)
    with pytest.raises(ValueError, match=re.escape(reason)):
        await server.fetch_tracks(str(remote.make_url("/")))
    tries = 0 if kind in ("endless", "bomb") else 5
    assert asked == (tries or 1)
    lines = [record.getMessage() for record in caplog.records if record.name == "server"]
    assert [line.split(":")[0] for line in lines] == [f"try {number} of 5 to get the tracks failed" for number in range(1, tries + 1)]
    assert all(reason in line for line in lines)


async def test_tracks_come_from_a_server_that_fails_three_times(tmp_path: Path, aiohttp_server: Any) -> None:
    write_import(tmp_path)
    asked: list[float] = []

    async def tracks(_: web.Request) -> web.Response:
        asked.append(time.monotonic())
        if len(asked) < 4:
            raise web.HTTPServiceUnavailable
        return web.json_response(TRACKS)

    app = web.Application()
    app.router.add_get("/tracks", tracks)
    remote = await aiohttp_server(app)
    async with started("--import", str(tmp_path), "--no-simulation", "--tracks", str(remote.make_url("/tracks"))) as program:
        assert (await get_json(f"{await program.url()}/health"))["events"] == 3
        _, errors = await program.stop()
    assert errors.count("failed: 503") == 3  # the port may hold these digits, too
    waits = [after - before for before, after in itertools.pairwise(asked)]
    assert all(wait >= least for wait, least in zip(waits, (0.5, 1, 2), strict=True))


@beside_others
async def test_tracks_that_cannot_be_had_end_it_with_status_2_and_the_reason(tmp_path: Path) -> None:
    write_import(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/tracks"
    for source, reason in ((url, "Connect"), (str(tmp_path / "none.json"), "No such file"), ("http://a..b/x", ""), ("HTTP://[", "no URL")):
        async with started("--import", str(tmp_path), "--tracks", source) as program:
            _, errors = await program.process.communicate()
            assert program.process.returncode == 2
            assert errors.decode().splitlines()[-1].startswith(f"server.py: cannot read the tracks from {source}: ")
            assert reason in errors.decode().splitlines()[-1]
            assert "Traceback" not in errors.decode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not a database, but a text that is longer than a hundred bytes " * 9, "it is no database of this program"),
        (b"short", "it is no database of this program"),
        ("CREATE TABLE songs (title)", "it is no database of this program"),
        (f"{SCHEMA_1}; PRAGMA user_version = {len(server.MIGRATIONS) + 1}", "it is of version"),
    ],
)
async def test_a_file_that_is_not_ours_is_refused_and_untouched(tmp_path: Path, content: bytes | str, said: str) -> None:
    path = tmp_path / "usage.db"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.executescript(content)
    before = path.read_bytes()
    async with started("--db", str(path)) as program:
        out, errors = await program.process.communicate()
        assert (program.process.returncode, out) == (2, b"")
        assert errors.decode().startswith(f"server.py: cannot use the database {path}: {said}")
        assert errors.count(b"\n") == 1
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("path", "said"), [("/tmp", "Is a directory"), ("/sys/usage.db", "Permission denied"), ("/no/such/usage.db", "No such file")])  # noqa: S108
async def test_a_database_that_cannot_be_opened_ends_it_with_status_2(path: str, said: str) -> None:
    async with started("--db", path) as program:
        _, errors = await program.process.communicate()
        assert program.process.returncode == 2
        assert errors.decode().startswith(f"server.py: cannot use the database {path}: {said}")
        assert errors.count(b"\n") == 1


async def test_a_damaged_file_ends_it_with_status_2_and_one_line(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    client = await start([], db=path)
    await client.post("/api/v1/streams", json=[STREAM | {"stream_started_on": JANUARY}] * 1_000)
    await client.put("/api/v1/users/user1", json={"product_type": "premium", "fee": "7.99", "origin": "web"})
    await set_month(client, "2019-01", CLOSE)
    await client.close()
    whole = path.read_bytes()
    wrong = list[bytes]()
    fees, origins = (-1, 1.5, "x", b"x", 1_000_001), ("x", "", b"web")
    for table, column, cells in (
        ("streams", "seconds_streamed", (-5, "x", b"x", 1.5, 7_200.5, 2**31)),
        ("streams", "stream_started_on", (-1, "x", 1.5, 253_402_300_800)),  # the last is in the year 10000
        ("streams", "label", ("", b"x")),
        ("subscriptions", "fee", fees), ("subscriptions", "origin", origins), ("subscriptions", "product_type", ("", b"x")),
        ("closed_subscriptions", "fee", fees), ("closed_subscriptions", "origin", origins),
    ):  # fmt: skip
        for cell in cells:
            path.write_bytes(whole)
            with contextlib.closing(sqlite3.connect(path)) as other:
                row = "id = 5" if table == "streams" else "user_id = 'user1'"  # one of many is enough
                other.execute(f"UPDATE {table} SET {column} = ? WHERE {row}", [cell])  # noqa: S608
                assert other.total_changes == 1
                other.commit()
            wrong.append(path.read_bytes())
    for damaged in (*wrong, whole[:-2_000], whole[:8_192] + b"\xaa" * 4_096 + whole[12_288:], whole[:4_096] + bytes(4_096) + whole[8_192:]):
        path.write_bytes(damaged)
        async with started("--db", str(path), "--no-simulation") as program:
            _, errors = await asyncio.wait_for(program.process.communicate(), 20)
            assert program.process.returncode == 2
            assert re.match(rf"server.py: cannot use the database {path}: (it is damaged: |disk I/O error)", errors.decode())
            assert errors.count(b"\n") == 1


async def test_special_names_are_plain_files_and_hard_links_are_refused(tmp_path: Path) -> None:
    for name in (":memory:", "file:x?mode=memory"):
        for events in (0, 1):
            process = await asyncio.create_subprocess_exec(
                sys.executable, HERE / "server.py", "--port=0", "--no-simulation", "--db", name, cwd=tmp_path, stdout=asyncio.subprocess.PIPE
            )
            program = Program(process)
            url = await program.url()
            assert (await get_json(f"{url}/health"))["events"] == events
            async with aiohttp.ClientSession() as session:
                assert (await session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1})).status == 201
            process.kill()
            await process.communicate()
    (tmp_path / "second.db").hardlink_to(tmp_path / ":memory:")
    os.mkfifo(tmp_path / "fifo")
    for name in ("second.db", "fifo", "/dev/zero"):
        async with started("--db", str(tmp_path / name)) as program:
            _, errors = await program.process.communicate()
            assert program.process.returncode == 2
            assert errors.decode() == f"server.py: cannot use the database {tmp_path / name}: it must be a plain file with one name (no hard links)\n"


async def test_the_log_of_another_program_stays_untouched_too(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as other:
        other.executescript("PRAGMA journal_mode = WAL; CREATE TABLE songs (title); INSERT INTO songs VALUES ('x')")
        for name in ("usage.db", "usage.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / f"of {name}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert (tmp_path / "of usage.db-wal").stat().st_size
    async with started("--db", str(tmp_path / "of usage.db")) as program:
        _, errors = await program.process.communicate()
        assert (program.process.returncode, errors.count(b"it is no database of this program")) == (2, 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


MOUNT = ("unshare", "--mount", "sh", "-c")
CAN_MOUNT = shutil.which("unshare") and not subprocess.run([*MOUNT, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode


@pytest.mark.skipif(not CAN_MOUNT, reason="nothing can be mounted here")
@pytest.mark.parametrize("directory", ["mount -t tmpfs none there", "true"])  # of another device, of the same one
async def test_a_file_that_is_mounted_alone_is_refused_for_its_log_would_stay_behind(tmp_path: Path, directory: str) -> None:
    place = tmp_path / "a dir \\ with a\ttab"
    (place / "there").mkdir(parents=True)
    (tmp_path / "usage.db").touch()
    script = f"{directory} && touch there/usage.db && mount --bind ../usage.db there/usage.db && ln -s there/usage.db link.db"
    for name in ("there/usage.db", "link.db"):
        process = await asyncio.create_subprocess_exec(
            *MOUNT, f"{script} && exec {sys.executable} {HERE / 'server.py'} --port=0 --db {name}",
            cwd=place, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await asyncio.wait_for(process.communicate(), 20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert (process.returncode, errors.decode()) == (2, f"server.py: cannot use the database {name}: it is mounted alone: mount its directory\n")
        (place / "link.db").unlink()
    assert (tmp_path / "usage.db").read_bytes() == b""


async def test_a_link_to_a_file_works_and_its_log_is_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.db").symlink_to("there/usage.db")
    for count in (1, 2):
        async with started("--db", str(tmp_path / "link.db"), "--no-simulation") as program, aiohttp.ClientSession() as session:
            url = await program.url()
            assert (await session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1})).status == 201
            assert (await get_json(f"{url}/health"))["events"] == count
            assert {path.name for path in (tmp_path / "there").iterdir()} == {"usage.db", "usage.db-wal", "usage.db-shm"}
            program.process.kill()
            await program.process.wait()


async def post_one(session: aiohttp.ClientSession, url: str, key: str = "") -> int:
    """Post a stream, and return the status: 200 for one that is replayed."""
    headers = {"Idempotency-Key": key} if key else {}
    async with session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1}, headers=headers) as answer:
        return 200 if "Idempotent-Replayed" in answer.headers else answer.status


async def events_after_a_kill(program: Program, path: Path | str) -> int:
    """Kill the program, start another one on its file, and return how many events that has."""
    program.process.kill()
    await program.process.wait()
    async with started("--db", str(path), "--no-simulation") as another:
        return cast("int", (await get_json(f"{await another.url()}/health"))["events"])


@contextlib.asynccontextmanager
async def failing_syncs(program: Program, when: str = "1+") -> AsyncIterator[None]:
    """Have the disk refuse to sync: each time or, of each thread, the times that `when` tells."""
    fails = f"inject=fsync,fdatasync:error=EIO:when={when}"
    tracer = await asyncio.create_subprocess_exec(
        "strace", "-f", "-e", fails, "-o", "/dev/null", "-p", str(program.process.pid), stderr=asyncio.subprocess.PIPE
    )
    assert tracer.stderr
    assert b"attached" in await tracer.stderr.readline()
    yield
    with contextlib.suppress(ProcessLookupError):
        tracer.send_signal(signal.SIGINT)
    await tracer.communicate()


needs_strace = pytest.mark.skipif(shutil.which("strace") is None and not CI, reason="strace is not installed")


@needs_strace
@pytest.mark.parametrize("retry", [False, True])
async def test_a_write_that_could_not_be_synced_is_not_there_after_a_kill(tmp_path: Path, retry: bool) -> None:
    path = str(tmp_path / "usage.db")
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await post_one(session, url) == 201
        async with failing_syncs(program, when="1"):
            assert await post_one(session, url, "k") == 503
            if retry:
                assert await post_one(session, url, "k") == 201
            program.process.kill()
            await program.process.wait()
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert (await get_json(f"{url}/health"))["events"] == 1 + retry
        assert await post_one(session, url, "k") == (200 if retry else 201)
        assert (await get_json(f"{url}/health"))["events"] == 2


@needs_strace
async def test_while_nothing_can_be_synced_nothing_is_stored_and_a_retry_is_stored_once(tmp_path: Path) -> None:
    path = str(tmp_path / "usage.db")
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await post_one(session, url) == 201
        async with failing_syncs(program):
            for key in ("a", "b", "a"):
                assert await post_one(session, url, key) == 503
            assert (await get_json(f"{url}/usage")) == [STREAM | {"stream_started_on": 1}]
        assert await post_one(session, url, "a") == 201
        assert await post_one(session, url, "a") == 200
        program.process.kill()
        await program.process.wait()
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert (await get_json(f"{url}/health"))["events"] == 2
        assert await post_one(session, url, "a") == 200
        assert await post_one(session, url, "b") == 201


@needs_strace
async def test_after_a_sync_that_failed_no_write_is_taken_while_another_process_reads(tmp_path: Path) -> None:
    path = str(tmp_path / "usage.db")
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await post_one(session, url) == 201
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN")
            assert other.execute("SELECT count(*) FROM streams").fetchone() == (1,)
            async with failing_syncs(program, when="1"):
                assert await post_one(session, url) == 503
            assert await post_one(session, url) == 503
            other.execute("COMMIT")
            assert await post_one(session, url) == 201
        assert await events_after_a_kill(program, path) == 2


@needs_strace
async def test_what_a_kill_left_in_the_log_is_synced_before_it_is_shown(tmp_path: Path) -> None:
    path = str(tmp_path / "usage.db")
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        assert await post_one(session, await program.url()) == 201
        program.process.kill()
        await program.process.wait()
    command = ["-f", "-e", "inject=fsync,fdatasync:error=EIO", "-o", "/dev/null", sys.executable, str(HERE / "server.py"), "--port=0", "--db", path]
    process = await asyncio.create_subprocess_exec("strace", *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE)
    out, errors = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert errors.decode() == f"server.py: cannot use the database {path}: disk I/O error\n"


def latest_first_page(wal: Path) -> bytes:
    """Return the first page of a database as the frames of its WAL have it."""
    content, page = wal.read_bytes(), 4096
    frames = range(32, len(content) - page - 23, page + 24)
    return [content[at + 24 : at + 24 + page] for at in frames if content[at : at + 4] == b"\0\0\0\1"][-1]


async def test_a_kill_between_the_first_page_and_the_others_of_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        async with session.post(f"{await program.url()}/api/v1/streams", json=[STREAM | {"stream_started_on": 1}] * 1_000) as answer:
            assert answer.status == 201
        program.process.kill()
        await program.process.wait()
    with path.open("r+b") as file:  # SQLite moves the first page first: it says how many there are
        file.write(latest_first_page(tmp_path / "usage.db-wal"))
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as file_alone, pytest.raises(sqlite3.DatabaseError):
        file_alone.execute("PRAGMA user_version")  # without the others it is damaged
    async with started("--db", str(path), "--no-simulation") as program:
        assert (await get_json(f"{await program.url()}/health"))["events"] == 1_000


async def test_a_disk_that_was_full_at_the_end_is_no_reason_not_to_start_when_there_is_room(tmp_path: Path) -> None:
    path, disk = tmp_path / "usage.db", ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*disk, "size=400k", "none", str(tmp_path)], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
            url, statuses = await program.url(), list[int]()
            while statuses[-1:] != [503]:
                async with session.post(f"{url}/api/v1/streams", json=[STREAM | {"stream_started_on": 1}] * 20) as answer:
                    statuses.append(answer.status)
            await program.stop()
        subprocess.run([*disk, "remount,size=4m", "none", str(tmp_path)], check=True)
        async with started("--db", str(path), "--no-simulation") as program:
            assert (await get_json(f"{await program.url()}/health"))["events"] == 20 * statuses.count(201) > 0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)  # noqa: S607


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        ("rm usage.db-wal", 3),
        ("mv usage.db-wal other", 3),
        ("cp usage.db-wal other; mv other usage.db-wal", 3),
        (": > usage.db-wal", None),
        ("truncate -s -1 usage.db-wal", None),
        ("truncate -s -4096 usage.db", None),
        (": > usage.db", None),
        ("rm usage.db", None),
        ("rm usage.db-shm", 3),
        (": > usage.db-shm", 3),
        ("cp usage.db other; mv other usage.db", None),
        ("rm usage.db-wal usage.db-shm", 3),
    ],
)
async def test_what_is_done_to_the_files_of_a_running_program_costs_a_503_and_no_201_that_is_gone(tmp_path: Path, damage: str, kept: int | None) -> None:
    path = tmp_path / "usage.db"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        for _ in range(3):
            assert await post_one(session, url) == 201
        shell = await asyncio.create_subprocess_shell(damage, cwd=tmp_path)
        assert await shell.wait() == 0
        for _ in range(3):
            assert await post_one(session, url) == 503
        async with session.get(f"{url}/health") as answer:
            assert answer.status == 503
        assert len(await get_json(f"{url}/usage")) == 3
        program.process.kill()
        await program.process.wait()
    if kept is not None:
        async with started("--db", str(path), "--no-simulation") as program:
            assert (await get_json(f"{await program.url()}/health"))["events"] == kept


@pytest.mark.parametrize("left", [0, 4_152, 8_272, 40_000])
async def test_a_log_that_was_cut_short_is_not_moved_into_the_file(tmp_path: Path, left: int) -> None:
    path = tmp_path / "usage.db"
    body = [STREAM | {"stream_started_on": 1}] * 1_000
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        async with session.post(f"{await program.url()}/api/v1/streams", json=body) as answer:
            assert answer.status == 201
        await program.stop()
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        async with session.post(f"{url}/api/v1/streams", json=body) as answer:
            assert answer.status == 201
        os.truncate(tmp_path / "usage.db-wal", left)
        for _ in range(2):
            assert await post_one(session, url) == 503
        assert await events_after_a_kill(program, path) == 1_000


async def test_a_file_whose_name_is_no_utf_8_costs_a_503_like_any_other(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.db"))
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await post_one(session, url) == 201
        path.unlink()
        async with session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1}) as answer:
            assert answer.status == 503
            assert (await answer.json())["error"] == "nothing can be stored: \udcff.db has been removed"


async def test_another_process_may_read_back_up_and_empty_the_log(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        with contextlib.closing(sqlite3.connect(path)) as other:
            for count in range(1, 5):
                assert await post_one(session, url) == 201
                assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
                assert other.execute("SELECT count(*) FROM streams").fetchone() == (count,)
        assert await post_one(session, url) == 201
        assert (tmp_path / "usage.db-wal").stat().st_size
        assert await events_after_a_kill(program, path) == 5


async def test_a_log_that_was_away_for_a_moment_may_then_be_written_to_by_another_process(tmp_path: Path) -> None:
    path, log = tmp_path / "usage.db", tmp_path / "usage.db-wal"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        for _ in range(5):
            assert await post_one(session, url) == 201
        before = log.stat().st_size
        log.rename(tmp_path / "away")
        assert await post_one(session, url) == 503  # what is in the log comes into the file
        (tmp_path / "away").rename(log)
        assert log.stat().st_size == 0
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE notes (note)")
        assert 0 < log.stat().st_size < before
        for _ in range(3):
            assert await post_one(session, url) == 201


async def test_a_log_that_another_process_has_emptied_and_written_to_is_whole(tmp_path: Path) -> None:
    path, log = tmp_path / "usage.db", tmp_path / "usage.db-wal"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        for _ in range(5):
            assert await post_one(session, url) == 201
        before = log.stat().st_size
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            other.execute("CREATE TABLE notes (note)")
        assert 0 < log.stat().st_size < before
        assert await post_one(session, url) == 201
        assert await events_after_a_kill(program, path) == 6


async def test_beside_a_long_reader_a_write_goes_on_and_what_stops_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await post_one(session, url) == 201
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM streams").fetchone() == (1,)
            writer.execute("BEGIN IMMEDIATE")
            assert await post_one(session, url) == 503
            writer.execute("ROLLBACK")
            for _ in range(3):  # the reader goes on, and no sync has failed
                assert await post_one(session, url) == 201
            (tmp_path / "usage.db-wal").unlink()
            async with session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1}) as answer:
                assert (answer.status, (await answer.json())["error"]) == (503, "nothing can be stored: usage.db-wal has been removed")
        assert await post_one(session, url) == 503  # without the reader what was in it comes into the file
        assert await events_after_a_kill(program, path) == 4


CHECKPOINT_OFTEN = """
import sqlite3, sys, time
other = sqlite3.connect(sys.argv[1])
while True:
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    print(flush=True)
    time.sleep(0.001)
"""


async def test_checkpoints_of_another_process_refuse_no_write_however_many(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        other = await asyncio.create_subprocess_exec(sys.executable, "-c", CHECKPOINT_OFTEN, path, stdout=asyncio.subprocess.PIPE)
        statuses = Counter([await post_one(session, url) for _ in range(300)])
        other.kill()
        out, _ = await other.communicate()
        assert (statuses, out.count(b"\n") > 50) == ({201: 300}, True)


async def undo(path: Path, *options: str) -> tuple[int | None, str, str]:
    """Take the latest import back; return the status, and what was said on standard output and error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, HERE / "server.py", "--undo-import", "--db", path, *options, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    return process.returncode, out.decode(), errors.decode()


async def test_imports_are_taken_back_the_latest_first(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"

    async def state(*changes: tuple[str, str, Any], imported: server.Import | None = None) -> list[bytes]:
        client = await start(db=path, imported=imported)
        for method, target, body in changes:
            assert (await client.request(method, f"/api/v1/{target}", json=body)).status < 400
        found = await snapshot(client)
        await client.close()
        return found

    subscription = {"product_type": "own", "fee": "1.00", "origin": "web"}
    of_user_2 = ("PUT", "users/user 2", subscription)
    empty = await state(("POST", "streams", STREAM), of_user_2)
    march = read_import(write_import(tmp_path / "march"))
    imported = await state(imported=march)
    users = USERS.replace("premium;7,99", "family;17,99") + "user 3;premium;5;web\n"
    april = read_import(write_import(tmp_path / "april", users, STREAMS.replace("user 1", "user 3")))
    # A stream of the import that is changed is still the import's; one that is removed is not missed; a subscription that is set is not.
    await state(
        ("PATCH", "streams/7", {"label": "changed"}), ("DELETE", "streams/8", None), ("PUT", "users/user 3", subscription | {"fee": "2.00"}), imported=april
    )
    assert await undo(path) == (0, "Took back import 2: 2 streams and 2 subscriptions\n", "")
    client = await start(db=path)
    after = await snapshot(client)
    assert (await (await client.get("/api/v1/users/user%203")).json())["data"]["subscription"]["fee"] == "2.00"
    assert after[0] == imported[0]
    assert [user for user in json.loads(after[2])["data"] if user["user_id"] != "user 3"] == json.loads(imported[2])["data"]
    created = (await (await client.post("/api/v1/streams", json=STREAM)).json())["data"]["id"]
    assert created == 18  # the numbers of what was taken back are not used again
    await client.delete(f"/api/v1/streams/{created}")
    await client.close()
    assert await undo(path) == (0, "Took back import 1: 3 streams and 2 subscriptions\n", "")
    after = await state()
    assert after[0] == empty[0]
    assert [user for user in json.loads(after[2])["data"] if user["user_id"] != "user 3"] == json.loads(empty[2])["data"]
    assert {user["user_id"] for user in json.loads(after[2])["data"] if user["subscription"]} == {"user1", "user2", "user3", "user 2", "user 3"}
    assert await undo(path) == (2, "", f"server.py: cannot take back an import of {path}: it holds none\n")
    assert (await state(imported=march))[0] == imported[0]  # once taken back it can come in again


async def test_an_import_that_cannot_be_taken_back_is_said_in_one_line_and_nothing_is_changed(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    process = await asyncio.create_subprocess_exec(sys.executable, HERE / "server.py", "--undo-import", stderr=asyncio.subprocess.PIPE)
    assert (await process.communicate())[1] == b"server.py: --undo-import goes with --db\n"
    assert process.returncode == 2
    assert await undo(path) == (2, "", f"server.py: cannot take back an import of {path}: No such file or directory\n")
    assert not path.exists()
    directory = write_import(tmp_path / "import")
    assert await undo(path, "--import", str(directory)) == (2, "", "server.py: --undo-import goes without --import\n")
    async with started("--db", str(path), "--no-simulation", "--import", str(directory)) as program:
        url = await program.url()
        assert await undo(path) == (2, "", f"server.py: cannot take back an import of {path}: another process uses it\n")
        assert len(await get_json(f"{url}/usage")) == 3
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        status, _, said = await undo(path)
        assert (status, said.count("\n")) == (2, 1)
    path.write_bytes(b"not a database, but a text that is longer than a hundred bytes " * 9)
    assert (await undo(path))[0] == 2


@beside_others
async def test_an_undo_that_is_killed_took_all_back_or_nothing(tmp_path: Path) -> None:
    path, rng = tmp_path / "usage.db", random.Random(31)
    directory = write_import(tmp_path / "import", streams=STREAMS + STREAMS.splitlines()[1].join("\n\n") * 40_000)
    seen = set[int]()
    for _ in range(12):
        async with started("--db", str(path), "--no-simulation", "--import", str(directory)) as program:
            assert (await get_json(f"{await program.url()}/health"))["events"] == 40_003
        process = await asyncio.create_subprocess_exec(
            sys.executable, HERE / "server.py", "--undo-import", "--db", path, stdout=asyncio.subprocess.DEVNULL
        )
        await asyncio.sleep(0.3 + rng.random() / 3)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        async with started("--db", str(path), "--no-simulation") as program:
            url = await program.url()
            count = (await get_json(f"{url}/health"))["events"]
            subscribers = {user["user_id"] for user in (await get_json(f"{url}/api/v1/users"))["data"] if user["subscription"]}
            assert (count, subscribers) in ((40_003, {"user 1", "user 2"}), (0, {"user1", "user2", "user3"}))
            seen.add(count)


async def test_an_import_that_touches_a_closed_month_is_not_taken_back(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    client = await start(db=path, imported=read_import(write_import(tmp_path / "import")))  # streams of 2019-03 and 2019-04
    row = await set_month(client, "2019-03", CLOSE)
    before = await snapshot(client)
    await client.close()
    said = f"server.py: cannot take back an import of {path}: 2019-03 is closed: open it first\n"
    assert await undo(path) == (2, "", said)
    client = await start(db=path)
    assert await snapshot(client) == before
    assert json.loads((await money(client, "months"))[0])["data"][-1] == row
    for stream in (1, 2):  # moved on, it is no longer in the closed month, but what was paid for it is an adjustment
        assert (await client.patch(f"/api/v1/streams/{stream}", json={"stream_started_on": 1_554_076_800})).status == 200
    await client.close()
    assert await undo(path) == (0, "Took back import 1: 3 streams and 2 subscriptions\n", "")
    client = await start(db=path)
    report = json.loads((await money(client, "report?month=2019-04"))[0])["data"]
    assert [line["adjustment"] for line in report["labels"]] == [f"-{row['distributed']}"]
    assert await set_month(client, "2019-03", CLOSE) == row | {"late": 1}


async def put_month(session: aiohttp.ClientSession, url: str, month: str, status: str) -> int:
    """Close a month or open it again, and return the status of the answer."""
    async with session.put(f"{url}/api/v1/months/{month}", json={"status": status}) as answer:
        await answer.read()
        return answer.status


async def read_money(session: aiohttp.ClientSession, url: str, *paths: str) -> list[bytes]:
    """Return the bodies of answers of the API."""
    found = []
    for path in paths:
        async with session.get(f"{url}/api/v1/{path}") as answer:
            assert answer.status == 200
            found.append(await answer.read())
    return found


class Changes:
    """Clients that create, change and remove streams of one month, and know the number of each change."""

    def __init__(self, session: aiohttp.ClientSession, url: str, started: int) -> None:
        """Begin with nothing."""
        self.session, self.url, self.started = session, url, started
        self.made: list[tuple[int, dict[str, Any]]] = []  # number, the stream as it was then
        self.removed: dict[int, dict[str, Any]] = {}
        self.closed = self.over = False
        self.after: list[int] = []  # numbers of changes that were sent when the close had been answered

    async def work(self, name: str) -> None:
        """Write until it is over; each stream has a label of its own."""
        rng, mine, sent = random.Random(name), list[int](), 0
        while not self.over:
            sent, seconds, closed = sent + 1, rng.randrange(1, 999), self.closed
            change = rng.choice(("POST", "POST", "PATCH", "DELETE")) if mine else "POST"
            body: dict[str, Any] = {"seconds_streamed": seconds}
            if change == "POST":
                body |= {"user_id": f"user{rng.randrange(1, 5)}", "track_id": "t", "label": f"{name} {sent}", "stream_started_on": self.started}
            path = "" if change == "POST" else f"/{rng.choice(mine)}"
            async with self.session.request(change, f"{self.url}/api/v1/streams{path}", json=body) as answer:
                assert answer.status == (201 if change == "POST" else 200)
                stream, version = (await answer.json())["data"], int(answer.headers["ETag"].strip('"'))
            if change == "DELETE":
                mine.remove(stream["id"])
                self.removed[stream["id"]] = stream
                continue
            mine += [stream["id"]] if change == "POST" else []
            self.made.append((version, stream))
            self.after += [version] if closed else []

    async def find_removals(self) -> None:
        """Learn the numbers of the removals from the feed."""
        async with self.session.get(f"{self.url}/api/v1/changes") as answer:
            rows = [json.loads(line) for line in (await answer.text()).splitlines()]
        self.made += [(row["version"], self.removed[row["id"]] | {"seconds_streamed": 0}) for row in rows if row.get("deleted") and row["id"] in self.removed]

    def before(self, number: float) -> list[Event]:
        """Return the streams as they were before the change with this number."""
        now = {stream["id"]: stream for version, stream in sorted(self.made, key=lambda made: made[0]) if version < number}
        return [Event(*(stream[name] for name in server.FIELDS)) for stream in now.values() if stream["seconds_streamed"]]


async def test_each_change_is_in_a_close_or_late_and_there_is_no_third_kind(tmp_path: Path) -> None:
    kinds, last = Counter[str](), 0
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        for turn in range(1, 13):
            month, following = f"2019-{turn:02}", f"2019-{turn + 1:02}" if turn < 12 else "2020-01"
            changes = Changes(session, url, int(datetime(2019, turn, 5, tzinfo=UTC).timestamp()))
            workers = [asyncio.create_task(changes.work(f"{turn}.{number}")) for number in range(16)]
            await asyncio.sleep(0.05 + turn / 200)
            while not changes.made:  # on a busy machine
                await asyncio.sleep(0.01)
            acknowledged = [version for version, _ in changes.made]
            assert await put_month(session, url, month, "closed") == 200
            changes.closed = True
            async with asyncio.timeout(10):
                while not changes.after:
                    await asyncio.sleep(0.05)
            changes.over = True
            await asyncio.gather(*workers)
            await changes.find_removals()
            numbers = {version for version, _ in changes.made}
            (close,) = {*range(last + 1, max(numbers) + 1)} - numbers  # the one change that is of no stream
            last = max(numbers)
            assert max(acknowledged) < close < min(changes.after)
            frozen, late = (json.loads(each)["data"] for each in await read_money(session, url, f"report?month={month}", f"report?month={following}"))
            then, now = (naive_month(changes.before(number), server.SUBSCRIPTIONS) for number in (close, math.inf))
            seconds = Counter({each.label: each.seconds_streamed for each in changes.before(close)})
            lines = {line["label"]: line for line in frozen["labels"] if line["streams"]}  # others have adjustments alone
            assert {label: line["seconds_streamed"] for label, line in lines.items()} == seconds
            for name, paid, due in zip(server.AMOUNTS, then[1:], now[1:], strict=True):
                assert {label: line[name] for label, line in lines.items()} == {label: server.euros(cents) for label, cents in paid.items()}
                adjusted = {label: server.euros(due.get(label, 0) - paid.get(label, 0)) for label in {*due, *paid}}
                found = {line["label"]: line[name.replace("amount", "adjustment")] for line in late["labels"]}
                assert {label: found.pop(label, "0.00") for label in adjusted} == adjusted
                assert not found
            changed = [version for version, stream in changes.made if version > close]
            used = sum(each["seconds_streamed"] for each in await get_json(f"{url}/usage?from={changes.started}&to={changes.started + 1}"))
            assert used == sum(each.seconds_streamed for each in changes.before(math.inf))
            kinds += Counter(frozen=len(numbers) - len(changed), late=len(changed))
    assert min(kinds.values()) > 500


@beside_others
async def test_a_close_or_an_open_that_is_killed_is_done_with_all_that_it_froze_or_not_done(tmp_path: Path) -> None:
    path, rng, seen = tmp_path / "usage.db", random.Random(42), Counter[bool]()
    tables = [statement.split()[2] for statement in server.REOPEN_MONTH]
    paths = ["report?month=2019-02", "report?month=2019-02&format=csv", "report/label1?month=2019-02", "report/label1?month=2019-02&format=csv"]
    made = [
        STREAM | {"user_id": f"user{number % 700}", "label": f"label{rng.randrange(9)}", "stream_started_on": started, "seconds_streamed": rng.randrange(999)}
        for number, started in enumerate([JANUARY] * 1_000 + [FEBRUARY] * 4_000)
    ]
    told, expected, took = dict[str, list[bytes]](), "open", 0.0
    for turn in range(52):
        async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
            url = await program.url()
            if turn == 0:
                for at in range(0, len(made), 1_000):
                    assert (await session.post(f"{url}/api/v1/streams", json=made[at : at + 1_000])).status == 201
                assert await put_month(session, url, "2019-01", "closed") == 200
                assert (await session.post(f"{url}/api/v1/streams", json=made[:50])).status == 201  # late: February has adjustments
            rows = {row["month"]: row for row in json.loads((await read_money(session, url, "months"))[0])["data"]}
            status = rows["2019-02"]["status"]
            assert status == expected
            found = await read_money(session, url, *paths)
            assert told.setdefault(status, found) == found  # to the byte
            if {*told} == {"open", "closed"}:
                assert [each.replace(b'"status":"open"', b'"status":"closed"') for each in told["open"]] == told["closed"]
            wanted = "open" if status == "closed" else "closed"
            began = time.monotonic()
            asked = asyncio.create_task(put_month(session, url, "2019-02", wanted))
            if turn < 2:
                assert await asked == 200
                took = max(took, time.monotonic() - began)
            else:
                await asyncio.sleep(rng.random() * took)
            program.process.kill()
            await program.process.wait()
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await asked
            answered = asked.exception() is None
        with contextlib.closing(sqlite3.connect(path)) as other:
            counts = {table: other.execute(f"SELECT count(*) FROM {table} WHERE month = '2019-02'").fetchone()[0] for table in tables}  # noqa: S608
        assert counts in (dict.fromkeys(tables, 0), counts | {"closed_months": 1, "closed_labels": 9, "closed_subscriptions": 3})
        expected = "closed" if counts["closed_months"] else "open"
        done = expected == wanted
        assert done or not answered
        seen[done] += 1
        took *= 0.9 if done else 1.2  # on a busy machine, too, some kills come before the end and some after it
    assert min(seen[True], seen[False]) > 5


@needs_strace
@pytest.mark.parametrize("retry", [False, True])
async def test_a_close_that_could_not_be_synced_is_not_there_after_a_kill(tmp_path: Path, retry: bool) -> None:
    path = str(tmp_path / "usage.db")
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await post_one(session, url) == 201  # in 1970
        async with failing_syncs(program, when="1"):
            assert await put_month(session, url, "1970-01", "closed") == 503
            assert json.loads((await read_money(session, url, "months"))[0])["data"][0]["status"] == "open"
            if retry:
                assert await put_month(session, url, "1970-01", "closed") == 200
            program.process.kill()
            await program.process.wait()
    async with started("--db", path, "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert json.loads((await read_money(session, url, "months"))[0])["data"][0]["status"] == ("closed" if retry else "open")
        assert await put_month(session, url, "1970-01", "closed") == 200


async def test_a_close_that_a_full_disk_does_not_take_is_503_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    body = [STREAM | {"stream_started_on": 1, "user_id": f"user{number}", "label": f"label {number}"} for number in range(1_000)]
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert (await session.post(f"{url}/api/v1/streams", json=body)).status == 201
        before = await read_money(session, url, "months", "report")
        limit = resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, ((tmp_path / "usage.db-wal").stat().st_size + 20_000, limit[1]))
        assert await put_month(session, url, "1970-01", "closed") == 503
        assert await read_money(session, url, "months", "report") == before
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limit)
        assert await put_month(session, url, "1970-01", "closed") == 200
        closed = await read_money(session, url, "months", "report?month=1970-01")
        program.process.kill()
        await program.process.wait()
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        assert await read_money(session, await program.url(), "months", "report?month=1970-01") == closed


async def test_history_that_a_full_disk_does_not_take_is_said_in_one_line(tmp_path: Path) -> None:
    async with started("--db", str(tmp_path / "usage.db"), "--history=3", "--no-simulation") as program:
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        _, errors = await program.process.communicate()
        assert program.process.returncode == 2
        lines = [line for line in errors.decode().splitlines() if " INFO " not in line]
        assert len(lines) == 1
        assert lines[0].startswith("server.py: cannot use the database")


async def test_a_batch_that_a_full_disk_does_not_take_is_one_line_in_the_log(tmp_path: Path) -> None:
    async with started("--db", str(tmp_path / "usage.db"), "--interval=0.05") as program:
        url = await program.url()
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        async with asyncio.timeout(20), aiohttp.ClientSession(url) as session:
            while (await metrics(session))["usage_simulation_errors_total"] < 3:
                await asyncio.sleep(0.05)
        _, errors = await program.stop()
        assert 3 <= errors.count("a simulated batch failed: nothing can be stored") == errors.count("\n")


async def test_of_what_a_client_takes_slowly_little_waits_in_the_system_so_steady_readers_are_not_cut_off() -> None:
    async with started("--no-simulation", "--history=10", "--interval=5") as program:
        host, port = (await program.url()).removeprefix("http://").split(":")
        with contextlib.closing(socket.socket()) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
            client.connect((host, int(port)))
            client.sendall(b"GET /usage HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await asyncio.sleep(2)
            program.process.send_signal(signal.SIGSTOP)  # what comes now is what the system held
            client.settimeout(1)
            taken = 0
            with contextlib.suppress(TimeoutError):
                while some := client.recv(65_536):
                    taken += len(some)
        assert taken < 1_000_000


def is_resolved(name: str) -> bool:
    """Tell whether a name leads to an address."""
    with contextlib.suppress(OSError):
        return bool(socket.gethostbyname(name))
    return False


@pytest.mark.skipif(not is_resolved(socket.gethostname()), reason="the name of this host leads nowhere")
async def test_the_url_that_is_printed_works_whatever_name_host_says() -> None:
    async with started("--no-simulation", f"--host={socket.gethostname()}") as program:
        assert await get_json(f"{await program.url()}/usage") == []


async def test_a_second_process_on_the_same_file_is_refused(tmp_path: Path) -> None:
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as first:
        url = await first.url()
        async with started("--db", str(tmp_path / "usage.db")) as second:
            _, errors = await second.process.communicate()
            assert second.process.returncode == 2
            assert errors.decode().endswith("usage.db: another process uses it\n")
        async with aiohttp.ClientSession() as session:
            assert (await session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1})).status == 201
        assert await first.stop() == (0, "")


class Writer:
    """A client that posts, and knows what it was answered."""

    def __init__(self, name: str) -> None:
        """Begin with nothing."""
        self.name = name
        self.sent = 0
        self.stored: dict[str, list[int]] = {}  # label -> ids
        self.unanswered: list[dict[str, Any]] = []

    async def post(self, session: aiohttp.ClientSession, url: str, streams: list[dict[str, Any]]) -> None:
        """Post an array of streams, which share a label of their own, with that as the key."""
        label = streams[0]["label"]
        async with session.post(f"{url}/api/v1/streams", json=streams, headers={"Idempotency-Key": label}) as answer:
            assert answer.status == 201
            self.stored[label] = [stream["id"] for stream in (await answer.json())["data"]]

    async def work(self, session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        """Post until the server has gone."""
        while True:
            self.sent += 1
            stream = STREAM | {"label": f"{self.name} {self.sent}", "stream_started_on": rng.choice((1_551_398_399, 1_551_398_400))}
            streams = [stream | {"track_id": f"track{number}"} for number in range(rng.choice((1, 1, 1, 20)))]
            try:
                await self.post(session, url, streams)
            except (aiohttp.ClientError, OSError):
                self.unanswered.append({"streams": streams})
                return


async def kill_50_times(path: Path, rng: random.Random) -> None:
    """Kill a server to which eight clients write, and check after each start what it has."""
    writers, highest = [Writer(f"w{number}") for number in range(8)], 0
    before = set[str]()
    for _ in range(51):
        async with started("--db", str(path), "--no-simulation") as program:
            url = await program.url()
            async with aiohttp.ClientSession() as session:
                for writer in writers:
                    for request in writer.unanswered:
                        await writer.post(session, url, request["streams"])
                    writer.unanswered.clear()
                acknowledged = {label: ids for writer in writers for label, ids in writer.stored.items()}
                found: dict[str, list[int]] = {}
                after = 0
                while after is not None:
                    page = await get_json(f"{url}/api/v1/streams?limit=1000&after={after}")
                    for stream in page["data"]:
                        found.setdefault(stream["label"], []).append(stream["id"])
                    after = page["next"]
                assert found == acknowledged  # each once, none in part, nothing else, under the ids that were answered
                ids = list(itertools.chain.from_iterable(found.values()))
                assert len(ids) == len(set(ids))
                assert all(number > highest for label in found.keys() - before for number in found[label])
                report = (await get_json(f"{url}/api/v1/report"))["data"]
                assert report["seconds_streamed"] == 5 * len(ids)
                assert {row["label"]: row["streams"] for row in report["labels"]} == {label: len(of) for label, of in found.items()}
                highest, before = max(ids, default=0), set(found)
                working = [asyncio.create_task(writer.work(session, url, rng)) for writer in writers]
                await asyncio.sleep(rng.random() * 0.15)
                program.process.kill()
                await asyncio.gather(*working)


@beside_others
async def test_nothing_acknowledged_is_lost_in_100_kills(tmp_path: Path) -> None:
    await asyncio.gather(*(kill_50_times(tmp_path / f"{seed}.db", random.Random(seed)) for seed in (29, 30)))


async def test_a_full_disk_is_503_and_it_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    async with started("--db", str(path), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        body, statuses = [STREAM | {"stream_started_on": 1}] * 1_000, list[int]()

        async def post() -> int:
            async with session.post(f"{url}/api/v1/streams", json=body) as answer:
                assert next(iter(await answer.json())) in ("message", "error")
                return answer.status

        limit = resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, (400_000, limit[1]))
        while statuses.count(503) < 3:
            statuses.append(await post())
        stored = statuses.count(201)
        assert stored > 0
        assert (await get_json(f"{url}/usage?group_by=label"))[0]["events"] == 1_000 * stored
        async with session.get(f"{url}/health") as answer:
            assert answer.status == 503
        resource.prlimit(program.process.pid, resource.RLIMIT_FSIZE, limit)
        assert await post() == 201
        assert (await get_json(f"{url}/health"))["events"] == 1_000 * (stored + 1)
        assert await events_after_a_kill(program, path) == 1_000 * (stored + 1)


@pytest.mark.skipif(not CAN_MOUNT, reason="nothing can be mounted here")
async def test_a_disk_that_is_full_and_has_room_again_takes_all_writes_again(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    script = f"mount -t tmpfs -o size=3m none small && head -c 1500000 /dev/zero > small/other && exec {sys.executable} {HERE / 'server.py'}"
    process = await asyncio.create_subprocess_exec(
        *MOUNT, f"{script} --port=0 --no-simulation --db small/usage.db", cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    program, statuses = Program(process), list[int]()
    url = await program.url()
    async with aiohttp.ClientSession() as session:
        while statuses.count(503) < 3:
            async with session.post(f"{url}/api/v1/streams", json=[STREAM | {"stream_started_on": 1}] * 200) as answer:
                statuses.append(answer.status)
        Path(f"/proc/{process.pid}/cwd/small/other").unlink()
        assert [await post_one(session, url) for _ in range(5)] == [201] * 5
    stored = 200 * statuses.count(201) + 5
    assert (await get_json(f"{url}/health"))["events"] == stored
    for name in ("usage.db", "usage.db-wal"):  # as a kill would leave them
        shutil.copy(f"/proc/{process.pid}/cwd/small/{name}", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "usage.db")) as other:
        assert other.execute("SELECT count(*) FROM streams").fetchone() == (stored,)
    await program.stop()


@needs_strace
async def test_each_answer_is_sent_after_a_sync_that_began_after_its_request_came(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as program:
        url = await program.url()
        follow = ["-f", "-ttt", "-s", "16", "-e", "trace=recvfrom,sendto,fsync,fdatasync"]
        tracer = await asyncio.create_subprocess_exec(
            "strace", *follow, "-o", str(trace), "-p", str(program.process.pid), stderr=asyncio.subprocess.PIPE
        )
        assert tracer.stderr
        assert b"attached" in await tracer.stderr.readline()

        async def client() -> None:
            async with aiohttp.ClientSession() as session:
                for _ in range(10):
                    async with session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1}) as answer:
                        assert answer.status == 201

        await asyncio.gather(*(client() for _ in range(8)))
        assert await program.stop() == (0, "")
        await tracer.communicate()
    syncs: list[tuple[float, float]] = []  # began, ended
    begun: dict[str, float] = {}  # by thread
    asked: dict[str, float] = {}  # by connection
    answered = 0
    for line in trace.read_text("utf-8").splitlines():
        thread, at, call = line.split(maxsplit=2)
        if re.match(r"f(data)?sync\(", call):
            begun[thread] = float(at)
        if "sync" in call and "= 0" in call:
            syncs.append((begun[thread], float(at)))
        if found := re.match(r'(recvfrom|sendto)\((\d+), "(POST|HTTP/1.1 201)', call):
            if found[3] == "POST":
                asked[found[2]] = float(at)
            else:
                answered += 1
                assert any(asked[found[2]] < began and ended < float(at) for began, ended in syncs), line
    assert answered == 80
    assert len(syncs) < 80  # those who wait together share one


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_waits_for_the_disk_at_a_signal_is_stored_and_answered(tmp_path: Path, number: int) -> None:
    statuses: list[int] = []
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()

        async def post() -> None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(f"{url}/api/v1/streams", json=[STREAM | {"stream_started_on": 1}] * 100) as answer:
                    statuses.append(answer.status)

        posts = [asyncio.create_task(post()) for _ in range(50)]
        await asyncio.sleep(0.05)
        assert await program.stop(number) == (0, "")
        await asyncio.gather(*posts)
    assert set(statuses) <= {201}
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as program:
        assert (await get_json(f"{await program.url()}/health"))["events"] >= 100 * len(statuses)


SLOW_SYNC = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
static long slowly(long call, int fd) {
    if (access(getenv("SLOW_WHILE"), F_OK) == 0) sleep(atoi(getenv("SLOW_SECONDS")));
    return syscall(call, fd);
}
int fsync(int fd) { return slowly(SYS_fsync, fd); }
int fdatasync(int fd) { return slowly(SYS_fdatasync, fd); }
"""


@pytest.fixture
async def slow_disk(tmp_path: Path) -> dict[str, str]:
    """Give an environment in which each sync takes SLOW_SECONDS while there is a file `slow`."""
    if shutil.which("gcc") is None and not CI:
        pytest.skip("gcc is not installed")
    (tmp_path / "slow.c").write_text(SLOW_SYNC)
    compiler = await asyncio.create_subprocess_exec("gcc", "-shared", "-fPIC", "-o", tmp_path / "slow.so", tmp_path / "slow.c")
    assert await compiler.wait() == 0
    return {"LD_PRELOAD": str(tmp_path / "slow.so"), "SLOW_WHILE": str(tmp_path / "slow")}


async def end_on_a_slow_disk(directory: Path, environment: dict[str, str], seconds: int, busy: bool) -> None:
    """End the program while each sync takes so many seconds, and see what it has stored."""
    directory.mkdir()
    slow, options = directory / "slow", ("--db", str(directory / "usage.db"), "--no-simulation")
    environment = environment | {"SLOW_WHILE": str(slow), "SLOW_SECONDS": str(seconds)}
    async with started(*options, **environment) as program, aiohttp.ClientSession() as session:
        url = await program.url()

        async def post() -> int | None:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1}) as answer:
                    return answer.status
            return None

        assert await post() == 201
        slow.touch()
        posts = [asyncio.create_task(post()) for _ in range(3)] if busy else []
        await asyncio.sleep(0.3)
        begin = time.monotonic()
        assert await program.stop() == (0, "")
        assert time.monotonic() - begin < (5 if busy else 1)  # 5 is what the contract promises; nothing is to be stored
        statuses = await asyncio.gather(*posts)
    assert None not in statuses or seconds > 1
    assert 201 not in statuses or seconds < 12
    async with started(*options) as program:
        assert (await get_json(f"{await program.url()}/health"))["events"] >= 1 + statuses.count(201)


async def test_a_slow_disk_does_not_hold_up_the_end_and_what_is_not_on_it_is_not_acknowledged(tmp_path: Path, slow_disk: dict[str, str]) -> None:
    for busy in (False, True):
        await asyncio.gather(*(end_on_a_slow_disk(tmp_path / f"{seconds} {busy}", slow_disk, seconds, busy) for seconds in (1, 4, 12)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_slow_disk_does_not_hold_up_the_end_of_a_start(tmp_path: Path, slow_disk: dict[str, str], number: int) -> None:
    (tmp_path / "slow").touch()
    async with started("--db", str(tmp_path / "usage.db"), **slow_disk, SLOW_SECONDS="9") as program:
        async with asyncio.timeout(20):
            while not (tmp_path / "usage.db").exists():
                await asyncio.sleep(0.05)
        begin = time.monotonic()
        assert await program.stop(number) == (0, "")
        assert time.monotonic() - begin < 5  # what the contract promises


def unchunked(received: bytes) -> bytes | None:
    """Return the body of a chunked answer, or None if it was broken off before its end."""
    stream, parts = io.BytesIO(received.partition(b"\r\n\r\n")[2]), list[bytes]()
    while (line := stream.readline()).endswith(b"\r\n"):
        size = int(line, 16)
        part = stream.read(size + 2)
        if len(part) < size + 2:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(part[:-2])
    return None


@pytest.mark.parametrize(("durable", "history"), [(False, 0.1), (True, 0.03)])  # 500,000 and 150,000 events
async def test_a_signal_amid_downloads_posts_and_batches_breaks_nothing_but_what_is_too_slow(tmp_path: Path, durable: bool, history: float) -> None:
    stored = ["--db", str(tmp_path / "usage.db")] * durable
    acknowledged: dict[str, list[dict[str, Any]]] = {}
    sent: dict[str, list[dict[str, Any]]] = {}
    downloads: list[tuple[str, bytes | None]] = []
    begun, ended = asyncio.Semaphore(0), asyncio.Event()

    async def download(path: str, pause: float) -> None:
        reader, writer = await asyncio.open_connection(*address, limit=65_536)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        parts = [await reader.readuntil(b"\r\n\r\n")]
        begun.release()
        with contextlib.suppress(OSError):
            while part := await reader.read(1 << 20):
                parts.append(part)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), pause)
        assert parts[0].startswith(b"HTTP/1.1 200 OK\r\n")
        downloads.append((path, unchunked(b"".join(parts))))
        writer.close()

    async def post(number: int) -> None:
        reader, writer = await asyncio.open_connection(*address)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            for count in itertools.count():
                label = f"{number} {count}"
                sent[label] = [STREAM | {"stream_started_on": 1, "label": label, "seconds_streamed": at} for at in range(20)]
                body = json.dumps(sent[label]).encode()
                writer.write(raw_write(body))
                status, _, body = await read_answer(reader)
                assert status == 201
                acknowledged[label] = json.loads(body)["data"]
                begun.release()
        writer.close()

    async with started("--interval=0.05", f"--history={history}", *stored) as program:
        address = (await program.url()).removeprefix("http://").split(":")
        asked = [("/usage", 0.0), ("/usage?format=ndjson", 0.0), ("/usage?format=csv", 0.0), ("/usage", 0.2), ("/usage?format=csv", 9.0)]
        clients = [*(download(*each) for each in asked), *(post(number) for number in range(50))]
        tasks = [asyncio.create_task(client) for client in clients]
        async with asyncio.timeout(20):
            for _ in range(len(asked) + 100):
                await begun.acquire()
        began = time.monotonic()
        assert await program.stop() == (0, "")
        assert time.monotonic() - began < 5  # what the contract promises
        ended.set()
        await asyncio.gather(*tasks)
    assert len(downloads) == len(asked)
    seen: list[dict[str, Any]] = []
    for path, body in downloads:
        if body is None:  # broken off, and it shows
            continue
        if "csv" in path:
            assert all(len(row) == 5 for row in csv.reader(io.StringIO(body.decode(), newline="")))
        else:
            seen = json.loads(body) if path == "/usage" else [json.loads(line) for line in body.splitlines()]
            assert len(seen) > 100_000
    assert None in [body for _, body in downloads]  # at least the one that hardly reads
    if not durable:
        return
    async with started("--no-simulation", *stored) as program:
        found: dict[str, list[dict[str, Any]]] = {}
        events = await get_json(f"{await program.url()}/usage")
        for made in events:
            found.setdefault(made["label"], []).append(made)
        assert all(found[label] == [{name: made[name] for name in STREAM} for made in streams] for label, streams in acknowledged.items())
        assert all(found.get(label, streams) == streams for label, streams in sent.items())  # what was not acknowledged is whole or not there
        assert not Counter(map(str, seen)) - Counter(map(str, events))


async def test_the_readmes_backup_and_undo_work_as_they_stand(tmp_path: Path) -> None:
    text = (HERE / "README.md").read_text("utf-8")
    (backup,) = re.findall(r'^(python3 -c "import sqlite3.*")$', text, re.MULTILINE)
    (take_back,) = re.findall(r"^\.venv/bin/(python server\.py .*--undo-import)$", text, re.MULTILINE)
    directory = write_import(tmp_path / "import")

    async def shell(command: str) -> None:
        process = await asyncio.create_subprocess_shell(command, cwd=tmp_path)
        assert await process.wait() == 0

    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert (await session.post(f"{url}/api/v1/streams", json=STREAM | {"stream_started_on": 1})).status == 201
        before = await get_json(f"{url}/api/v1/users")
        tag = (await session.get(f"{url}/usage")).headers["ETag"]
        await shell(backup)
        await program.stop()
    async with started("--db", str(tmp_path / "backup.db"), "--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert await get_json(f"{url}/api/v1/users") == before
        # Under the same numbers there may be other changes from now on: caches and followers must not take them for those they know.
        assert (await session.get(f"{url}/usage", headers={"If-None-Match": tag})).status == 200
        assert (await session.get(f"{url}/api/v1/changes?after={tag[3:-1]}")).status == 410
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation", "--import", str(directory)) as program:
        assert (await get_json(f"{await program.url()}/health"))["events"] == 4
        await program.stop()
    await shell(f"{sys.executable} {HERE}/{take_back.removeprefix('python ')}")
    async with started("--db", str(tmp_path / "usage.db"), "--no-simulation") as program:
        assert await get_json(f"{await program.url()}/api/v1/users") == before


@pytest.mark.skipif(shutil.which("curl") is None and not CI, reason="curl is not installed")
async def test_the_month_of_the_readme_works_as_it_stands(tmp_path: Path) -> None:
    text = (HERE / "README.md").read_text("utf-8").partition("### A month, from the 1st to the payment")[2].partition("\n### ")[0]
    said, (row,) = [], re.findall(r"^\{.*\}$", text, re.MULTILINE)
    async with started("--db", str(tmp_path / "example.db"), "--no-simulation") as program:
        url = await program.url()
        for command in re.findall(r"^curl .*$", text, re.MULTILINE):
            process = await asyncio.create_subprocess_shell(
                command.replace("http://127.0.0.1:8080", url), cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            said.append((await process.communicate())[0].decode())
            assert process.returncode == 0
    _, months, report, close, statement, nothing, _, late, _, close_again, february = said
    was = json.loads(row)
    assert json.loads(months)["data"] == [was | {"status": "open", "closed_on": None}]
    assert {line["label"]: [line[name] for name in server.AMOUNTS] for line in json.loads(report)["data"]["labels"]} == {"a": ["15.77", "9.91"], "b": ["10.51", "16.37"]}
    closed = json.loads(close)["data"]
    assert list(closed.items()) == list((was | {"closed_on": closed["closed_on"]}).items())
    walk(json.loads(statement)["data"])
    payers = [[str(cell) for cell in row.values() if cell is not None] for row in json.loads(statement)["data"]["user_centric"]["subscribers"]]
    saved = (tmp_path / "statement-2019-01-a.csv").read_text("utf-8").splitlines()[1:]
    assert (nothing, [[cell for cell in line.split(",") if cell] for line in saved]) == ("", payers)
    assert [each["late"] for each in json.loads(late)["data"]] == [0, 2]
    assert json.loads(close_again)["data"]["distributed"] == "26.28"
    lines = [line.split(",") for line in february.splitlines()[1:]]
    assert [line[6:] for line in lines] == [["13.14", "12.34", "-3.16", "-4.32"], ["13.14", "13.94", "3.16", "4.32"]]
    for label, amount, centric, adjustment, adjustment_centric in [[line[2], *line[6:]] for line in lines]:
        sums = [server.euros(round(100 * (Fraction(one) + Fraction(other)))) for one, other in ((amount, adjustment), (centric, adjustment_centric))]
        cells = [amount, adjustment, f"**{sums[0]}**", centric, adjustment_centric, f"**{sums[1]}**"]
        assert f"| {label} | {' | '.join(cells)} |".replace("-", "−") in text


def test_the_inline_script_metadata_agrees_with_the_requirements() -> None:
    metadata = re.search(r"(?s)^# /// script\n(.+?)^# ///$", (HERE / "server.py").read_text("utf-8"), re.MULTILINE)
    assert metadata
    assert re.findall(r'"(aiohttp.*?)"', metadata[1]) == re.findall(
        r"^(aiohttp.*)$", (HERE / "requirements.txt").read_text("utf-8"), re.MULTILINE
    )


# ── The page, in a browser ──────────────────────────────────────────────────────────────────────

CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
SCREENS = ((1280, 800), (1920, 1080), (3840, 2160))


@pytest.fixture(scope="session")
async def chromium() -> AsyncIterator[Any]:
    """Start a real browser, to which the name evil.example leads here: one for all tests, for a start takes a second."""
    try:
        driver = importlib.import_module("playwright.async_api")
        if not CHROMIUM.exists():
            raise ImportError(f"{CHROMIUM} is not installed")
    except ImportError as error:
        if CI:
            pytest.fail(f"no browser: {error}")
        pytest.skip(f"no browser: {error}")
    async with driver.async_playwright() as playwright:
        mapped = "--host-resolver-rules=MAP evil.example 127.0.0.1"
        chromium = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*SWITCHES.split(), mapped])
        yield chromium
        await chromium.close()


@pytest.fixture
async def browser(chromium: Any) -> AsyncIterator[Any]:
    """Give the browser, and leave nothing of this test in it."""
    yield chromium
    for context in chromium.contexts:
        await context.close()


async def serve_vue(context: Any) -> None:
    """Have the CDN answer with the bytes of the file VUE_FILE if it is set."""
    if "VUE_FILE" in os.environ:
        vue, headers = os.environ["VUE_FILE"], {"access-control-allow-origin": "*"}
        await context.route("https://**/vue.global.prod.js", lambda route: route.fulfill(path=vue, headers=headers))


@pytest.fixture
async def page(browser: Any) -> AsyncIterator[Any]:
    """Give a page of a desk's size; what it or the browser complains of fails the test."""
    page = await browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(15_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.extend([message.text] * (message.type == "error")))
    await serve_vue(page)
    yield page
    # What the browser itself says of a server that is away is no fault of the page.
    assert [text for text in complaints if "Failed to load resource" not in text] == []


def by_testid(name: str, **data: str) -> str:
    """Return the selector of what tests find under a name."""
    return f'[data-testid="{name}"]' + "".join(f'[data-{key}="{value}"]' for key, value in data.items())


async def figures(page: Any) -> list[Any]:
    """Return the three figures of the challenge as the page shows them."""
    shown: list[Any] = await page.evaluate("""() => {
        const get = id => [...document.querySelectorAll(`[data-testid="${id}"]`)]
        const number = element => Number(element?.textContent.replaceAll(',', ''))
        return [number(get('total-seconds')[0]),
            Object.fromEntries(get('label-row').map(row => [row.dataset.label, number(row.querySelector('[data-testid="label-seconds"]'))])),
            get('top-track')[0]?.textContent]
    }""")
    return shown


async def texts(page: Any, selector: str) -> list[str]:
    """Return what stands in each element."""
    found: list[str] = await page.evaluate("selector => [...document.querySelectorAll(selector)].map(each => each.innerText ?? each.textContent)", selector)
    return found


async def buckets(page: Any) -> dict[str, list[int]]:
    """Return the chart as its table has it: the sum and the seconds of each layer."""
    rows: list[list[str]] = await page.evaluate("[...document.querySelectorAll('.chart tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))")
    return {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows}


def sums(events: list[dict[str, Any]], name: str) -> dict[str, int]:
    """Add up the seconds of `events` by a field."""
    found: dict[str, int] = {}
    for made in events:
        found[made[name]] = found.get(made[name], 0) + made["seconds_streamed"]
    return found


async def ask_now(page: Any) -> None:
    """Have the page ask at once, as it does when it is seen again, where a test is not about the 5 s of a poll."""
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


async def settle(page: Any, url: str, query: str) -> list[Any]:
    """Wait until the page shows what /usage says for `query`, and return that."""
    await ask_now(page)
    for _ in range(60):
        shown, events = await figures(page), await get_json(f"{url}/usage?{query}")
        labels, tracks = sums(events, "label"), sums(events, "track_id")
        leaders = sorted(name for name, seconds in tracks.items() if seconds == max(tracks.values()))
        if shown == [sum(labels.values()), labels, ", ".join(leaders)]:
            assert sum(row[0] for row in (await buckets(page)).values()) == shown[0]
            return shown
        await asyncio.sleep(0.2)
    pytest.fail(f"{shown} is not what /usage says: {labels}, {tracks}")


async def post(url: str, streams: Any) -> None:
    """Send streams to the server."""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/api/v1/streams", json=streams) as answer:
        assert (answer.status, bool(await answer.read())) == (201, True)


def many_streams(names: Sequence[str], now: float, span: int = 86_400, each: int = 5) -> list[dict[str, Any]]:
    """Make streams of as many labels and tracks as there are names, within `span` seconds up to `now`."""
    rng = random.Random(len(names))
    return [
        STREAM | {"user_id": f"user{rng.randrange(40)}", "track_id": f"track of {name}"[-128:], "label": name,
                  "stream_started_on": int(now) - rng.randrange(60, span), "seconds_streamed": 30 + at + rng.randrange(900)}
        for at, name in enumerate(names) for _ in range(each)
    ][:1_000]


async def test_the_page_shows_the_three_figures_and_follows_a_new_batch(page: Any) -> None:
    async with started("--interval=4", "--random-seed=16") as program:
        url = await program.url()
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        before = await figures(page)
        await page.wait_for_function(
            "before => document.querySelector('[data-testid=total-seconds]').textContent !== before",
            arg=f"{before[0]:,}",
        )
        assert re.fullmatch(r"\+[\d,]+ s", await page.text_content(by_testid("arrived")))
        _, labels, _ = await settle(page, url, "")
        assert list(labels) == sorted(labels, key=lambda label: (-labels[label], label))
        assert re.match(r"Live · updated \d+ s ago", await page.text_content(by_testid("status")))


async def test_the_page_says_that_it_is_stale_and_catches_up_by_itself(page: Any) -> None:
    async with started("--no-simulation", "--history=0.01") as program:
        url = await program.url()
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        before = await figures(page)
        await program.stop()
    await page.wait_for_selector(f'{by_testid("status")}:has-text("Stale since")')
    assert re.fullmatch(r"Stale since \d\d:\d\d:\d\d · retrying in \d+ s", await page.text_content(by_testid("status")))
    assert await figures(page) == before
    assert float(await page.eval_on_selector(f"{by_testid('chart')} .mark", "mark => getComputedStyle(mark).opacity")) < 1
    async with started("--no-simulation", "--history=0.02", f"--port={url.rsplit(':')[-1]}") as program:
        await program.url()
        await page.wait_for_selector(f'{by_testid("status")}:has-text("Live")', timeout=30_000)
        events = await get_json(f"{url}/usage")
        assert (await figures(page))[1] == sums(events, "label")


async def test_the_page_of_an_empty_server_says_how_to_send_a_first_stream(page: Any) -> None:
    async with started("--no-simulation") as program:
        await page.goto(url := await program.url())
        await page.wait_for_selector("text=No streams yet")
        assert await page.text_content(by_testid("total-seconds")) == "0"
        assert await page.query_selector(by_testid("label-row")) is None
        assert await page.is_visible(".pale")  # what the page will show
        line = await page.inner_text(by_testid("first-stream"))
        shell = await asyncio.create_subprocess_exec("sh", "-c", f"{line} -s", stdout=asyncio.subprocess.PIPE)
        assert b'"id":' in (await shell.communicate())[0]
        await ask_now(page)
        await page.wait_for_selector(by_testid("event-row"))
        await settle(page, url, "")


async def test_a_click_on_a_label_or_track_shows_only_that_one_and_escape_or_back_shows_all(page: Any) -> None:
    async with started("--no-simulation", "--history=0.2") as program:
        url = await program.url()
        await page.goto(url)
        everything = await settle(page, url, "")
        await page.click(f"{by_testid('label-row', label='label2')} button")
        only = await settle(page, url, "label=label2")
        assert list(only[1]) == ["label2"]
        assert page.url.endswith("?label=label2")
        assert await page.get_attribute(f"{by_testid('label-row', label='label2')} button", "aria-pressed") == "true"
        await page.click(f"{by_testid('track-row', track='track1')} button")
        await settle(page, url, "label=label2&track_id=track1")
        assert await page.eval_on_selector_all(by_testid("track-row"), "rows => rows.map(row => row.dataset.track)") == ["track1"]
        await page.reload()
        await page.wait_for_selector(by_testid("label-row"))
        await settle(page, url, "label=label2&track_id=track1")
        await page.go_back()
        await settle(page, url, "label=label2")
        await page.go_forward()
        await page.keyboard.press("Escape")
        assert await settle(page, url, "") == everything
        await page.focus(f"{by_testid('label-row', label='label1')} button")
        await page.keyboard.press("Enter")
        await settle(page, url, "label=label1")
        await page.click(f"{by_testid('label-row', label='label1')} button")
        assert await settle(page, url, "") == everything
        assert "?" not in page.url


async def test_ranges_are_picked_by_click_key_and_url_and_back_undoes_them(page: Any) -> None:
    async with started("--no-simulation", "--history=2.5") as program:
        url = await program.url()
        await page.goto(f"{url}?range=1h")
        await page.wait_for_selector(by_testid("label-row"))
        for act, picked, seconds, size in (
            (None, "1h", 3_600, 60),
            (lambda: page.click(by_testid("range-15m")), "15m", 900, 60),
            (lambda: page.keyboard.press("3"), "24h", 86_400, 3_600),
            (lambda: page.keyboard.press("4"), "all", 0, 0),
            (page.go_back, "24h", 86_400, 3_600),
            (page.go_back, "15m", 900, 60),
            (lambda: page.keyboard.press("2"), "1h", 3_600, 60),
        ):
            if act:
                await act()
            assert await page.get_attribute(by_testid(f"range-{picked}"), "aria-pressed") == "true"
            since = int(time.time() - seconds) // size * size if size else 0
            await settle(page, url, f"from={since}")
            assert (f"range={picked}" in page.url) == (picked != "all")
            if size:
                before, now = [
                    sum(sums(await get_json(f"{url}/usage?from={start}&to={start + seconds}"), "label").values()) for start in (since - seconds, since)
                ]
                percent = now / before * 100 - 100  # of as many whole hours or minutes
                found = re.search(r"([+−])([\d,]+) % (so far )?against the .* before", await page.text_content(by_testid("beneath")))
                assert found
                assert abs(percent - float(found[1].replace("−", "-") + found[2])) < 0.6


async def test_live_shows_what_usage_says_and_each_link_is_the_request_behind_its_panel(page: Any) -> None:
    asked: list[str] = []
    async with started("--no-simulation", "--history=0.5") as program:
        url = await program.url()
        page.on("request", lambda request: asked.append(request.url))
        began = time.time()
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        links = await page.evaluate("[...document.querySelectorAll('a:not([download])')].map(link => [link.href, link.target]).filter(([href]) => /usage|api/.test(href))")
        assert {link for link, _ in links} - set(asked) == set()
        assert {target for _, target in links} == {"_blank"}
        total, by_label, by_track, chart, latest = [await get_json(link) for link, _ in links]
        shown = await figures(page)
        assert total == by_label == chart
        assert sums(total, "label") == shown[1]
        assert by_track[0]["track_id"] == shown[2]
        assert (await page.text_content(".lead")).startswith(f"{by_track[0]['seconds_streamed']:,} s, {by_track[0]['seconds_streamed'] - by_track[1]['seconds_streamed']:,} s ahead of {by_track[1]['track_id']}")
        days, seconds = divmod(shown[0], 86_400)
        beneath = re.fullmatch(r"(.*) · about (\d+) streams at once", await page.inner_text(by_testid("beneath")))
        assert beneath
        assert beneath[1] == f"{days} d {seconds // 3600} h {seconds % 3600 // 60} min"
        first = (await get_json(f"{url}/usage?limit=1"))[0]["stream_started_on"]
        spans = [moment - first for moment in (began, time.time())]  # it was worked out in between
        assert min(shown[0] / span for span in spans) - 0.5 <= int(beneath[2]) <= max(shown[0] / span for span in spans) + 0.5
        rows = await texts(page, by_testid("event-row"))
        assert 5 < len(rows) <= len(latest) == 12
        for row, made in zip(rows, latest, strict=False):
            assert f"{made['track_id']} · {made['label']}" in row
            assert f"{made['seconds_streamed']:,} s" in row
        largest, others = await page.evaluate("""() => {
            const size = each => parseFloat(getComputedStyle(each).fontSize)
            const total = document.querySelector('[data-testid="total-seconds"]')
            return [size(total), Math.max(...[...document.querySelectorAll('#app *')].filter(each => each !== total && each.checkVisibility()).map(size))]
        }""")
        assert largest > others  # the total is the largest thing on the page
        assert [address for address in asked if not address.startswith(url)] == [await page.get_attribute("script[src]", "src")]
        shares = [float(row.split()[-2]) for row in await texts(page, by_testid("label-row"))]
        assert abs(sum(shares) - 100) < 0.3
        assert "€" not in await page.inner_text("#app")  # a figure in euros stands beside seconds of its month only
        await page.click(f"{by_testid('track-row', track='track1')} button")
        await settle(page, url, "track_id=track1")
        assert "€" not in await page.inner_text("#app")


async def test_the_chart_is_read_by_keyboard_pointer_and_table_and_leads_into_its_buckets(page: Any) -> None:
    async with started("--no-simulation", "--history=1.2") as program:
        url = await program.url()
        await page.goto(url)
        await page.wait_for_selector(by_testid("chart"))
        await settle(page, url, "")
        rows = await get_json(url + "/usage?window=hour&group_by=label")
        hours = sorted({row["window_start"] for row in rows})
        table = await buckets(page)
        assert [row[0] for row in table.values()] == [sum(row["seconds_streamed"] for row in rows if row["window_start"] == hour) for hour in range(hours[0], hours[-1] + 1, 3_600)]

        async def reads(hour: int) -> None:
            """Check that the chart says of an hour: its time, its sum, and each label's seconds and share."""
            own = sums([row for row in rows if row["window_start"] == hour], "label")
            assert f"{sum(own.values()):,} s" in await page.inner_text(f"section:has({by_testid('chart')})")
            shown = await page.inner_text(by_testid("tip"))
            assert time.strftime("%H:%M", time.localtime(hour)) in shown
            for name, seconds in own.items():
                assert re.search(rf"{name}\s+{seconds:,} s\s+{seconds / sum(own.values()) * 100:.1f} %", shown)
            assert f"{sum(own.values()):,} s" in shown

        await page.focus(by_testid("chart"))
        for key, hour in (("Home", hours[0]), ("ArrowRight", hours[1]), ("ArrowRight", hours[2]), ("ArrowLeft", hours[1]), ("End", hours[-1])):
            await page.keyboard.press(key)
            await reads(hour)
        await page.keyboard.press("Escape")
        assert await page.query_selector(by_testid("tip")) is None
        bars = [await bar.bounding_box() for bar in await page.query_selector_all(by_testid("bucket"))]
        await page.mouse.move(bars[4]["x"] + 3, bars[4]["y"] + 5)
        await reads(hours[4])
        await page.mouse.click(bars[4]["x"] + 3, bars[4]["y"] + 5)
        await settle(page, url, f"from={hours[4]}&to={hours[5]}")
        assert time.strftime("bucket=%Y-%m-%dT%H", time.gmtime(hours[4])) in page.url
        assert len(await buckets(page)) == 60
        await page.keyboard.press("Escape")
        await settle(page, url, "")
        await page.focus(by_testid("chart"))
        await page.keyboard.press("Home")
        await page.keyboard.press("ArrowRight")
        await page.keyboard.press("Enter")
        await settle(page, url, f"from={hours[1]}&to={hours[2]}")
        await page.go_back()
        await settle(page, url, "")
        assert await page.evaluate("Intl.DateTimeFormat().resolvedOptions().timeZone") in await page.inner_text(f"section:has({by_testid('chart')})")
        ticks = await texts(page, f"{by_testid('chart')} text")
        assert any(re.fullmatch(r"\d\d:00", tick) for tick in ticks)
        assert "0 s" in ticks


@pytest.fixture
async def phone(browser: Any) -> Any:
    """Give a page on a phone, which is tapped."""
    context = await browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    await serve_vue(context)
    page = await context.new_page()
    page.set_default_timeout(15_000)
    return page


async def tap_bucket(page: Any) -> None:
    """Tap the fourth bar of the chart."""
    bar = page.locator(f"{by_testid('chart')} g:has(> rect)").nth(3)
    await bar.scroll_into_view_if_needed()
    box = await bar.bounding_box()
    await page.touchscreen.tap(box["x"] + 2, box["y"] + 10)
    await asyncio.sleep(0.3)  # the finger has gone


async def test_a_tap_pins_what_the_chart_says_of_a_bucket_until_escape(phone: Any) -> None:
    async with started("--no-simulation", "--history=1.2") as program:
        url = await program.url()
        rows = await get_json(url + "/usage?window=hour")
        await phone.goto(url)
        await phone.wait_for_selector(by_testid("label-row"))
        await tap_bucket(phone)
        assert f"{rows[3]['seconds_streamed']:,} s" in await phone.inner_text(f"section:has({by_testid('chart')})")
        await phone.click(f"{by_testid('tip')} button")
        await settle(phone, url, f"from={rows[3]['window_start']}&to={rows[4]['window_start']}")
        await phone.go_back()
        await settle(phone, url, "")
        await tap_bucket(phone)
        await phone.wait_for_selector(by_testid("tip"))
        await phone.keyboard.press("Escape")
        await phone.wait_for_selector(by_testid("tip"), state="detached")


async def test_the_last_half_hour_is_hatched_for_it_is_not_complete(page: Any) -> None:
    async with started("--no-simulation", "--history=1") as program:
        url = await program.url()
        for query, width, size in (("?range=1h", 3_600, 60), ("?range=24h", 86_400, 3_600)):
            await page.goto(url + query)
            await page.wait_for_selector(by_testid("chart"))
            assert "so the last half hour is not complete" in await page.inner_text(f"section:has({by_testid('chart')})")
            await page.wait_for_selector(by_testid("bucket"))
            first = int(time.time() - width) // size * size
            starts = range(first, int(time.time()) + 1, size)
            open_since = next(at for at, start in enumerate(starts) if start + size > time.time() - 1_800)
            hatched = await (await page.query_selector(by_testid("hatched"))).bounding_box()
            bars = [await bar.bounding_box() for bar in await page.query_selector_all(by_testid("bucket"))]
            drawn = [at for at, bar in enumerate(bars) if bar and bar["x"] + bar["width"] / 2 > hatched["x"]]
            assert abs(drawn[0] - open_since) <= (size == 60)
        await page.goto(f"{url}?bucket={time.strftime('%Y-%m-%dT%H', time.gmtime(time.time() - 7_200))}")
        await page.wait_for_selector(by_testid("bucket"))
        assert await page.query_selector(by_testid("hatched")) is None


async def test_paused_it_asks_for_what_the_user_asks_for_and_for_nothing_else(page: Any) -> None:
    asked: list[str] = []
    async with started("--no-simulation", "--history=0.1") as program:
        url = await program.url()
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(url)
        await page.wait_for_selector(by_testid("event-row"))
        await page.click(by_testid("pause"))
        assert await page.text_content(by_testid("status")) == "Paused"
        before = len(asked)
        await post(url, STREAM | {"stream_started_on": int(time.time()), "track_id": "brand new"})
        await asyncio.sleep(6)
        assert len(asked) == before
        await page.click(f"{by_testid('label-row', label='label2')} button")
        await settle(page, url, "label=label2")
        assert await page.text_content(by_testid("status")) == "Paused"
        await page.keyboard.press("Escape")
        await settle(page, url, "")
        await page.click(by_testid("pause"))
        await page.wait_for_selector(f'{by_testid("event-row")}:first-child:has-text("brand new")')


async def test_a_hidden_page_does_not_poll(page: Any) -> None:
    asked: list[str] = []
    async with started("--no-simulation", "--history=0.01") as program:
        await page.goto(await program.url())
        await page.wait_for_selector(by_testid("event-row"))
        await asyncio.sleep(1)
        page.on("request", lambda request: asked.append(request.url))
        hide = "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); document.dispatchEvent(new Event('visibilitychange')) }"
        await page.evaluate(hide, True)
        await asyncio.sleep(6)
        assert asked == []
        await page.evaluate(hide, False)
        await asyncio.sleep(1)
        assert len(asked) == 1


async def test_until_the_answer_is_there_the_old_numbers_are_pale_and_busy(page: Any) -> None:
    asked = asyncio.Event()
    answer = asyncio.Event()

    async def slowly(route: Any) -> None:
        asked.set()
        await answer.wait()
        await route.continue_()

    async with started("--no-simulation", "--history=1.5") as program:
        url = await program.url()
        await page.goto(url)
        everything = await settle(page, url, "")
        busy_before = await page.get_attribute("#app main", "aria-busy")
        await page.route("**/usage?*from=*", slowly)
        await page.click(by_testid("range-1h"))
        await asyncio.wait_for(asked.wait(), 5)
        assert await figures(page) == everything
        await asyncio.sleep(0.5)
        assert float(await page.evaluate("getComputedStyle(document.querySelector('.total')).opacity")) < 0.7
        assert (busy_before, await page.get_attribute("#app main", "aria-busy")) == ("false", "true")
        answer.set()
        await page.wait_for_selector('#app main[aria-busy="false"]')
        assert (await figures(page))[0] < everything[0]
        # From then on it is there at once: what someone asked for does not count up.
        await settle(page, url, f"from={int(time.time() - 3_600) // 60 * 60}")


async def test_hostile_names_many_labels_and_huge_numbers_are_shown_as_they_are(page: Any) -> None:
    names = [*HOSTILE, "<img src=x onerror=document.title='owned'>", "{{ constructor.constructor('document.title=1')() }}", "x" * 128, "__proto__", "Others"]
    async with started("--no-simulation") as program:
        url = await program.url()
        now = int(time.time())
        many = [STREAM | {"stream_started_on": now - 60, "label": f"label {number:03}", "seconds_streamed": number} for number in range(300)]
        odd = [STREAM | {"stream_started_on": now - 60, "label": name, "track_id": name, "seconds_streamed": 86_400 - at} for at, name in enumerate(names)]
        await post(url, odd + many)
        await page.set_viewport_size({"width": 320, "height": 640})
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        shown = await page.eval_on_selector_all(by_testid("label-row"), "rows => rows.map(row => row.dataset.label)")
        assert shown == names[: len(shown)]
        assert len(shown) == 5
        assert await page.title() == "Seconds streamed"
        assert await page.text_content(by_testid("top-track")) == names[0]
        assert await page.evaluate("document.documentElement.scrollWidth") <= 320
        left = sum(86_400 - at for at in range(5, len(names))) + sum(range(300))
        whole = left + sum(86_400 - at for at in range(5))
        row = f"{295 + len(names)} more · {left / whole * 100:.1f} %"
        assert await texts(page, ".labels .more th") == [row]  # so that it adds up
        await page.click(f"text={row}")
        await page.wait_for_selector(by_testid("all-label"))
        assert len(await page.query_selector_all(by_testid("all-label"))) == 50
        await page.click("dialog >> text=Next")
        assert len(await page.query_selector_all(by_testid("all-label"))) == 50
        await page.click("dialog th >> text=Label")
        assert (await texts(page, by_testid("all-label")))[0].startswith("<img")
        assert await page.get_attribute("dialog th:has-text('Label')", "aria-sort") == "ascending"
        await page.fill(by_testid("search"), "others")
        assert [row.split()[0] for row in await texts(page, by_testid("all-label"))] == ["Others"]
        await page.click("dialog >> text=Others")
        await page.wait_for_selector("dialog", state="detached")
        await page.wait_for_selector(by_testid("label-row", label="Others"))
        assert list((await settle(page, url, "label=Others"))[1]) == ["Others"]
        await page.go_back()
        await page.wait_for_selector("dialog")
        await page.go_back()
        await page.wait_for_selector("dialog", state="detached")
        await page.click(f'{by_testid("label-row")}:first-child button')
        await settle(page, url, urlencode({"label": names[0]}))
    assert await page.evaluate("[number(10 ** 12), duration(10 ** 12)]") == ["1,000,000,000,000", "11,574,074 d 1 h 46 min"]


async def test_a_label_may_have_any_name_and_is_not_lost_in_the_chart(page: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        names = [*(f"label {number}" for number in range(10)), "Others"]
        streams = many_streams(names, time.time() - 3_600, 7_200)
        await post(url, [*streams, STREAM | {"label": "Others", "stream_started_on": int(time.time()) - 4_000, "seconds_streamed": 9_000}])
        await page.goto(url)
        await page.wait_for_selector(by_testid("chart"))
        head, rows = await page.evaluate("""[...document.querySelectorAll('.chart table')].map(table => [
            [...table.tHead.rows[0].cells].map(cell => cell.textContent),
            [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => Number(cell.textContent.replaceAll(',', '')))),
        ])[0]""")
        by_label = sums(await get_json(f"{url}/usage"), "label")
        drawn = [(name, sum(row[at] for row in rows)) for at, name in enumerate(head)]
        assert [each for each in drawn if each[0] == "Others"] == [("Others", by_label["Others"])]
        best = sorted(by_label, key=lambda label: (-by_label[label], label))[:7]
        assert head == ["From", "All labels", *best, "4 other labels"]
        assert drawn[2:] == [*((label, by_label[label]) for label in best), ("4 other labels", sum(by_label.values()) - sum(by_label[label] for label in best))]


async def test_the_page_says_what_to_do_when_a_range_is_empty(page: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        await post(url, STREAM | {"stream_started_on": 0})
        await page.goto(f"{url}?range=1h")
        await page.wait_for_selector("text=No streams in this range")
        await page.click("text=Show all")
        await settle(page, url, "")
        await page.wait_for_selector(f'{by_testid("event-row")}:has-text("1 Jan")')  # with its date, for it is not of today


async def test_the_page_of_a_server_restarted_empty_shows_that(page: Any) -> None:
    async with started("--no-simulation", "--history=0.01") as program:
        url = await program.url()
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        await program.stop()
    async with started("--no-simulation", f"--port={url.rsplit(':')[-1]}") as program:
        await program.url()
        await ask_now(page)
        await page.wait_for_selector("text=No streams yet", timeout=30_000)
        await page.wait_for_selector(f'{by_testid("total-seconds")}:text-is("0")')


async def violations(page: Any) -> list[str]:
    """Return what axe finds."""
    await page.evaluate(Path(os.environ["AXE_FILE"]).read_text("utf-8"))
    found: list[str] = await page.evaluate("axe.run().then(found => found.violations.map(each => each.id + ': ' + each.nodes[0].html))")
    return found


needs_axe = pytest.mark.skipif("AXE_FILE" not in os.environ and not CI, reason="AXE_FILE does not say where axe-core is")


@needs_axe
@pytest.mark.parametrize(("scheme", "width"), [("light", 390), ("dark", 1280)])
async def test_axe_finds_nothing_in_live_whatever_its_state(page: Any, scheme: str, width: int) -> None:
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    await page.set_viewport_size({"width": width, "height": 800})
    async with started("--no-simulation", "--history=0.5") as program:
        url = await program.url()
        await post(url, many_streams([f"name {number}" for number in range(12)], time.time()))
        await page.goto(url)
        await page.wait_for_selector(by_testid("event-row"))
        assert await violations(page) == []
        await page.click(by_testid("more-label"))
        await page.wait_for_selector(by_testid("all-label"))
        assert await violations(page) == []
        await page.keyboard.press("Escape")
        await page.click(by_testid("menu"))
        assert await violations(page) == []
        await page.click("#menu >> text=Keys")
        assert await violations(page) == []
        await page.keyboard.press("Escape")
        await page.focus(by_testid("chart"))
        await page.keyboard.press("Home")
        assert await violations(page) == []
        await page.click(f"{by_testid('label-row', label='label1')} button")
        await settle(page, url, "label=label1")
        assert await violations(page) == []
        await page.goto(f"{url}?wall")
        await page.wait_for_selector(by_testid("label-row"))
        assert await violations(page) == []
        await page.keyboard.press("Escape")
        await program.stop()
    await ask_now(page)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("Stale since")')
    assert await violations(page) == []
    async with started("--no-simulation", f"--port={url.rsplit(':')[-1]}") as program:
        await program.url()
        await ask_now(page)
        await page.wait_for_selector("text=No streams yet", timeout=30_000)
        assert await violations(page) == []


async def test_the_page_works_by_keyboard_alone(page: Any) -> None:
    async with started("--no-simulation", "--history=0.1") as program:
        await page.goto(await program.url())
        await page.wait_for_selector(by_testid("event-row"))
        reached: list[str] = []
        for _ in range(30):
            await page.keyboard.press("Tab")
            reached.append(await page.evaluate("(document.activeElement.dataset.testid ?? '') + ' ' + document.activeElement.textContent.trim()"))
        for wanted in (" Live", " Money", "range-all All", "pause Pause", "menu Menu", " label1", " track1", "chart"):
            assert any(one.startswith(wanted) for one in reached), wanted
        await page.focus(by_testid("menu"))
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.dataset.testid") == "download"
        await page.keyboard.press("Escape")
        assert not await page.is_visible(by_testid("download"))
        await page.keyboard.press("?")
        assert "15 minutes, 1 hour, 24 hours, all" in await page.inner_text("dialog")
        await page.keyboard.press("Escape")
        await page.keyboard.press("p")
        assert await page.text_content(by_testid("status")) == "Paused"
        await page.keyboard.press("m")
        await page.wait_for_selector(by_testid("month-row"))


async def test_the_page_without_javascript_says_what_to_do(page: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        context = await page.context.browser.new_context(java_script_enabled=False)
        plain = await context.new_page()
        complaints: list[str] = []
        plain.on("console", lambda message: complaints.append(message.text))
        await plain.goto(url)
        assert "curl" in await plain.inner_text("body")
        assert not await plain.is_visible("#app")
        assert not await plain.is_visible("#loading")
        await context.close()
        assert complaints == []


async def test_the_page_says_what_to_do_without_vue(page: Any) -> None:
    async with started("--no-simulation") as program:
        await page.route("https://**/*", lambda route: route.abort())
        await page.goto(url := await program.url())
        await page.wait_for_selector(f"text=curl '{url}/usage?group_by=label,track_id'")
        assert not await page.is_visible("#app")
        assert not await page.is_visible("#loading")


async def test_the_page_runs_no_other_vue_than_the_one_it_names(browser: Any) -> None:
    async with started("--no-simulation") as program:
        context = await browser.new_context()
        altered = Path(os.environ["VUE_FILE"]).read_bytes() + b"\n" if "VUE_FILE" in os.environ else b"window.Vue = {}"
        await context.route("https://**/*", lambda route: route.fulfill(body=altered, content_type="text/javascript", headers={"access-control-allow-origin": "*"}))
        page = await context.new_page()
        await page.goto(url := await program.url())
        await page.wait_for_selector(f"text=curl '{url}/usage?group_by=label,track_id'")
        assert await page.evaluate("'Vue' in window") is False
        assert re.search(r"vue@\d+\.\d+\.\d+/", await page.get_attribute("script[src]", "src"))  # one exact version
        await context.close()


@pytest.mark.parametrize("count", [3, 12, 300])
async def test_live_is_one_screen_on_a_desk_and_a_wall_and_never_wider_than_a_phone(page: Any, count: int) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        names = [f"{number} of {count} labels, each with a name of its own" for number in range(count)]
        await post(url, many_streams(names, time.time() - 3_600, 80_000, 3))
        for query in ("", "?range=15m", f"?{urlencode({'label': names[0]})}", "?wall"):
            await page.goto(url + query)
            await page.wait_for_selector(by_testid("total-seconds"))
            for width, height in SCREENS:
                await page.set_viewport_size({"width": width, "height": height})
                for _ in range(20):  # what fits is found out after the size has changed
                    seen = await page.evaluate("""() => {
                        const hidden = [...document.querySelectorAll('.panel, .ranking, [data-testid="more-label"]')].filter(each => {
                            const [box, home] = [each, each.closest('section')].map(element => element.getBoundingClientRect())
                            return box.bottom > innerHeight || each.scrollHeight > each.clientHeight + 1 || box.bottom > home.bottom
                        })
                        const chart = document.querySelector('[data-testid="chart"]').getBoundingClientRect()
                        return [document.documentElement.scrollHeight, document.documentElement.scrollWidth,
                            chart.height >= innerHeight / 4 && chart.bottom <= innerHeight, hidden.map(each => each.className)]
                    }""")
                    if seen == [height, width, True, []]:
                        break
                    await asyncio.sleep(0.1)
                assert (query, seen) == (query, [height, width, True, []])
                rows = len(await page.query_selector_all(by_testid("label-row")))
                assert rows in {"": range(3, 11), "?range=15m": range(1)}.get(query, range(1, 11))
            for width in (320, 390, 768):
                await page.set_viewport_size({"width": width, "height": 844})
                assert await page.evaluate("document.documentElement.scrollWidth") == width
        await page.keyboard.press("Escape")
        await page.wait_for_selector(by_testid("pause"))


async def test_the_wall_has_no_controls_and_the_screen_is_kept_awake(page: Any) -> None:
    async with started("--no-simulation", "--history=0.5") as program:
        url = await program.url()
        await page.add_init_script("window.locks = []; navigator.wakeLock.request = kind => { locks.push(kind); return Promise.resolve({ release() { locks.pop() } }) }")
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        await page.keyboard.press("f")
        await page.wait_for_selector(by_testid("pause"), state="detached")
        assert page.url.endswith("?wall")
        assert await page.evaluate("[Boolean(document.fullscreenElement), locks]") == [True, ["screen"]]
        assert await page.evaluate("[...document.querySelectorAll('a, button')].filter(each => each.checkVisibility()).length") == 0
        boxes = [await (await page.query_selector(part)).bounding_box() for part in (".total", ".chart")]
        assert sum(box["width"] * box["height"] for box in boxes) > 0.6 * 1280 * 800
        await settle(page, url, "")
        await page.keyboard.press("f")
        await page.wait_for_selector(by_testid("pause"))
        assert await page.evaluate("[Boolean(document.fullscreenElement), locks]") == [False, []]


@pytest.mark.parametrize(("width", "height"), [(768, 1_024), (1_080, 1_920), (1_280, 800), (1_200, 1_920)])
async def test_the_wall_fills_the_screen_lying_or_upright_names_each_label_and_says_when_it_is_stale(page: Any, width: int, height: int) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    async with started("--no-simulation", "--history=0.5") as program:
        url = await program.url()
        await page.goto(f"{url}?wall")
        await page.wait_for_selector(by_testid("label-row"))
        seen = await page.evaluate("""() => [
            document.documentElement.scrollHeight,
            Math.max(...[...document.querySelectorAll('.panel')].map(each => each.getBoundingClientRect().bottom)),
            Math.min(...[...document.querySelectorAll('.ranking bdi')].map(each => Math.min(each.offsetWidth, each.closest('.name').clientWidth))),
        ]""")
        assert seen[0] == height
        assert height - 20 < seen[1] <= height
        assert seen[2] > 20
        cut = "[...document.querySelectorAll('.ranking')].filter(each => each.scrollHeight > each.clientHeight + 1).length"
        assert [len(await page.query_selector_all(by_testid(f"{kind}-row"))) for kind in ("label", "track")] + [await page.evaluate(cut)] == [3, 3, 0]
        await program.stop()
        await ask_now(page)
        await page.wait_for_selector(f'{by_testid("status")}:has-text("Stale since")')
        assert await page.evaluate("document.documentElement.scrollHeight") == height


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_labels_of_one_hue_are_told_apart_by_their_marks_and_keep_them(page: Any, tmp_path: Path, scheme: str) -> None:
    marks = """selector => Object.fromEntries([...document.querySelectorAll(selector)].map(row => {
        const style = getComputedStyle(row.querySelector('.swatch'))
        return [row.dataset.label, [style.backgroundColor, style.backgroundImage].join(' ')]
    }))"""
    await page.emulate_media(color_scheme=scheme)
    async with money_server(tmp_path) as url:
        await page.goto(url)
        await page.click(by_testid("more-label"))
        await page.wait_for_selector(by_testid("all-label"))
        in_live = await page.evaluate(marks, by_testid("all-label"))
        assert (len(in_live), len(set(in_live.values()))) == (12, 12)
        await page.keyboard.press("Escape")
        for label in in_live:  # alone it has the mark that it had among the others
            await page.click(by_testid("more-label"))
            await page.click(f"{by_testid('all-label', label=label)} button")
            await page.wait_for_selector(f'{by_testid("clear")}:has-text("{label}")')
            await page.wait_for_function("document.querySelectorAll('[data-testid=label-row]').length === 1")
            assert await page.evaluate(marks, by_testid("label-row")) == {label: in_live[label]}
            await page.keyboard.press("Escape")
        await page.keyboard.press("m")
        await page.wait_for_selector(by_testid("money-row"))
        assert await page.evaluate(marks, by_testid("money-row")) == in_live


async def test_the_chart_names_its_colours_and_its_scale_says_what_its_lines_mean(page: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        start = int(time.time()) // 3_600 * 3_600 - 7_200
        streams = [STREAM | {"label": f"label {at}", "stream_started_on": start + hour * 600, "seconds_streamed": 60_000 - at} for at in range(10) for hour in range(2)]
        await post(url, streams)
        await page.goto(f"{url}?range=24h")
        await page.wait_for_selector(by_testid("legend"))
        named = await texts(page, f"{by_testid('legend')} bdi")
        assert named == [*(f"label {at}" for at in range(7)), "3 other labels"]
        assert await texts(page, f'{by_testid("chart")} .row text') == ["0 s", "250K s", "500K s", "750K s", "1M s", "1.25M s"]
        await page.set_viewport_size({"width": 320, "height": 640})
        assert await page.evaluate("document.documentElement.scrollWidth") == 320


def simulate_sight(colour: str, matrix: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """Return a colour, `#rrggbb`, in OKLab as an eye sees it that the matrix stands for."""
    linear = [(each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4) for each in (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))]
    seen = [min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in matrix]
    to_lms = ((0.4122214708, 0.5363325363, 0.0514459929), (0.2119034982, 0.6806995451, 0.1073969566), (0.0883024619, 0.2817188376, 0.6299787005))
    to_lab = ((0.2104542553, 0.7936177850, -0.0040720468), (1.9779984951, -2.4285922050, 0.4505937099), (0.0259040371, 0.7827717662, -0.8086757660))
    roots = [sum(a * b for a, b in zip(row, seen, strict=True)) ** (1 / 3) for row in to_lms]
    return tuple(sum(a * b for a, b in zip(row, roots, strict=True)) for row in to_lab)


# Machado, Oliveira and Fernandes 2009: normal sight, protanopia, deuteranopia, tritanopia.
SIGHTS = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


async def test_a_label_keeps_its_colour_and_eight_hues_stay_apart_for_every_eye(page: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        now = int(time.time())
        shapes = [(100, "label1", 10), (100, "label2", 500), (100, "label3", 300), (7_300, "label1", 90), (7_300, "label9", 800), (40 * 86_400, "label3", 9_000)]
        shapes += [(80_000, f"label{number}", 5_000 + number) for number in range(4, 9)]  # before label1 but in the last minutes
        await post(url, [STREAM | {"stream_started_on": now - ago, "label": label, "seconds_streamed": seconds} for ago, label, seconds in shapes])
        colours = dict[str, set[str]]()
        for query in ("", "?range=15m", "?range=24h", "?label=label1", "?label=label3"):
            await page.goto(url + query)
            await page.wait_for_selector(by_testid("label-row"))
            found = await page.evaluate("""[...document.querySelectorAll('[data-testid="label-row"]')].map(row =>
                [row.dataset.label, getComputedStyle(row.querySelector('.swatch'))])
                .map(([name, style]) => [name, style.getPropertyValue('--hue') || style.backgroundColor])""")
            for name, colour in found:
                colours.setdefault(name, set()).add(colour)
        assert all(len(each) == 1 for each in colours.values()), colours
        assert len(set.union(*(colours[f"label{number}"] for number in (1, 2, 3)))) == 3
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            hues = await page.evaluate("[...Array(8).keys()].map(each => getComputedStyle(document.documentElement).getPropertyValue(`--hue-${each}`).trim())")
            for sight in SIGHTS:
                seen = [simulate_sight(hue, sight) for hue in hues]
                assert min(math.dist(a, b) for a, b in itertools.combinations(seen, 2)) > 0.09


async def test_bars_are_scaled_to_the_largest_and_names_have_the_row(page: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        now = int(time.time())
        await post(url, [STREAM | {"stream_started_on": now - 60, "label": f"a label with a long name: {at}", "seconds_streamed": 1_000 - at * 10} for at in range(10)])
        await page.set_viewport_size({"width": 1920, "height": 1080})
        await page.goto(url)
        await page.wait_for_selector(by_testid("label-row"))
        await asyncio.sleep(0.7)
        shown = await page.evaluate("""[...document.querySelectorAll('[data-testid="label-row"]')].map(row => {
            const name = row.querySelector('.name')
            return [row.querySelector('.bar > span').getBoundingClientRect().width / row.getBoundingClientRect().width, name.scrollWidth - name.clientWidth]
        })""")
        assert [round(part, 2) for part, _ in shown] == [round(1 - at / 100, 2) for at in range(len(shown))]
        assert [cut for _, cut in shown] == [0] * len(shown)


def test_no_line_of_the_page_is_too_long_to_read() -> None:
    lines = (HERE / "index.html").read_text("utf-8").splitlines()
    assert sum(len(line) > 160 for line in lines) <= 10
    assert [line for line in lines if len(line) > 120] == []


# Notes when the page shows other figures, and which: the total and the sum of the chart.
NOTE_CHANGES = """() => {
    const sum = selector => [...document.querySelectorAll(selector)].reduce((all, each) => all + Number(each.textContent.replaceAll(',', '')), 0)
    const figures = () => [sum('[data-testid="total-seconds"]'), sum('.chart tbody td:nth-of-type(1)')]
    let before = figures()
    window.notes = []
    performance.setResourceTimingBufferSize(10000)
    new MutationObserver(() => {
        const seen = figures()
        if (String(seen) !== String(before)) notes.push({ seen, at: performance.now() })
        before = seen
    }).observe(document.querySelector('#app'), { subtree: true, childList: true, characterData: true })
    window.answered = () => Math.max(...performance.getEntriesByType('resource').filter(each => each.name.includes('/usage')).map(each => each.responseEnd))
}"""


async def test_an_answer_is_shown_within_100_ms_and_a_stored_stream_within_one_poll_total_and_chart_together(page: Any) -> None:
    await page.emulate_media(reduced_motion="reduce")  # or the total counts up to what it is
    async with started("--no-simulation", "--history=3") as program:
        url = await program.url()
        await post(url, many_streams([f"label {number}" for number in range(300)], time.time(), each=3))
        await page.goto(url)
        await page.wait_for_selector(by_testid("bucket"))
        await page.evaluate(NOTE_CHANGES)
        waits = defaultdict[str, list[float]](list)
        for picked in ("24h", "1h", "15m", "all") * 3:
            await page.evaluate("notes.length = 0")
            await page.click(by_testid(f"range-{picked}"))
            await page.wait_for_function("notes.length && document.querySelector('#app main').getAttribute('aria-busy') === 'false'")
            notes, answered = await page.evaluate("[notes, answered()]")
            assert [note["seen"][0] - note["seen"][1] for note in notes] == [0]
            waits[picked].append(round(notes[0]["at"] - answered, 1))
        print("ms from the answer to the figures:", dict(waits))
        assert 0 <= max(min(each) for each in waits.values()) < 100  # what else the machine does is no fault of the page
        total = (await figures(page))[0]
        await page.evaluate("notes.length = 0")
        await post(url, STREAM | {"stream_started_on": int(time.time()) - 60, "seconds_streamed": 77})
        stored = time.monotonic()
        await page.wait_for_function("notes.length")
        passed = time.monotonic() - stored
        print(f"seconds from the stored stream to the figures: {passed:.2f}")
        assert [note["seen"] for note in await page.evaluate("notes")] == [[total + 77, total + 77]]
        assert passed < 6


# From here on time is the test's: it stands still, for the server and for the page, until the test lets it pass.


class Moment:
    """A server and a page that have the same time."""

    def __init__(self, page: Any, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stop the time at NOW."""
        self.page, self.start, self.now = page, start, float(NOW)
        monkeypatch.setattr(time, "time", lambda: self.now)  # what Date says, too

    async def open(self, events: Iterable[Event] = (), path: str = "/", ahead: float = 0, **options: Any) -> Client:
        """Start the server and open the page, on a device whose clock is so far ahead."""
        client = await self.start(events, clock=lambda: self.now, **options)
        await self.page.clock.install(time=self.now + ahead - 1)
        await self.page.clock.pause_at(self.now + ahead)
        await self.page.goto(str(client.make_url(path)))
        await self.page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
        return client

    async def poll(self, seconds: float = 5) -> None:
        """Let time pass until the page has polled."""
        self.now += seconds
        await self.page.clock.run_for(1_000 * seconds)
        await self.page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')


@pytest.fixture
def moment(page: Any, start: Start, monkeypatch: pytest.MonkeyPatch) -> Moment:
    """Give a server and a page whose time is the test's."""
    return Moment(page, start, monkeypatch)


@pytest.mark.parametrize("ahead", [600, -3_600, 86_400 * 40])
async def test_a_device_whose_clock_is_wrong_shows_the_same(page: Any, moment: Moment, ahead: int) -> None:
    events = [event(NOW - 60 * number, label=f"label{number % 3}") for number in range(1, 120)]
    await moment.open(events, "/?range=15m", ahead)
    within = [one for one in events if one.stream_started_on >= NOW - 900]
    assert (await figures(page))[0] == sum(one.seconds_streamed for one in within)
    assert len(await buckets(page)) in (15, 16)
    await page.click(by_testid("range-1h"))
    await page.wait_for_function("document.querySelectorAll('[data-testid=bucket]').length >= 60")
    assert (await figures(page))[0] == 60 * 60
    assert (await texts(page, by_testid("event-row")))[0].endswith(time.strftime("%H:%M", time.localtime(NOW - 60)))


async def test_the_wait_doubles_to_a_minute_while_the_server_is_away(page: Any, moment: Moment) -> None:
    client = await moment.open([event()])
    await client.server.close()
    passed = 5
    for wait in (5, 10, 20, 40, 60, 60):
        await page.clock.run_for(1_000 * passed)
        await page.wait_for_selector(f'{by_testid("status")}:text-matches("retrying in {wait} s$")')
        passed = wait


async def test_polls_never_overlap_however_slowly_the_server_answers(page: Any, moment: Moment) -> None:
    answering, asked = asyncio.Event(), list[str]()

    async def slowly(route: Any) -> None:
        asked.append(route.request.url)
        await answering.wait()
        await route.continue_()

    await page.route("**/usage?*", slowly)
    opening = asyncio.create_task(moment.open([event()]))
    await page.wait_for_selector("text=Loading the streams")
    answering.set()
    await opening
    answering.clear()
    asked.clear()
    await page.clock.run_for(5_000)
    while not asked:
        await asyncio.sleep(0.01)
    await page.clock.run_for(9_000)
    await asyncio.sleep(0.2)
    answering.set()
    assert len(asked) == 1
    await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')


async def test_total_rankings_and_chart_are_of_one_moment_while_others_write(page: Any, moment: Moment) -> None:
    client = await moment.open([event(NOW - 60 * at, label=f"label{at % 3}", track_id=f"track{at % 3}") for at in range(1, 10)])
    state = client.app[server.STATE]
    await page.emulate_media(reduced_motion="reduce")
    await page.evaluate("""() => {
        window.seen = []
        const whole = element => Number(element.textContent.replaceAll(',', '').replace(' s', ''))
        const sum = elements => [...elements].reduce((all, each) => all + whole(each), 0)
        const drawn = table => [...table.tHead.rows[0].cells].map((cell, at) => ['From', 'All labels'].includes(cell.textContent) ? 0
            : sum([...table.tBodies[0].rows].map(row => row.cells[at]))).reduce((all, each) => all + each, 0)
        new MutationObserver(() => seen.push([sum(document.querySelectorAll('[data-testid="total-seconds"]')),
            sum(document.querySelectorAll('[data-testid="label-seconds"]')), sum(document.querySelectorAll('[data-testid="track-row"] td:nth-of-type(1)')),
            drawn(document.querySelector('.chart table'))])).observe(document.querySelector('#app'), { subtree: true, childList: true, characterData: true })
    }""")
    total, writing, left = 9 * 60, 0, 0
    moments = {total}

    async def while_it_asks(route: Any) -> None:
        nonlocal total, writing, left
        if left:  # between two answers of one poll
            writing, left = writing + 1, left - 1
            total += writing
            moments.add(total)
            await state.create([event(NOW - 60, writing, label=f"label{writing % 3}", track_id=f"track{writing % 3}")])
        await route.continue_()

    await page.route("**/usage?*", while_it_asks)
    shown = list[int]()
    for poll in range(20):
        left = poll % 5
        await moment.poll()
        shown.append((await figures(page))[0])
    seen = await page.evaluate("seen")
    assert [row for row in seen if len(set(row)) > 1] == []
    assert {row[0] for row in seen} <= moments
    assert len(set(shown)) > 15  # so many moments were seen
    assert shown[-1] == total


async def test_panels_are_of_one_moment_on_a_slow_network_while_others_write_on_and_on(page: Any) -> None:
    async with started("--no-simulation") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        await post(url, STREAM | {"stream_started_on": 1})
        network = await page.context.new_cdp_session(page)
        await network.send("Network.enable")
        await network.send("Network.emulateNetworkConditions", {"offline": False, "latency": 50, "downloadThroughput": -1, "uploadThroughput": -1})

        async def write_on() -> None:
            while True:
                await post_one(session, url)
                await asyncio.sleep(0.02)

        writing = asyncio.create_task(write_on())
        try:
            for path, rows in (("/", "label-row"), ("/?view=money&month=1970-01", "money-row")):
                asked: list[str] = []
                page.on("requestfinished", lambda request, asked=asked: asked.append(request.url))
                await page.goto(url + path)
                await page.wait_for_selector(by_testid(rows))
                for _ in range(4):
                    asked.clear()
                    await ask_now(page)
                    await page.wait_for_function("before => document.body.innerText !== before", arg=await page.inner_text("body"))
                    await asyncio.sleep(1)
                    # A poll is three or four answers, and a few more where a write comes in between: far from nine times as many.
                    assert len(asked) <= 16
                    if path == "/":
                        assert len(set(await page.evaluate("""() => [document.querySelector('[data-testid=label-seconds]'), document.querySelector('[data-testid=track-seconds]')].map(each => each.textContent)"""))) == 1
                    else:
                        month, line = await page.evaluate("""() => [...document.querySelectorAll('[data-testid="money-seconds"], tfoot td')].slice(0, 2).map(each => each.textContent)""")
                        assert month == line
        finally:
            writing.cancel()


async def test_streams_at_once_are_those_since_the_first_stream_and_not_since_its_bucket_began(page: Any, moment: Moment) -> None:
    start = NOW // 86_400 * 86_400 - 5 * 86_400 + 23 * 3_600  # so its day is nearly over
    streams = [event(at, 1_800, user_id=f"user{user}") for at in range(start, NOW - 1_800, 1_800) for user in range(30)]
    client = await moment.open(streams)
    count = sum(made.seconds_streamed for made in streams) / (NOW - start)
    assert round(count) == 30
    assert f"about {count:.0f} streams at once" in await page.text_content(by_testid("beneath"))
    await page.goto(str(client.make_url("/?label=label1")))
    await page.wait_for_selector(by_testid("label-row"))
    assert f"about {count:.0f} streams at once" in await page.text_content(by_testid("beneath"))


async def test_streams_at_once_of_a_few_seconds_are_those_of_a_whole_window(page: Any, moment: Moment) -> None:
    client = await moment.open([event(NOW // 60 * 60 - 3_601, 1_290)])  # it started in the last second of its minute
    assert "about 21.5 streams" not in await page.text_content(by_testid("beneath"))
    assert "about 22 streams at once" in await page.text_content(by_testid("beneath"))
    await client.app[server.STATE].create([event(NOW // 60 * 60 - 3_600, 30)])
    await moment.poll()
    assert "about 22 streams at once" in await page.text_content(by_testid("beneath"))


async def test_a_page_that_was_opened_while_there_was_nothing_says_the_same_as_a_new_one(page: Any, moment: Moment) -> None:
    client = await moment.open()
    await client.app[server.STATE].create([event(NOW - 86_400 * 5 - 43_200, 86_400), event(NOW - 60, 86_400)])
    await moment.poll()
    before = await page.text_content(by_testid("beneath"))
    await page.reload()
    await page.wait_for_selector(by_testid("label-row"))
    assert await page.text_content(by_testid("beneath")) == before


async def test_the_axis_is_whole_on_paper_too(page: Any, moment: Moment) -> None:
    await moment.open((event(NOW - 3_600 * at, 50_000) for at in range(1, 20)), "/?range=24h")
    await page.emulate_media(media="print")
    panel, ticks = await page.evaluate("""() => [document.querySelector('.chart').getBoundingClientRect().left,
        [...document.querySelectorAll('.plot text[text-anchor=end]')].map(each => each.getBoundingClientRect().left)]""")
    assert (len(ticks) > 2, min(ticks) >= panel) == (True, True)
    assert await page.evaluate("getComputedStyle(document.querySelector('.plot > svg')).overflow") == "visible"


@pytest.mark.parametrize("width", [600, 667, 768, 1280])
async def test_what_the_chart_says_of_a_bucket_does_not_cover_it(page: Any, moment: Moment, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 1_024})
    await moment.open((event(NOW - 3_600 * at, 900) for at in range(24)), "/?range=24h")
    await page.locator(by_testid("chart")).scroll_into_view_if_needed()
    for bar in await page.query_selector_all(f"{by_testid('bucket')}:has(rect)"):
        box = await bar.bounding_box()
        await page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tip = await page.locator(by_testid("tip")).bounding_box()
        assert tip["x"] + tip["width"] <= box["x"] + 1 or tip["x"] >= box["x"] + box["width"] - 1


async def test_a_text_that_is_selected_beyond_the_edge_of_a_dialog_does_not_close_it(page: Any, moment: Moment) -> None:
    await moment.open(event(NOW - 60, 1 + number, label=f"label {number:03}") for number in range(30))
    await page.click("button:text('more')")
    box = await page.locator("dialog").bounding_box()
    await page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    await page.mouse.down()
    await page.mouse.move(box["x"] - 40, box["y"] + 30)
    await page.mouse.up()
    assert await page.is_visible("dialog")
    await page.mouse.click(box["x"] - 40, box["y"] + 30)
    await page.wait_for_selector("dialog", state="detached")


async def test_the_line_that_sends_a_first_stream_stays_selected(page: Any) -> None:
    async with started("--no-simulation") as program:
        await page.goto(await program.url())
        await page.click(by_testid("first-stream"))
        selected = await page.evaluate("getSelection().toString()")
        assert selected.startswith("curl ")
        await asyncio.sleep(1.2)
        await ask_now(page)
        await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
        await asyncio.sleep(0.2)
        assert await page.evaluate("getSelection().toString()") == selected


LONG_NAMES = ("Harmonia Mundi France", "Universal Recordings", "Deutsche Grammophon")


async def test_what_the_chart_says_of_a_bucket_has_its_figures_on_one_line_and_names_that_differ(page: Any, moment: Moment) -> None:
    await moment.open(event(NOW - 60, 86_400 * 3, label=name) for name in LONG_NAMES)
    await page.focus(by_testid("chart"))
    await page.keyboard.press("End")
    lines = await page.evaluate("""() => [...document.querySelectorAll('[data-testid=tip] tr')].map(row => [row.getBoundingClientRect().height,
        [...row.cells].some(cell => cell.scrollWidth > cell.clientWidth + 1)])""")
    assert len(lines) == 4
    assert max(height for height, _ in lines) < 1.5 * min(height for height, _ in lines)
    assert not any(cut for _, cut in lines)


@pytest.mark.parametrize(("names", "whole"), [(LONG_NAMES, LONG_NAMES), ([*(f"Label number {at:03}" for at in range(300))], ["293 other labels"]), (["a", "b", "c", "d", "e", "f", "A label with a longer name"], ["a", "b", "f"])])
async def test_the_legend_cuts_no_name_where_there_is_room(page: Any, moment: Moment, names: Sequence[str], whole: Sequence[str]) -> None:
    await moment.open(event(NOW - 60, 900 - at, label=name) for at, name in enumerate(names))
    cut = await page.evaluate("""() => Object.fromEntries([...document.querySelectorAll('[data-testid=legend] bdi')].map(each => [each.textContent,
        each.scrollWidth > each.clientWidth || each.parentElement.scrollWidth > each.parentElement.clientWidth + 1]))""")
    shown = [name if len(name) <= 18 else f"{name[:17]}…" for name in whole]
    assert {name: cut.get(name) for name in shown} == dict.fromkeys(shown, False)


async def test_all_tracks_that_tie_are_named(page: Any, moment: Moment) -> None:
    names = [f"A tied track name {at}" for at in range(6)]
    await moment.open(event(NOW - 60, 100, track_id=name) for name in names)
    assert await page.text_content(by_testid("top-track")) == ", ".join(names)
    assert await page.evaluate("(each => each.scrollHeight <= each.clientHeight + 1)(document.querySelector('[data-testid=top-track]'))")


@pytest.mark.parametrize("width", [320, 390, 1280, 1920])
async def test_the_latest_streams_show_track_and_label_and_cut_neither_while_there_is_room(page: Any, moment: Moment, width: int) -> None:
    pairs = [("71f4ca0346edbe5327af3cbea93b1d7d" * 3, "label 3"), ("track1", "Harmonia Mundi"), ("catalogue-000123", "C"), ("My Way (Live)", "B"), ("My Way (Live at the Garden)", "ECM"), ("א" * 90, "ב" * 90), ("track", "l" * 90)]
    await page.set_viewport_size({"width": width, "height": 844})
    await moment.open([event(NOW - 60 - at, track_id=track, label=label) for at, (track, label) in enumerate(pairs)])
    rows = await page.evaluate("""() => [...document.querySelectorAll('[data-testid=event-row]')].map(row => {
        const [track, label] = [...row.querySelectorAll('bdi.half')]
        return [label.getBoundingClientRect().right <= row.cells[0].getBoundingClientRect().right + 1, track.scrollWidth > track.clientWidth,
            label.scrollWidth > label.clientWidth, (row.cells[0].getBoundingClientRect().right - label.getBoundingClientRect().right) / row.cells[0].clientWidth,
            (track.scrollWidth + label.scrollWidth + 20) / row.cells[0].clientWidth]
    })""")
    assert len(rows) >= 6
    for (track, label), (is_within, track_is_cut, label_is_cut, room, needed) in zip(pairs, rows, strict=False):
        assert is_within
        assert not (label_is_cut and len(label) < 4)
        if needed < 0.9:
            assert (track, label, track_is_cut, label_is_cut) == (track, label, False, False)
        if track_is_cut or label_is_cut:
            assert (track, label, room < 0.2) == (track, label, True)


@pytest.mark.parametrize("width", [768, 1280, 1920])
async def test_a_chip_names_the_whole_hour_or_minute_and_the_status_stays_whole(page: Any, moment: Moment, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 844})
    client = await moment.open([event(NOW - 7_200)])
    for query in ("bucket=2027-01-15T07", "bucket=2027-01-15T07:05", "bucket=2027-01-15", "bucket=2027-01-15T07:05&label=label1"):
        await page.goto(str(client.make_url(f"/?{query}")))
        await page.wait_for_selector(by_testid("clear"))
        assert await page.evaluate("[...document.querySelectorAll('[data-testid=clear] bdi, .status')].filter(each => each.scrollWidth > each.clientWidth).map(each => each.textContent)") == [], query
    await client.app[server.STATE].create([event(NOW - 7_200, label="A label with a long name")])
    await page.goto(str(client.make_url("/?bucket=2027-01-15T07&label=A+label+with+a+long+name")))
    await page.wait_for_selector(by_testid("clear"))
    assert (await page.inner_text(f"{by_testid('clear')}.when")).removeprefix("In").strip().startswith("07:00–08:00, ")
    assert await page.evaluate("(each => each.scrollWidth <= each.clientWidth)(document.querySelector('.status'))")
    await page.goto(str(client.make_url("/?bucket=2027-01-15T07:05")))
    assert "Fri, 15 Jan 2027, 07:05" in await page.get_attribute(f"{by_testid('clear')}.when", "title")


async def test_what_is_stale_and_asked_for_anew_can_be_read(page: Any) -> None:
    await page.emulate_media(color_scheme="dark")
    await show_and_stop(page, "--history=1")
    await page.keyboard.press("3")
    await page.wait_for_selector('#app main[aria-busy="true"]')
    await asyncio.sleep(0.4)
    assert await page.evaluate("getComputedStyle(document.querySelector('.total')).opacity") == "1"


async def test_a_finger_that_scrolls_over_the_chart_pins_nothing(phone: Any) -> None:
    async with started("--no-simulation", "--history=1.2") as program:
        await phone.goto(await program.url())
        await phone.wait_for_selector(by_testid("label-row"))
        await phone.locator(by_testid("chart")).scroll_into_view_if_needed()
        box = await phone.locator(by_testid("chart")).bounding_box()
        touch = await phone.context.new_cdp_session(phone)
        before, x = await phone.evaluate("scrollY"), box["x"] + box["width"] / 2
        for kind, y in (("touchStart", 60), *(("touchMove", y) for y in range(55, -100, -5)), ("touchEnd", None)):
            points = [] if y is None else [{"x": x, "y": box["y"] + y + 60}]
            await touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        assert await phone.evaluate("scrollY") > before
        assert await phone.query_selector(by_testid("tip")) is None


async def test_a_page_on_a_phone_does_not_jump_when_the_minutes_get_a_digit_more(page: Any, moment: Moment) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    client = await moment.open([event(NOW - 86_400 * 20, 116 * 86_400 + 3_660)])
    tops, texts = set(), set()
    for more in (0, 1_000 * 86_400 + 20 * 3_600 + 52 * 60):
        await client.app[server.STATE].create([event(NOW - 70_000, more)])
        await moment.poll()
        tops.add(await page.evaluate("document.querySelector('.labels').getBoundingClientRect().top + scrollY"))
        texts.add(await page.evaluate("(each => { const range = document.createRange(); range.selectNodeContents(each); return range.getClientRects().length })(document.querySelector('[data-testid=beneath]'))"))
    assert texts == {1, 2}
    assert len(tops) == 1


@pytest.mark.parametrize(("width", "height"), [(320, 568), (390, 844), (844, 390), (768, 1024), (1100, 500), (1024, 600), (1366, 625)])
async def test_a_wall_is_exactly_the_screen_however_small_that_is(page: Any, moment: Moment, width: int, height: int) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    await moment.open((event(NOW - 60 * at, label=f"label {at % 20}") for at in range(1, 300)), "/?wall")
    assert await page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [width, height]
    heights = await page.evaluate("['.total', '.chart', '.plot'].map(each => document.querySelector(each).getBoundingClientRect().height)")
    assert min(heights) > 50
    assert await page.is_visible(".labels") is (height >= 640 or (width >= 1024 and height >= 576))
    assert await page.is_visible(".tracks") is (width >= 640 and height >= 576)


@pytest.mark.parametrize("width", [320, 390, 1280])
async def test_the_menu_opens_below_its_button(page: Any, moment: Moment, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 844})
    await moment.open([event()])
    await page.click(by_testid("menu"))
    button, menu = [await page.locator(each).bounding_box() for each in (by_testid("menu"), "#menu")]
    assert 0 <= menu["y"] - button["y"] - button["height"] < 20
    assert menu["x"] >= 0
    assert menu["x"] <= button["x"] + button["width"] <= menu["x"] + menu["width"] + 1 or menu["x"] <= button["x"] <= menu["x"] + menu["width"]
    assert menu["x"] + menu["width"] <= width


async def test_back_from_the_wall_leaves_fullscreen_too(page: Any, moment: Moment) -> None:
    await moment.open([event(NOW - 60)])
    await page.keyboard.press("f")
    await page.wait_for_function("document.fullscreenElement !== null")
    await page.go_back()
    await page.wait_for_function("document.fullscreenElement === null")
    assert "wall" not in page.url


# What is shown, and how many answers show it at first. For everything, Live asks where it begins; Money asks once whether
# anything could be kept, and a statement that is opened by its address comes with the month before.
FIRST_ANSWERS = {
    "": 4, "?label=label1": 4, "?range=24h": 3, "?range=1h": 3, "?range=15m": 3, "?range=1h&track=track1": 3, "?bucket=2027-01-15T07": 3,
    "?view=money": 4, "?view=money&label=label1": 5,
}


async def test_a_poll_asks_for_three_answers_at_most_and_for_one_when_nothing_has_changed(page: Any, moment: Moment) -> None:
    asked: list[str] = []
    client = await moment.open(history=1, random_seed=1)
    state = client.app[server.STATE]
    page.on("request", lambda request: asked.append(request.url) if re.search(r"/(usage|api|health)\b", request.url) else None)
    for query, first in FIRST_ANSWERS.items():
        counts: list[int] = []
        await page.goto("about:blank")
        moment.now += 60 - moment.now % 60  # a minute that ends changes what is asked for
        await page.clock.pause_at(moment.now)
        asked.clear()
        await page.goto(str(client.make_url(f"/{query}")))
        await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
        for number in range(4):
            counts.append(len(asked))
            asked.clear()
            if number % 2 == 0:
                await server.tick(state, moment.now, state.rng)
            await moment.poll()
        assert (query, counts, len(asked)) == (query, [first, 3, 1, 3], 1)


async def test_everything_is_shown_whatever_was_shown_before_and_however_much_there_is(
    page: Any, moment: Moment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_ROWS", 1_000)
    hourly = [event(NOW - 3_600 * number) for number in range(1, 2_400)]  # more hours than rows, but fewer days
    client = await moment.open([*hourly, event(NOW - 60, 7, label="new")])
    state = client.app[server.STATE]

    async def shows(seconds: int) -> None:
        await page.wait_for_selector(f'{by_testid("total-seconds")}:text-is("{seconds:,}")')
        await page.wait_for_selector(f'{by_testid("status")}:has-text("Live")')

    everything = 60 * len(hourly) + 7
    await shows(everything)
    await page.click(f"{by_testid('label-row', label='new')} button")
    await shows(7)
    await page.keyboard.press("Escape")  # from minutes
    await shows(everything)
    for key in ("Home", "ArrowRight", "Enter"):
        await page.press(by_testid("chart"), key)
    await shows(60 * 24)
    await page.keyboard.press("Escape")  # from the hours of a day
    await shows(everything)
    await page.click(f"{by_testid('label-row', label='new')} button")
    await shows(7)
    await state.create([event(made.stream_started_on, label="new") for made in hourly])
    moment.now += 5
    await page.clock.run_for(5_000)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("Stale")')  # for its minutes are too many now
    await moment.poll()
    await page.clock.run_for(1_000)
    await shows(everything)


async def test_many_labels_over_years_are_shown(page: Any, moment: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_ROWS", 1_000)  # more days of labels than rows, but fewer months
    await moment.open(event(NOW - 86_400 * day, label=f"label {number}") for day in range(250) for number in range(10))
    assert (await figures(page))[0] == 250 * 10 * 60
    assert len(await buckets(page)) in (9, 10)


@pytest.mark.parametrize(("motion", "width"), [("no-preference", 1280), ("no-preference", 390), ("reduce", 1280)])
async def test_numbers_change_without_a_shift_the_total_counts_up_and_no_motion_is_a_choice(
    page: Any, moment: Moment, motion: str, width: int
) -> None:
    await page.emulate_media(reduced_motion=motion)
    await page.set_viewport_size({"width": width, "height": 800})
    client = await moment.open([event(NOW - 60 * number) for number in range(1, 14)], random_seed=1)
    state = client.app[server.STATE]
    for _ in range(3):  # until all three labels and tracks are there: a row more is a row more
        await server.tick(state, moment.now, state.rng)
        await moment.poll()
    await page.clock.run_for(3_000)
    moment.now += 3
    await page.evaluate("""() => {
        window.shifts = []
        new PerformanceObserver(list => shifts.push(...list.getEntries().map(each => each.value))).observe({ type: 'layout-shift' })
    }""")
    orders = set[tuple[str, ...]]()
    for _ in range(12):
        before, labels, _ = await figures(page)
        orders.add(tuple(labels))
        await server.tick(state, moment.now, state.rng)
        after = sum(row["seconds_streamed"] for row in await (await client.get("/usage")).json())
        await moment.poll(5)
        moving = await page.evaluate("document.getAnimations().length")
        if motion == "reduce":
            assert (moving, (await figures(page))[0]) == (0, after)
        else:
            assert moving > 0
            assert (await figures(page))[0] == before
            await page.clock.run_for(300)
            assert before < (await figures(page))[0] < after
        await page.clock.run_for(1_000)
        moment.now += 1 + 0.3 * (motion != "reduce")
        assert (await figures(page))[0] == after
    assert len(orders) > 1  # labels have overtaken each other
    assert await page.evaluate("shifts") == []


async def test_what_arrives_is_marked_for_a_moment(page: Any, moment: Moment) -> None:
    client = await moment.open([event(NOW - 600 * number) for number in range(1, 14)])
    assert await page.query_selector(".arriving") is None
    await client.post("/api/v1/streams", json=STREAM | {"stream_started_on": NOW - 60, "seconds_streamed": 77})
    await moment.poll()
    assert await page.text_content(by_testid("arrived")) == "+77 s"
    assert ["77 s" in row for row in await texts(page, f"{by_testid('event-row')}.arriving")] == [True]
    await page.clock.run_for(3_000)
    await page.wait_for_selector(by_testid("arrived"), state="detached")


async def test_streams_of_0_seconds_are_streams(page: Any, moment: Moment) -> None:
    client = await moment.open([event(NOW - 60, 0)])
    assert await figures(page) == [0, {"label1": 0}, "track1"]
    assert "NaN" not in await page.inner_text("body")
    await page.goto(str(client.make_url("/?view=money")))
    await page.wait_for_selector("text=not a second was streamed")
    assert "NaN" not in await page.inner_text("body")


# Text outside of the panel or cell that it belongs to, panels that overlap, and anything that makes the page scroll sideways.
MISPLACED = """() => {
    const found = document.documentElement.scrollWidth > innerWidth ? [`scrolls to ${document.documentElement.scrollWidth}`] : []
    const inside = (a, b) => a.left >= b.left - 1 && a.right <= b.right + 1 && a.top >= b.top - 1 && a.bottom <= b.bottom + 1
    const walker = document.createTreeWalker(document.querySelector('#app'), NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement
        if (!walker.currentNode.data.trim() || element.closest('.hidden, .name, .latest td:first-child, .leader, .lead, [popover]')) continue
        const range = document.createRange()
        range.selectNodeContents(walker.currentNode)
        const home = element.closest('td, th, button, .button, section, header').getBoundingClientRect()
        for (const box of range.getClientRects()) if (!inside(box, home)) found.push(walker.currentNode.data)
    }
    const panels = [...document.querySelectorAll('section')].map(panel => panel.getBoundingClientRect())
    for (const a of panels) for (const b of panels) if (a !== b && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push('panels overlap')
    return found
}"""


async def test_huge_numbers_ties_and_long_names_fit_from_the_smallest_phone_to_the_wall(page: Any, moment: Moment) -> None:
    names = ["a" * 128, "b " * 64, "tie"]
    await moment.open(event(NOW - 60 * number, 10**12, track_id=name, label=name) for number, name in enumerate(names, 1))
    assert await page.text_content(by_testid("top-track")) == ", ".join(names)
    await page.wait_for_selector("text=3 tracks tie with 1,000,000,000,000 s")
    for width, height in ((320, 640), (390, 844), (768, 1024), (1152, 700), *SCREENS):
        await page.set_viewport_size({"width": width, "height": height})
        for _ in range(20):  # what fits is found out after the size has changed
            if not (misplaced := await page.evaluate(MISPLACED)):
                break
            await asyncio.sleep(0.1)
        assert (width, misplaced) == (width, [])


@pytest.mark.parametrize("width", [320, 390, 768, 1_280, 3_840])
async def test_what_arrives_is_said_beside_the_total_and_covers_nothing(page: Any, moment: Moment, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    client = await moment.open([event(NOW - 60 * number) for number in range(1, 14)])
    await client.post("/api/v1/streams", json=STREAM | {"stream_started_on": NOW - 60, "seconds_streamed": 1_234})
    await moment.poll()
    assert await page.text_content(by_testid("arrived")) == "+1,234 s"
    covered = await page.evaluate("""() => {
        const inked = element => {
            const range = document.createRange()
            range.selectNodeContents(element)
            const [text, box] = [range, element].map(each => each.getBoundingClientRect())
            return { left: text.left, right: Math.min(text.right, box.right), top: text.top, bottom: text.bottom }
        }
        const mine = inked(document.querySelector('[data-testid="arrived"]'))
        return [...document.querySelectorAll('.total h2, .total .api, .figure')].map(inked)
            .filter(box => mine.left < box.right && box.left < mine.right && mine.top < box.bottom && box.top < mine.bottom).length
    }""")
    assert covered == 0


@pytest.mark.parametrize("width", [320, 390, 768, 1_280])
@pytest.mark.parametrize("view", ["live", "money"])
async def test_a_page_that_becomes_stale_moves_nothing(page: Any, moment: Moment, view: str, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    client = await moment.open([event(NOW - 60)], f"/?view={view}")
    places = "[...document.querySelectorAll('header > *, .panel')].filter(each => each.checkVisibility()).map(each => Math.round(each.getBoundingClientRect().top))"
    before = await page.evaluate(places)
    await client.close()
    await page.clock.run_for(6_000)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("Stale since")')
    after = await page.evaluate(places)
    assert [abs(one - other) <= 12 for one, other in zip(before, after, strict=True)] == [True] * len(before)
    assert before[-1] == after[-1]


MINUTELY = [event(NOW + 3_600 - 60 * number) for number in range(1, 60 * 75)]  # three days of one stream a minute
DOUBLED = [*MINUTELY, *(one for one in MINUTELY if one.stream_started_on < NOW - 86_400)]
HOURLY = [event(NOW - 3_600 * number) for number in range(1, 24 * 110)]


@pytest.mark.parametrize(("events", "query", "said"), [
    (MINUTELY, "range=24h", "+0 % against the 24 h before"),
    (DOUBLED, "range=24h", "−50 % against the 24 h before"),
    (MINUTELY, "range=1h", "+0 % so far against the hour before"),
    (MINUTELY, "range=15m", "+0 % so far against the 15 min before"),
    (MINUTELY, "bucket=2027-01-15T08", "+0 % so far against as much of the hour before"),
    (MINUTELY, "bucket=2027-01-15", "+0 % so far against as much of the day before"),
    (DOUBLED, "bucket=2027-01-15", "−50 % so far against as much of the day before"),
    (MINUTELY, "bucket=2027-01-14", "+0 % against the day before"),
    (HOURLY, "bucket=2027-01", "+0 % so far against as much of the 31 days before"),
    (HOURLY, "bucket=2026-11", "+0 % against the 30 days before"),
])
async def test_a_change_is_against_a_period_of_the_same_length(page: Any, moment: Moment, events: list[Event], query: str, said: str) -> None:
    moment.now += 3_470
    await moment.open([one for one in events if one.stream_started_on < moment.now], f"/?{query}")
    assert (await page.text_content(by_testid("beneath"))).rpartition(" · ")[2] == said


async def test_what_arrives_is_what_came_and_not_what_is_more_than_before(page: Any, moment: Moment) -> None:
    await page.emulate_media(reduced_motion="reduce")
    client = await moment.open([event(NOW - 899, 200), event(NOW - 100, 500)], "/?range=15m")
    for _ in range(11):
        await moment.poll()
    await client.app[server.STATE].create([event(NOW - 10, 300)])
    await moment.poll()
    assert await page.text_content(by_testid("total-seconds")) == "800"
    assert await page.text_content(by_testid("arrived")) == "+300 s"


async def test_a_time_of_another_year_is_told_with_its_year(page: Any, moment: Moment) -> None:
    client = await moment.open([event(1_551_398_400)])
    assert "2019" in (await texts(page, by_testid("event-row")))[0]
    await page.goto(str(client.make_url("/?bucket=2019-03-01")))
    await page.wait_for_selector(by_testid("event-row"))
    await page.press(by_testid("chart"), "Home")
    assert "2019" in await page.text_content(by_testid("tip"))


async def test_a_page_that_is_paused_while_it_is_stale_says_so_and_promises_no_try(page: Any, moment: Moment) -> None:
    client = await moment.open([event()])
    await client.server.close()
    await page.clock.run_for(5_000)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("retrying in")')
    await page.keyboard.press("p")
    await page.wait_for_selector(f'{by_testid("status")}:text-matches("Stale since .* · paused$")')
    await page.clock.run_for(120_000)
    assert (await page.text_content(by_testid("status"))).endswith("paused")
    await page.keyboard.press("p")
    await page.wait_for_selector(f'{by_testid("status")}:has-text("retrying in")')


async def test_an_address_that_means_nothing_is_shown_all_the_same(page: Any, moment: Moment) -> None:
    client = await moment.open([event()])
    for query in (
        "range=constructor", "range=__proto__", "range=toString", "bucket=9999-12-31", "bucket=9999-12", "bucket=2030-01-01", "bucket=2027-01-15T09",
        f"label={'x' * 129}", "label=%00", f"track={'%F0%9F%98%80' * 129}", f"label={'%F0%9F%98%80' * 128}", "view=money&month=1969-12", "view=money&month=0001-01",
        "view=money&month=9999-12", "view=money&wall", f"view=money&label={'x' * 129}",
    ):
        await page.goto(str(client.make_url(f"/?{query}")))
        await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
        assert (query, len(await page.query_selector_all(by_testid("bucket"))) <= 2) == (query, True)
        assert await page.is_visible(by_testid("pause"))
        await moment.poll()


@pytest.mark.parametrize(("years", "width"), [(45, 1_280), (45, 390), (5, 390), (8, 3_840), (200 / 365, 320)])
async def test_ticks_of_time_never_run_into_one_another(page: Any, moment: Moment, years: float, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    await moment.open(event(int(NOW - 365 * 86_400 * years * part / 50)) for part in range(50))
    ticks = await page.evaluate("""() => [...document.querySelectorAll('.plot > svg > text')].map(each => {
        const box = each.getBoundingClientRect()
        return [box.left, box.right]
    })""")
    assert len(ticks) > 1
    assert [pair for pair in itertools.pairwise(ticks) if pair[0][1] >= pair[1][0]] == []


async def test_the_wall_says_what_it_shows(page: Any, moment: Moment) -> None:
    client = await moment.open([event()], "/?wall&range=24h&label=label1")
    assert "24 h" in await page.text_content("#total-heading")
    assert "label1" in await page.text_content("#total-heading")
    await page.goto(str(client.make_url("/?wall")))
    await page.wait_for_selector(by_testid("total-seconds"))
    assert await page.text_content("#total-heading") == "Total seconds streamed"
    await page.goto(str(client.make_url("/?view=money")))
    await page.wait_for_selector(by_testid("money-row"))
    await page.keyboard.press("f")  # money is for no wall
    await moment.poll()
    assert await page.is_visible(by_testid("pause"))


async def test_escape_leads_from_a_minute_back_to_its_hour(page: Any, moment: Moment) -> None:
    await moment.open([event(NOW - 60 * number) for number in range(600)])
    addresses = [page.url]
    for _ in range(2):
        await page.press(by_testid("chart"), "Home")
        await page.press(by_testid("chart"), "Enter")
        addresses.append(page.url)
        await page.wait_for_selector("#app main:not([aria-busy=true])")
    assert [len(address.partition("bucket=")[2]) for address in addresses] == [0, 13, 16]
    for address in (addresses[1], addresses[0]):
        await page.keyboard.press("Escape")
        assert page.url == address


async def test_each_answer_may_take_10_seconds(page: Any, moment: Moment) -> None:
    held = list[Any]()

    async def hold(route: Any) -> None:
        held.append(route)

    async def pass_on(seconds: int) -> None:
        async with asyncio.timeout(10):
            while not held:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        moment.now += seconds
        await page.clock.run_for(1_000 * seconds)
        for route in [held.pop() for _ in range(len(held))]:
            await route.continue_()

    await page.route("**/usage?*", hold)
    opening = asyncio.create_task(moment.open([event()]))
    for _ in range(3):  # where the streams begin, the sums, the rest
        await pass_on(6)
    await asyncio.wait_for(opening, 10)
    assert (await figures(page))[0] == 60


@pytest.mark.parametrize(("width", "height"), [(1_280, 720), (1_366, 768), (1_536, 730), (1_280, 780)])
async def test_on_a_lower_screen_nothing_is_cut_off(page: Any, moment: Moment, width: int, height: int) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    await moment.open(event(NOW - 60 * number, label=f"label {number % 12}") for number in range(60))
    assert await page.evaluate("""() => [...document.querySelectorAll('.panel')].filter(each =>
        each.scrollHeight > each.clientHeight + 1 || each.getBoundingClientRect().bottom > document.documentElement.scrollHeight
        || [...each.children].some(child => child.getBoundingClientRect().bottom > each.getBoundingClientRect().bottom)).map(each => each.className)""") == []


async def test_the_table_of_the_chart_names_its_columns_whatever_labels_are_called(page: Any, moment: Moment) -> None:
    seconds = {f"label {number}": number for number in range(1, 12)} | {"5 other labels": 12}  # as the last layer is called
    client = await moment.open(event(seconds=number, label=name) for name, number in seconds.items())
    for number, name in enumerate(("label 3", "label 9", "5 other labels", "label 1")):
        await client.app[server.STATE].create([event(seconds=50, label=name), event(seconds=1, label=f"new {number}")])
        await moment.poll()
        seconds[name] += 50
        best = sorted(seconds, key=lambda label: (-seconds[label], label))[:7]
        columns = await page.evaluate("""() => ['thead th', 'tbody tr:first-child > *'].map(each =>
            [...document.querySelectorAll(`.chart .hidden ${each}`)].map(cell => cell.textContent))""")
        heads, cells = (column[2:] for column in columns)
        assert (heads, [int(cell) for cell in cells[:7]]) == ([*best, f"{6 + number} other labels"], [seconds[label] for label in best])


async def answer_without_a_tag(route: Any) -> None:
    """Pass on what the server says without its ETag, as some proxies do, and say of its health that it is none."""
    answer = await route.fetch()
    status = 503 if route.request.url.endswith("/health") else answer.status
    await route.fulfill(response=answer, status=status, headers={name: text for name, text in answer.headers.items() if name != "etag"})


async def test_without_a_tag_nothing_is_taken_for_unchanged(page: Any, moment: Moment) -> None:
    await page.route("**/usage?*", answer_without_a_tag)
    await page.emulate_media(reduced_motion="reduce")
    client = await moment.open([event()])
    await client.app[server.STATE].create([event(seconds=7)])
    await moment.poll()
    assert (await figures(page))[0] == 67


@pytest.mark.parametrize("query", ["bucket=2027-01-15", "bucket=2027-01-15T07", "range=1h", "range=24h"])
async def test_while_it_is_paused_or_stale_what_is_said_of_the_last_numbers_stays(page: Any, moment: Moment, query: str) -> None:
    moment.now -= 1_800
    await moment.open([one for one in MINUTELY if one.stream_started_on < moment.now], f"/?{query}")
    before = await page.text_content(by_testid("beneath")), len(await buckets(page))
    assert "+0 %" in before[0]
    await page.keyboard.press("p")
    await page.clock.run_for(40 * 60_000)
    assert (await page.text_content(by_testid("beneath")), len(await buckets(page))) == before


async def test_of_an_hour_that_has_just_ended_it_says_that_it_is_not_complete(page: Any, moment: Moment) -> None:
    moment.now += 3_660
    await moment.open([one for one in MINUTELY if one.stream_started_on < NOW + 1_800], "/?bucket=2027-01-15T08")
    assert (await page.text_content(by_testid("beneath"))).endswith("−50 % so far against the hour before")


async def test_all_tracks_are_all_however_many_there_are(page: Any, moment: Moment) -> None:
    await moment.open((event(track_id=f"track {number}") for number in range(1_500)), "/?all=track")
    await page.wait_for_selector("text=1 to 50 of 1,500")
    await page.fill(f"dialog {by_testid('search')}", "track 149")
    assert len(await page.query_selector_all(by_testid("all-track"))) == 11


@pytest.mark.parametrize(("width", "height"), [(1_280, 720), (1_920, 720), (1_024, 700), (1_080, 1_920)])
@pytest.mark.parametrize("count", [3, 300])
async def test_a_wall_of_any_height_names_the_most_popular_track(page: Any, moment: Moment, width: int, height: int, count: int) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    await moment.open((event(NOW - 60 * number, 60 + number, label=f"label {number}", track_id=f"track {number}") for number in range(count)), "/?wall")
    seen = await page.evaluate("""() => [document.documentElement.scrollHeight, ...['.leader', '.lead', '.plot'].map(each => document.querySelector(each).clientHeight),
        ...[...document.querySelectorAll('.panel')].filter(each => each.checkVisibility() && each.scrollHeight > each.clientHeight + 1).map(each => each.className)]""")
    assert (seen[0], seen[4:]) == (height, [])
    assert seen[1] >= 20
    assert seen[2] >= 15
    assert seen[3] >= 100


@pytest.mark.parametrize(("width", "height"), [(1_280, 800), (1_080, 1_920), (768, 1_024), (390, 844)])
async def test_the_wall_writes_nothing_over_its_state(page: Any, moment: Moment, width: int, height: int) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    label, track = "a label of fifty-five characters, as labels may well be", "a track whose name is even longer than that, as tracks may well be"
    client = await moment.open([event(label=label, track_id=track)], f"/?{urlencode({'range': '24h', 'label': label, 'track': track})}&wall")
    await client.server.close()
    await page.clock.run_for(5_000)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("retrying in")')
    heading, status = await page.evaluate("""['#total-heading', '[data-testid=status]'].map(each => document.querySelector(each).getBoundingClientRect())
        .map(({ left, right, top, bottom }) => [left, right, top, bottom])""")
    assert heading[1] <= status[0] or heading[2] >= status[3]


@pytest.mark.parametrize(("width", "height"), [(1_280, 800), (1_400, 800), (1_152, 800), (1_366, 800), (1_920, 1_080)])
async def test_live_is_one_screen_whatever_is_filtered_and_however_stale_it_is(page: Any, moment: Moment, width: int, height: int) -> None:
    await page.set_viewport_size({"width": width, "height": height})
    names = {"label": "nineteen characters", "track": "a track of the same"}
    client = await moment.open([event(NOW - 60 * number, label=names["label"], track_id=names["track"]) for number in range(60)])
    cut = """document.querySelector('[data-testid=chart]').getBoundingClientRect().bottom > innerHeight
        || document.documentElement.scrollHeight > innerHeight || document.documentElement.scrollWidth > innerWidth"""
    for query in ({"bucket": "2026-01-15"}, {"range": "15m", "label": "nobody"}, names, names | {"bucket": "2027-01-15T07"}):
        await page.goto(str(client.make_url(f"/?{urlencode(query)}")))
        await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
        assert (query, await page.evaluate(cut)) == (query, False)
    await client.server.close()
    await page.clock.run_for(5_000)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("retrying in")')
    assert not await page.evaluate(cut)


async def test_what_has_arrived_is_said_beside_no_other_total(page: Any, moment: Moment) -> None:
    client = await moment.open([event(), event(label="label2")])
    await client.app[server.STATE].create([event(seconds=77)])
    await moment.poll()
    assert await page.text_content(by_testid("arrived")) == "+77 s"
    await page.click(f"{by_testid('label-row', label='label2')} button")
    await page.wait_for_selector("#app main:not([aria-busy=true])")
    assert await page.query_selector(by_testid("arrived")) is None


async def test_a_bucket_that_no_calendar_has_is_none_and_an_hour_is_told_from_its_first_minute(page: Any, moment: Moment) -> None:
    client = await moment.open([event()], "/?bucket=2027-02-31")
    assert await page.query_selector(by_testid("clear")) is None
    chips = list[str]()
    for bucket in ("2027-01-15T07", "2027-01-15T07:00"):
        await page.goto(str(client.make_url(f"/?bucket={bucket}")))
        chips.append(await page.inner_text(by_testid("clear")))
    assert len(set(chips)) == 2


async def test_the_download_holds_what_the_page_shows(page: Any, moment: Moment) -> None:
    rng = random.Random(3)
    await moment.open([event(NOW - rng.randrange(9_000), label=f"label{rng.randrange(3)}") for _ in range(200)], "/?range=1h&label=label1")
    await page.click(by_testid("menu"))
    async with page.expect_download() as download:
        await page.click(by_testid("download"))
    rows = list(csv.DictReader(io.StringIO((await (await download.value).path()).read_text("utf-8"))))
    assert {row["label"] for row in rows} == {"label1"}
    assert 0 < len(rows) < 60
    assert sum(int(row["seconds_streamed"]) for row in rows) == (await figures(page))[0]


async def test_with_forced_colours_marks_keep_theirs_and_the_pressed_range_is_told_apart(page: Any, moment: Moment) -> None:
    await page.emulate_media(forced_colors="active")
    await moment.open([event()])
    marks = await page.evaluate("""['.swatch', '.bar > span', '[data-testid="chart"] g > rect'].map(each => {
        const style = getComputedStyle(document.querySelector(each))
        return each.includes('rect') ? style.fill : style.backgroundColor
    })""")
    ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground not in marks
    assert len(set(marks)) == 1
    pressed, other = await page.evaluate("['all', '1h'].map(each => getComputedStyle(document.querySelector(`[data-testid=\"range-${each}\"]`)).backgroundColor)")
    assert pressed != other


@pytest.mark.parametrize("query", ["?range=1h", "?track=track0", "?view=money"])
async def test_euros_stand_only_beside_the_seconds_of_the_same_month_and_streams(page: Any, moment: Moment, query: str) -> None:
    events = [event(NOW - 90 * at * at, 60 + at, label=f"label{at % 3}", track_id=f"track{at % 4}") for at in range(1, 60)]  # all of January
    client = await moment.open(events, f"/{query}")
    month = sums(await (await client.get("/usage")).json(), "label")
    rows = [row for row in await texts(page, "tr") if "€" in row]
    for row in rows:
        label = next((label for label in month if label in row), None)
        assert f"{month[label] if label else sum(month.values()):,}" in row
    assert len(rows) == (4 if "money" in query else 0)


async def test_the_rest_of_300_labels_opens_in_a_dialog_that_is_searched_and_closed(page: Any, moment: Moment) -> None:
    await moment.open(event(NOW - 60, 1 + number, label=f"label {number:03}") for number in range(300))
    await page.click("button:text('more')")
    assert await page.evaluate("document.documentElement.scrollHeight") == 800
    assert len(await page.query_selector_all(by_testid("all-label"))) == 50
    await page.fill("input[type=search]", "label 17")
    assert len(await page.query_selector_all(by_testid("all-label"))) == 10
    await page.click("dialog button[aria-label=Close]")
    await page.wait_for_selector("dialog", state="detached")


async def test_what_can_be_clicked_says_so_and_is_large_enough_for_a_finger(page: Any, moment: Moment) -> None:
    client = await moment.open([event()])
    for query, width in itertools.product(("/", "/?view=money"), (390, 1280)):
        await page.set_viewport_size({"width": width, "height": 800})
        await page.goto(str(client.make_url(query)))
        await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
        cursors, small = await page.evaluate("""() => {
            const seen = [...document.querySelectorAll('button, a')].filter(each => each.checkVisibility())
            return [seen.filter(each => !each.disabled).map(each => getComputedStyle(each).cursor),
                seen.filter(each => each.getBoundingClientRect().height < 23.9).map(each => each.textContent)]
        }""")
        assert (query, width, set(cursors), small) == (query, width, {"pointer"}, [])
    await page.goto(str(client.make_url("/")))
    name = by_testid("label-row") + " button"
    await page.wait_for_selector(name)
    before = await page.eval_on_selector(name, "each => getComputedStyle(each).textDecorationLine")
    await page.hover(name)
    assert await page.eval_on_selector(name, "each => getComputedStyle(each).textDecorationLine") != before


POLLS = int(os.environ.get("POLLS", "40"))  # 500 is a page that hung on the wall for 42 minutes
WARM = 20 + POLLS // 8 * 2  # before them: the engine goes on compiling for some hundreds of polls, ever less


async def test_a_page_left_open_holds_its_memory_and_asks_for_three_small_answers_at_most(page: Any, moment: Moment) -> None:
    moment.now += 600  # the hour does not end before the polls do, so the chart keeps its bars
    browser = await page.context.new_cdp_session(page)
    for domain in ("Network", "Performance", "HeapProfiler"):
        await browser.send(f"{domain}.enable")
    statuses: list[int] = []
    sizes: list[float] = []
    browser.on("Network.responseReceivedExtraInfo", lambda told: statuses.append(told["statusCode"]))
    browser.on("Network.loadingFinished", lambda told: sizes.append(told["encodedDataLength"]))
    client = await moment.open(history=1, random_seed=1)
    state = client.app[server.STATE]
    await page.unroute_all()  # a route keeps the browser from using its cache

    async def poll() -> list[int]:
        """Let 5 s pass and return the statuses of the answers to the page."""
        statuses.clear()
        await moment.poll()
        return [*statuses]

    async def held() -> tuple[float, float]:
        """Return the bytes and the nodes that the page holds after a garbage collection."""
        await browser.send("HeapProfiler.collectGarbage")
        metrics = {each["name"]: each["value"] for each in (await browser.send("Performance.getMetrics"))["metrics"]}
        return metrics["JSHeapUsedSize"], metrics["Nodes"]

    changed: list[list[int]] = []
    same: list[list[int]] = []
    for number in range(WARM + POLLS):  # a batch every second poll, as with the default interval of 10 s
        if number == WARM:
            before = await held()
            sizes.clear()
        if number % 2:
            same.append(await poll())
        else:
            await server.tick(state, moment.now, state.rng)
            changed.append(await poll())
    after = await held()
    answers = list(itertools.chain.from_iterable([*changed[WARM // 2 :], *same[WARM // 2 :]]))
    print(f"{before=} {after=} answers={len(answers)} unchanged={answers.count(304)} {max(sizes)=} {sum(sizes)=}")
    assert changed[WARM // 2 :] == [[200] * 3] * (POLLS // 2)
    assert same[WARM // 2 :] == [[304]] * (POLLS // 2)
    assert max(sizes) < 5_000
    assert after[1] < before[1] + POLLS // 4
    assert after[0] <= before[0] + 500_000


# What a page can try with a server of another origin: each gives what it could read, or why it could not.
ATTACK = """async ([url, stream]) => {
    const streams = url + '/api/v1/streams', json = { 'Content-Type': 'application/json' }
    const subscription = JSON.stringify({ product_type: 'stolen', fee: '0', origin: 'web' })
    const text = (input, options) => fetch(input, options).then(answer => answer.text()).catch(() => '')
    const embed = (tag, source) => new Promise(done => {
        const element = document.createElement(tag)
        element.onload = () => done(tag === 'iframe' ? element.contentDocument?.body.textContent ?? '' : 'loaded')
        element.onerror = () => done('')
        setTimeout(() => done(''), 1000)
        element[tag === 'link' ? 'href' : tag === 'object' ? 'data' : 'src'] = source
        element.rel = 'stylesheet'
        document.body.append(element)
    })
    const submit = enctype => new Promise(done => {
        document.body.insertAdjacentHTML('beforeend', `<iframe name="${enctype}"></iframe><form method=POST target="${enctype}"><input></form>`)
        const form = document.forms[document.forms.length - 1]
        Object.assign(form, { enctype, action: streams })
        // As text/plain a form can send what is JSON: only the = between its name and value has to fit in.
        const [name, value] = stream.split('user1')
        Object.assign(form.elements[0], { name, value })
        setTimeout(() => done(''), 500)
        form.submit()
    })
    const socket = () => new Promise(done => {
        const opened = new WebSocket(url.replace('http', 'ws') + '/usage')
        opened.onopen = () => done('open')
        opened.onerror = () => done('')
    })
    const stolen = [
        await text(streams, { method: 'POST', mode: 'no-cors', body: stream }),
        await text(streams, { method: 'POST', mode: 'no-cors', body: new Blob([stream], { type: 'text/plain' }), credentials: 'include' }),
        await text(streams, { method: 'POST', headers: json, body: stream }),
        await text(streams + '/1', { method: 'PUT', headers: json, body: stream }),
        await text(streams + '/1', { method: 'PATCH', headers: json, body: '{"label":"stolen"}' }),
        await text(streams + '/1', { method: 'DELETE' }),
        await text(url + '/api/v1/users/user1', { method: 'PUT', headers: json, body: subscription }),
        await text(url + '/usage'), await text(url + '/usage', { mode: 'no-cors' }), await text(url + '/usage', { headers: { 'If-None-Match': '*' } }),
        await embed('script', url + '/usage?format=csv'), await embed('script', url + '/health'), await embed('img', url + '/usage'), await embed('link', url + '/usage'),
        await embed('iframe', url + '/'), await embed('iframe', url + '/usage'), await embed('object', url + '/'),
        await submit('text/plain'), await submit('application/x-www-form-urlencoded'), await submit('multipart/form-data'), await socket(),
    ]
    navigator.sendBeacon(streams, stream)
    return stolen
}"""


@pytest.mark.parametrize("attacker", ["localhost", "127.0.0.1", "evil.example"])
async def test_a_page_of_another_origin_can_neither_write_nor_read(browser: Any, aiohttp_server: Any, attacker: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html><title>evil</title><body>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/", answer)
    foreign = await aiohttp_server(app)
    stream = json.dumps(STREAM | {"stream_started_on": 1})
    async with started("--no-simulation", "-v") as program, aiohttp.ClientSession() as session:
        url = await program.url()
        assert (await session.post(f"{url}/api/v1/streams", data=stream, headers={"Content-Type": "application/json"})).status == 201
        before = await get_json(f"{url}/usage"), await get_json(f"{url}/api/v1/users")
        victim = await browser.new_page()
        await victim.goto(f"http://{attacker}:{foreign.port}/")
        assert await victim.evaluate(ATTACK, [url, stream]) == [""] * 21
        framed = [frame for frame in victim.frames if frame.url.startswith("chrome-error:")]
        assert framed  # what may not be framed is not
        # And as a whole page, on the way there.
        async with victim.expect_navigation() as navigation:
            await victim.evaluate("document.forms[0].removeAttribute('target'); document.forms[0].submit()")
        assert (await navigation.value).status == 403
        await victim.close()
        assert (await get_json(f"{url}/usage"), await get_json(f"{url}/api/v1/users")) == before
        status, log = await program.stop()
        assert status == 0
    asked = re.findall(r'"(POST|PUT|PATCH|DELETE) \S+ HTTP/1.1" (\d+)', log)
    assert asked == [("POST", "201"), *[("POST", "403")] * (len(asked) - 1)]
    assert len(asked) == 8  # those that need no preflight came here: two fetches, three forms, a beacon, a page
    assert log.count('"OPTIONS ') >= 3


async def test_a_name_that_is_made_to_lead_here_gets_nothing(browser: Any) -> None:
    async with started("--no-simulation") as program:
        url = await program.url()
        victim = await browser.new_page()
        rebound = url.replace("127.0.0.1", "evil.example")
        answer = await victim.goto(rebound)
        assert (answer.status, list(json.loads(await answer.text()))) == (421, ["error"])
        found = await victim.evaluate("""stream => Promise.all([
            fetch('/usage'), fetch('/health'), fetch('/api/v1/users'),
            fetch('/api/v1/streams', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: stream }),
            fetch('/api/v1/streams/1', { method: 'DELETE' }),
        ]).then(answers => answers.map(answer => answer.status))""", json.dumps(STREAM | {"stream_started_on": 1}))
        assert found == [421] * 5
        assert await get_json(f"{url}/usage") == []


MONTHS = {"2019-01": 1_546_300_800, "2019-02": 1_548_979_200, "2019-03": 1_551_398_400, "2019-04": 1_554_076_800, "2019-05": 1_556_668_800}
MONEY_VIEW = "?view=money&month=2019-05"


def write_months(directory: Path, count: int = 12) -> Path:
    """Write an import of five months, 40 subscribers and 12 labels, or as many as `count` says."""
    rng, labels = random.Random(48), [f"label {number:02}" for number in range(count)]
    users = "".join(f"user {number:02};{rng.choice(['premium', 'family'])};{rng.choice(['7,99', '14,99'])};{rng.choice(['web', 'app_store'])}\n" for number in range(40))
    tracks = [{"track_id": f"track {number}", "label": labels[number % count]} for number in range(48)]
    rows = "".join(
        f"{rng.randrange(1, 29):02}/{month:02}/2019;user {rng.randrange(40):02};NL;track {int(rng.triangular(0, 48, 0))};{rng.randrange(30, 1_800)}\n"
        for month in range(1, 6) for _ in range(300)
    )
    return write_import(directory, f"user_id;product_type;fee;origin\n{users}", f"date;user_id;region;track_id;seconds\n{rows}", tracks)


@contextlib.asynccontextmanager
async def money_server(tmp_path: Path, *options: str, count: int = 12, **environment: str) -> AsyncIterator[str]:
    """Run a server with five months of money, of so many labels, in a file."""
    files = f"--import={write_months(tmp_path / 'import', count)}", f"--db={tmp_path / 'usage.db'}"
    async with started("--no-simulation", *files, *options, **environment) as program:
        yield await program.url()


def shown_euros(text: str) -> str:
    """Return an amount of the page as the API writes it."""
    return text.replace("€", "").replace("−", "-").replace("+", "").replace(",", "")


async def money_rows(page: Any) -> list[list[str]]:
    """Return the table of labels: the label, pro rata, by listener, the adjustment."""
    rows: list[list[str]] = await page.evaluate("""() => [...document.querySelectorAll('[data-testid="money-row"]')].map(row => [row.dataset.label,
        ...['money-amount', 'money-user-centric', 'money-adjustment'].map(id => row.querySelector(`[data-testid="${id}"]`).textContent.trim())])""")
    return [[label, *map(shown_euros, cells)] for label, *cells in rows]


def written(cents: int, sign: str = "") -> str:
    """Write cents as the page does; `sign` is that of what is above nothing."""
    return f"{'−' if cents < 0 else sign if cents else ''}€{abs(cents) // 100:,}.{abs(cents) % 100:02}"


def cells_of(line: dict[str, Any], before: dict[str, str]) -> list[str]:
    """Return what stands in the row of a line of the report, when each label had `before` in the month before."""
    amount, listener, adjustment = (round(100 * float(line[name])) for name in ("amount", "amount_user_centric", "adjustment"))
    earlier = round(100 * float(before.get(line["label"], 0)))
    change = f"{amount / earlier * 100 - 100:+.1f} %".replace("-", "−") if earlier else "new" if amount else "–"
    return [line["label"], f"{line['seconds_streamed']:,}", f"{line['share'] * 100:.1f} %", written(amount), written(listener),
            written(listener - amount, "+"), written(adjustment, "+"), change.replace("−0.0", "+0.0")]


async def test_each_month_shows_what_the_report_says_and_stands_in_the_address(page: Any, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/?view=money")
        await page.wait_for_selector(by_testid("month-row"))
        months = (await get_json(f"{url}/api/v1/months"))["data"]
        names_of_months = [datetime.strptime(row["month"], "%Y-%m").replace(tzinfo=UTC).strftime("%B %Y") for row in months]
        assert [row.split("\n") for row in await texts(page, by_testid("month-row"))] == [
            [name, f"€{row['revenue']}", "Open"] for name, row in zip(names_of_months, months, strict=True)
        ]
        before = dict[str, str]()
        for month in MONTHS:
            await page.click(by_testid("month-row", month=month))
            await page.wait_for_url(f"**month={month}")
            data = (await get_json(f"{url}/api/v1/report?month={month}"))["data"]
            await page.wait_for_function("said => document.querySelector('[data-testid=distributed]').textContent.includes(said)", arg=f"{data['distributed']} of")
            await page.wait_for_selector(f'{by_testid("month-row", month=month)}[aria-current="true"]')
            names = ("label", "amount", "amount_user_centric", "adjustment")
            for _ in range(50):
                if await money_rows(page) == [[line[name] for name in names] for line in data["labels"]]:
                    break
                await asyncio.sleep(0.1)
            assert await money_rows(page) == [[line[name] for name in names] for line in data["labels"]]
            foot = await page.text_content(by_testid("money-foot"))
            assert foot.count(data["revenue"]) == 2  # both columns add up to it
            shown = await page.evaluate("[...document.querySelectorAll('[data-testid=money-row]')].map(row => [...row.cells].map(cell => cell.innerText.trim()))")
            assert shown == [cells_of(line, before) for line in data["labels"]]
            before = {line["label"]: line["amount"] for line in data["labels"]}
            row = next(row for row in months if row["month"] == month)
            kept = round(100 * float(row["fees"])) - round(100 * float(row["revenue"]))
            flow = await texts(page, "section .flow dd")
            assert flow == [f"€{row['fees']}", written(kept), f"€{row['revenue']}", f"€{row['distributed']}", f"€{row['adjusted']}"]
            assert "✓" in await page.inner_text(f"p:has({by_testid('distributed')})")
        links = await page.evaluate("[...document.querySelectorAll('a[href*=\"/api\"]:not([download])')].map(link => [link.href, link.target])")
        assert {href for href, _ in links} - set(asked) == set()
        assert {target for _, target in links} == {"_blank"}
        assert await page.evaluate("document.querySelector('.live-view, [data-testid=total-seconds]')") is None  # no 15 minutes here
        await page.go_back()
        await page.wait_for_url("**month=2019-04")
        await page.keyboard.press("l")
        await page.wait_for_selector(by_testid("total-seconds"))
        assert "€" not in await page.inner_text("body")  # and no money there


@pytest.mark.parametrize(("day", "shown"), [(1, "2027-01"), (7, "2027-01"), (8, "2027-02")])
async def test_in_the_first_seven_days_of_a_month_the_one_before_is_shown(page: Any, moment: Moment, day: int, shown: str) -> None:
    moment.now = datetime(2027, 2, day, 12, tzinfo=UTC).timestamp()
    starts = [datetime(2027, month, 1, tzinfo=UTC) for month in (1, 2)]
    await moment.open([event(int(start.timestamp()), label=f"label of {start:%B}") for start in starts], "/?view=money")
    name = f"label of {starts[int(shown[-2:]) - 1]:%B}"
    assert ["€26.28" in row for row in await texts(page, "tr") if name in row] == [True]
    await page.wait_for_selector(f'{by_testid("month-row", month=shown)}[aria-current="true"]')
    assert await page.text_content("#month-heading") == starts[int(shown[-2:]) - 1].strftime("%B %Y")
    assert shown_euros(await page.text_content(by_testid("money-amount"))) == "26.28"  # of the month that is shown


def sortable(cell: str) -> float | str:
    """Return what a cell of a table is sorted by."""
    number = re.sub(r"[€,+ %]", "", cell).replace("−", "-")
    return {"new": math.inf, "–": -100.0}.get(cell) or (float(number) if re.fullmatch(r"-?[\d.]+", number) else cell)


async def check_sorting(page: Any, table: str) -> None:
    """Sort a table by each of its columns, both ways."""
    heads = page.locator(f"{table} thead button")
    for at in range(await heads.count()):
        directions = set[str]()
        for _ in range(2):
            await heads.nth(at).click()
            directions.add(direction := await page.locator(f"{table} th[aria-sort]").get_attribute("aria-sort"))
            column = await page.evaluate("([table, at]) => [...document.querySelector(table).tBodies[0].rows].map(row => row.cells[at].innerText.trim())", [table, at])
            cells = [sortable(cell) for cell in column]
            assert (at, cells) == (at, sorted(cells, reverse=direction == "descending"))
        assert directions == {"ascending", "descending"}


async def test_labels_are_sorted_by_each_column_searched_and_downloaded(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/{MONEY_VIEW}")
        await page.wait_for_selector(by_testid("money-row"))
        labels = [row[0] for row in await money_rows(page)]
        await check_sorting(page, ".shares table")
        assert sorted(row[0] for row in await money_rows(page)) == sorted(labels)
        await page.fill(by_testid("search"), "LABEL 03")
        await page.wait_for_function("document.querySelectorAll('[data-testid=money-row]').length === 1")
        assert [row[0] for row in await money_rows(page)] == ["label 03"]
        async with page.expect_download() as download:
            await page.click(by_testid("report-csv"))
        path = await (await download.value).path()
        async with aiohttp.ClientSession() as session, session.get(f"{url}/api/v1/report?month=2019-05&format=csv") as answer:
            assert Path(path).read_bytes() == await answer.read()


async def test_a_statement_opens_adds_up_and_back_closes_it(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/{MONEY_VIEW}")
        await page.click(f'{by_testid("money-row", label="label 00")} a')
        await page.wait_for_selector(by_testid("statement-amount"))
        data = (await get_json(f"{url}/api/v1/report/label%2000?month=2019-05"))["data"]
        payers = [each for each in data["user_centric"]["subscribers"] if each["user_id"]]
        rows = await page.evaluate("[...document.querySelectorAll('[data-testid=statement-row]')].map(row => [row.dataset.label, row.lastElementChild.textContent.trim()])")
        assert [[name, shown_euros(part)] for name, part in rows] == [[each["user_id"], each["part"]] for each in payers]
        parts = sum(round(1_000_000 * float(each["part"])) for each in data["user_centric"]["subscribers"])
        assert 0 <= round(1_000_000 * float(data["user_centric"]["sum"])) - parts < len(rows) + 1  # each part is cut
        said = await page.text_content(by_testid("statement"))
        for figure in (data["pro_rata"]["exact"], data["user_centric"]["exact"], data["line"]["amount"]):
            assert figure in said
        assert shown_euros(await page.text_content(by_testid("statement-amount"))) == data["line"]["amount_user_centric"]
        shown = await page.evaluate("[...document.querySelectorAll('dialog tbody tr, dialog tfoot tr')].map(row => [...row.cells].map(cell => cell.innerText.trim()))")

        def money(text: str) -> str:
            return f"€{text}"

        assert [row[1:6] for row in shown[: len(payers)]] == [
            [f"{each['product_type']}, {each['origin']}", money(each["fee"]), money(each["net"]), f"{each['seconds_streamed']:,}", f"{each['of_seconds']:,}"] for each in payers
        ]
        # The rows add up to the amount by hand: those who listen, those who do not, and what rounding does.
        *summands, amount = (Decimal(shown_euros(row[-1])) for row in shown)
        assert sum(summands) == amount == Decimal(data["line"]["amount_user_centric"])
        beneath = [row[0] for row in shown[len(payers) :]]
        idle = len(data["user_centric"]["subscribers"]) - len(payers)
        assert [name.split(":")[0] for name in beneath] == ["Subscribers who streamed nothing"] * idle + ["Listeners without a subscription", "Rounding", "= By listener"]
        await check_sorting(page, "dialog table")
        async with page.expect_download() as download:
            await page.click(by_testid("statement-csv"))
        assert (await download.value).suggested_filename == "statement-2019-05-label-00.csv"
        content = Path(await (await download.value).path()).read_bytes()
        assert content.count(b"\r\n") == 1 + len(data["user_centric"]["subscribers"])
        assert (await page.pdf(format="A4"))[:4] == b"%PDF"
        await page.go_back()
        await page.wait_for_selector(by_testid("statement"), state="detached")
        assert "label=" not in page.url
        await page.go_forward()
        await page.wait_for_selector(by_testid("statement"))
        await page.keyboard.press("Escape")
        await page.wait_for_selector(by_testid("statement"), state="detached")


async def test_both_models_are_explained_beside_the_money_whose_csv_is_money(page: Any, moment: Moment) -> None:
    client = await moment.open([event()], "/?view=money")
    shown = await page.inner_text("body")
    files = [await (await client.get(URL(href).path_qs)).text() for href in await page.eval_on_selector_all("a[download]", "links => links.map(link => link.href)")]
    explained = [re.search(sentence, shown) is not None for sentence in (r"Pro rata\b.* all seconds", r"By listener\b.* subscriber")]
    assert [any("amount_user_centric" in file for file in files), *explained] == [True] * 3


async def test_the_footer_compares_with_all_of_the_month_before_also_with_labels_that_are_gone(page: Any, moment: Moment) -> None:
    december, january = (int(datetime(*month, 5, tzinfo=UTC).timestamp()) for month in ((2026, 12), (2027, 1)))
    await moment.open([event(december, label="gone"), event(december, label="stays"), event(january, label="stays")], "/?view=money&month=2027-01")
    assert (await texts(page, f"{by_testid('money-foot')} td"))[-1] == "+0.0 %"
    await page.fill(by_testid("search"), "stay")
    assert (await texts(page, f"{by_testid('money-foot')} td"))[-1] == "+0.0 %"  # nothing is hidden by this search


async def test_a_stream_of_1970_bars_nothing(page: Any, moment: Moment, tmp_path: Path) -> None:
    await moment.open([event(0), event(NOW - 40 * 86_400)], "/?view=money", db=tmp_path / "usage.db")
    await page.click(by_testid("month-row", month="1970-01"))
    await page.wait_for_selector(f'{by_testid("month-row", month="1970-01")}[aria-current="true"]')
    await page.click(f'{by_testid("close-month")}:not([disabled])')
    await page.fill(by_testid("typed-month"), "1970-01")
    await page.click(by_testid("confirm-close"))
    await page.wait_for_selector(f'{by_testid("month-row", month="1970-01")}:has-text("Closed since")')


async def test_the_table_has_rows_whatever_page_another_month_was_on(page: Any, moment: Moment) -> None:
    january = [event(NOW - 60, label=f"label {number}") for number in range(120)]
    await moment.open([*january, event(NOW - 20 * 86_400)], "/?view=money&month=2027-01")
    await page.click("text=Next")
    await page.click("text=Next")
    assert len(await page.query_selector_all(by_testid("money-row"))) == 20
    await page.click(by_testid("month-row", month="2026-12"))
    await page.wait_for_selector(by_testid("money-row", label="label1"))


async def test_a_printed_month_has_all_its_labels(page: Any, moment: Moment) -> None:
    await moment.open([event(label=f"label {number}") for number in range(120)], "/?view=money")
    assert len(await page.query_selector_all(by_testid("money-row"))) == 50
    await page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert len(await page.query_selector_all(by_testid("money-row"))) == 120
    await page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert len(await page.query_selector_all(by_testid("money-row"))) == 50


async def test_a_month_that_is_closed_while_the_page_is_paused_is_shown_closed(page: Any, moment: Moment, tmp_path: Path) -> None:
    await moment.open([event(NOW - 20 * 86_400)], "/?view=money&month=2026-12", db=tmp_path / "usage.db")
    await page.keyboard.press("p")
    await page.click(f'{by_testid("close-month")}:not([disabled])')
    await page.fill(by_testid("typed-month"), "2026-12")
    await page.click(by_testid("confirm-close"))
    await page.wait_for_selector(f'{by_testid("month-row", month="2026-12")}:has-text("Closed since")')
    assert await page.text_content(by_testid("status")) == "Paused"


async def test_a_month_can_be_closed_as_soon_as_it_is_over(page: Any, moment: Moment, tmp_path: Path) -> None:
    moment.now = datetime(2027, 1, 31, 23, 59, 50, tzinfo=UTC).timestamp()
    await moment.open([event()], "/?view=money&month=2027-01", db=tmp_path / "usage.db")
    assert "1 Feb" in await page.text_content(by_testid("why-open"))
    for _ in range(3):
        await moment.poll()
    await page.wait_for_selector(f'{by_testid("close-month")}:not([disabled])')


async def test_a_server_that_is_started_again_with_a_file_lets_months_be_closed(page: Any, tmp_path: Path) -> None:
    async with started("--no-simulation", "--history=60", "--interval=600") as program:
        url = await program.url()
        month = (await get_json(f"{url}/api/v1/months"))["data"][1]["month"]
        await page.goto(f"{url}/?view=money&month={month}")
        await page.wait_for_selector(f'{by_testid("why-open")}:has-text("--db")')
        await program.stop()
    async with started("--no-simulation", "--history=60", "--interval=600", f"--db={tmp_path / 'usage.db'}", f"--port={url.rsplit(':')[-1]}") as program:
        await program.url()
        await ask_now(page)
        await page.wait_for_function("!document.querySelector('[data-testid=why-open]')?.textContent.includes('--db')", timeout=30_000)


async def test_money_says_that_it_is_stale_when_health_does_not_answer(page: Any, moment: Moment) -> None:
    await moment.open([event()])
    asked = asyncio.Event()
    await page.route("**/health", lambda _: asked.set())
    await page.keyboard.press("m")
    await asyncio.wait_for(asked.wait(), 10)
    await page.clock.run_for(10_000)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("retrying in")')


async def test_money_is_shown_without_a_tag_and_while_health_is_503(page: Any, moment: Moment) -> None:
    await page.route(re.compile("/health|/api/"), answer_without_a_tag)
    await moment.open([event(NOW - 20 * 86_400)], "/?view=money&month=2026-12")
    assert "--db" in await page.text_content(by_testid("why-open"))


async def test_another_month_begins_with_its_first_page(page: Any, moment: Moment) -> None:
    await moment.open([event(start, label=f"label {number}") for number in range(120) for start in (NOW - 60, NOW - 20 * 86_400)], "/?view=money&month=2027-01")
    await page.click("text=Next")
    await page.wait_for_selector("text=51 to 100 of 120")
    await page.click(by_testid("month-row", month="2026-12"))
    await page.wait_for_selector("text=1 to 50 of 120")


async def test_a_statement_of_a_name_that_no_address_can_hold_or_that_has_nothing_is_told_as_that(page: Any, moment: Moment) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/api/" in request.url else None)
    client = await moment.open([event(label=".")], "/?view=money&label=.")
    assert "address" in await page.inner_text(by_testid("statement"))
    assert "has nothing" not in await page.inner_text(by_testid("statement"))
    assert [href for href in await page.eval_on_selector_all(f"{by_testid('statement')} a", "links => links.map(link => link.href)") if "undefined" in href] == []
    asked.clear()
    await page.goto(str(client.make_url("/?view=money&label=nobody")))
    await page.wait_for_selector("text=has nothing")
    assert len(asked) <= 4


async def test_a_statement_without_a_second_is_told_in_words_and_both_adjustments_are(page: Any, moment: Moment, tmp_path: Path) -> None:
    december = int(datetime(2026, 12, 5, tzinfo=UTC).timestamp())
    client = await moment.open([event(december, 100, label="a"), event(december, 300, "user2", label="b")], "/?view=money", db=tmp_path / "usage.db")
    assert (await client.put("/api/v1/months/2026-12", json={"status": "closed"})).status == 200
    await client.app[server.STATE].create([event(december, 50, "user2", label="a")])
    line = (await (await client.get("/api/v1/report?month=2027-01")).json())["data"]["labels"][0]
    await page.goto(str(client.make_url(f"/?view=money&month=2027-01&label={line['label']}")))
    await page.wait_for_selector(by_testid("statement-adjustment"))
    said = await page.inner_text(by_testid("statement"))
    assert "÷ 0" not in said
    assert line["adjustment"] != line["adjustment_user_centric"]
    shown = [shown_euros(each.partition("\n")[2]) for each in await texts(page, f"{by_testid('statement')} .flow > div") if each.startswith("Adjustment")]
    assert shown == [line["adjustment"], line["adjustment_user_centric"]]
    await page.goto(str(client.make_url("/?view=money&month=2026-12&label=a")))
    await page.wait_for_selector(by_testid("statement-row"))
    assert "in 1 stream." in await page.inner_text(by_testid("statement"))


@pytest.mark.parametrize("width", [320, 360, 390])
async def test_a_long_name_leaves_room_for_the_money_on_a_phone(page: Any, moment: Moment, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 800})
    await moment.open([event(label="Universal Music Group International 1"), event(label="b")], "/?view=money")
    name, amount, box = await page.evaluate("""['.shares tbody th', '[data-testid=money-amount]', '.shares .scroll'].map(each =>
        document.querySelector(each).getBoundingClientRect()).map(box => [box.width, box.right])""")
    assert name[0] + amount[0] < box[0]  # both are seen at once, wherever it is scrolled to
    assert name[0] < box[0] / 2


async def test_a_statement_is_printed_whole_and_light_and_nothing_else_is(page: Any, moment: Moment) -> None:
    listeners = [f"listener {number:03}" for number in range(120)]  # more than fit on a page, of the screen or of paper
    client = await moment.open([event(user_id=name) for name in listeners])
    for name in listeners:
        await client.put(f"/api/v1/users/{name}", json={"product_type": "premium", "fee": "7.99", "origin": "web"})
    await page.goto(str(client.make_url("/?view=money&label=label1")))
    await page.wait_for_selector(f'{by_testid("status")}:has-text("updated 0 s ago")')
    rows = len(await page.query_selector_all(by_testid("statement-row")))
    pages = re.findall(rb"/Type /Page\b", await page.pdf(format="A4"))
    await page.emulate_media(media="print", color_scheme="dark")
    await page.evaluate("dispatchEvent(new Event('beforeprint'))")
    printed = await page.inner_text("body")
    assert "Statement for label1, January 2027" in printed
    assert [name for name in listeners if name not in printed] == []
    assert rows == 50  # on the screen
    assert len(pages) > 2
    visible = "selector => [...document.querySelectorAll(selector)].filter(each => each.checkVisibility()).length"
    assert [await page.evaluate(visible, each) for each in ("header", "section", "button:not(th button)", "input")] == [0] * 4
    style = await page.evaluate("""(get => [get('.statement').color, get('.statement').backgroundColor, get('.statement thead').display])(
        selector => getComputedStyle(document.querySelector(selector)))""")
    ink, ground = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in style[:2]]
    assert ink < 200
    assert ground > 700
    assert style[2] == "table-header-group"


async def test_a_month_is_closed_by_typing_it_and_what_comes_late_is_an_adjustment(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/?view=money&month=2019-02")
        await page.wait_for_selector(f'{by_testid("close-month")}[disabled]')
        assert "2019-01" in await page.text_content(by_testid("why-open")) or "January" in await page.text_content(by_testid("why-open"))
        await page.click(by_testid("month-row", month="2019-01"))
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        await page.fill(by_testid("typed-month"), "2019-1")
        assert await page.is_disabled(by_testid("confirm-close"))
        await page.fill(by_testid("typed-month"), "2019-01")
        await page.click(by_testid("confirm-close"))
        await page.wait_for_selector(f'{by_testid("month-row", month="2019-01")}:has-text("Closed since")')
        months = (await get_json(f"{url}/api/v1/months"))["data"]
        assert [row["month"] for row in months if row["status"] == "closed"] == ["2019-01"]
        late = STREAM | {"user_id": "user 01", "label": "label 11", "stream_started_on": MONTHS["2019-01"] + 9, "seconds_streamed": 90_000}
        await post(url, late)
        await ask_now(page)
        await page.wait_for_selector(f'{by_testid("month-row", month="2019-01")}:has-text("changed since")')
        await page.click(by_testid("month-row", month="2019-02"))
        await page.wait_for_function("""() => [...document.querySelectorAll('[data-testid="money-adjustment"]')].some(each => each.textContent.includes('+'))""")
        lines = (await get_json(f"{url}/api/v1/report?month=2019-02"))["data"]["labels"]
        shown = {label: adjustment for label, _, _, adjustment in await money_rows(page)}
        assert shown == {line["label"]: line["adjustment"] for line in lines}
        await page.go_back()
        await page.wait_for_url("**month=2019-01")
        await page.go_back()
        await page.wait_for_url("**month=2019-02")


async def test_closing_says_why_it_cannot_be_and_asks_for_the_token(page: Any, tmp_path: Path) -> None:
    async with started("--no-simulation", "--history=0.1") as program:
        await page.goto(f"{await program.url()}/?view=money")
        await page.wait_for_selector(f'{by_testid("close-month")}[disabled]')
        assert len(await page.text_content(by_testid("why-open"))) > 10
    async with money_server(tmp_path, USAGE_TOKEN="s3cret") as url:  # noqa: S106 - of this server
        await page.goto(f"{url}/?view=money&month=2019-01")
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        await page.fill(by_testid("typed-month"), "2019-01")
        await page.click(by_testid("confirm-close"))
        await page.fill(by_testid("token"), "wrong")
        await page.click(by_testid("confirm-close"))
        await page.wait_for_selector("text=not the right one")
        await page.fill(by_testid("token"), "s3cret")
        await page.click(by_testid("confirm-close"))
        await page.wait_for_selector(f'{by_testid("month-row", month="2019-01")}:has-text("Closed since")')
        assert await page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]") == [["s3cret"], [], ""]


async def test_a_month_that_is_over_cannot_be_closed_without_a_file_and_the_page_says_so(page: Any, moment: Moment) -> None:
    await moment.open([event(NOW - 40 * 86_400)], "/?view=money&month=2026-12")
    assert await page.is_disabled(by_testid("close-month"))
    assert "--db" in await page.text_content(by_testid("why-open"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_in_money_and_its_dialogs_and_nothing_goes_sideways(page: Any, tmp_path: Path, scheme: str) -> None:
    axe = os.environ.get("AXE_FILE")
    if not axe:
        pytest.skip("AXE_FILE does not say where axe-core is")
    await page.emulate_media(color_scheme=scheme)

    async def check() -> None:
        if not await page.evaluate("'axe' in window"):
            await page.evaluate(Path(axe).read_text("utf-8"))
        found = await page.evaluate("axe.run().then(found => found.violations.map(each => [each.id, each.nodes[0].html]))")
        assert found == []

    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/{MONEY_VIEW}")
        await page.wait_for_selector(by_testid("money-row"))
        await check()
        for width in (320, 390, 768, 1_280):
            await page.set_viewport_size({"width": width, "height": 800})
            await asyncio.sleep(0.2)
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await page.click(f'{by_testid("money-row", label="label 00")} a')
        await page.wait_for_selector(by_testid("statement-row"))
        await check()
        await page.keyboard.press("Escape")
        await page.click(by_testid("month-row", month="2019-01"))
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        await page.wait_for_selector(by_testid("typed-month"))
        await check()


@needs_axe
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_in_money_when_it_is_empty_stale_or_late_and_while_closing_fails(page: Any, tmp_path: Path, scheme: str) -> None:
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    async with started("--no-simulation") as program:
        await page.goto(f"{await program.url()}/?view=money")
        await page.wait_for_selector("text=No label had a second")
        assert await violations(page) == []
        await page.click(by_testid("menu"))
        assert await violations(page) == []
        await page.keyboard.press("Escape")
        await program.stop()
        await ask_now(page)
        await page.wait_for_selector(f'{by_testid("status")}:has-text("Stale since")')
        assert await violations(page) == []
    async with money_server(tmp_path, USAGE_TOKEN="s3cret") as url:  # noqa: S106 - of this server
        headers = {"Authorization": "Bearer s3cret"}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.put(f"{url}/api/v1/months/2019-01", json={"status": "closed"}) as answer:
                assert answer.status == 200
            late = STREAM | {"user_id": "user 01", "label": "label 11", "stream_started_on": MONTHS["2019-01"] + 9, "seconds_streamed": 90_000}
            async with session.post(f"{url}/api/v1/streams", json=late) as answer:
                assert answer.status == 201
        await page.goto(f"{url}/?view=money&month=2019-02&label=label+11")
        await page.wait_for_selector(by_testid("statement-adjustment"))
        assert await violations(page) == []
        await page.keyboard.press("Escape")
        await page.wait_for_selector("text=12 labels changed since")
        await page.fill(by_testid("search"), "nothing is called that")
        await page.wait_for_selector(by_testid("money-row"), state="detached")
        assert await violations(page) == []
        await page.click(by_testid("close-month"))
        assert await page.evaluate("document.activeElement.dataset.testid") == "typed-month"
        await page.keyboard.type("2019-02")
        await page.click(by_testid("confirm-close"))
        await page.wait_for_selector("text=asks for a token")
        assert await violations(page) == []


async def test_in_forced_colours_the_current_month_is_told_by_more_than_a_colour(page: Any, tmp_path: Path) -> None:
    await page.emulate_media(forced_colors="active")
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/{MONEY_VIEW}")
        await page.wait_for_selector(by_testid("money-row"))
        outlines = await page.evaluate("[...document.querySelectorAll('.month')].map(each => [each.ariaCurrent, getComputedStyle(each).outlineStyle])")
        assert outlines == [["true", "solid"], *[[None, "none"]] * 4]


@pytest.mark.parametrize("count", [10, 12])
async def test_money_is_one_screen_with_all_its_panels(page: Any, tmp_path: Path, count: int) -> None:
    async with money_server(tmp_path, count=count) as url:
        async with aiohttp.ClientSession() as session, session.put(f"{url}/api/v1/months/2019-01", json={"status": "closed"}) as answer:
            assert answer.status == 200
        await post(url, STREAM | {"user_id": "user 01", "label": "label 09", "stream_started_on": MONTHS["2019-01"] + 9, "seconds_streamed": 90_000})
        for month in ("2019-05", "2019-02", "2019-01"):  # an open one, one with adjustments, one that is closed
            await page.goto(f"{url}/?view=money&month={month}")
            await page.wait_for_selector(f'{by_testid("month-row", month="2019-01")}:has-text("changed since")')
            await page.wait_for_selector(by_testid("money-row"))
            for width, height in SCREENS:
                await page.set_viewport_size({"width": width, "height": height})
                assert len(await page.query_selector_all(by_testid("month-row"))) == len(MONTHS)
                assert len(await page.query_selector_all(by_testid("money-row"))) == count
                seen = await page.evaluate("""() => [document.scrollingElement.scrollHeight, document.scrollingElement.scrollWidth,
                    [...document.querySelectorAll('.panel, .panel li, .panel tr, .panel p')].filter(each => each.getBoundingClientRect().bottom > innerHeight).length]""")
                assert (month, seen) == (month, [height, width, 0])


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_money_and_its_dialogs_can_be_read_at_every_size(page: Any, tmp_path: Path, scheme: str) -> None:
    await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/{MONEY_VIEW}&label=label+00")
        await page.wait_for_selector(by_testid("statement-row"))
        for width, height in ((320, 640), (390, 844), (768, 1_024), *SCREENS):
            await page.set_viewport_size({"width": width, "height": height})
            seen = await page.evaluate("""() => {
                const [dialog, close, title] = ['dialog', 'dialog .close', 'dialog h2'].map(each => document.querySelector(each))
                const line = parseFloat(getComputedStyle(document.documentElement).fontSize)
                const cut = [...dialog.querySelectorAll('.scroll thead, .scroll tbody tr')].filter(each => each.offsetHeight > (each.matches('tr') ? 2.5 : 3.5) * line)
                return [document.documentElement.scrollWidth, dialog.scrollWidth - dialog.clientWidth, cut.length,
                    close.getBoundingClientRect().top < title.getBoundingClientRect().bottom]
            }""")
            assert (width, seen) == (width, [width, 0, 0, True])
        await page.goto(f"{url}/?view=money&month=2019-01")
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        for width, height in ((320, 640), (390, 844), (768, 1_024), *SCREENS):
            await page.set_viewport_size({"width": width, "height": height})
            assert await page.evaluate("(dialog => dialog.scrollWidth - dialog.clientWidth)(document.querySelector('dialog'))") == 0
            # Nothing typed yet: the button cannot be pressed, and what it says can be read. axe does not look at these.
            text, ground = await page.evaluate("""() => {
                const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true })
                const solid = (...layers) => {
                    for (const layer of layers) { paint.fillStyle = layer; paint.fillRect(0, 0, 1, 1) }
                    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3)
                }
                const [button, sheet] = ['[data-testid="confirm-close"]', 'dialog'].map(each => getComputedStyle(document.querySelector(each)))
                return [solid(sheet.backgroundColor, button.backgroundColor, button.color), solid(sheet.backgroundColor, button.backgroundColor)]
            }""")
            linear = [[each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in (part / 255 for part in colour)] for colour in (text, ground)]
            dark, light = sorted(sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), colour, strict=True)) for colour in linear)
            assert (light + 0.05) / (dark + 0.05) >= 4.5


def pdf_pages(pdf: bytes) -> list[str]:
    """Return the text of each page of a PDF that Chromium wrote: a page's text is glyphs, and its fonts say what they stand for."""
    objects = dict[bytes, bytes]()
    for found in re.finditer(rb"(?s)(?:^|\n)(\d+) 0 obj\n(.*?)\nendobj", pdf):
        objects[found[1]] = found[2]

    def stream(number: bytes) -> bytes:
        head, _, rest = objects[number].partition(b"stream\n")
        content = rest[: rest.rindex(b"\nendstream")]
        return zlib.decompress(content) if b"FlateDecode" in head else content

    fonts = dict[bytes, dict[int, str]]()
    for number, body in objects.items():
        if written := re.search(rb"/ToUnicode (\d+) 0 R", body):
            glyphs, table = fonts.setdefault(number, {}), stream(written[1])
            for part in re.findall(rb"(?s)beginbfchar(.*?)endbfchar", table):
                glyphs |= {int(glyph, 16): bytes.fromhex(text.decode()).decode("utf-16-be") for glyph, text in re.findall(rb"<(\w+)> <(\w+)>", part)}
            for part in re.findall(rb"(?s)beginbfrange(.*?)endbfrange", table):
                for first, last, text in re.findall(rb"<(\w+)> <(\w+)> <(\w+)>", part):
                    glyphs |= {int(first, 16) + at: chr(int(text, 16) + at) for at in range(int(last, 16) - int(first, 16) + 1)}
    pages = []
    for body in objects.values():
        if re.search(rb"/Type /Page\b", body) and (content := re.search(rb"/Contents (\d+) 0 R", body)):
            text, glyphs = "", dict[int, str]()
            for font, shown in re.findall(rb"/F(\d+) \S+ Tf|<(\w+)> Tj", stream(content[1])):
                glyphs = fonts[font] if font else glyphs
                text += "".join(glyphs[int(shown[at : at + 4], 16)] for at in range(0, len(shown), 4))
            pages.append(text)
    return pages


async def test_a_printed_statement_has_the_tables_head_on_each_page_and_nothing_to_press(page: Any, tmp_path: Path) -> None:
    users = "".join(f"listener {number:03};family;14,99;app_store\n" for number in range(300))
    users += f"{'w' * 128};{'a plan of many words ' * 5};14,99;web\n"
    rows = f"03/05/2019;{'w' * 128};NL;track 0;9999\n" + "".join(f"02/05/2019;listener {number:03};NL;track {number % 2 * track};{30 + number}\n" for number in range(300) for track in range(2))
    tracks = [{"track_id": f"track {number}", "label": f"label {number}"} for number in range(2)]
    directory = write_import(tmp_path, f"user_id;product_type;fee;origin\n{users}", f"date;user_id;region;track_id;seconds\n{rows}", tracks)
    async with started("--no-simulation", f"--import={directory}") as program:
        await page.emulate_media(color_scheme="dark")
        await page.goto(f"{await program.url()}/{MONEY_VIEW}&label=label+0")
        await page.wait_for_selector(by_testid("statement-row"))
        pages = pdf_pages(await page.pdf(prefer_css_page_size=True))
        said = "".join(pages).replace("\u00a0", " ")
        assert all(said.count(name) == 1 for name in (*(f"listener {number:03}" for number in range(300)), "w" * 128))
        assert len(pages) < 12  # a line each
        heads = [[name in text.replace(" ", "") for name in ("Subscriber", "Secondshere", "Brings")] for text in pages if "listener " in text]
        assert (len(heads) > 5, heads) == (True, [[True] * 3] * len(heads))
        assert [f"{number} of {len(pages)}" in text for number, text in enumerate(pages, 1)] == [True] * len(pages)
        assert ("Statement for label 0, May 2019" in said, "In whole cents that is" in said) == (True, True)
        for pressed in ("Print", "CSV", "API", "Pause", "Menu", "Next", "Previous", "Search"):
            assert pressed not in said
        await page.emulate_media(media="print")
        ground, ink = await page.evaluate("['backgroundColor', 'color'].map(each => getComputedStyle(document.querySelector('dialog'))[each])")
        assert (ground, ink) == ("rgb(255, 255, 255)", "rgb(18, 22, 29)")
        await page.set_viewport_size({"width": 687, "height": 1_000})  # A4 within its margins, at 96 dpi
        beyond = await page.evaluate("[...document.querySelectorAll('dialog *')].filter(each => each.checkVisibility() && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 99))")
        assert beyond == []


CUT_OFF = """selector => [...document.querySelectorAll(selector)].filter(each => each.checkVisibility()).flatMap(each => {
    const scroll = each.closest('.scroll').getBoundingClientRect(), cell = each.getBoundingClientRect()
    return cell.right > scroll.right + 1 || cell.left < scroll.left - 1 ? [each.textContent] : []
})"""


async def test_no_name_or_number_is_so_long_that_a_table_hides_its_figures(page: Any) -> None:
    async with started("--no-simulation") as program:
        url, now = await program.url(), int(time.time())
        names = ["w" * 128, *(f"label {number}" for number in range(20))]
        await post(url, [STREAM | {"label": name, "stream_started_on": now - 60, "seconds_streamed": 2_000_000_000} for name in names for _ in range(40)])
        await page.goto(f"{url}/?all=label")
        await page.wait_for_selector(by_testid("all-label"))
        assert await page.evaluate(CUT_OFF, "dialog td") == []
        await page.goto(f"{url}/?view=money&label={'w' * 128}")
        await page.wait_for_selector(by_testid("statement-row"))
        assert await page.evaluate(CUT_OFF, "dialog :is(td, th)") == []


@pytest.mark.parametrize("width", [768, 1_000])
async def test_all_columns_of_the_money_can_be_seen_on_a_tablet(page: Any, tmp_path: Path, width: int) -> None:
    await page.set_viewport_size({"width": width, "height": 1_024})
    async with money_server(tmp_path) as url:
        await post(url, STREAM | {"user_id": "user 01", "label": "House Recordings", "stream_started_on": MONTHS["2019-05"] + 9, "seconds_streamed": 900_000_000})
        await page.goto(f"{url}/{MONEY_VIEW}")
        await page.wait_for_selector(by_testid("money-row", label="House Recordings"))
        assert await page.evaluate(CUT_OFF, ".shares td") == []


async def test_on_paper_no_heading_of_a_statement_lies_on_its_text_and_a_long_table_begins_on_the_first_page(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path, count=100) as url:
        await page.goto(f"{url}/{MONEY_VIEW}&label=label+00")
        await page.wait_for_selector(by_testid("statement-row"))
        await page.emulate_media(media="print")
        gaps = await page.evaluate("""() => [...document.querySelectorAll('.statement h3')].map(each =>
            each.nextElementSibling.getBoundingClientRect().top - each.getBoundingClientRect().bottom)""")
        assert (len(gaps) >= 2, min(gaps) >= 0) == (True, True)
        await page.keyboard.press("Escape")
        await page.wait_for_selector('main[aria-busy="false"]')
        pages = pdf_pages(await page.pdf(prefer_css_page_size=True))
        first = next(text for text in pages if "1 of " in text).replace("\u00a0", " ")
        assert ("What each label gets" in first, "label 00" in first) == (True, True)


async def show_and_stop(page: Any, *options: str) -> None:
    """Open the page of a server that then goes away, and wait until the page says so."""
    async with started("--no-simulation", *options) as program:
        await page.goto(await program.url())
        await page.wait_for_selector(by_testid("label-row"))
        await program.stop()
    await ask_now(page)
    await page.wait_for_selector(f'{by_testid("status")}:has-text("retrying in")')


async def test_what_a_user_asks_for_while_the_server_is_away_makes_no_wait_longer(page: Any) -> None:
    await show_and_stop(page, "--history=0.1")
    for picked in ("1h", "24h", "15m", "1h"):
        await page.click(by_testid(f"range-{picked}"))
        await page.wait_for_function("document.querySelector('[data-testid=status]').textContent.includes('retrying')")
    assert int(re.findall(r"retrying in (\d+) s", await page.text_content(by_testid("status")))[0]) < 10


async def test_a_statement_that_is_opened_while_the_server_is_away_says_so(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/{MONEY_VIEW}")
        await page.wait_for_selector(by_testid("money-row"))
    await page.click(f"{by_testid('money-row', label='label 00')} .name")
    await page.wait_for_selector("dialog :text('The server could not be')")


async def test_the_dialog_that_closes_a_month_is_of_that_month_only(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path) as url:
        await page.goto(f"{url}/?view=money&month=2019-02")
        await page.click(by_testid("month-row", month="2019-01"))
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        await page.fill(by_testid("typed-month"), "2019-01")
        await page.go_back()
        await page.wait_for_selector(by_testid("typed-month"), state="detached")
        await page.go_forward()
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        async with aiohttp.ClientSession() as session:
            assert await put_month(session, url, "2019-01", "closed") == 200
        await ask_now(page)
        await page.wait_for_selector(by_testid("typed-month"), state="detached")


async def test_a_token_that_no_header_can_hold_is_not_the_right_one(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path, USAGE_TOKEN="s3cret") as url:  # noqa: S106 - of this server
        await page.goto(f"{url}/?view=money&month=2019-01")
        await page.click(f'{by_testid("close-month")}:not([disabled])')
        await page.fill(by_testid("typed-month"), "2019-01")
        await page.click(by_testid("confirm-close"))
        await page.wait_for_selector("text=asks for a token")
        await page.wait_for_function("document.activeElement.dataset.testid === 'token'")
        await page.keyboard.type("s3cret€")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("text=not the right one")


async def test_a_tap_elsewhere_lets_a_pinned_bucket_go(phone: Any) -> None:
    async with started("--no-simulation", "--history=1.2") as program:
        await phone.goto(await program.url())
        await phone.wait_for_selector(by_testid("label-row"))
        await tap_bucket(phone)
        await phone.wait_for_selector(by_testid("tip"))
        heading = await phone.locator("#chart-heading").bounding_box()
        await phone.touchscreen.tap(heading["x"] + 5, heading["y"] + 5)
        await phone.wait_for_selector(by_testid("tip"), state="detached")


async def test_stale_ticks_can_be_read_and_a_day_on_a_phone_has_more_than_one(page: Any) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    await show_and_stop(page, "--history=1")
    ticks = await page.evaluate("""() => [...document.querySelectorAll('.plot text[text-anchor=middle]')].map(each => {
        let seen = 1
        for (let up = each; up; up = up.parentElement) seen *= getComputedStyle(up).opacity
        return seen
    })""")
    assert (len(ticks) > 1, set(ticks)) == (True, {1})


async def test_a_name_that_is_written_from_the_right_keeps_its_beginning(page: Any) -> None:
    name = "שלום עולם " * 10
    async with started("--no-simulation") as program:
        url = await program.url()
        await post(url, STREAM | {"label": name, "track_id": name, "stream_started_on": int(time.time()) - 60})
        for width, query in ((390, ""), (1280, ""), (390, "/?view=money"), (1280, "/?view=money")):
            await page.set_viewport_size({"width": width, "height": 844})
            await page.goto(url + query)
            await page.wait_for_selector(by_testid("money-row" if "money" in query else "event-row"))
            beyond = await page.evaluate("""() => [...document.querySelectorAll('.name bdi, .legend bdi')].filter(each =>
                each.checkVisibility() && each.getBoundingClientRect().right > each.parentElement.getBoundingClientRect().right + 1).map(each => each.parentElement.outerHTML)""")
            assert (width, query, beyond) == (width, query, [])


async def test_a_focus_ring_is_seen_whole(page: Any, tmp_path: Path) -> None:
    async with money_server(tmp_path) as url:
        for query, part in (("/?view=money", ".month"), ("", ".ranking button.name")):
            await page.goto(url + query)
            await page.wait_for_selector(part)
            await page.keyboard.press("Tab")  # so that what has the focus shows it
            ring = await page.evaluate("""part => {
                const each = document.querySelector(part)
                each.focus({ focusVisible: true })
                const style = getComputedStyle(each)
                return [style.outlineStyle, parseFloat(style.outlineWidth) + parseFloat(style.outlineOffset)]
            }""", part)
            assert (part, ring[0], ring[1] <= 0) == (part, "solid", True)


async def test_a_change_is_told_only_against_a_period_that_streams_fill(page: Any, moment: Moment) -> None:
    await moment.open([event(NOW - 60 * number) for number in range(1, 1_500)], "/?range=24h")  # of 25 h
    assert "against" not in await page.text_content(by_testid("beneath"))
