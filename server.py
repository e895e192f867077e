# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.3,<4"]
# ///
"""Seconds streamed: collect usage events, query them, and share out the money that they are worth.

    python server.py            then open http://127.0.0.1:8080, or curl http://127.0.0.1:8080/usage

The words, as the code uses them:

    event         one play of one track by one user, in exactly five fields; a stream is the same
    usage         the events that are kept
    subscription  what a user pays a month, and through whom
    revenue       of a month: what is left of all fees
    block         some events that stand next to each other in the usage: one step of a long answer
    batch         the 1 to 5 events that the simulation makes at a time

Times are Unix seconds, durations are seconds, money is in cents. The limits: one process, one event
loop; all events are in memory, and without --db gone when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import calendar
import contextlib
import csv
import ctypes
import errno
import fcntl
import gc
import gzip
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import signal
import socket
import sqlite3
import stat
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field, replace
from email.utils import formatdate
from fractions import Fraction
from functools import cached_property, lru_cache
from heapq import merge, nsmallest
from http import HTTPStatus
from operator import add, attrgetter, itemgetter
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakValueDictionary

import aiohttp
from aiohttp import hdrs, http_exceptions, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.typedefs import Handler

BLOCK_EVENTS = 1024  # at most, in one block: about 100 kB of JSON and half a millisecond of work
STREAM_BYTES = 64 * 1024  # a longer answer is streamed
GZIP_BYTES = 1024  # a shorter answer is not worth compressing
LARGE_BYTES = 512 * 1024  # so much memory, once it is free, goes back to the system at once
FREEZE_EVENTS = 20_000  # a search for garbage among so many takes some milliseconds
KEPT_BYTES = 1024 * 1024  # a longer answer is made for each who asks
KEPT_ANSWERS = 64
THREADS = 4
REPORTING = 2  # how many reports may be made at a time: the other threads are for what is quick
SUMMING = 4  # how many answers may hold the sums of many groups at a time
SUM_SECONDS = 300  # how long such an answer may hold them
STALL_SECONDS = 60  # a client that takes nothing of its answers for so long is cut off
BODY_BYTES = 1024 * 1024
BODY_SECONDS = 10
POST_EVENTS = 1_000
BUSY_SECONDS = 1  # how long a commit waits for another process that has locked the file
GATHER_SECONDS = 0.001  # how long a commit waits for more to come with it
TURN_SECONDS = 0.002  # how long a long answer may keep the event loop at a stretch
SHUTDOWN_SECONDS = 1.5  # aiohttp waits up to twice this for requests under way; 5 s are promised
LATE_SECONDS = 5  # a batch that is no later than this, or than three intervals, is not missed
FETCH_TIMEOUT = aiohttp.ClientTimeout(total=30)
BACKLOG = 1024  # how many connections may wait to be taken
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DAY = 86_400

STATE: web.AppKey[State] = web.AppKey("state")

T = TypeVar("T")

log = logging.getLogger("server")


# ── Events ──────────────────────────────────────────────────────────────────────────────────────
# What an event is: the only place where one is checked and encoded.

NAMES = ("user_id", "track_id", "label")
FIELDS = (*NAMES, "stream_started_on", "seconds_streamed")
EVENT_KEYS = frozenset(FIELDS)

# Control characters forge log lines and break CSV; lone surrogates cannot be written as UTF-8.
FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
TEXT_CHARACTERS = 128

SECONDS = tuple(range(DAY + 1))  # what a stream can have lasted
CSV_END = "\r\n"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
quote = json.encoder.encode_basestring  # what `to_json` does with a text


class InvalidError(ValueError):
    """What a client asked for or sent is malformed; the message names the field or parameter."""


class MissingError(LookupError):
    """There is nothing under this id."""


@dataclass(slots=True, eq=False)
class Event:
    """One play of one track by one user.

    `stream_started_on` is in Unix seconds, `seconds_streamed` in seconds. `id`, from 1, is the order
    of arrival: `Usage.number` gives it. From then on an event is never changed.
    """

    user_id: str
    track_id: str
    label: str
    stream_started_on: int
    seconds_streamed: int
    id: int = 0

    def __post_init__(self) -> None:
        # The same few names and numbers come again and again: one object of each takes half the memory.
        self.user_id, self.track_id = sys.intern(self.user_id), sys.intern(self.track_id)
        self.label, self.seconds_streamed = sys.intern(self.label), SECONDS[self.seconds_streamed]

    @property
    def json(self) -> bytes:
        """The five fields as compact JSON."""
        return (
            f'{{"user_id":{quote(self.user_id)},"track_id":{quote(self.track_id)},"label":{quote(self.label)},'
            f'"stream_started_on":{self.stream_started_on},"seconds_streamed":{self.seconds_streamed}}}'
        ).encode()

    @property
    def stream(self) -> bytes:
        """The JSON with the id before the five keys."""
        return b'{"id":%d,%b' % (self.id, self.json[1:])

    @property
    def csv(self) -> str:
        """The line of a CSV file."""
        names = encode_cells(self.user_id, self.track_id, self.label)
        return f"{names},{self.stream_started_on},{self.seconds_streamed}{CSV_END}"


@lru_cache(maxsize=1024)
def encode_cells(*cells: object) -> str:
    """Return a line as RFC 4180 has it, without its end, and with no cell that a spreadsheet runs."""
    text = io.StringIO()
    csv.writer(text).writerow(
        f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell for cell in cells
    )
    return text.getvalue()[: -len(CSV_END)]


def check_text(name: str, value: object) -> str:
    """Return `value` if it is 1 to 128 characters and none of them a control character.

    Raises InvalidError, which names the field or parameter `name`.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= TEXT_CHARACTERS:
        raise InvalidError(f"{name} must be a text of 1 to {TEXT_CHARACTERS} characters")
    if not value.isprintable() and FORBIDDEN_CHARACTERS.search(value):  # the first is quick
        raise InvalidError(f"{name} must not contain control characters")
    return value


def check_int(name: str, value: object, high: int) -> int:
    """Return `value` if it is an int from 0 to `high`: `true` is none, and neither is `1.0`."""
    if type(value) is not int or not 0 <= value <= high:
        raise InvalidError(f"{name} must be an int from 0 to {high}")
    return value


def check_keys(name: str, value: object, keys: Set[str]) -> dict[str, Any]:
    """Return `value` if it is a JSON object with just these keys."""
    if not isinstance(value, dict):
        raise InvalidError(f"{name} must be an object")
    if value.keys() == keys:
        return value
    for key in value:
        if key not in keys:
            raise InvalidError(f"{key[:TEXT_CHARACTERS]!r} is an unknown key of {name}")
    raise InvalidError(f"{min(keys - value.keys())} is missing in {name}")


def parse_event(value: object, now: float) -> Event:
    """Return the event that `value`, parsed JSON, is; `now` is in Unix seconds.

    Raises InvalidError, which names the field: the one validation of an event.
    """
    fields = check_keys("the event", value, EVENT_KEYS)
    return Event(
        check_text("user_id", fields["user_id"]),
        check_text("track_id", fields["track_id"]),
        check_text("label", fields["label"]),
        check_int("stream_started_on", fields["stream_started_on"], int(now)),
        check_int("seconds_streamed", fields["seconds_streamed"], DAY),
    )


def parse_events(value: object, now: float) -> list[Event]:
    """Return the event, or the array of 1 to 1,000 events, that `value` is; an error names the index."""
    if not isinstance(value, list):
        return [parse_event(value, now)]
    if not 1 <= len(value) <= POST_EVENTS:
        raise InvalidError(f"an array must hold 1 to {POST_EVENTS} events")
    events: list[Event] = []
    try:
        for item in value:
            events.append(parse_event(item, now))  # noqa: PERF401 - its length is the index
    except InvalidError as error:
        raise InvalidError(f"[{len(events)}]: {error}") from None
    return events


# ── Usage ───────────────────────────────────────────────────────────────────────────────────────
# The events that are kept, and the questions that can be asked about them.


class Block(list[Event]):
    """Some events in order. It is never changed, so what has been found out about it stays true."""

    @cached_property
    def json(self) -> bytes:
        """The JSON of each event, with a comma before it."""
        return b"".join([b"," + event.json for event in self])

    @cached_property
    def sums(self) -> dict[tuple[str, ...], Totals]:
        """What `sum_up` has found out."""
        return {}


class Blocks:
    """Events in order of a field, equal ones in order of their ids, in a deque of blocks.

    A writer puts a new block in the place of an old one. So a reader that has got blocks sees one
    moment, however slowly it reads, without a copy of its own; and an event that belongs into the
    middle costs the copy of one block instead of shifting the whole deque.
    """

    def __init__(self, field: str) -> None:
        """Order by the field with this name, an int."""
        self.rank = attrgetter(field)
        self.key = attrgetter(field, "id")
        self.blocks: deque[Block] = deque()

    def add(self, events: Iterable[Event]) -> None:
        """Put each event in its place."""
        if not self.blocks:
            self._replace(0, sorted(events, key=self.key))
            return
        for at, group in self._by_block(events):
            changed = [*self.blocks[at]]
            if len(group) > len(changed) // 16:  # sorting anew is quicker than finding so many places
                changed = sorted(changed + group, key=self.key)
            else:
                for event in group:
                    insort(changed, event, key=self.key)
            self._replace(at, changed)

    def remove(self, events: Iterable[Event]) -> None:
        """Take out events that are there."""
        for at, group in self._by_block(events):
            gone = set(group)
            self._replace(at, [event for event in self.blocks[at] if event not in gone])

    def between(self, low: int | None = None, high: int | None = None) -> deque[Block]:
        """Return the events with `low <= field < high`, in order, as blocks."""
        first, end = 0, len(self.blocks)
        if low is not None:
            first = bisect_left(self.blocks, low, key=lambda block: self.rank(block[-1]))
        if high is not None:
            end = bisect_left(self.blocks, high, key=lambda block: self.rank(block[0]))
        found = deque(itertools.islice(self.blocks, first, end))
        if found and low is not None:
            found[0] = Block(found[0][bisect_left(found[0], low, key=self.rank) :])
        if found and high is not None:
            found[-1] = Block(found[-1][: bisect_left(found[-1], high, key=self.rank)])
        return found

    def _by_block(self, events: Iterable[Event]) -> Iterator[tuple[int, list[Event]]]:
        """Yield the place of each block that events belong to, and these: the last first, so none moves."""
        pending = sorted(events, key=self.key)
        while pending:
            after = bisect_right(self.blocks, self.key(pending[-1]), key=lambda block: self.key(block[0]))
            at = max(0, after - 1)
            first = bisect_left(pending, self.key(self.blocks[at][0]), key=self.key) if at else 0
            yield at, pending[first:]
            del pending[first:]

    def _replace(self, at: int, events: list[Event]) -> None:
        """Put `events` in the place of the block there, cut into blocks of about equal length."""
        if self.blocks:
            del self.blocks[at]
        parts = math.ceil(len(events) / BLOCK_EVENTS)
        for part in reversed(range(parts)):
            first, end = len(events) * part // parts, len(events) * (part + 1) // parts
            self.blocks.insert(at, Block(events[first:end]))


class Totals(dict[Any, tuple[int, int]]):
    """Streams and seconds under a key each; what has no stream has no key."""

    def count(self, key: Any, streams: int, seconds: int) -> None:
        """Add to what stands under `key`."""
        before = self.get(key, (0, 0))
        if before[0] + streams:
            self[key] = (before[0] + streams, before[1] + seconds)
        else:
            del self[key]


@lru_cache(maxsize=4096)
def month_of(day: int) -> str:
    """Return the month, as in 2019-03, in which the day with this number since 1970 lies, in UTC."""
    return time.strftime("%Y-%m", time.gmtime(day * DAY))


class Usage:
    """The events that are kept, and their totals, which the report reads."""

    def __init__(self, keep: float = math.inf) -> None:
        """Keep the `keep` events that started last."""
        self.keep = keep
        self.by_start = Blocks("stream_started_on")
        self.by_id = Blocks("id")
        self.months: defaultdict[str, Totals] = defaultdict(Totals)  # of each: (user_id, label)
        self.tracks = Totals()  # (user_id, track_id)
        self.keys: dict[str, tuple[bytes, int]] = {}  # idempotency key -> hash of the body, first id
        self.count = 0
        self.last_id = 0
        self.frozen = 0  # the last id when the events were last set apart for the garbage collector
        self.etag = secrets.token_hex(8)  # another one after every change, and after every start
        self.warned = False

    def number(self, events: Sequence[Event]) -> None:
        """Give each event its id, which no other has ever had."""
        for event in events:
            self.last_id += 1
            event.id = self.last_id

    def add(self, events: Sequence[Event]) -> None:
        """Keep numbered events; then drop the oldest above `keep`."""
        self.by_start.add(events)
        self.by_id.add(events)
        self._count(events, 1)
        if self.last_id >= self.frozen + FREEZE_EVENTS:  # none is garbage, so none is searched
            self.frozen = self.last_id
            gc.freeze()
        if self.count <= self.keep:
            return
        if not self.warned:
            self.warned = True
            log.warning("there are more than %d events: from now on the oldest go (--keep, --db)", self.keep)
        oldest = itertools.chain.from_iterable(self.by_start.blocks)
        self.remove(list(itertools.islice(oldest, int(self.count - self.keep))))

    def find(self, stream_id: int) -> Event:
        """Return the event with this id; raises MissingError."""
        for event in itertools.chain(*self.by_id.between(stream_id, stream_id + 1)):
            return event
        raise MissingError(f"there is no stream {stream_id}")

    def replace(self, old: Event, new: Event) -> None:
        """Put `new` in the place of `old`, which has the same id."""
        self.remove([old])
        self.add([new])

    def remove(self, events: Sequence[Event]) -> None:
        """Forget events that are there."""
        self.by_start.remove(events)
        self.by_id.remove(events)
        self._count(events, -1)

    def _count(self, events: Sequence[Event], sign: int) -> None:
        self.etag = secrets.token_hex(8)
        self.count += sign * len(events)
        sums = Totals()
        for event in events:
            key = (event.stream_started_on // DAY, event.user_id, event.label, event.track_id)
            sums.count(key, sign, sign * event.seconds_streamed)
        for (day, user, label, track), (streams, seconds) in sums.items():
            self.months[month_of(day)].count((user, label), streams, seconds)
            self.tracks.count((user, track), streams, seconds)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def matching(blocks: deque[Block], names: Mapping[str, Set[str]]) -> Iterator[Block]:
    """Yield each block without the events whose user, track or label is none of those asked for.

    `blocks` is used up, so that a slow reader holds only what it has yet to read.
    """
    while blocks:
        found = blocks.popleft()
        for name, wanted in names.items():
            found = Block([event for event in found if getattr(event, name) in wanted])
        yield found


WINDOWS = {"minute": 60, "hour": 3_600, "day": DAY}  # and month, which has no fixed length


def window_start(window: str, started: int) -> int:
    """Return when the minute, hour, day or month in UTC began in which `started` lies."""
    if window == "month":
        return calendar.timegm(time.strptime(month_of(started // DAY), "%Y-%m"))
    return started - started % WINDOWS[window]


def in_windows(events: list[Event], window: str) -> Iterator[tuple[int, list[Event]]]:
    """Yield each window that `events`, in order of start, lie in: when it began, and its events."""

    def began(event: Event) -> int:
        return window_start(window, event.stream_started_on)

    at = 0
    while at < len(events):
        start = began(events[at])
        if at == 0 and began(events[-1]) == start:
            yield start, events  # as it is, for it may know its sums
            return
        end = bisect_right(events, start, at, key=began)
        yield start, events[at:end]
        at = end


def sum_up(events: list[Event], by: tuple[str, ...]) -> Totals:
    """Return the totals of each combination of `by`; a block remembers them, if they are few."""
    known = events.sums if isinstance(events, Block) else {}
    if by in known:
        return known[by]
    seconds: defaultdict[Any, list[int]] = defaultdict(list)
    keys = zip(*(map(attrgetter(name), events) for name in by), strict=True) if by else itertools.repeat(())
    for key, streamed in zip(keys, map(attrgetter("seconds_streamed"), events), strict=False):
        seconds[key].append(streamed)
    sums = Totals((key, (len(each), sum(each))) for key, each in seconds.items())
    if len(sums) <= len(events) // 16:
        known[by] = sums
    return sums


def rank(sums: Totals, columns: Sequence[str], *first: int) -> Iterator[list[dict[str, Any]]]:
    """Yield a row for each key, most seconds first, ties in order of the names.

    There may be a million: so they are sorted in runs, which are merged, with a step after each.
    """

    def place(key: Any) -> tuple[int, Any]:
        return -sums[key][1], key

    def used_up(keys: list[Any]) -> Iterator[Any]:
        while keys:
            yield keys.pop()

    runs = []
    for keys in batched(sums, BLOCK_EVENTS):
        runs.append(sorted(keys, key=place, reverse=True))
        yield []
    # What has been told is forgotten step by step: to free all of it at the end would hold others up.
    for keys in batched(merge(*map(used_up, runs), key=place), BLOCK_EVENTS):
        yield [dict(zip(columns, (*first, *key, *sums.pop(key)), strict=True)) for key in keys]


def grouped(
    blocks: Iterable[list[Event]], by: tuple[str, ...], window: str | None, columns: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Yield rows of the combinations of `by`, with a `window` those of each, in order of time.

    Lists of rows come in steps, many of them empty, so that others can be let in between.
    """
    sums, began = Totals(), -1
    for block in blocks:
        for start, events in in_windows(block, window) if window else [(began, block)]:
            if start != began:
                yield from rank(sums, columns, began)
                sums, began = Totals(), start
            for key, (streams, seconds) in sum_up(events, by).items():
                sums.count(key, streams, seconds)
        yield []
    yield from rank(sums, columns, *([began] if window else []))


# ── Royalties ───────────────────────────────────────────────────────────────────────────────────
# Who is owed what. Money is in ints: cents, or hundredths of a cent before the revenue is rounded.

FACTORS = {"app_store": 70, "web": 90}  # per cent: what the store or the payment provider leaves
FEE = re.compile(r"([0-9]{1,5})(?:\.([0-9]{1,2}))?")
HIGHEST_FEE = 1_000_000  # cents
CURRENCY = "EUR"
AMOUNTS = ("amount", "amount_user_centric")
ADJUSTMENTS = ("adjustment", "adjustment_user_centric")
LABEL_COLUMNS = ("label", "streams", "seconds_streamed", "share", *AMOUNTS, *ADJUSTMENTS)
REPORT_COLUMNS = ("month", "currency", *LABEL_COLUMNS)
PAYER_COLUMNS = ("user_id", "product_type", "fee", "origin", "net", "seconds_streamed", "of_seconds", "part")
BITS = 128  # of a claim: what is cut off leaves a doubt only at a tie
STEP_USERS = 50  # with a few labels each a fraction of a millisecond's work

Steps = Generator[None, None, T]  # long work: yields where others may go on, and returns a T
ByLabel = Mapping[str, tuple[int, int]]  # streams and seconds
ByUser = Mapping[str, Mapping[str, tuple[int, int]]]
Claims = Mapping[str, tuple[int, int]]  # of labels, each with by how much it may be too low
Parts = Counter[int]  # the numerators of fractions, by denominator, for many have the same
Figures = tuple[int, int, int, int]  # of a label: streams, seconds, cents pro rata, cents user-centric
Cents = tuple[int, int]  # pro rata, user-centric
Adjustments = Mapping[str, Mapping[str, Cents]]  # month that they are for -> label


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a user subscribes to; `fee` is in cents a month."""

    product_type: str
    fee: int
    origin: str

    @property
    def net(self) -> int:
        """What is left of the fee, in hundredths of a cent."""
        return self.fee * FACTORS[self.origin]


SUBSCRIPTIONS = {
    "user1": Subscription("premium", 799, "app_store"),
    "user2": Subscription("platinum", 1499, "web"),
    "user3": Subscription("premium", 799, "web"),
}


def parse_subscription(value: object) -> Subscription:
    """Return the subscription that `value`, parsed JSON, is; raises InvalidError, which names the field."""
    fields = check_keys("the subscription", value, {"product_type", "fee", "origin"})
    fee = FEE.fullmatch(check_text("fee", fields["fee"]))
    cents = int(fee[1]) * 100 + int((fee[2] or "").ljust(2, "0")) if fee else math.inf
    if cents > HIGHEST_FEE:
        raise InvalidError("fee must be a decimal text from 0 to 10000 with two decimals at most")
    if fields["origin"] not in tuple(FACTORS):
        raise InvalidError(f"origin must be one of {', '.join(FACTORS)}")
    return Subscription(check_text("product_type", fields["product_type"]), int(cents), fields["origin"])


def euros(units: int, places: int = 2) -> str:
    """Write cents as a decimal; with more `places`, fractions of them."""
    whole, rest = divmod(abs(units), 10**places)
    return f"{'-' * (units < 0)}{whole}.{rest:0{places}}"


@dataclass(frozen=True)
class Ledger:
    """What a month's streams and fees come to: `fees` and `revenue` in cents, the rest in hundredths of one.

    A label's user-centric claim is the sum, over users, of net fee x seconds of the label / seconds of the
    user; the fees of the silent, who streamed nothing, go by the seconds of all. It is added up as price
    of a second x seconds, in 2^-BITS of the unit. Each price is cut by less than that, and two are paid
    for a second: so a claim is too low by less than twice the label's seconds.
    """

    totals: ByUser
    subscriptions: Mapping[str, Subscription]
    labels: ByLabel  # streams and seconds
    claims: Claims
    seconds: int
    fees: int
    net: int
    revenue: int  # rounded once, half up
    silent: int
    silent_users: int


def seconds_of(labels: ByLabel) -> int:
    """Add up the seconds of such totals."""
    return sum(seconds for _, seconds in labels.values())


def tally(totals: ByUser, subscriptions: Mapping[str, Subscription]) -> Steps[Ledger]:
    """Return a month's ledger: the one place where its seconds and fees are added up."""
    fees = net = 0
    for some in batched(subscriptions.values(), STEP_USERS):
        yield
        fees += sum(each.fee for each in some)
        net += sum(each.net for each in some)
    silent, silent_users, labels, claims = net, len(subscriptions), Totals(), Counter[str]()
    for listeners in batched(totals.items(), STEP_USERS):
        yield
        for user, own in listeners:
            price, heard = 0, seconds_of(own)
            if heard and (found := subscriptions.get(user)):
                price = (found.net << BITS) // heard
                silent, silent_users = silent - found.net, silent_users - 1
            for label, (streams, seconds) in own.items():
                labels.count(label, streams, seconds)
                claims[label] += price * seconds
    whole = seconds_of(labels)
    price = (silent << BITS) // (whole or 1)
    low = {label: (claims[label] + price * seconds, 2 * seconds) for label, (_, seconds) in labels.items()}
    revenue = (net + 50) // 100
    return Ledger(totals, subscriptions, labels, low, whole, fees, net, revenue, silent, silent_users)


def find_listeners(ledger: Ledger) -> Iterator[list[tuple[str | None, int, ByLabel, int]]]:
    """Yield in steps who listened: net fee, totals by label, all seconds; then, as None, all the silent."""
    for some in batched(ledger.totals.items(), STEP_USERS):
        found = [(ledger.subscriptions.get(user), user, own) for user, own in some]
        yield [(user, each.net if each else 0, own, seconds_of(own)) for each, user, own in found]
    yield [(None, ledger.silent, ledger.labels, ledger.seconds)]


def find_parts(ledger: Ledger, labels: Set[str]) -> Steps[dict[str, Parts]]:
    """Return the fractions that the exact claims of some labels are the sums of."""
    parts = {label: Counter[int]() for label in labels}
    for some in find_listeners(ledger):
        yield
        for _, net, own, heard in some:
            for label in labels & own.keys():
                part = Fraction((net << BITS) * own[label][1], heard or 1)
                parts[label][part.denominator] += part.numerator
    return parts


def add_parts(parts: Parts) -> Steps[Fraction]:
    """Add up fractions two by two, so that long numbers only meet long ones."""
    sums = [(numerator, denominator) for denominator, numerator in parts.items() if numerator] or [(0, 1)]
    while len(sums) > 1:
        yield
        odd = sums[len(sums) & ~1 :]
        sums = [(a * d + c * b, b * d) for (a, b), (c, d) in zip(sums[::2], sums[1::2], strict=False)] + odd
    return Fraction(*sums[0])


def share_out(cents: int, whole: int, claims: Claims, ledger: Ledger) -> Steps[dict[str, int]]:
    """Share out `cents` by a ledger's claims, `whole` in sum, to the last cent: by the largest remainder.

    Each gets its share rounded down; what is left goes, a cent each, to those who lost most by the
    rounding, ties in order of the name. Claims may be too low. That matters only where the last who gets a
    cent is no further from the next, who gets none: then the exact differences of those near them decide.
    (A claim that is cut to just below a whole cent has lost so much that it gets the cent again.)
    """
    shares = {name: divmod(cents * claim, whole) for name, (claim, _) in claims.items()}
    order = sorted(shares, key=lambda name: (-shares[name][1], name))
    rests = [shares[name][1] for name in order]
    left = cents - sum(share for share, _ in shares.values())
    width = cents * max((off for _, off in claims.values()), default=0)
    if width and 0 < left < len(order) and rests[left - 1] - rests[left] <= width:
        near = [name for name in order if abs(shares[name][1] - rests[left - 1]) <= width]
        parts, exact = (yield from find_parts(ledger, set(near))), {}
        for name in near:
            difference = Counter(parts[name])
            difference.subtract(parts[near[0]])
            exact[name] = cents * (yield from add_parts(difference)) - whole * shares[name][0]
        at = order.index(near[0])
        order[at : at + len(near)] = sorted(near, key=lambda name: (-exact[name], name))
    return {name: shares[name][0] + (at < left) for at, name in enumerate(order)}


def share_month(ledger: Ledger) -> Steps[dict[str, Figures]]:
    """Return each label's streams and seconds, and the cents that it is owed pro rata and user-centric."""
    cents = ledger.revenue if ledger.seconds else 0
    by_seconds = {label: (seconds, 0) for label, (_, seconds) in ledger.labels.items()}
    pro_rata = yield from share_out(cents, ledger.seconds or 1, by_seconds, ledger)
    centric = yield from share_out(cents, (ledger.net or 1) << BITS, ledger.claims, ledger)
    return {label: (*of, pro_rata[label], centric[label]) for label, of in ledger.labels.items()}


@dataclass(frozen=True)
class Account:
    """A month's money, in cents: what was frozen when it was closed, or what closing it now would freeze."""

    closed_on: int | None
    totals: ByUser
    subscriptions: Mapping[str, Subscription]
    fees: int
    revenue: int
    labels: Mapping[str, Figures]
    adjustments: Adjustments  # what is paid with this month for others

    @property
    def status(self) -> str:
        """Whether it was closed."""
        return "open" if self.closed_on is None else "closed"

    def lines(self) -> dict[str, list[int]]:
        """Return each label's figures and, after them, the sums of its adjustments."""
        lines = {label: [*figures, 0, 0] for label, figures in self.labels.items()}
        for label, cents in itertools.chain(*(of_month.items() for of_month in self.adjustments.values())):
            line = lines.setdefault(label, [0] * 6)
            line[4:] = map(add, line[4:], cents)
        return lines


@dataclass
class Month:
    """A month's totals as they are now and, once it is closed, its account."""

    totals: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    closed: Account | None = None
    _late: list[dict[str, Cents]] = field(default_factory=list)  # what `find_late` found, or nothing yet
    _shared: bool = False

    def change(self, user: str, labels: dict[str, tuple[int, int]]) -> None:
        """Put a user's totals by label in the place of those before; they must not change any more."""
        if self._shared:
            self.totals, self._shared = dict(self.totals), False
        if labels:
            self.totals[user] = labels
        else:
            self.totals.pop(user, None)
        self._late = []  # a new list: who reads an earlier snapshot writes into the old one

    def close(self, account: Account | None) -> None:
        """Close the month with this account or, with none, open it again."""
        self.closed, self._late = account, []

    def snapshot(self) -> Month:
        """Return the month as it is now; the next change copies the totals that the two share."""
        self._shared = True
        return replace(self)

    def find_late(self) -> Steps[Mapping[str, Cents]]:
        """Return how much more each label of a closed month would get now, where that is not nothing."""
        if self.closed and not self._late:
            now = yield from share_month((yield from tally(self.totals, self.closed.subscriptions)))
            both = ({label: of[2:] for label, of in owed.items()} for owed in (now, self.closed.labels))
            self._late.append(subtract(*both))
        return self._late[0] if self.closed else {}


@dataclass
class Books:
    """All that money follows from. Who reads in steps needs a snapshot: others write in between."""

    months: defaultdict[str, Month]
    subscriptions: dict[str, Subscription]

    def snapshot(self) -> Books:
        """Return the books as they are now."""
        months = {name: month.snapshot() for name, month in self.months.items()}
        return Books(defaultdict(Month, months), dict(self.subscriptions))

    def closed(self) -> dict[str, Account]:
        """Return the accounts of the closed months, in order."""
        return {name: month.closed for name, month in sorted(self.months.items()) if month.closed}

    def streamed(self) -> list[str]:
        """Return the open months with a stream, in order."""
        return sorted(name for name, month in self.months.items() if month.totals and not month.closed)

    def target(self) -> str:
        """Return the month that adjustments go to: the first of these or, with none, after the closed."""
        return next(iter(self.streamed() or map(next_month, reversed(self.closed()))), "")

    def obstacle(self, month: str, status: str, now: float) -> str:
        """Return what stands in the way of making a month closed or open; "" when it is so, or can be."""
        closed, first = self.closed(), min(self.streamed(), default=month)
        if (month in closed) == (status == "closed"):
            return ""
        if status == "open":
            return f"{max(closed)} is closed: open it first" if max(closed) > month else ""
        if month >= month_of(int(now) // DAY):
            return f"{month} is not over"
        return f"{first} has streams and is open: close it first" if first < month else ""


def next_month(month: str) -> str:
    """Return the month after a month such as 2019-12."""
    year, number = map(int, month.split("-"))
    return f"{year + number // 12:04}-{number % 12 + 1:02}"


def subtract(these: Mapping[str, Cents], those: Mapping[str, Cents]) -> dict[str, Cents]:
    """Return by how much the labels' amounts differ, where they do."""
    pairs = ((label, these.get(label, (0, 0)), those.get(label, (0, 0))) for label in {**these, **those})
    return {label: (a - c, b - d) for label, (a, b), (c, d) in pairs if (a, b) != (c, d)}


def find_due(books: Books) -> Steps[Adjustments]:
    """Return what is still to be paid for each month: what the closed would get now less what was paid."""
    due: dict[str, Mapping[str, Cents]] = {}
    for name in books.closed():
        due[name] = yield from books.months[name].find_late()
    for account in books.closed().values():
        for name, paid in account.adjustments.items():  # for months that are open again, too
            due[name] = subtract(due.get(name, {}), paid)
    return {name: of_month for name, of_month in sorted(due.items()) if of_month}


def find_account(books: Books, name: str, closed_on: int | None = None) -> Steps[Account]:
    """Return what was frozen of a month or, when it is open, what closing it now freezes."""
    month = books.months.get(name, Month())
    if month.closed:
        return month.closed
    ledger = yield from tally(month.totals, books.subscriptions)
    labels = yield from share_month(ledger)
    due = (yield from find_due(books)) if name == books.target() else {}
    return Account(closed_on, month.totals, books.subscriptions, ledger.fees, ledger.revenue, labels, due)


def find_accounts(books: Books) -> Steps[dict[str, Account]]:
    """Return all months that have a stream or an adjustment, or are closed, in order."""
    found = {}
    for name in sorted({*books.months, books.target()}):
        account = yield from find_account(books, name)
        if account.totals or account.adjustments or account.status == "closed":
            found[name] = account
    return found


def describe_month(books: Books, name: str, account: Account) -> Steps[dict[str, Any]]:
    """Return the row of a month in the list of months."""
    late = yield from books.months.get(name, Month()).find_late()
    streams, seconds, amount, _, adjusted, _ = map(sum, zip([0] * 6, *account.lines().values(), strict=True))
    row = {"month": name, "status": account.status, "closed_on": account.closed_on}
    row |= {"subscribers": len(account.subscriptions), "streams": streams, "seconds_streamed": seconds}
    row |= {"fees": euros(account.fees), "revenue": euros(account.revenue), "distributed": euros(amount)}
    return row | {"adjusted": euros(adjusted), "late": len(late)}


def write_lines(lines: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Return the report's lines for each label's figures: highest amount first, then by name."""
    whole = sum(line[1] for line in lines.values()) or 1
    written = []
    for label, (streams, seconds, *cents) in sorted(lines.items(), key=lambda item: (-item[1][2], item[0])):
        share = round(seconds / whole, 6)  # no money, so a float will do
        cells = label, streams, seconds, share, *map(euros, cents)
        written.append(dict(zip(LABEL_COLUMNS, cells, strict=True)))
    return written


def report(books: Books, month: str | None = None) -> Steps[tuple[dict[str, Any], Iterator[dict[str, Any]]]]:
    """Return the report over a month, or over all with a stream or an adjustment, and its CSV's rows."""
    if month:
        accounts = {month: (yield from find_account(books, month))}
    else:
        every = yield from find_accounts(books)
        accounts = {name: account for name, account in every.items() if account.totals or account.adjustments}
    added = defaultdict[str, list[int]](lambda: [0] * 6)
    for account in accounts.values():
        yield
        for label, figures in account.lines().items():
            added[label] = list(map(add, figures, added[label]))
    _, seconds, amount, _, adjusted, _ = map(sum, zip([0] * 6, *added.values(), strict=True))
    data: dict[str, Any] = {"currency": CURRENCY, "months": list(accounts)}
    data |= {"status": accounts[month].status} if month else {}
    data |= {"subscribers": len(accounts[month].subscriptions if month else books.subscriptions)}
    data |= {"revenue": euros(sum(account.revenue for account in accounts.values()))}
    data |= {"distributed": euros(amount), "adjusted": euros(adjusted), "seconds_streamed": seconds}
    rows = (
        {"month": name, "currency": CURRENCY} | line
        for name, account in accounts.items()
        for line in write_lines(account.lines())
    )
    return data | {"labels": write_lines(added)}, rows


def find_payers(ledger: Ledger, label: str) -> Steps[tuple[list[dict[str, Any]], list[int]]]:
    """Return a statement's rows of subscribers, and the seconds of each listener who does not subscribe."""
    rows, others = [], []
    for some in find_listeners(ledger):
        yield
        for user, net, own, heard in some:
            _, seconds = own.get(label, (0, 0))
            found = ledger.subscriptions.get(user or "")
            if (found and seconds) or (not user and ledger.silent_users):
                part = 100 * net * seconds // (heard or 1)
                terms = (found.product_type, euros(found.fee), found.origin) if found else (None,) * 3
                cells = user, *terms, euros(100 * net, 6), seconds, heard, euros(part, 6)
                rows.append((not user, -part, user, dict(zip(PAYER_COLUMNS, cells, strict=True))))
            elif user and seconds:
                others.append(seconds)
    return [row for *_, row in sorted(rows, key=itemgetter(0, 1, 2))], others


def statement(books: Books, month: str, label: str) -> Steps[dict[str, Any]]:
    """Return why a label is owed its amounts, every figure cut; raises MissingError if it has nothing."""
    account = yield from find_account(books, month)
    lines = account.lines()
    if label not in lines:
        raise MissingError(f"there is nothing for the label {label!r} in {month}")
    ledger = yield from tally(account.totals, account.subscriptions)
    payers, others = yield from find_payers(ledger, label)
    _, seconds, amount, centric_amount, *_ = lines[label]
    low, off = ledger.claims.get(label, (0, 0))
    scales = Fraction(100, 1 << BITS), Fraction(account.revenue * 10_000, (ledger.net or 1) << BITS)
    cuts, highest = ([int(scale * claim) for scale in scales] for claim in (low, low + off))
    if cuts != highest:
        parts = yield from find_parts(ledger, {label})
        claim = yield from add_parts(parts[label])
        cuts = [int(scale * claim) for scale in scales]

    def round_to(paid: int, exact: int) -> dict[str, Any]:
        down = exact // 10_000
        return {"exact": euros(exact, 6), "rounded_down": euros(down), "cent_added": paid > down}

    adjustments = [
        {"month": name} | dict(zip(AMOUNTS, map(euros, cents[label]), strict=True))
        for name, cents in account.adjustments.items()
        if label in cents
    ]
    revenue = {"revenue": euros(account.revenue)}
    pro_rata = round_to(amount, account.revenue * 10_000 * seconds // (ledger.seconds or 1))
    sums = {"sum": euros(cuts[0], 6), "of_sum": euros(100 * ledger.net, 6)}
    return {
        "month": month,
        "status": account.status,
        "currency": CURRENCY,
        "line": next(line for line in write_lines(lines) if line["label"] == label),
        "pro_rata": revenue | {"seconds_streamed": seconds, "of_seconds": ledger.seconds} | pro_rata,
        "user_centric": {"subscribers": payers} | sums | revenue | round_to(centric_amount, cuts[1]),
        "listeners_without_subscription": {"users": len(others), "seconds_streamed": sum(others)},
        "adjustments": adjustments,
    }


def finish(steps: Steps[T]) -> T:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast("T", end.value)


def describe_users(
    tracks: Totals, months: Iterable[Totals], subscriptions: Mapping[str, Subscription], only: str | None
) -> Iterator[dict[str, Any]]:
    """Yield who streamed or subscribes, all or `only` one, in order of id: seconds by label and track."""
    rows = [(user, "", "", (0, 0)) for user in subscriptions]
    rows += [(user, "tracks", track, total) for (user, track), total in tracks.items()]
    rows += [(user, "labels", label, total) for totals in months for (user, label), total in totals.items()]
    wanted = rows if only is None else [row for row in rows if row[0] == only]
    for user, own in itertools.groupby(sorted(wanted), key=itemgetter(0)):
        described = {"user_id": user, "streams": 0, "seconds_streamed": 0, "labels": {}, "tracks": {}}
        for _, kind, name, (streams, seconds) in own:
            if kind:
                described[kind][name] = described[kind].get(name, 0) + seconds
            if kind == "tracks":
                described["streams"] += streams
                described["seconds_streamed"] += seconds
        found = subscriptions.get(user)
        described["subscription"] = asdict(found) | {"fee": euros(found.fee)} if found else None
        yield described


# ── Import ──────────────────────────────────────────────────────────────────────────────────────
# The three files of a royalty backend: all that they hold or, with a list of their faults, nothing.

USER_COLUMNS = ("user_id", "product_type", "fee", "origin")
STREAM_COLUMNS = ("date", "user_id", "region", "track_id", "seconds")


class ImportFailedError(Exception):
    """The files cannot be imported; the message names file, line and fault, one a line, 20 at most."""


class Import:
    """What `users.csv` and `streaming.csv` hold, with the labels that the tracks belong to."""

    def __init__(self, directory: Path, tracks: bytes, now: float) -> None:
        """Read everything; raises ImportFailedError with the faults of all files together."""
        self.now = now
        self.hash = hashlib.sha256(tracks).digest()
        self.faults: list[str] = []
        self.labels: dict[str, str] = {}
        self.subscriptions: dict[str, Subscription] = {}
        self.events: list[Event] = []
        self._read_tracks(tracks)
        self._read_rows(directory / "users.csv", USER_COLUMNS, self._add_user)
        self._read_rows(directory / "streaming.csv", STREAM_COLUMNS, self._add_stream)
        if self.faults:
            raise ImportFailedError("\n".join(self.faults[:20]))

    @contextlib.contextmanager
    def _noting(self, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.faults.append(f"{where}: {error.strerror}")
        except (ValueError, RecursionError, csv.Error) as error:
            self.faults.append(f"{where}: {error}")

    def _read_tracks(self, tracks: bytes) -> None:
        with self._noting("tracks.json"):
            items = json.loads(tracks.decode("utf-8-sig"))
            if not isinstance(items, list):
                raise InvalidError("it must hold a list of tracks")
            for number, item in enumerate(items, 1):
                with self._noting(f"tracks.json, track {number}"):
                    self._add_track(item)

    def _add_track(self, item: object) -> None:
        if not isinstance(item, dict) or "track_id" not in item:
            raise InvalidError("track_id is missing")
        key = min((key for key in item if key.startswith("label")), default="label")  # "label" if it is there
        track, label = check_text("track_id", item["track_id"]), check_text(key, item.get(key))
        if self.labels.setdefault(track, label) != label:
            raise InvalidError(f"track {track!r} is there twice, with another label")

    def _read_rows(self, path: Path, columns: Sequence[str], take: Callable[[dict[str, str]], None]) -> None:
        """Give each row's cells, by column, to `take`, and note with its line what is wrong with it."""
        began = shown = time.monotonic()
        with (
            self._noting(path.name),
            path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
        ):
            self.hash = hashlib.sha256(self.hash + path.read_bytes()).digest()
            delimiter = ";" if ";" in (header := file.readline()) else ","
            cells = next(csv.reader([header], delimiter=delimiter), [])
            names = [cell.strip().casefold().replace(" ", "_") for cell in cells]
            if sorted(names) != sorted(columns):
                raise InvalidError(f"the first line must name the columns {delimiter.join(columns)}")
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            end: list[str] = []
            while cells is not end:
                with self._noting(where := f"{path.name}:{reader.line_num + 2}"):
                    cells = next(reader, end)
                    if not "".join(cells).strip():
                        continue
                    if len(cells) != len(names):
                        raise InvalidError(f"{len(cells)} columns instead of {len(names)}")
                    take(dict(zip(names, map(str.strip, cells), strict=True)))
                if sys.stderr.isatty() and (now := time.monotonic()) > shown + 1:
                    shown = now
                    print(f"{where} after {now - began:.0f} s", file=sys.stderr)

    def _add_user(self, row: dict[str, str]) -> None:
        user = check_text("user_id", row.pop("user_id"))
        if user in self.subscriptions:
            raise InvalidError(f"user {user!r} is there twice")
        self.subscriptions[user] = parse_subscription(row | {"fee": row["fee"].replace(",", ".")})

    def _add_stream(self, row: dict[str, str]) -> None:
        if (track := row["track_id"]) not in self.labels:
            raise InvalidError(f"track {track!r} is not among the tracks")
        if not INTEGER.fullmatch(row["seconds"]):
            raise InvalidError(f"seconds {row['seconds']!r} is no int")
        started = midnight(row["date"])
        if not 0 <= started <= self.now:
            raise InvalidError(f"date {row['date']!r} is before 1970 or in the future")
        cells = row["user_id"], track, self.labels[track], started, int(row["seconds"])
        self.events.append(parse_event(dict(zip(FIELDS, cells, strict=True)), self.now))


@lru_cache(maxsize=4096)
def midnight(date: str) -> int:
    """Return the time, in Unix seconds, at which the day dd/mm/yyyy begins in UTC; raises InvalidError."""
    try:
        if not re.fullmatch(r"[0-9]{2}/[0-9]{2}/[0-9]{4}", date):
            raise ValueError
        return calendar.timegm(time.strptime(date, "%d/%m/%Y"))
    except ValueError:
        raise InvalidError(f"date {date!r} is no day dd/mm/yyyy") from None


async def fetch_tracks(url: str) -> bytes:
    """Return what `url` answers; it is tried up to 5 times, the wait doubling from 0.5 s.

    Raises aiohttp.ClientError, OSError or ValueError for what went wrong the last time.
    """
    async with aiohttp.ClientSession(raise_for_status=True, timeout=FETCH_TIMEOUT) as session:
        for wait in (0.5, 1, 2, 4):
            try:
                return await (await session.get(url)).read()
            except aiohttp.InvalidURL:
                raise ValueError("it is no URL") from None
            except (aiohttp.ClientError, OSError) as error:
                log.warning("the tracks could not be fetched, next try in %s s: %s", wait, error or "timeout")
            await asyncio.sleep(wait)
        return await (await session.get(url)).read()


# ── Storage ─────────────────────────────────────────────────────────────────────────────────────
# With --db, what is written is on disk first and visible second: the usage answers, SQLite remembers.

APPLICATION_ID = b"secs"  # in the file's header, beside the version of the schema
MIGRATIONS = (
    """
    CREATE TABLE streams (
        user_id TEXT NOT NULL, track_id TEXT NOT NULL, label TEXT NOT NULL,
        stream_started_on INTEGER NOT NULL, seconds_streamed INTEGER NOT NULL,
        id INTEGER PRIMARY KEY AUTOINCREMENT);
    CREATE TABLE subscriptions (
        user_id TEXT PRIMARY KEY, product_type TEXT NOT NULL, fee INTEGER NOT NULL, origin TEXT NOT NULL,
        import INTEGER);
    CREATE TABLE keys (key TEXT PRIMARY KEY, hash BLOB NOT NULL, first_id INTEGER NOT NULL);
    CREATE TABLE imports (
        id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, first_id INTEGER NOT NULL, size INTEGER NOT NULL);
    """,
)
# A thousand rows in one step: between two steps the thread would wait for its turn with the event loop.
SET_STREAMS = """
    REPLACE INTO streams SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),
    json_extract(value, '$[2]'), json_extract(value, '$[3]'), json_extract(value, '$[4]'),
    json_extract(value, '$[5]') FROM json_each(?)
"""
DELETE_STREAM = "DELETE FROM streams WHERE id = ?"
INSERT_KEY = "INSERT INTO keys VALUES (?, ?, ?)"
SET_SUBSCRIPTION = "INSERT OR REPLACE INTO subscriptions VALUES (?, ?, ?, ?, ?)"
INSERT_IMPORT = "INSERT INTO imports VALUES (?, ?, ?, ?)"

Statements = Sequence[tuple[str, Iterable[Any]]]  # each with its rows, SET_STREAMS with its events


class StorageError(Exception):
    """The disk does not take what is to be stored, or the file cannot be used."""


class Journal:
    """The SQLite file behind the usage; one process writes to it, in one transaction at a time."""

    def __init__(self, path: Path) -> None:
        """Open the file, new or of any earlier version; raises StorageError and leaves others untouched."""
        self.waiting: list[tuple[Statements, Callable[[], None], asyncio.Future[None]]] = []
        self.wanted = asyncio.Event()
        self.thread = ThreadPoolExecutor(1)  # its own, so that no commit queues behind a report
        self.closing = False
        self.failed = False
        self.last_commit = -math.inf
        self.path = path.absolute()  # to SQLite a name such as ":memory:" or "file:..." is no file
        with self._refusing():
            self.lock = self.path.open("a+b")  # held to the end: closing it would drop SQLite's own locks
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._check_file()
            self.lock.seek(0)
            header = self.lock.read(100)
            if header and not (header.startswith(b"SQLite format 3\0") and header[68:72] == APPLICATION_ID):
                raise StorageError("it is no database of this program")
            self.connection = sqlite3.connect(self.path, check_same_thread=False, timeout=BUSY_SECONDS)
            (version,) = self.connection.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise StorageError(f"it is of version {version}, this program is of {len(MIGRATIONS)}")
            for number, migration in enumerate(MIGRATIONS[version:], version + 1):
                of_file = f"PRAGMA application_id = 0x{APPLICATION_ID.hex()}; PRAGMA user_version = {number};"
                self.connection.executescript(f"BEGIN; {migration} {of_file} COMMIT;")
            self.connection.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")

    @staticmethod
    @contextlib.contextmanager
    def _refusing() -> Iterator[None]:
        """Raise a StorageError for whatever makes the file unusable, damaged contents included."""
        try:
            yield
        except BlockingIOError:
            raise StorageError("another process uses it") from None
        except OSError as error:
            raise StorageError(str(error.strerror)) from None
        except (sqlite3.Error, TypeError, ValueError, IndexError) as error:
            raise StorageError(f"it is damaged or in use: {error}") from None

    def _check_file(self) -> None:
        """Raise a StorageError unless the path still leads to the file that was opened, and to it alone.

        SQLite's log goes by the name: under a second one it would not be found.
        """
        opened = os.fstat(self.lock.fileno())
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise StorageError("the file has been removed") from None
        if not os.path.samestat(opened, found):
            raise StorageError("the file has been replaced")
        if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:
            raise StorageError("it must be a plain file with one name (no hard links)")

    def take_in(self, imported: Import) -> None:
        """Store what is imported, unless the same has been before; raises StorageError."""
        with self._refusing():
            execute = self.connection.execute
            if execute("SELECT 1 FROM imports WHERE hash = ?", [imported.hash]).fetchone():
                log.info("the import is stored already")
                return
            (number,) = execute("SELECT coalesce(max(id), 0) + 1 FROM imports").fetchone()
            first_id = self.last_id() + 1
        if number > 1:
            log.warning("this is import %d, beside those stored before: are there streams in both?", number)
        for stream_id, event in enumerate(imported.events, first_id):
            event.id = stream_id
        users = ((user, *astuple(found), number) for user, found in imported.subscriptions.items())
        self.commit([
            (SET_STREAMS, imported.events),
            (SET_SUBSCRIPTION, users),
            (INSERT_IMPORT, [(number, imported.hash, first_id, len(imported.events))]),
        ])

    def last_id(self) -> int:
        """Return the highest id that a stream ever had."""
        (found,) = self.connection.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence").fetchone()
        return int(found)

    def load(self, usage: Usage, subscriptions: dict[str, Subscription]) -> None:
        """Put into `usage` and `subscriptions` what is stored; raises StorageError."""
        with self._refusing():
            execute = self.connection.execute
            usage.add([Event(*row) for row in execute("SELECT * FROM streams")])
            usage.last_id = self.last_id()
            usage.keys = {key: (digest, first_id) for key, digest, first_id in execute("SELECT * FROM keys")}
            if execute("SELECT 1 FROM imports").fetchone():
                subscriptions.clear()
            for user, *cells, _ in execute("SELECT * FROM subscriptions"):
                subscriptions[user] = Subscription(*cells)

    def commit(self, statements: Statements) -> None:
        """Store all of it or, with a StorageError, nothing; when this returns it is on disk."""
        try:
            self._check_file()
            with self.connection:
                for statement, group in itertools.groupby(statements, key=itemgetter(0)):
                    rows: Iterable[Any] = itertools.chain.from_iterable(rows for _, rows in group)
                    if statement == SET_STREAMS:
                        cells = map(attrgetter(*FIELDS, "id"), rows)
                        rows = ((to_json(thousand),) for thousand in batched(cells, POST_EVENTS))
                    self.connection.executemany(statement, rows)
        except Exception as error:
            self.failed = True
            raise StorageError(f"nothing can be stored: {error}") from None
        self.failed = False
        self.last_commit = time.monotonic()

    async def store(self, statements: Statements, apply: Callable[[], None]) -> None:
        """Have `statements` stored and then `apply` called; raises StorageError."""
        done = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda done: done.exception())  # the client may have gone
        self.waiting.append((statements, apply, done))
        self.wanted.set()
        await asyncio.shield(done)

    async def run(self) -> None:
        """Store what waits, all of it in one commit, until it is closed."""
        while not self.closing or self.waiting:
            await self.wanted.wait()
            await asyncio.sleep(GATHER_SECONDS)
            self.wanted.clear()
            batch, self.waiting = self.waiting, []
            statements = [statement for of_one, _, _ in batch for statement in of_one]
            try:
                await asyncio.get_running_loop().run_in_executor(self.thread, self.commit, statements)
            except StorageError as error:
                log.error("%s", error)
                for _, _, done in batch:
                    done.set_exception(error)
                continue
            began = time.monotonic()
            for _, apply, done in batch:
                apply()
                done.set_result(None)
                if time.monotonic() > began + TURN_SECONDS:
                    await asyncio.sleep(0)
                    began = time.monotonic()

    async def close(self, running: asyncio.Task[None]) -> None:
        """End `run` when nothing waits any more, and close the file."""
        self.closing = True
        self.wanted.set()
        await running
        self.thread.shutdown()
        self.connection.close()
        self.lock.close()


# ── Simulation ──────────────────────────────────────────────────────────────────────────────────
# Events as the client apps would send them, with the values that the challenge names.

USERS = ("user1", "user2", "user3")
TRACKS = ("track1", "track2", "track3")
LABELS = ("label1", "label2", "label3")


def simulate_batch(now: int, rng: random.Random) -> list[Event]:
    """Make 1 to 5 streams of 30 to 1,800 s that end at `now`: they start out of order, as in life."""
    events = []
    for _ in range(rng.randint(1, 5)):
        seconds = rng.randint(30, 1_800)
        user, track, label = rng.choice(USERS), rng.choice(TRACKS), rng.choice(LABELS)
        events.append(Event(user, track, label, now - seconds, seconds))
    return events


@dataclass
class Simulation:
    """The random generator, and what `/health` tells; `last_batch` is in monotonic seconds."""

    rng: random.Random
    last_batch: float = -math.inf
    errors: int = 0


async def tick(state: State, now: float, rng: random.Random) -> None:
    """Add a batch that ends at `now`."""
    await state.add(simulate_batch(int(now), rng))
    state.simulation.last_batch = time.monotonic()


async def simulate_history(state: State) -> None:
    """Add the batches of the `history` days before now, at the rate of the simulation."""
    config, now = state.config, state.clock()
    if not config.history or (state.journal and state.usage.count):
        return
    events: list[Event] = []
    for number in range(1, int(config.history * DAY / config.interval) + 1):  # the latest first
        if len(events) >= state.usage.keep:
            log.warning("--keep ends the history after %.1f days", number * config.interval / DAY)
            break
        events += simulate_batch(int(now - number * config.interval), state.simulation.rng)
        if number % 1_000 == 0:
            await asyncio.sleep(0)  # a signal can end a long start
    await state.add(events[::-1])


def next_due(due: float, now: float, interval: float) -> float:
    """Return when the batch after the one at `due` comes: in rhythm, whenever `now` is.

    What a process has missed that was stopped for an hour does not come all at once.
    """
    return due + interval * max(1, math.ceil((now - due) / interval))


async def run_simulation(state: State) -> None:
    """Make a batch at once and then one every `interval` seconds, without drift.

    A batch that fails is logged and counted, and the next one comes.
    """
    interval, now = state.config.interval, asyncio.get_running_loop().time
    due = now()
    while True:
        try:
            await tick(state, state.clock(), state.simulation.rng)
        except Exception:
            state.simulation.errors += 1
            log.exception("a simulated batch failed")
        due = next_due(due, now(), interval)
        await asyncio.sleep(due - now())


# ── HTTP: parsing, errors, safety ───────────────────────────────────────────────────────────────
# What comes in is parsed here; an answer goes out through `send` if it depends on the data alone (or
# through `stream`, if it is long), else through `reply`; every error through `answer_errors`. The rules
# above know nothing of HTTP.

INTEGER = re.compile(r"-?[0-9]{1,100}")
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]+)?")
SUCCESS = b'{"message":%b,"data":%b}'

CONTENT_TYPES = {
    "json": "application/json; charset=utf-8",
    "ndjson": "application/x-ndjson; charset=utf-8",
    "csv": "text/csv; charset=utf-8; header=present",
    "html": "text/html; charset=utf-8",
}
SAFETY_HEADERS = (  # what keeps browsers from misusing an answer
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
KEPT_HEADERS = (hdrs.ALLOW, hdrs.WWW_AUTHENTICATE)  # of those that an error of aiohttp has
STATUSES = {InvalidError: 400, MissingError: 404, StorageError: 503}

GROUP_BY = "|".join(",".join(by) for size in (1, 2, 3) for by in itertools.permutations(NAMES, size))

# What a parameter may be, what that is called, and what is made of it.
PARAMETERS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "from": (INTEGER.pattern, "an int", int),
    "to": (INTEGER.pattern, "an int", int),
    "group_by": (GROUP_BY, f"a comma list of {', '.join(NAMES)}", lambda text: tuple(text.split(","))),
    "window": (r"minute|hour|day|month", "minute, hour, day or month", str),
    "format": (r"json|ndjson|csv", "json, ndjson or csv", str),
    "limit": (r"0*([1-9][0-9]{0,2}|1000)", "an int from 1 to 1000", int),
    "after": (r"[0-9]{1,100}", "an int, 0 or more", int),
    "month": (r"[0-9]{4}-(0[1-9]|1[0-2])", "a month as in 2019-03", str),
}
FILTERS = ("from", "to", *NAMES)


@lru_cache(maxsize=64)
def parse_query(query: str, *parameters: str) -> Mapping[str, Any]:
    """Parse a query string; the values of a name, which may come more than once, are returned as a set.

    Raises InvalidError, which names the parameter.
    """
    asked: dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    except ValueError:
        raise InvalidError("the query is not UTF-8") from None
    for name, text in pairs:
        if name not in parameters:
            raise InvalidError(f"unknown parameter {name[:TEXT_CHARACTERS]!r}")
        if name in NAMES:
            asked.setdefault(name, set()).add(check_text(name, text))
            continue
        if name in asked:
            raise InvalidError(f"{name} is given more than once")
        pattern, kind, convert = PARAMETERS[name]
        if not re.fullmatch(pattern, text):
            raise InvalidError(f"{name} must be {kind}")
        asked[name] = convert(text)
    return asked


def select(usage: Usage, asked: Mapping[str, Any]) -> Iterator[Block]:
    """Return the events that the parameters in FILTERS ask for."""
    names = {name: asked[name] for name in NAMES if name in asked}
    return matching(usage.by_start.between(asked.get("from"), asked.get("to")), names)


async def read_json(request: web.Request) -> tuple[object, bytes]:
    """Return the body, parsed and as it is; raises InvalidError if it is no JSON."""
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(reason="a write needs Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
        if len(body) > STREAM_BYTES:
            await let_others_in(request.app[STATE].turn)
        return json.loads(body.decode()), body
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"the body did not arrive within {BODY_SECONDS} s") from None
    except (ValueError, RecursionError):
        raise InvalidError("the body is no JSON") from None


def encode(value: Any) -> bytes:
    """Return compact JSON."""
    return to_json(value).encode()


def encode_rows(rows: Iterable[dict[str, Any]]) -> bytes:
    """Return their JSON, each with a comma before it."""
    return "".join([f",{to_json(row)}" for row in rows]).encode()


Pieces = Generator[bytes, None, None]  # of an answer


def write_rows(
    kind: str,
    columns: Iterable[str],
    blocks: Iterable[list[Any]],
    *,
    as_json: Callable[[list[Any]], bytes] = encode_rows,
    as_line: Callable[[Any], bytes] = encode,
    as_csv: Callable[[Any], str] = lambda row: encode_cells(*row.values()) + CSV_END,
) -> Pieces:
    """Yield `blocks` of rows as json, ndjson or csv, piece by piece; b"" where a block has no rows."""
    if kind == "csv":
        yield (encode_cells(*columns) + CSV_END).encode()
        for block in blocks:
            yield "".join(map(as_csv, block)).encode()
    elif kind == "ndjson":
        for block in blocks:
            yield b"\n".join([*map(as_line, block), b""])
    else:
        opening = b"["
        for piece in map(as_json, blocks):
            if opening and piece:
                yield opening + piece[1:]
                opening = b""
            else:
                yield piece
        yield opening + b"]"


async def let_others_in(turn: asyncio.Lock) -> None:
    """Wait for the turn to go on with something long.

    In one turn of the event loop one of all that is long goes on, for about TURN_SECONDS: so however
    much there is, nobody waits for more than that.
    """
    async with turn:
        await asyncio.sleep(0)


async def in_turns(turn: asyncio.Lock, steps: Iterable[T]) -> AsyncIterator[T]:
    """Yield `steps`, and let others in while they are made."""
    began = time.monotonic()
    for step in steps:
        yield step
        if time.monotonic() > began + TURN_SECONDS:
            await let_others_in(turn)
            began = time.monotonic()


def has_gone(request: web.Request) -> bool:
    """Tell whether nobody waits for the answer any more."""
    return request.transport is None or request.transport.is_closing()


@dataclass(eq=False)
class Answer:
    """What is made once for all who ask for it."""

    askers: list[web.Request]
    made: asyncio.Task[bytes | None]


Make = Callable[[Sequence[web.Request]], Coroutine[Any, Any, bytes | None]]  # an answer, for those who ask


class TooLongError(Exception):
    """An answer is too long to be kept: it has to be streamed to each who asks."""


async def share(request: web.Request, name: object, make: Make) -> bytes:
    """Return what `make` returns, which is called once for all who share under this name.

    Raises TooLongError for None, and what `make` raises, which is then called again for the next who asks.
    It is kept until the usage changes, if it is among the last KEPT_ANSWERS: so a client that asks for ever
    other ones does not fill the memory.
    """
    state = request.app[STATE]
    if state.answers_of != state.usage.etag:
        state.answers_of, state.answers = state.usage.etag, {}
    answers = state.answers
    answer = answers.get(name)
    if not answer or (answer.made.done() and answer.made.exception()):
        answers.pop(name, None)
        if len(answers) >= KEPT_ANSWERS:
            del answers[next(iter(answers))]
        askers: list[web.Request] = []
        answer = answers[name] = Answer(askers, asyncio.create_task(make(askers)))
        answer.made.add_done_callback(lambda _: askers.clear())
    if not answer.made.done():
        answer.askers.append(request)
        await asyncio.shield(answer.made)
    if (body := answer.made.result()) is None:
        raise TooLongError
    if len(body) > KEPT_BYTES and answers.get(name) is answer:
        del answers[name]
    return body


async def gather(state: State, askers: Sequence[web.Request], pieces: Pieces) -> bytes | None:
    """Return `pieces` as one, or None for more than KEPT_BYTES.

    Raises ConnectionResetError as soon as all who asked have gone.
    """
    ready: list[bytes] = []
    began, size = time.monotonic(), 0
    async with contextlib.AsyncExitStack() as long:
        long.callback(pieces.close)  # or an error would hold all that they are made from
        async for piece in in_turns(state.turn, pieces):
            ready.append(piece)
            size += len(piece)
            if size > KEPT_BYTES:
                return None
            if all(map(has_gone, askers)):
                raise ConnectionResetError
            if began and time.monotonic() > began + TURN_SECONDS:  # it is long: it waits for others that are
                await long.enter_async_context(state.gathering)
                began = 0
    return b"".join(ready)


Headers = tuple[tuple[str, str], ...]


@lru_cache(maxsize=64)
def cache_headers(etag: str, kind: str) -> Headers:
    """Return what tells a client how long it may keep an answer, and what it is."""
    return (
        ("ETag", f'W/"{etag}"'),
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept-Encoding"),
        ("Content-Type", CONTENT_TYPES[kind]),
    )


async def send(
    request: web.Request, etag: str, kind: str, make: Make, *more: tuple[str, str]
) -> web.StreamResponse:
    """Answer with 304 if the client has this already, else with what `make` returns; raises what it raises.

    `more` are further headers.
    """
    headers = cache_headers(etag, kind) + more
    if any(known.value in (etag, "*") for known in request.if_none_match or ()):
        return Ready(304, headers=headers)
    name = (request.raw_path, etag)
    body = plain = await share(request, name, make)
    if len(plain) >= GZIP_BYTES and accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
        packed = ("gzip", *name)
        body = await share(request, packed, lambda _: asyncio.to_thread(gzip.compress, plain, 6))
        headers += (("Content-Encoding", "gzip"),)
    if len(body) <= STREAM_BYTES:
        return Ready(200, body, headers)
    # Piece by piece, so that no connection holds all of it as its own.
    pieces = (body[at : at + STREAM_BYTES] for at in range(0, len(body), STREAM_BYTES))
    return await stream(request, pieces, (*headers, ("Content-Length", str(len(body)))))


@contextlib.asynccontextmanager
async def cut_off_after(seconds: float | None, request: web.BaseRequest) -> AsyncIterator[None]:
    """Cut a client off, and raise ConnectionResetError, if it has not taken what is sent within `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        if request.transport:
            request.transport.abort()
        raise ConnectionResetError from None


@lru_cache(maxsize=64)
def write_head(status: int, length: int, keep_alive: bool, now: int, headers: Headers) -> bytes:
    """Write the head of an answer that is sent in the second `now`."""
    connection = "keep-alive" if keep_alive else "close"
    headers += (("Date", formatdate(now, usegmt=True)), ("Connection", connection))
    if status != HTTPStatus.NOT_MODIFIED:
        headers += (("Content-Length", str(length)),)
    lines = (f"{name}: {value}\r\n" for name, value in (*headers, *SAFETY_HEADERS))
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{''.join(lines)}\r\n".encode()


class Ready(web.StreamResponse):
    """An answer that is there.

    Head and body are sent as they are, and forgotten: aiohttp's own way of writing a head takes a good part
    of the time that a short answer takes in all, and it holds an answer until the connection's next request.
    """

    keep_alive = True
    body_length = 0

    def __init__(self, status: int, body: bytes = b"", headers: Headers = ()) -> None:
        """Put the answer together, but do not send it yet."""
        super().__init__(status=status)
        self.body_length = len(body)  # for the log
        self.body, self.further = body, headers

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        """Send it; the next request is not looked at before the client has taken enough."""
        self.keep_alive = request.keep_alive
        head = write_head(self.status, len(self.body), self.keep_alive, int(time.time()), self.further)
        body, self.body = self.body, b""
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError
        request.transport.write(head if request.method == hdrs.METH_HEAD else head + body)
        if request.protocol.writing_paused:
            async with cut_off_after(STALL_SECONDS, request):
                await request.writer.drain()
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Send nothing more."""


def joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield `pieces`, those that are shorter than STREAM_BYTES together; b"" while they are too short."""
    ready: list[bytes] = []
    size = 0
    for piece in pieces:
        ready.append(piece)
        size += len(piece)
        if size < STREAM_BYTES:
            yield b""
        else:
            yield b"".join(ready)
            ready, size = [], 0
    yield b"".join(ready)


async def stream(
    request: web.Request, pieces: Pieces, headers: Headers, seconds: float | None = None
) -> web.StreamResponse:
    """Answer piece by piece, and let others in between.

    A client is cut off that takes nothing for STALL_SECONDS, or not everything in `seconds`.
    """
    response = web.StreamResponse(headers=headers)
    if request.method == hdrs.METH_HEAD:
        return response
    if response.content_length is None and accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
        response.enable_compression(web.ContentCoding.gzip)
    if request.version < aiohttp.HttpVersion11:
        response.force_close()  # without chunks only the end of the connection ends the answer
    await response.prepare(request)
    async with cut_off_after(seconds, request), contextlib.AsyncExitStack() as end:
        end.callback(pieces.close)  # or an error would hold all that they are made from
        async for part in in_turns(request.app[STATE].turn, joined(pieces)):
            if has_gone(request):
                raise ConnectionResetError
            async with cut_off_after(STALL_SECONDS, request):
                await response.write(part)
    return response


@lru_cache(maxsize=64)
def accepts_gzip(codings: str) -> bool:
    """Tell whether a client with this Accept-Encoding takes gzip: `gzip;q=0` says that it does not."""
    each = codings.lower().replace(" ", "").split(",")
    return any(re.fullmatch(r"gzip(;q=(1|0\.0*[1-9]).*)?", coding) for coding in each)


def reply(status: int, body: bytes, **headers: str) -> Ready:
    """Answer with JSON that is about this moment, so nobody may keep it."""
    headers |= {"Content-Type": CONTENT_TYPES["json"], "Cache-Control": "no-store"}
    return Ready(status, body, tuple(headers.items()))


def succeed(message: str, data: bytes, status: int = 200, **headers: str) -> Ready:
    """Answer as every success of the API does; `data` is JSON."""
    return reply(status, SUCCESS % (encode(message), data), **headers)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what the rules and aiohttp raise into answers, none of them with a traceback."""
    try:
        check_access(request, request.app[STATE].config)
        return await handler(request)
    except tuple(STATUSES) as error:
        return reply(STATUSES[type(error)], encode({"error": str(error)}))
    except web.HTTPException as error:
        kept = {name: text for name, text in error.headers.items() if name in KEPT_HEADERS}
        return reply(error.status, encode({"error": error.reason}), **kept)
    except ConnectionError:
        return Ready(200)  # goes nowhere: the client has gone
    except Exception:
        log.exception("%s %r failed", request.method, request.path)
        if request.writer.output_size:
            raise  # half an answer is out: it has to break off
        return reply(500, encode({"error": "internal error"}))


@lru_cache(maxsize=64)
def is_own_name(host: str, allowed: tuple[str, ...]) -> bool:
    """Tell whether a Host may be ours: an IP address, localhost, *.localhost, or a name that is allowed.

    Any other is a name that somebody made to lead here (DNS rebinding): pages under it could read all.
    """
    if not (found := HOST.fullmatch(host.lower())):
        return False
    name = found[1].strip("[]").removesuffix(".")
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name == "localhost" or name.endswith(".localhost") or name in allowed


def check_access(request: web.Request, config: Config) -> None:
    """Raise an HTTPException for a foreign Host, a write from a foreign page, or one without the token."""
    host = request.headers.get(hdrs.HOST, "")
    if not is_own_name(host, config.allow_host):
        raise web.HTTPMisdirectedRequest(reason="this Host is unknown here; --allow-host NAME makes it known")
    if request.method in (hdrs.METH_GET, hdrs.METH_HEAD):
        return
    site, origin = request.headers.get("Sec-Fetch-Site", "none"), request.headers.get(hdrs.ORIGIN)
    if site not in ("same-origin", "none") or (origin and urlsplit(origin).netloc.lower() != host.lower()):
        raise web.HTTPForbidden(reason="a page of another origin may not write here")
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    known = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), config.token.encode())
    if config.token and not (known and scheme.lower() == "bearer"):
        challenge = {hdrs.WWW_AUTHENTICATE: "Bearer"}
        raise web.HTTPUnauthorized(reason="a write needs Authorization: Bearer TOKEN", headers=challenge)


async def add_safety_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Put them on what is no `Ready`: long answers, and aiohttp's own."""
    response.headers.update(SAFETY_HEADERS)


def read_page(path: Path) -> tuple[bytes, str]:
    """Return the page as it is on disk now, and the policy under which it runs; raises OSError.

    The policy names the scripts that the file loads, and its inline script and style by their hashes.
    Vue compiles the template in the page, for which it needs 'unsafe-eval'.
    """
    page = path.read_bytes().replace(b"\r\n", b"\n")  # as the HTML parser does before it hashes

    def hashes(inline: bytes) -> str:
        digests = (hashlib.sha256(text).digest() for text in re.findall(inline, page, re.DOTALL))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    loaded = b" ".join(re.findall(rb'<script[^>]* src="([!-~]+)"', page)).decode()
    return page, (
        f"default-src 'none'; script-src {loaded} {hashes(rb'<script>(.*?)</script>')} 'unsafe-eval'; "
        f"style-src {hashes(rb'<style>(.*?)</style>')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────
# Each parses, asks the rules above, and answers.


async def get_page(request: web.Request) -> web.StreamResponse:
    """Show the page as it is on disk, or as it last was."""
    state = request.app[STATE]
    with contextlib.suppress(OSError):
        state.page = read_page(state.config.page)
    page, policy = state.page
    etag = hashlib.sha256(page).hexdigest()[:16]

    async def make(_: object) -> bytes:
        return page

    return await send(request, etag, "html", make, ("Content-Security-Policy", policy))


async def get_usage(request: web.Request) -> web.StreamResponse:
    """List the events that are asked for, or their sums."""
    state = request.app[STATE]
    asked = parse_query(request.rel_url.raw_query_string, *FILTERS, "group_by", "window", "format")
    if asked.get("from", 0) > state.clock():
        return Ready(400)  # with an empty body: the challenge wants it so
    kind, by, window = asked.get("format", "json"), asked.get("group_by", ()), asked.get("window")

    def write_usage() -> Pieces:
        events = select(state.usage, asked)
        if not (by or window):
            as_json, as_csv = attrgetter("json"), attrgetter("csv")
            return write_rows(kind, FIELDS, events, as_json=as_json, as_line=as_json, as_csv=as_csv)
        columns = (*(["window_start"] if window else []), *by, "events", "seconds_streamed")
        return write_rows(kind, columns, grouped(events, by, window, columns))

    def make(askers: Sequence[web.Request]) -> Coroutine[Any, Any, bytes | None]:
        return gather(state, askers, write_usage())

    try:
        return await send(request, state.usage.etag, kind, make)
    except TooLongError:
        sums = by and not window
        async with state.summing if sums else contextlib.nullcontext():
            headers = cache_headers(state.usage.etag, kind)
            return await stream(request, write_usage(), headers, SUM_SECONDS if sums else None)


async def get_health(request: web.Request) -> Ready:
    """Tell whether all is well: 503 when the simulation has stopped or the last write failed."""
    state = request.app[STATE]
    age = time.monotonic() - state.simulation.last_batch
    running = state.config.simulate and age < max(LATE_SECONDS, 3 * state.config.interval)
    journal = state.journal
    healthy = running == state.config.simulate and not (journal and journal.failed)
    commit_age = time.monotonic() - journal.last_commit if journal else math.inf
    value = {
        "status": "ok" if healthy else "degraded",
        "events": state.usage.count,
        "simulation": {
            "running": running,
            "last_batch_age": round(age, 1) if age < math.inf else None,
            "errors": state.simulation.errors,
        },
        "storage": {
            "durable": journal is not None,
            "last_commit_age": round(commit_age, 1) if commit_age < math.inf else None,
        },
    }
    return reply(200 if healthy else 503, encode(value))


async def get_streams(request: web.Request) -> Ready:
    """List a page of streams in order of id."""
    state = request.app[STATE]
    asked = dict(parse_query(request.rel_url.raw_query_string, *FILTERS, "limit", "after"))
    limit, after = asked.pop("limit", 100), asked.pop("after", 0)
    page: list[Event] = []
    if asked.get("from", 0) > state.clock():
        raise InvalidError("from is in the future")
    if asked:
        total = 0
        async for block in in_turns(state.turn, select(state.usage, asked)):
            total += len(block)
            later = (event for event in block if event.id > after)
            page = nsmallest(limit + 1, itertools.chain(page, later), key=attrgetter("id"))
    else:
        total = state.usage.count
        following = itertools.chain.from_iterable(state.usage.by_id.between(after + 1))
        page = list(itertools.islice(following, limit + 1))
    data = b",".join(event.stream for event in page[:limit])
    following_id = page[limit - 1].id if len(page) > limit else None
    return succeed("Found Streams", b'[%b],"total":%d,"next":%b' % (data, total, encode(following_id)))


async def post_streams(request: web.Request) -> Ready:
    """Store one event or an array of them: all or none, and once for an `Idempotency-Key`."""
    state = request.app[STATE]
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
        raise InvalidError("Idempotency-Key must be 1 to 255 printable ASCII characters")
    value, body = await read_json(request)
    digest = hashlib.sha256(body).digest()
    # A retry of what is stored is not in the future, even if the clock has been set back since.
    stored = digest == state.usage.keys.get(key or "", (None, 0))[0]
    events = parse_events(value, sys.maxsize if stored else state.clock())
    async with state.alone("key", key) if key else contextlib.nullcontext():
        known, first_id = state.usage.keys.get(key or "", (None, 0))
        if known is None:
            await state.add(events, (key, digest) if key else None)
        elif known != digest:
            raise web.HTTPUnprocessableEntity(reason="this Idempotency-Key came with another body before")
        for number, event in enumerate(events if known else []):
            event.id = first_id + number  # so the first answer is made again, whatever has become of them
    headers = {"Idempotent-Replayed": "true"} if known else {}
    data = b",".join(event.stream for event in events)
    if isinstance(value, list):
        return succeed("Streams Created", b"[%b]" % data, 201, **headers)
    return succeed("Stream Created", data, 201, Location=f"/api/v1/streams/{events[0].id}", **headers)


def find_stream(request: web.Request) -> Event:
    """Return the stream that the path names; raises InvalidError or MissingError."""
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal()):
        raise InvalidError("Stream ID Invalid")
    return request.app[STATE].usage.find(int(text.lstrip("0")[:30] or "0"))


async def get_stream(request: web.Request) -> Ready:
    """Show a stream."""
    return succeed("Found Stream", find_stream(request).stream)


async def change_stream(request: web.Request) -> Ready:
    """Replace a stream (PUT), or change some of its fields (PATCH)."""
    state, old = request.app[STATE], find_stream(request)
    fields, _ = await read_json(request)
    async with state.alone("stream", old.id):
        old = find_stream(request)  # as it is now that the body has arrived
        if request.method == hdrs.METH_PATCH and isinstance(fields, dict):
            fields = {name: getattr(old, name) for name in FIELDS} | fields
        new = parse_event(fields, state.clock())
        new.id = old.id
        await state.write([(SET_STREAMS, [new])], lambda: state.usage.replace(old, new))
    return succeed("Stream Updated", new.stream)


async def delete_stream(request: web.Request) -> Ready:
    """Remove a stream."""
    state, stream = request.app[STATE], find_stream(request)
    async with state.alone("stream", stream.id):
        stream = find_stream(request)
        await state.write([(DELETE_STREAM, [(stream.id,)])], lambda: state.usage.remove([stream]))
    return succeed("Stream Removed", stream.stream)


async def describe(state: State, only: str | None = None) -> list[bytes]:
    """Return the JSON of the users, or of `only` one; in a thread, for there may be many; on copies."""
    async with state.reporting:
        months = [Totals(totals) for totals in state.usage.months.values()]
        tracks, subscriptions = Totals(state.usage.tracks), dict(state.subscriptions)
        return await asyncio.to_thread(
            lambda: [encode(user) for user in describe_users(tracks, months, subscriptions, only)]
        )


async def get_users(request: web.Request) -> Ready:
    """List all who streamed or subscribe."""
    return succeed("Found Users", b"[%b]" % b",".join(await describe(request.app[STATE])))


def parse_user(request: web.Request) -> str:
    """Return the user that the path names; raises InvalidError."""
    try:
        return check_text("user_id", unquote(request.rel_url.raw_parts[-1], errors="strict"))
    except ValueError:
        raise InvalidError("User ID Invalid") from None


async def get_user(request: web.Request) -> Ready:
    """Show what a user streamed and subscribes to."""
    user = parse_user(request)
    for described in await describe(request.app[STATE], user):
        return succeed("Found User Stream Report", described)
    raise MissingError(f"there is no user {user!r}")


async def put_user(request: web.Request) -> Ready:
    """Set a user's subscription."""
    state, user = request.app[STATE], parse_user(request)
    value, _ = await read_json(request)
    subscription = parse_subscription(value)

    def apply() -> None:
        state.subscriptions[user] = subscription
        state.usage.etag = secrets.token_hex(8)

    await state.write([(SET_SUBSCRIPTION, [(user, *astuple(subscription), None)])], apply)
    (described,) = await describe(state, user)
    return succeed("Subscription Set", described)


async def get_report(request: web.Request) -> web.StreamResponse:
    """Tell how much each label is owed, for a month or for all."""
    state = request.app[STATE]
    asked = parse_query(request.rel_url.raw_query_string, "month", "format")
    if asked.get("format") == "ndjson":
        raise InvalidError("format must be json or csv")
    kind = asked.get("format", "json")

    def make_report(months: dict[str, Totals], subscriptions: dict[str, Subscription]) -> bytes:
        books = Books(defaultdict(Month), subscriptions)
        for name, totals in months.items():
            for (user, label), total in totals.items():
                books.months[name].totals.setdefault(user, {})[label] = total
        data, rows = finish(report(books, asked.get("month")))
        if kind == "csv":
            return b"".join(write_rows("csv", REPORT_COLUMNS, [list(rows)]))
        return SUCCESS % (encode("Found Label Stream Report"), encode(data))

    async def make(_: object) -> bytes:
        # In a thread, for with many subscribers it takes seconds; on copies, for others go on writing. If
        # something has changed while it waited, it is newer than its etag: the next poll gets it again.
        async with state.reporting:
            months = {month: Totals(totals) for month, totals in state.usage.months.items() if totals}
            if month := asked.get("month"):
                months = {month: months.get(month, Totals())}
            return await asyncio.to_thread(make_report, months, dict(state.subscriptions))

    return await send(request, state.usage.etag, kind, make)


STREAM_PATH = "/api/v1/{_:streams?}/{id}"  # the seed spells it both ways
USER_PATH = "/api/v1/users/{user_id:[^/]+}"

ROUTES = (
    web.get("/", get_page),
    web.get("/usage", get_usage),
    web.get("/health", get_health),
    web.get("/api/v1/streams", get_streams),
    web.post("/api/v1/streams", post_streams),
    web.get(STREAM_PATH, get_stream),
    web.put(STREAM_PATH, change_stream),
    web.patch(STREAM_PATH, change_stream),
    web.delete(STREAM_PATH, delete_stream),
    web.get("/api/v1/users", get_users),
    web.get(USER_PATH, get_user),
    web.put(USER_PATH, put_user),
    web.get("/api/v1/report", get_report),
)


# ── The application ─────────────────────────────────────────────────────────────────────────────

PAGE = Path(__file__).with_name("index.html")


@dataclass(frozen=True)
class Config:
    """What the command line decides; `interval` is in seconds, `history` in days."""

    interval: float = 10
    simulate: bool = True
    history: float = 0
    random_seed: int | None = None
    keep: int = 1_000_000
    db: Path | None = None
    allow_host: tuple[str, ...] = ()
    token: str = field(default="", repr=False)  # empty: none is needed
    page: Path = PAGE


@dataclass
class State:
    """What the handlers share; `clock` tells Unix seconds."""

    config: Config
    usage: Usage
    subscriptions: dict[str, Subscription]
    simulation: Simulation
    journal: Journal | None
    page: tuple[bytes, str]  # and its policy
    clock: Callable[[], float]
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of all that is long: see `let_others_in`
    answers: dict[object, Answer] = field(default_factory=dict)  # see `share`
    answers_of: str = ""  # the etag of the usage that they are of
    gathering: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SUMMING))
    summing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(SUMMING))
    reporting: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(REPORTING))
    locks: WeakValueDictionary[object, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def alone(self, *name: object) -> asyncio.Lock:
        """Return the lock of what has this name, so that one change of it waits for the other."""
        return self.locks.setdefault(name, asyncio.Lock())

    async def write(self, statements: Statements, apply: Callable[[], None]) -> None:
        """Make a change: stored first, visible second; raises StorageError."""
        if self.journal:
            await self.journal.store(statements, apply)
        else:
            apply()

    async def add(self, events: Sequence[Event], key: tuple[str, bytes] | None = None) -> None:
        """Number and keep `events`, and the idempotency key, with the body's hash, that they came with."""
        self.usage.number(events)
        keys = {key[0]: (key[1], events[0].id)} if key else {}

        def apply() -> None:
            self.usage.add(events)
            self.usage.keys |= keys

        rows = [(INSERT_KEY, [(name, digest, first_id)]) for name, (digest, first_id) in keys.items()]
        await self.write([(SET_STREAMS, events), *rows], apply)


def abort_if_failed(journal: asyncio.Task[None]) -> None:
    """End the process as a kill does: what is stored and what is visible could differ from now on."""
    if not journal.cancelled() and (error := journal.exception()):
        log.critical("the journal has failed; start again, nothing stored is lost", exc_info=error)
        os.abort()


@contextlib.asynccontextmanager
async def own_journal(app: web.Application) -> AsyncIterator[None]:
    """Run the journal, and at the end store what still waits."""
    journal = app[STATE].journal
    if not journal:
        yield
        return
    task = asyncio.create_task(journal.run())
    task.add_done_callback(abort_if_failed)
    yield
    await journal.close(task)


@contextlib.asynccontextmanager
async def own_simulation(app: web.Application) -> AsyncIterator[None]:
    """Fill in the history, then run the simulation for as long as the application lives."""
    state = app[STATE]
    await simulate_history(state)
    task = asyncio.create_task(run_simulation(state)) if state.config.simulate else None
    yield
    if task:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def create_app(
    config: Config, imported: Import | None = None, clock: Callable[[], float] = time.time
) -> web.Application:
    """Build the application; raises OSError for the page, StorageError for the database."""
    page = read_page(config.page)
    app = web.Application(middlewares=[answer_errors], client_max_size=BODY_BYTES)
    journal = Journal(config.db) if config.db else None
    usage = Usage() if journal else Usage(config.keep)
    subscriptions = dict(SUBSCRIPTIONS)
    if journal:
        if imported:
            journal.take_in(imported)
        journal.load(usage, subscriptions)
    elif imported:
        subscriptions = dict(imported.subscriptions)
        usage.number(imported.events)
        usage.add(imported.events)
    simulation = Simulation(random.Random(config.random_seed))  # noqa: S311 - no secret comes of it
    app[STATE] = State(config, usage, subscriptions, simulation, journal, page, clock)
    app.add_routes(ROUTES)
    app.on_response_prepare.append(add_safety_headers)
    app.cleanup_ctx.extend((own_journal, own_simulation))
    return app


# ── Command line ────────────────────────────────────────────────────────────────────────────────

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message, without the usage: that is for `--help`."""
        self.exit(2, f"{self.prog}: {message}\n")


def between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that is a number from `low` to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")

    return parse


def build_parser(environment: Mapping[str, str]) -> Parser:
    """Return the parser of the command line; HOST and PORT in the environment are defaults."""
    parser = Parser(description="Collect usage events and share out royalties.", allow_abbrev=False)
    add = parser.add_argument
    host, port = environment.get("HOST") or "127.0.0.1", environment.get("PORT") or "8080"
    add("--host", default=host, help="address to listen on (%(default)s)")
    add("--port", default=port, type=between(int, 0, 65_535), help="port; 0 picks a free one (%(default)s)")
    add("--interval", default=Config.interval, type=between(float, 0.001, DAY), metavar="SECONDS",
        help="time between two simulated batches (%(default)s)")
    add("--no-simulation", dest="simulate", action="store_false", help="simulate nothing from now on")
    add("--history", default=Config.history, type=between(float, 0, 3_650), metavar="DAYS",
        help="simulate the DAYS before now, too")
    add("--random-seed", type=int, metavar="N", help="make the simulation repeatable")
    add("--keep", default=Config.keep, type=between(int, 1, 10**9), metavar="N",
        help="keep N events at most (%(default)s)")
    add("--db", type=Path, metavar="FILE", help="keep everything in an SQLite file")
    add("--import", dest="directory", type=Path, metavar="DIR",
        help="load users.csv, streaming.csv and tracks.json")
    add("--tracks", metavar="FILE_OR_URL", help="the tracks of an import (DIR/tracks.json)")
    add("--allow-host", action="append", default=[], type=str.lower, metavar="NAME",
        help="a further name that requests may come in under; repeatable")
    add("-v", "--verbose", action="store_true", help="log each request")
    return parser


def read_import(parser: Parser, directory: Path | None, tracks: str | None) -> Import | None:
    """Return what is to be imported, or exit with status 2 and what is wrong with it."""
    if directory is None:
        return None
    source = tracks or str(directory / "tracks.json")
    remote = source.lower().startswith(("http://", "https://"))
    try:
        content = asyncio.run(fetch_tracks(source)) if remote else Path(source).read_bytes()
        return Import(directory, content, time.time())
    except (OSError, ValueError, aiohttp.ClientError) as error:
        parser.error(f"cannot read the tracks from {source}: {error or 'it took too long'}")
    except ImportFailedError as error:
        parser.exit(2, f"{error}\n")


def listen(host: str, port: int) -> socket.socket:
    """Open the port, before any work begins, so that one that is taken is known at once; raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family, backlog=BACKLOG)


def log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what the event loop could not do, in one line if it is only that it takes no more connections."""
    if getattr(context.get("exception"), "errno", None) == errno.EMFILE:
        log.error("no connection can be taken: all file descriptors are in use (ulimit -n)")
    else:
        loop.default_exception_handler(context)


def is_no_fault_of_a_client(record: logging.LogRecord) -> bool:
    """Tell whether a log line is about us, not about a client that sent what is no HTTP or has gone."""
    faults = (http_exceptions.HttpProcessingError, ConnectionError)
    return not (record.exc_info and isinstance(record.exc_info[1], faults))


def give_back_memory() -> None:
    """Have the C library give back large pieces of memory as soon as they are free.

    By itself glibc keeps the more, the larger they are that it has seen. Other libraries have no mallopt.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for limit in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(limit, LARGE_BYTES)


async def serve(app: web.Application, listener: socket.socket, url: str, verbose: bool) -> None:
    """Answer until the first signal; whatever signals follow, requests under way are answered first."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    for number in SIGNALS:
        loop.add_signal_handler(number, lambda: task and not task.cancelling() and task.cancel())
    loop.set_default_executor(ThreadPoolExecutor(THREADS))  # each keeps some memory of its own
    loop.set_exception_handler(log_loop_error)
    access_log = logging.getLogger("aiohttp.access") if verbose else None
    logging.getLogger("aiohttp.server").addFilter(is_no_fault_of_a_client)
    # A compressed body could hold a thousand times of what it may; none was promised, so none is unpacked.
    runner = web.AppRunner(
        app,
        access_log=access_log,
        access_log_format='%a "%r" %s %b',  # no header: it may hold any control character above 127
        shutdown_timeout=SHUTDOWN_SECONDS,
        auto_decompress=False,
    )
    try:
        await runner.setup()
        # One connection at a time: asyncio takes as many as may wait, and logs as often that it cannot.
        await web.SockSite(runner, listener, backlog=1).start()
        listener.listen(BACKLOG)
        print(f"Listening on {url}", flush=True)
        await loop.create_future()
    except asyncio.CancelledError:
        pass
    finally:
        connections = [each.transport for each in runner.server.connections] if runner.server else []
        await runner.cleanup()
    for _ in range(50):  # half a second, for what has been answered to be sent, too
        if not any(each and each.get_write_buffer_size() for each in connections):
            break
        await asyncio.sleep(0.01)
    os._exit(0)  # all is stored; to free so many events, or to end a report that nobody gets, takes seconds


def main() -> None:
    """Run the program: status 0 after Ctrl-C or SIGTERM, 2 and one line if it cannot start."""
    for number in SIGNALS:  # until the event loop takes them over
        signal.signal(number, lambda *_: sys.exit(0))
    give_back_memory()
    gc.set_threshold(10_000, 10, 10)  # seldom, for requests leave few cycles behind
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # many shells allow 256 or 1,024 until they are asked
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    parser = build_parser(os.environ)
    options = vars(parser.parse_args())
    host, port, verbose = options.pop("host"), options.pop("port"), options.pop("verbose")
    directory, tracks = options.pop("directory"), options.pop("tracks")
    options["allow_host"] = tuple(options["allow_host"])
    token = os.environ.get("USAGE_TOKEN", "")
    if tracks and not directory:
        parser.error("--tracks goes with --import")
    try:
        listener = listen(host, port)
    except (OSError, UnicodeError) as error:
        parser.error(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}")
    imported = read_import(parser, directory, tracks)
    try:
        app = create_app(Config(**options, token=token), imported)
    except OSError as error:
        parser.error(f"cannot read the page: {error}")
    except StorageError as error:
        parser.error(f"cannot use the database {options['db']}: {error}")
    if not token and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        log.warning("others can reach this: without USAGE_TOKEN it is for a gateway to say who may write")
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    try:
        asyncio.run(serve(app, listener, url, verbose))
    except StorageError as error:
        parser.error(f"cannot fill the database {options['db']}: {error}")


if __name__ == "__main__":
    main()
