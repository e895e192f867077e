# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.3,<4"]
# ///
"""Seconds streamed: collect usage events, query them, and share out the money that they are worth.

    python server.py            then open http://127.0.0.1:8080, or curl http://127.0.0.1:8080/usage

The map, from top to bottom. Each section uses only those above it, and the application's State and Config:

    long work     how whatever takes long shares the event loop
    events        what an event is: the one place where one is checked and written
    usage         the events that are kept, in chunks that are never changed
    totals        streams and seconds: how they are counted and added up
    royalties     who is owed what
    import        the three files of a royalty backend
    storage       with --db: on disk first, visible second
    simulation    events as client apps would send them
    requests      HTTP that comes in: what is asked, and who may ask
    answers       HTTP that goes out: how answers are made, kept and sent
    handlers      one for each route; ROUTES is the index of the API
    application   what the handlers share, and who owns it
    command line  options, signals, the process

The words:

    event, stream  one play of one track by one user, in exactly five fields
    subscription   what a user pays a month, and through whom
    revenue        of a month: what is left of all fees
    the silent     the subscribers who have not streamed a second in a month
    adjustment     what is paid with a later close, because streams of a month changed after it was closed
    sequence       every change of the data takes its next number; an id and a version are such numbers
    feed           the list of these changes, for programs that follow them
    batch          the 1 to 5 events that the simulation makes at a time

Times are Unix seconds, durations are seconds, money is in cents. The limits: one process, one event
loop; all events are in memory, and without --db gone when it ends.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - it is for those who have an older one
    print(f"server.py: it needs Python 3.11 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
    sys.exit(2)

import os
import signal

if __name__ == "__main__":  # until `main` takes them over: the imports take a while
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))

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
import queue
import random
import re
import resource
import secrets
import socket
import sqlite3
import stat
import threading
import time
import unicodedata
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass, field
from decimal import Decimal
from email.utils import formatdate
from functools import cached_property, lru_cache, partial
from heapq import merge
from http import HTTPStatus
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, cast
from urllib.parse import parse_qsl, unquote
from urllib.parse import quote as percent_encode
from weakref import WeakValueDictionary

try:
    import aiohttp
    from aiohttp import hdrs, http_exceptions, web
    from aiohttp.typedefs import Handler

    if [*map(int, re.findall("[0-9]+", aiohttp.__version__)[:3])] < [3, 14, 3]:
        raise ImportError(f"aiohttp {aiohttp.__version__} is too old")
except ImportError as error:
    print(f"server.py: {error}; install it: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

__version__ = "2.0"

CHUNK_EVENTS = 1024  # at most, in one chunk: about 100 kB of JSON and a millisecond of work
PIECE_BYTES = 64 * 1024  # of an answer, written at a time
GZIP_BYTES = 1024  # a shorter answer is not worth compressing
KEPT_BYTES = 1024 * 1024  # a longer answer is not kept, and a longer list is sent in pieces as they are made
KEPT_ANSWERS = 64
MOST_ROWS = 100_000  # of totals, in one answer
STEP_ROWS = 256  # of them are made and written in one step
KNOWN_TOTALS = 8  # so many groupings a chunk remembers
PAGE_STREAMS = 1_000
WRITE_SECONDS = 60  # a client that takes nothing of its answers for so long is disconnected
LINGER_SECONDS = 1  # how long a body that nobody wants may go on before its connection is closed
BODY_BYTES = 1024 * 1024
LARGE_BODY_BYTES = 64 * 1024  # one that is longer takes a time slice to parse, and more
BODY_SECONDS = 10
POST_EVENTS = 1_000
BUSY_SECONDS = 1  # how long a commit waits for another process that has locked the file
END_SECONDS = 4.7  # from the signal on, whatever the disk and the clients do; 5 are promised
LATE_SECONDS = 5  # or three intervals, if that is longer, without a batch: the simulation has stopped
IMPORT_BYTES = 256 * 1024 * 1024  # at most, of each file of an import
LINE_CHARACTERS = 65_536
IMPORT_FAULTS = 20  # an import is read up to so many
FETCH_SECONDS = 30  # how long each try to get the tracks may take
FETCH_WAITS = (0, 0.5, 1, 2, 4)  # seconds before each of these tries
OUTPUT_LINES = 1_000  # so many lines may wait to be read, further ones are dropped
SIGNALS = (signal.SIGINT, signal.SIGTERM)
DAY = 86_400

STATE: web.AppKey[State] = web.AppKey("state")

T = TypeVar("T")

log = logging.getLogger("server")


def telling(what: str, items: Iterable[T]) -> Iterator[T]:
    """Yield `items`, and log once a second how many of `what` that were."""
    began = said = time.monotonic()
    for number, item in enumerate(items):
        if (now := time.monotonic()) >= said + 1:
            said = now
            log.info("%s so far: %s after %.0f s", what, f"{number:,}", now - began)
        yield item


def reason_of(error: BaseException) -> str:
    """Return what an error says; of an OSError without its number and file."""
    return getattr(error, "strerror", None) or str(error)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


# ── Long work ───────────────────────────────────────────────────────────────────────────────────
# One event loop does everything, so nothing may keep it for longer than a time slice at a stretch. Work that
# could is a generator, which yields wherever others may go on: `TimeSlices.finish` runs it to its end.

SLICE_SECONDS = 0.0005  # a time slice
SHORT_SLICES = 64  # work that takes more time slices is long work
MOST_LONG_WORK = 4  # is under way at a time, for it holds memory
# Without --db a write waits for nothing else: so only so many begin in a round of the event loop. With --db
# the `Journal` makes many visible together, and sleeps in between.
ROUND_WRITES = 8
# A thread gets the interpreter's lock once it has waited so long without a break (`sys.setswitchinterval`).
# After each slice the event loop releases the lock, too shortly for the thread to take it, and the wait
# begins anew. So this must be shorter than a slice, or threads would starve.
SWITCH_SECONDS = SLICE_SECONDS / 5

Steps = Generator[None, None, T]  # work that yields where others may go on, and returns a T


def in_steps(items: Iterable[T]) -> Steps[list[T]]:
    """Return a list of items that are made one after the other."""
    made = []
    for item in items:
        yield
        made.append(item)
    return made


def drain(items: deque[T]) -> Iterator[T]:
    """Yield items and forget each: to free all of them at the end would take too long."""
    while items:
        yield items.popleft()


def sort_in_steps(items: Iterable[T], key: Callable[[T], Any]) -> Steps[Iterator[T]]:
    """Return items in order, sorted in runs that are then merged: all at once would take too long."""
    runs = yield from in_steps(deque(sorted(some, key=key)) for some in batched(items, CHUNK_EVENTS))
    return merge(*map(drain, runs), key=key)


class TimeSlices:
    """How all work shares the event loop: whatever asks for it gets one time slice, after all others.

    A round of the event loop runs what is ready: all requests that have come, and one such time slice.
    """

    def __init__(self) -> None:
        self.one_a_round = asyncio.Lock()
        self.long_work = asyncio.Semaphore(MOST_LONG_WORK)
        self.writes = asyncio.Semaphore(ROUND_WRITES)

    async def yield_to_others(self) -> None:
        """Wait for the next round in which nobody else has the time slice."""
        async with self.one_a_round:  # as through a turnstile: in each round one gets out, to its work
            await asyncio.sleep(0)

    async def wait_to_write(self) -> None:
        """Wait for a round in which fewer than ROUND_WRITES others begin to write (without --db)."""
        async with self.writes:  # in each round ROUND_WRITES get out
            await asyncio.sleep(0)

    async def finish(self, work: Generator[Any, None, T], first: bool = False) -> T:
        """Return what `work` returns, and yield to others between its time slices.

        If it proves to be long, it goes on as one of MOST_LONG_WORK at a time, unless it comes `first`.
        """
        slices, held, until = 0, False, time.monotonic() + SLICE_SECONDS
        try:
            while True:
                next(work)
                if time.monotonic() >= until:
                    slices += 1
                    if slices == SHORT_SLICES and not first:
                        held = await self.long_work.acquire()
                    await self.yield_to_others()
                    until = time.monotonic() + SLICE_SECONDS
        except StopIteration as end:
            return cast("T", end.value)
        finally:
            work.close()  # or a traceback would hold what it works on
            if held:
                self.long_work.release()


# ── Events ──────────────────────────────────────────────────────────────────────────────────────
# What an event is, and what it may hold.

NAMES = ("user_id", "track_id", "label")
FIELDS = (*NAMES, "stream_started_on", "seconds_streamed")
EVENT_KEYS = frozenset(FIELDS)

# Control characters forge log lines and break CSV; lone surrogates cannot be written as UTF-8.
FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
TEXT_CHARACTERS = 128

INTEGER = re.compile(r"-?[0-9]{1,100}")
HIGHEST_SECONDS = 2**31 - 1
COMMON_SECONDS = {seconds: seconds for seconds in range(7_200)}  # one object of each, for all events
CSV_END = "\r\n"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run

JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
quote = json.encoder.encode_basestring  # what JSON does with a text


class InvalidError(ValueError):
    """What a client asked for or sent is malformed; the message names the field or parameter."""


class MissingError(LookupError):
    """There is nothing under this id."""


class ConflictError(Exception):
    """What is asked for is well-formed, but the state of the data does not allow it."""


@dataclass(slots=True, eq=False)
class Event:
    """One play of one track by one user.

    `stream_started_on` is in Unix seconds, `seconds_streamed` in seconds. `id` is the number, in the
    sequence of all changes, under which the stream was created. Once it is given, the event is never
    changed: a `ChangedEvent` takes its place.
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
        self.label = sys.intern(self.label)
        self.seconds_streamed = COMMON_SECONDS.get(self.seconds_streamed, self.seconds_streamed)

    @property
    def version(self) -> int:
        """The number of the stream's latest change: its creation."""
        return self.id

    @property
    def etag(self) -> str:
        """The strong ETag."""
        return f'"{self.version}"'

    @property
    def json_fields(self) -> str:
        """The five fields as compact JSON, without the braces."""
        return (
            f'"user_id":{quote(self.user_id)},"track_id":{quote(self.track_id)},"label":{quote(self.label)},'
            f'"stream_started_on":{self.stream_started_on},"seconds_streamed":{self.seconds_streamed}'
        )

    @property
    def json_with_id(self) -> bytes:
        """The JSON with the id before the five keys."""
        return f'{{"id":{self.id},{self.json_fields}}}'.encode()


@dataclass(slots=True, eq=False)
class ChangedEvent(Event):
    """What a stream was changed to; few are, so only these take memory for a version of their own."""

    version: int = 0  # instead of the property


@dataclass(slots=True, eq=False)
class Tombstone:
    """What the feed tells of a stream that has been removed."""

    id: int
    version: int
    json_fields: ClassVar[str] = '"deleted":true'  # in the feed, where an event has its five


def number_events(events: Iterable[Event], first_id: int) -> None:
    """Give events, as they are created, one id after the other."""
    for number, event in enumerate(events, first_id):
        event.id = number


class Money(str):
    """An amount as text that `encode_cells` leaves as it is: a minus at its start is no formula."""


@lru_cache(maxsize=1024, typed=True)  # typed: Money("-1") is equal to the text "-1"
def encode_cells(*cells: object) -> str:
    """Return a line as RFC 4180 has it, without its end, and with no text that a spreadsheet runs."""
    text = io.StringIO()
    csv.writer(text).writerow(
        f"'{cell}" if type(cell) is str and cell.startswith(FORMULA) else cell for cell in cells
    )
    return text.getvalue()[: -len(CSV_END)]


def check_text(name: str, value: object) -> str:
    """Return `value` if it is 1 to 128 characters and none of them a control character.

    Raises InvalidError, which names the field or parameter `name`.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= TEXT_CHARACTERS:
        raise InvalidError(f"{name} must be a text of 1 to {TEXT_CHARACTERS} characters")
    if not value.isprintable() and FORBIDDEN_CHARACTERS.search(value):  # the first condition is quick
        raise InvalidError(f"{name} must not contain control characters, and must be UTF-8")
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
        check_int("seconds_streamed", fields["seconds_streamed"], HIGHEST_SECONDS),
    )


def parse_events(value: object, now: float) -> Steps[list[Event]]:
    """Return the event, or those of the array of 1 to 1,000, that `value` is; an error names the index."""
    if not isinstance(value, list):
        return [parse_event(value, now)]
    if not 1 <= len(value) <= POST_EVENTS:
        raise InvalidError(f"an array must hold 1 to {POST_EVENTS} events")
    events = []
    for index, item in enumerate(value):
        yield
        try:
            events.append(parse_event(item, now))
        except InvalidError as error:
            raise InvalidError(f"[{index}]: {error}") from None
    return events


# ── Usage ───────────────────────────────────────────────────────────────────────────────────────
# The events that are kept, in deques of chunks that are never changed, only replaced: whoever has got
# chunks reads one moment, however slowly, and what has been found out about a chunk stays true.


class Chunk(list[Any]):
    """Some events, or in the feed tombstones too, that stand next to each other."""

    @cached_property
    def json_lines(self) -> bytes:
        """The JSON of each event, with a newline before it: `write_list` makes commas of these for a list."""
        return "".join([f"\n{{{event.json_fields}}}" for event in self]).encode()

    @property
    def csv(self) -> bytes:
        """The lines of a CSV file."""
        return "".join([
            f"{encode_cells(event.user_id, event.track_id, event.label)},"  # few names: so they are cached
            f"{event.stream_started_on},{event.seconds_streamed}{CSV_END}"
            for event in self
        ]).encode()

    @property
    def feed_lines(self) -> bytes:
        """The lines of the feed."""
        lines = [f'{{"version":{each.version},"id":{each.id},{each.json_fields}}}\n' for each in self]
        return "".join(lines).encode()

    @cached_property
    def known(self) -> dict[object, Totals]:
        """The totals that `count_chunk` has found, by window and names."""
        return {}


class Order:
    """Events in order of a field, equal ones in order of their ids, in a deque of chunks.

    An event that belongs into the middle costs the copy of one chunk instead of shifting the whole deque.
    """

    def __init__(self, field: str) -> None:  # the name of one that holds an int
        self.value = attrgetter(field)
        self.key = attrgetter(field, "id")
        self.chunks: deque[Chunk] = deque()

    def put(self, events: Iterable[Any], sign: int = 1) -> None:
        """Put each event in its place or, with a `sign` of -1, take out those, the objects themselves."""
        for at, group in self._by_chunk(events):
            chunk = Chunk(self.chunks[at] if self.chunks else ())
            if sign < 0:
                leaving = set(group)
                chunk = Chunk([event for event in chunk if event not in leaving])
            elif not chunk or self.key(group[0]) > self.key(chunk[-1]):  # as new ids and versions are
                chunk += group
            elif len(group) > len(chunk) // 16:  # sorting anew is quicker than finding so many places
                chunk = Chunk(sorted(chunk + group, key=self.key))
            else:
                for event in group:
                    insort(chunk, event, key=self.key)
            self._replace(at, chunk)

    def _by_chunk(self, events: Iterable[Any]) -> list[tuple[int, list[Any]]]:
        """Return the places of the chunks that events belong into, and these events.

        An event belongs into the last chunk that begins at or before it or, if none does, into the first. The
        last place comes first: so `put` may replace a chunk by none or several, and the others stay in place.
        """
        pending, found = sorted(events, key=self.key), []
        while pending:
            last = self.key(pending[-1])
            at = max(0, bisect_right(self.chunks, last, key=lambda chunk: self.key(chunk[0])) - 1)
            start = bisect_left(pending, self.key(self.chunks[at][0]), key=self.key) if at else 0
            found.append((at, pending[start:]))
            del pending[start:]
        return found

    def between(self, low: float = -math.inf, high: float = math.inf) -> deque[Chunk]:
        """Return the events with `low <= field < high`, in order, as chunks, none of them empty."""
        first = bisect_left(self.chunks, low, key=lambda chunk: self.value(chunk[-1]))
        end = bisect_left(self.chunks, high, key=lambda chunk: self.value(chunk[0]))
        found = deque(itertools.islice(self.chunks, first, end))
        if found and self.value(found[0][0]) < low:
            found[0] = Chunk(found[0][bisect_left(found[0], low, key=self.value) :])
        if found and self.value(found[-1][-1]) >= high:
            found[-1] = Chunk(found[-1][: bisect_left(found[-1], high, key=self.value)])
            if not found[-1]:  # `low` and `high` lie between two of its events
                found.pop()
        return found

    def _replace(self, at: int, new: Chunk) -> None:
        """Put `new`, if it holds any event, in the place of the chunk there; too long, it is cut evenly."""
        if self.chunks:
            del self.chunks[at]
        parts = math.ceil(len(new) / CHUNK_EVENTS)
        for part in reversed(range(parts)):
            first, end = len(new) * part // parts, len(new) * (part + 1) // parts
            self.chunks.insert(at, new if parts == 1 else Chunk(new[first:end]))


class Usage:
    """The events that are kept, by start and by id, and the number of the latest change of all data.

    Of more than `keep` events those that started last are kept. With --db `keep` is infinite, so nothing need
    be dropped on disk. `record` is told what comes (1) and goes (-1).
    """

    def __init__(self, record: Callable[[Sequence[Event], int], object], keep: float = math.inf) -> None:
        self.record = record
        self.keep = keep
        self.by_start, self.by_id = Order("stream_started_on"), Order("id")
        self.changed, self.tombstones = Order("version"), Order("version")  # with `by_id` they are the feed
        self.keys: dict[str, tuple[bytes, int]] = {}  # idempotency key -> hash of the body, first id
        self.count = 0
        self.sequence_name = secrets.token_hex(4)
        self.last_number = 0  # the highest that was given
        self.sequence = 0  # the highest that is visible: `State.store` and `Journal._store` move it on
        self.tombstones_since = 0  # all removals after this number still have theirs
        self.gc_frozen_at = 0  # `last_number` at the last `gc.freeze`
        self.warned = False

    @property
    def etag(self) -> str:
        """What names the moment that is visible."""
        return f"{self.sequence_name}-{self.sequence}"

    def next_number(self, count: int = 1) -> int:
        """Give the next `count` changes their numbers, which no others have ever had; return the first."""
        self.last_number += count
        return self.last_number - count + 1

    def find_too_old(self, events: Sequence[Event]) -> Event | None:
        """Return the one of these new events that `keep` would drop first, if it would drop any at once."""
        over = self.count + len(events) - self.keep  # so many will be dropped
        if over <= 0:
            return None
        earliest = min(events, key=attrgetter("stream_started_on"))
        # It is dropped if fewer than `over` kept events go before it. One with the same start does, as its id
        # is lower than the new one's: so `+ 1`, for `high` is exclusive.
        earlier = self.by_start.between(high=earliest.stream_started_on + 1)
        return earliest if sum(map(len, earlier)) < over else None

    def add(self, events: Sequence[Event]) -> None:
        """Keep numbered events; then drop the oldest above `keep`, which takes further numbers."""
        self._put(events, 1)
        if self.last_number >= self.gc_frozen_at + 20_000:
            # What is kept is no garbage: the collector, which would take ms to search it, passes over it.
            self.gc_frozen_at = self.last_number
            gc.freeze()
        if self.count <= self.keep:
            return
        if not self.warned:
            self.warned = True
            log.warning("there are more than %d events: from now on the oldest go (--keep, --db)", self.keep)
        oldest = [*itertools.chain(*first_of(self.by_start.chunks, self.count - self.keep))]
        self.remove(oldest, self.next_number(len(oldest)))

    def find(self, stream_id: int) -> Event:
        """Return the event with this id; raises MissingError."""
        if found := self.by_id.between(stream_id, stream_id + 1):
            return found[0][0]  # type: ignore[no-any-return]
        raise MissingError(f"there is no stream {stream_id}")

    def changes_after(self, number: int) -> Iterator[Chunk]:
        """Return what was created, changed or removed after a number, as it is now, in order of version."""
        # These are of now, however late they are read: `between` has copied where the chunks are.
        found = [order.between(number + 1) for order in (self.by_id, self.changed, self.tombstones)]
        created, changed, removed = map(itertools.chain.from_iterable, found)
        unchanged = (event for event in created if type(event) is Event)  # their version is their id
        in_order = merge(unchanged, changed, removed, key=attrgetter("version"))
        return map(Chunk, batched(in_order, CHUNK_EVENTS))

    def replace(self, old: Event, new: Event) -> None:
        """Put `new` in the place of `old`, which has the same id."""
        self._put([old], -1)
        self.add([new])

    def remove(self, events: Sequence[Event], number: int) -> None:
        """Forget events that are there; their tombstones get the versions from `number` on."""
        self._put(events, -1)
        self.tombstones.put(Tombstone(event.id, version) for version, event in enumerate(events, number))
        over = sum(map(len, self.tombstones.chunks)) - self.keep  # `keep` is how many of these are kept, too
        if over > 0:  # who follows from before has to begin anew
            oldest = [*itertools.chain(*first_of(self.tombstones.chunks, over))]
            self.tombstones.put(oldest, -1)
            self.tombstones_since = oldest[-1].version

    def _put(self, events: Sequence[Event], sign: int) -> None:
        """Put events into all orders (1) or take them out (-1)."""
        self.by_start.put(events, sign)
        self.by_id.put(events, sign)
        self.changed.put((event for event in events if type(event) is ChangedEvent), sign)
        self.count += sign * len(events)
        self.record(events, sign)


Wanted = tuple[tuple[str, Set[Any] | range], ...]  # names of fields, and the values that are wanted of each


def matching(events: Chunk, wanted: Wanted) -> Chunk:
    """Return the events whose fields are all among the values that are wanted: the one filter."""
    for name, values in wanted:
        events = Chunk(itertools.compress(events, map(values.__contains__, map(attrgetter(name), events))))
    return events


def first_of(chunks: Iterable[Chunk], limit: float) -> Iterator[Chunk]:
    """Yield chunks until there are `limit` events."""
    for chunk in chunks:
        yield chunk if len(chunk) <= limit else Chunk(chunk[: int(limit)])
        limit -= len(chunk)
        if limit <= 0:
            return


# ── Totals ──────────────────────────────────────────────────────────────────────────────────────
# How many streams and seconds there are under each key, all counted by `totals_of`. A chunk's own totals
# never change, so they add up to any grouping, filter and window of /usage. Those by user and month, which
# `Books` (royalties) keeps, change with each event: so a report takes no longer when there are more events.

Total = tuple[int, int]  # streams and seconds
Totals = dict[Any, Total]
WINDOWS = {"minute": 60, "hour": 3_600, "day": DAY}  # and month, which has no fixed length
MANY: Totals = {}  # stands for totals that are too many to be remembered


def totals_of(events: Sequence[Event], names: Sequence[str], window: str | None = None) -> Totals:
    """Return the totals of `events` by the start of the window, if there is one, and these fields."""
    columns: list[Iterable[Any]] = [windows_of(events, window)] if window else []
    columns += [map(attrgetter(name), events) for name in names]  # read in C, for there are many events
    keys = zip(*columns, strict=True) if columns else itertools.repeat(())
    seconds: defaultdict[Any, list[int]] = defaultdict(list)
    for key, streamed in zip(keys, map(attrgetter("seconds_streamed"), events), strict=False):
        seconds[key].append(streamed)
    return {key: (len(each), sum(each)) for key, each in seconds.items()}


def add_up(totals: Totals, key: Any, total: Total, sign: int = 1) -> None:
    """Add a total, or any such pair, to what stands under `key`; two zeros have no key."""
    first, second = totals.get(key, (0, 0))
    first, second = first + sign * total[0], second + sign * total[1]
    if first or second:
        totals[key] = first, second
    else:
        totals.pop(key, None)


@lru_cache(maxsize=4096)
def month_of(day: int) -> str:
    """Return the month, as in 2019-03, of the day with this number since 1970, in UTC."""
    return time.strftime("%Y-%m", time.gmtime(day * DAY))


@lru_cache(maxsize=4096)
def month_start(month: str) -> int:
    """Return when a month begins in UTC, in Unix seconds."""
    return calendar.timegm(time.strptime(month, "%Y-%m"))


def windows_of(events: Iterable[Event], window: str) -> list[int]:
    """Return when the minute, hour, day or month in UTC of each event began."""
    if window == "month":
        return [month_start(month_of(event.stream_started_on // DAY)) for event in events]
    return [event.stream_started_on - event.stream_started_on % WINDOWS[window] for event in events]


def count_chunk(chunk: Chunk, window: str | None, by: tuple[str, ...], wanted: Wanted) -> Totals:
    """Return the totals, by window start and these names, of the events that are wanted.

    A chunk remembers totals that are few. Where they are many, to filter before counting saves work.
    """
    names = (*by, *(name for name, _ in wanted if name not in by))  # to filter by one it must be in the keys
    found = chunk.known.get((window, names))
    if found is MANY:
        return totals_of(matching(chunk, wanted), by, window)
    if found is None:  # it is the first time
        found = totals_of(chunk, names, window)
        chunk.known[window, names] = found if len(found) <= len(chunk) // 4 else MANY
        if len(chunk.known) > KNOWN_TOTALS:
            del chunk.known[next(iter(chunk.known))]
    first = 1 if window else 0  # the place of the first name in a key
    for name, values in wanted:
        at = first + names.index(name)
        found = {key: total for key, total in found.items() if key[at] in values}
    if names == by:
        return found
    sums: Totals = {}
    for key, total in found.items():
        add_up(sums, key[: first + len(by)], total)  # without the names that are only filtered by
    return sums


def aggregate(
    chunks: Iterable[Chunk], by: tuple[str, ...], window: str | None, wanted: Wanted, limit: int | None
) -> Steps[Iterator[tuple[Any, ...]]]:
    """Return rows of window start, names, streams and seconds: in order of time, then most seconds first.

    Raises InvalidError for more rows than MOST_ROWS, unless only the first `limit` are asked for.
    """
    sums: Totals = {}  # events come in order of time, so do their windows, and a dict keeps that order
    for chunk in chunks:
        yield
        if window and limit and len(sums) >= limit:
            # Rows come in order of time, too: so the first `limit` are of no later window than this key is.
            last_window = next(itertools.islice(sums, limit - 1, None))[0]
            if windows_of(chunk[:1], window)[0] > last_window:
                break  # all events up to that window have been counted
        for key, total in count_chunk(chunk, window, by, wanted).items():
            if key in sums:
                add_up(sums, key, total)
            else:  # quicker: most keys of short windows are new
                sums[key] = total
        if len(sums) > MOST_ROWS and not limit:
            raise InvalidError(f"there are more than {MOST_ROWS:,} rows: narrow the query, or pass limit")

    def place(item: tuple[tuple[Any, ...], Total]) -> tuple[Any, ...]:
        key, (_, seconds) = item
        return (key[0] if window else 0), -seconds, key

    rows = (yield from sort_in_steps(sums.items(), place)) if by else sums.items()
    return ((*key, *total) for key, total in itertools.islice(rows, limit))


# ── Royalties ───────────────────────────────────────────────────────────────────────────────────
# Who is owed what. Money is in ints: cents, or hundredths of a cent before the revenue is rounded.
#
#     amount   what a label gets of a month's revenue: pro rata, by the seconds of all, or user-centric, each
#              fee by the seconds of who pays it
#     claim    a label's part, x 2**CLAIM_BITS, of the seconds of all or, user-centric, of all net fees
#     quota    what a claim comes to in cents of the revenue, x 2**QUOTA_BITS, before it is rounded to cents
#     ledger   what a month's streams and fees come to, and how they are shared out
#     account  a month's money: it follows the streams while the month is open, and is frozen with its close
#     late     how much more, or less, a closed month would give a label now
#     unpaid   what of that no adjustment has paid yet

FACTORS = {"app_store": 70, "web": 90}  # per cent: what the store or the payment provider leaves
FEE = re.compile(r"[0-9]{1,5}(\.[0-9]{1,2})?")
HIGHEST_FEE = 1_000_000  # cents
CURRENCY = "EUR"
CLAIM_BITS = 640  # binary places of a claim
QUOTA_BITS = 384  # and of a quota: `round_off` tells why it has less
AMOUNTS = ("amount", "amount_user_centric")
ADJUSTMENTS = ("adjustment", "adjustment_user_centric")
LABEL_COLUMNS = ("label", "streams", "seconds_streamed", "share", *AMOUNTS, *ADJUSTMENTS)
REPORT_COLUMNS = ("month", "currency", *LABEL_COLUMNS)
USER_COLUMNS = ("user_id", "product_type", "fee", "origin")
PAYER_COLUMNS = (*USER_COLUMNS, "net", "seconds_streamed", "of_seconds", "part")

ByUser = dict[str, Totals]  # of each user the totals by label or by track
Adjustments = dict[tuple[str, str], tuple[int, int]]  # amounts by the month that they are for, and label


@dataclass(frozen=True, slots=True)
class Subscription:
    """What a user subscribes to; `fee` is in cents a month. Raises InvalidError, which names the field."""

    product_type: str
    fee: int
    origin: str

    def __post_init__(self) -> None:
        check_text("product_type", self.product_type)
        check_int("fee", self.fee, HIGHEST_FEE)
        if self.origin not in tuple(FACTORS):  # it may be a list, which no dict looks up
            raise InvalidError(f"origin must be one of {', '.join(FACTORS)}")

    @property
    def net(self) -> int:
        """What is left of the fee, in hundredths of a cent."""
        return self.fee * FACTORS[self.origin]


# Built in, for the users of the simulation; an import takes their place.
SUBSCRIPTIONS = {
    "user1": Subscription("premium", 799, "app_store"),
    "user2": Subscription("platinum", 1499, "web"),
    "user3": Subscription("premium", 799, "web"),
}


def parse_subscription(value: object) -> Subscription:
    """Return the subscription that `value`, parsed JSON, is; raises InvalidError, which names the field."""
    fields = check_keys("the subscription", value, {"product_type", "fee", "origin"})
    fee = check_text("fee", fields["fee"])
    if not FEE.fullmatch(fee) or (cents := int(100 * Decimal(fee))) > HIGHEST_FEE:
        raise InvalidError("fee must be a decimal text from 0 to 10000 with two decimals at most")
    return Subscription(fields["product_type"], cents, fields["origin"])


def euros(units: int, places: int = 2) -> Money:
    """Write units of 10**-places of a euro as a decimal: cents, or with 6 `places` millionths."""
    return Money(f"{Decimal(units).scaleb(-places):f}")


class Line(NamedTuple):
    """What a label has in a month: streams and seconds, and in cents what it is owed."""

    streams: int = 0
    seconds_streamed: int = 0
    amount: int = 0
    amount_user_centric: int = 0
    adjustment: int = 0
    adjustment_user_centric: int = 0


def add_lines(lines: Iterable[Line]) -> Line:
    """Return the sum of lines, column by column: of none it is Line(), all zeros."""
    return Line(*map(sum, zip(Line(), *lines, strict=True)))


@dataclass(frozen=True)
class Ledger:
    """What a month's streams and fees come to, and what each label is owed of it.

    Fees and revenue are in cents, net fees in hundredths of one. A label's user-centric claim is the sum,
    over users, of net fee x seconds of the label / seconds of the user, and a part of the fees of the silent
    by the seconds of all.
    """

    labels: dict[str, Line]
    claims: Counter[str]  # user-centric
    seconds: int
    fees: int
    net: int
    revenue: int  # rounded once, half up
    silent_net: int
    silent_users: int


def seconds_of(totals: Totals) -> int:
    return sum(seconds for _, seconds in totals.values())


def tally(users: ByUser, subscriptions: Mapping[str, Subscription]) -> Steps[Ledger]:
    """Return a month's ledger: the one place where its seconds and fees are added up and shared out."""
    fees = net = 0
    for subscription in subscriptions.values():
        yield
        fees, net = fees + subscription.fee, net + subscription.net
    silent_net, silent_users = net, len(subscriptions)  # until they are found to have streamed
    totals: Totals = {}
    pro_rata, centric = Counter[str](), Counter[str]()  # claims
    for user, own in users.items():
        yield
        price, user_seconds = 0, seconds_of(own)
        if user_seconds and user in subscriptions:
            price = (subscriptions[user].net << CLAIM_BITS) // user_seconds  # of a second
            silent_net, silent_users = silent_net - subscriptions[user].net, silent_users - 1
        for label, total in own.items():
            add_up(totals, label, total)
            centric[label] += price * total[1]
    seconds, revenue = seconds_of(totals), (net + 50) // 100
    silent_price = (silent_net << CLAIM_BITS) // (seconds or 1)
    for label, total in totals.items():
        yield
        pro_rata[label] = total[1] << CLAIM_BITS
        centric[label] += silent_price * total[1]
    cents = revenue if seconds else 0  # or labels with streams of 0 s would get what is left, a cent each
    amounts = yield from share_out(cents, seconds, pro_rata)
    amounts_centric = yield from share_out(cents, net, centric)
    lines = ((label, Line(*total, amounts[label], amounts_centric[label])) for label, total in totals.items())
    labels = dict((yield from in_steps(lines)))
    return Ledger(labels, centric, seconds, fees, net, revenue, silent_net, silent_users)


def share_out(cents: int, whole: int, claims: Mapping[str, int]) -> Steps[dict[str, int]]:
    """Share out `cents`, to the last one, by claims on `whole`: by the largest remainder.

    `whole` is what all claims come to, without their binary places. Each gets its quota rounded down.
    What is left goes, a cent each, to those who lost most by the rounding, ties in order of the name.
    """
    divided = ((name, *divmod(quota(cents, claim, whole), 1 << QUOTA_BITS)) for name, claim in claims.items())
    shares = yield from in_steps(divided)
    left = cents - sum(share for _, share, _ in shares)
    in_order = yield from sort_in_steps(shares, lambda each: (-each[2], each[0]))
    rounded = ((name, share + (number < left)) for number, (name, share, _) in enumerate(in_order))
    return dict((yield from in_steps(rounded)))


def quota(amount: int, claim: int, whole: int) -> int:
    """Return what a `claim` on `whole` comes to of `amount`, x 2**QUOTA_BITS."""
    return round_off(amount * claim // (whole or 1))


def round_off(exact: int) -> int:
    """Round a number with CLAIM_BITS binary places to QUOTA_BITS of them, to the nearest.

    The prices in `tally` are rounded down, so a claim is a little too low: a quota that is 5 on paper is
    4.99... before this, and 5 after it. So quotas that are equal on paper are equal here, and the name breaks
    a tie, not chance. README, "Exact, in little memory", shows that the places suffice.
    """
    off = CLAIM_BITS - QUOTA_BITS
    return (exact + (1 << (off - 1))) >> off


@dataclass
class Books:
    """What reports and users are made from. Who reads in steps needs a snapshot: others write in between.

    `record` copies a month that a snapshot shares before it changes it. It never changes a user's totals in
    place, but puts new ones there.
    """

    subscriptions: dict[str, Subscription]
    months: defaultdict[str, ByUser] = field(default_factory=lambda: defaultdict(dict))
    versions: Counter[str] = field(default_factory=Counter)  # of the totals of each month
    tracks: ByUser = field(default_factory=dict)  # over all time
    closed: dict[str, Account] = field(default_factory=dict)
    copy_on_record: set[str] = field(default_factory=set)  # months that a snapshot shares

    def record(self, events: Sequence[Event], sign: int = 1) -> None:
        """Add events to the totals or, with a `sign` of -1, take them away."""
        by_month: defaultdict[str, list[Event]] = defaultdict(list)
        for event in events:
            by_month[month_of(event.stream_started_on // DAY)].append(event)
        for month, of_month in by_month.items():
            if month in self.copy_on_record:
                self.months[month] = {**self.months[month]}
                self.copy_on_record.remove(month)
            record_users(self.months[month], of_month, "label", sign)
            self.versions[month] += 1
            if not self.months[month]:
                del self.months[month]
        record_users(self.tracks, events, "track_id", sign)

    def snapshot(self) -> Books:
        """Return the books as they are now: months are copied once they change, accounts are shared.

        `tracks` changes with each write, so it is copied at once.
        """
        self.copy_on_record |= self.months.keys()
        months, versions = self.months.copy(), self.versions.copy()
        return Books(self.subscriptions.copy(), months, versions, self.tracks.copy(), self.closed.copy())

    def paying_month(self) -> str:
        """Return the first open month with streams, or the one after the last closed: it pays adjustments.

        It may be before closed ones: a month without streams need not be closed, and may get some later.
        """
        last = max(self.closed, default="1969-12")  # without any, there is nothing to adjust
        after_last = month_of(month_start(last) // DAY + 31)  # the 32nd day is one of the next month
        return min(self.months.keys() - self.closed.keys(), default=after_last)

    def obstacle(self, month: str, new_status: str, now: float) -> str:
        """Return why a month cannot get this status, which it has not yet, or "" if it can."""
        if new_status == "open":
            return f"{max(self.closed)} is closed: open it first" if max(self.closed) > month else ""
        if month >= month_of(int(now) // DAY):
            return f"{month} is not over"
        first = min(self.months.keys() - self.closed.keys(), default=month)
        return f"{first} has streams and is open: close it first" if first < month else ""


def record_users(users: ByUser, events: Sequence[Event], name: str, sign: int) -> None:
    """Count events by user and a field, and put new totals of these users into `users`."""
    totals = totals_of(events, ("user_id", name))
    for user in {user for user, _ in totals}:
        users[user] = {**users.get(user, {})}
    for (user, value), total in totals.items():
        add_up(users[user], value, total, sign)
        if not users[user]:  # that was the last value, so no more of this user comes
            del users[user]


def describe_user(books: Books, user: str) -> dict[str, Any]:
    """Return what a user streamed, by label and by track, and subscribes to; raises MissingError."""
    tracks, found = books.tracks.get(user, {}), books.subscriptions.get(user)
    if not (tracks or found):
        raise MissingError(f"there is no user {user!r}")
    labels = Counter[str]()
    for users in books.months.values():
        for label, (_, seconds) in users.get(user, {}).items():
            labels[label] += seconds
    return {
        "user_id": user,
        "streams": sum(streams for streams, _ in tracks.values()),
        "seconds_streamed": seconds_of(tracks),
        "labels": dict(sorted(labels.items())),
        "tracks": {track: seconds for track, (_, seconds) in sorted(tracks.items())},
        "subscription": asdict(found) | {"fee": euros(found.fee)} if found else None,
    }


@dataclass
class Account:
    """A month's money, in cents: what was frozen when it was closed, or what closing it now would freeze."""

    closed_on: int | None
    totals: ByUser
    subscriptions: dict[str, Subscription]
    fees: int
    revenue: int
    labels: dict[str, Line]
    adjustments: Adjustments  # what is paid with this month for others, or taken back: see `unpaid`
    # The version of the month's totals, and what was late then. All snapshots share an account, and this is
    # all that ever changes in it.
    late_cache: tuple[int, Adjustments] | None = None

    @property
    def status(self) -> str:
        return "open" if self.closed_on is None else "closed"

    def lines(self) -> dict[str, Line]:
        """Return each label's line with the sums of its adjustments."""
        lines = {**self.labels}
        for (_, label), cents in self.adjustments.items():
            lines[label] = add_lines([lines.get(label, Line()), Line(0, 0, 0, 0, *cents)])
        return lines

    def late_amounts(self, month: str, books: Books) -> Steps[Adjustments]:
        """Return how much more each label would get than its amounts, from the month's totals of now."""
        version = books.versions[month]
        if self.late_cache is None or self.late_cache[0] != version:
            now = yield from tally(books.months.get(month, {}), self.subscriptions)
            late: Adjustments = {}
            for labels, sign in ((now.labels, 1), (self.labels, -1)):
                for label, line in labels.items():
                    yield
                    add_up(late, (month, label), (line.amount, line.amount_user_centric), sign)
            self.late_cache = version, late
        return self.late_cache[1]


def unpaid(books: Books) -> Steps[Adjustments]:
    """Return what is still to be paid, or taken back, for each month and label.

    That is what is late, less what adjustments have paid of it. So a label's amount of a closed month, all
    adjustments for it, and this come to what that month would give it now.

    Say March was closed after April, for it had no streams before, and paid for April. If April is opened
    again, nothing of it is late, and what March paid for it is negative here: the next close takes it back,
    and that of April pays all.
    """
    due: Adjustments = {}
    for month, account in books.closed.items():
        due |= yield from account.late_amounts(month, books)
    for account in books.closed.values():
        for key, cents in account.adjustments.items():  # for months that are open again, too
            yield
            add_up(due, key, cents, -1)
    return due


def account_of(books: Books, month: str, closed_on: int | None = None) -> Steps[Account]:
    """Return what was frozen of a month or, when it is open, what closing it now freezes.

    That shares the totals of the books, which must be a snapshot: so `record` copies before it changes them.
    """
    if month in books.closed:
        return books.closed[month]
    users = books.months.get(month, {})
    ledger = yield from tally(users, books.subscriptions)
    adjustments = (yield from unpaid(books)) if month == books.paying_month() else {}  # one pays all
    money = ledger.fees, ledger.revenue, ledger.labels
    account = Account(closed_on, users, books.subscriptions, *money, adjustments)
    account.late_cache = books.versions[month], {}  # nothing: so `late_amounts` need not tally this once more
    return account


def accounts_of(books: Books, month: str | None = None) -> Steps[dict[str, Account]]:
    """Return a month's account or, without `month`, those of months that have streams now or any lines.

    A month without streams may have lines: what was frozen, or adjustments.
    """
    found = {}
    for name in [month] if month else sorted({*books.months, *books.closed, books.paying_month()}):
        account = yield from account_of(books, name)
        if month or name in books.months or account.lines():
            found[name] = account
    return found


def month_rows(books: Books, only: str | None = None) -> Steps[list[dict[str, Any]]]:
    """Return the rows of the list of months, the latest first."""
    rows = []
    accounts = yield from accounts_of(books, only)
    if not only:
        accounts |= books.closed  # also those with nothing in them
    for month, account in sorted(accounts.items(), reverse=True):
        line = add_lines(account.lines().values())
        late = yield from account.late_amounts(month, books)
        rows.append({
            "month": month,
            "status": account.status,
            "closed_on": account.closed_on,
            "subscribers": len(account.subscriptions),
            "streams": line.streams,
            "seconds_streamed": line.seconds_streamed,
            "fees": euros(account.fees),
            "revenue": euros(account.revenue),
            "distributed": euros(line.amount),
            "adjusted": euros(line.adjustment),
            "late": len(late),  # labels, whether paid since or not
        })
    return rows


def describe_line(label: str, line: Line, seconds_of_all: int) -> dict[str, Any]:
    """Return a label's line as the report shows it."""
    streams, seconds, *cents = line
    share = round(seconds / (seconds_of_all or 1), 6)  # no money, so a float will do
    return dict(zip(LABEL_COLUMNS, (label, streams, seconds, share, *map(euros, cents)), strict=True))


def describe_lines(lines: Mapping[str, Line]) -> Steps[Iterator[dict[str, Any]]]:
    """Return the report's lines: highest amount first, then by name."""
    seconds_of_all = add_lines(lines.values()).seconds_streamed
    in_order = yield from sort_in_steps(lines.items(), lambda item: (-item[1].amount, item[0]))
    return (describe_line(label, line, seconds_of_all) for label, line in in_order)


def report(books: Books, month: str | None) -> Steps[dict[str, Any]]:
    """Return the report over a month, or over all."""
    accounts = yield from accounts_of(books, month)
    every = yield from in_steps(account.lines() for account in accounts.values())
    names = {*itertools.chain(*every)}
    sums = ((name, add_lines(each[name] for each in every if name in each)) for name in names)
    lines = dict((yield from in_steps(sums)))
    labels = yield from in_steps((yield from describe_lines(lines)))
    total = add_lines(lines.values())
    return {
        "currency": CURRENCY,
        "months": list(accounts),
        **({"status": accounts[month].status} if month else {}),
        "subscribers": len(accounts[month].subscriptions if month else books.subscriptions),
        "revenue": euros(sum(account.revenue for account in accounts.values())),
        "distributed": euros(total.amount),
        "adjusted": euros(total.adjustment),
        "seconds_streamed": total.seconds_streamed,
        "labels": labels,
    }


def report_by_month(books: Books, month: str | None) -> Steps[Iterator[tuple[Any, ...]]]:
    """Return the rows of the report as CSV: one for each month and label."""
    by_month = []
    for name, account in (yield from accounts_of(books, month)).items():
        by_month.append((name, (yield from describe_lines(account.lines()))))
    rows = ((name, line) for name, lines in by_month for line in lines)
    plain = ((name, line | {"share": f"{Decimal(str(line['share'])):f}"}) for name, line in rows)  # no 1e-05
    return ((name, CURRENCY, *line.values()) for name, line in plain)


def describe_payer(terms: Sequence[str | None], net: int, seconds: int, of_seconds: int) -> dict[str, Any]:
    """Return a statement's row for a subscriber, or all the silent; `net` is in hundredths of a cent."""
    part = 100 * net * seconds // (of_seconds or 1)
    cells = (*terms, euros(100 * net, 6), seconds, of_seconds, euros(part, 6))  # in millionths of a euro
    return dict(zip(PAYER_COLUMNS, cells, strict=True))


def find_payers(account: Account, label: str) -> Steps[tuple[list[dict[str, Any]], list[int]]]:
    """Return a row for each subscriber who streamed the label, and the seconds of each other listener."""
    rows, others = list[dict[str, Any]](), list[int]()
    for user, own in account.totals.items():
        yield
        _, seconds = own.get(label, (0, 0))
        if seconds and (found := account.subscriptions.get(user)):
            terms = user, found.product_type, euros(found.fee), found.origin
            rows.append(describe_payer(terms, found.net, seconds, seconds_of(own)))
        elif seconds:
            others.append(seconds)
    in_order = yield from sort_in_steps(rows, lambda row: (-Decimal(row["part"]), row["user_id"]))
    return (yield from in_steps(in_order)), others


def statement(books: Books, month: str, label: str) -> Steps[dict[str, Any]]:
    """Return why a label is owed its amounts, cut to six decimals; raises MissingError if it has nothing."""
    account = yield from account_of(books, month)
    line = account.lines().get(label)
    if line is None:
        raise MissingError(f"there is nothing for the label {label!r} in {month}")
    ledger = yield from tally(account.totals, account.subscriptions)
    payers, others = yield from find_payers(account, label)
    if ledger.silent_users:
        payers.append(describe_payer([None] * 4, ledger.silent_net, line.seconds_streamed, ledger.seconds))
    adjusted = {name: cents for (name, of_label), cents in account.adjustments.items() if of_label == label}
    claim = ledger.claims[label]
    claimed = round_off(100 * claim) >> QUOTA_BITS  # in millionths of a euro; it was in hundredths of a cent

    def explain(own_claim: int, whole: int, paid: int) -> dict[str, Any]:
        exact = quota(10_000 * account.revenue, own_claim, whole) >> QUOTA_BITS  # 10,000 are a cent
        down = exact // 10_000
        return {"exact": euros(exact, 6), "rounded_down": euros(down), "cent_added": paid > down}

    return {
        "month": month,
        "status": account.status,
        "currency": CURRENCY,
        "line": describe_line(label, line, ledger.seconds),
        "pro_rata": {
            "revenue": euros(account.revenue),
            "seconds_streamed": line.seconds_streamed,
            "of_seconds": ledger.seconds,
            **explain(line.seconds_streamed << CLAIM_BITS, ledger.seconds, line.amount),
        },
        "user_centric": {
            "subscribers": payers,
            "sum": euros(claimed, 6),
            "of_sum": euros(100 * ledger.net, 6),
            "revenue": euros(account.revenue),
            **explain(claim, ledger.net, line.amount_user_centric),
        },
        "listeners_without_subscription": {"users": len(others), "seconds_streamed": sum(others)},
        "adjustments": [
            {"month": name} | dict(zip(AMOUNTS, map(euros, cents), strict=True))
            for name, cents in sorted(adjusted.items())
        ],
    }


def payer_rows(books: Books, month: str, label: str) -> Steps[Iterator[Sequence[Any]]]:
    """Return the rows of a statement's subscribers, as CSV has them; raises MissingError."""
    found = yield from statement(books, month, label)
    return ([*row.values()] for row in found["user_centric"]["subscribers"])


# ── Import ──────────────────────────────────────────────────────────────────────────────────────
# The three files of a royalty backend: all that they hold or, with a list of their faults, nothing.

STREAM_COLUMNS = ("date", "user_id", "region", "track_id", "seconds")


class ImportFailedError(Exception):
    """The files cannot be imported; the message names file, line and fault, one a line, 20 at most."""


def check_size(size: int) -> None:
    """Raise InvalidError if a file of an import has so many bytes that memory could run out."""
    if size > IMPORT_BYTES:
        raise InvalidError(f"it is larger than {IMPORT_BYTES >> 20} MiB")


def read_file(path: Path) -> bytes:
    """Return what a file of an import holds; raises OSError or InvalidError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):  # a pipe could wait, a device go on for ever
            raise InvalidError("it is no regular file")
        check_size(found.st_size)
        return file.read(found.st_size)


def check_lines(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines of a CSV file; raises InvalidError, and ends, at one whose cells could fill the memory."""
    for line in lines:
        if len(line) > LINE_CHARACTERS:
            raise InvalidError(f"a line is longer than {LINE_CHARACTERS:,} characters")
        yield line


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
            raise ImportFailedError("\n".join(self.faults))

    @contextlib.contextmanager
    def _noting_fault(self, where: str) -> Iterator[None]:
        """Go on after what is done in it has failed, unless there are too many faults already."""
        try:
            yield
        except (OSError, ValueError, RecursionError, csv.Error) as error:
            self.faults.append(f"{where}: {reason_of(error)[:300]}")
            if len(self.faults) == IMPORT_FAULTS:
                raise ImportFailedError("\n".join(self.faults)) from None

    def _read_tracks(self, tracks: bytes) -> None:
        with self._noting_fault("tracks.json"):
            items = json.loads(tracks.decode("utf-8-sig"))
            if not isinstance(items, list):
                raise InvalidError("it must hold a list of tracks")
            for number, item in enumerate(items, 1):
                with self._noting_fault(f"tracks.json, track {number}"):
                    self._add_track(item)

    def _add_track(self, item: object) -> None:
        if not isinstance(item, dict) or "track_id" not in item:
            raise InvalidError("track_id is missing")
        # Some files call it `label`, in some the key only begins so. Of several the first in the alphabet is
        # meant: `label` itself, if it is there.
        key = min((key for key in item if key.startswith("label")), default="label")
        track, label = check_text("track_id", item["track_id"]), check_text("label", item.get(key))
        if self.labels.setdefault(track, label) != label:
            raise InvalidError(f"track {track!r} is there twice, with another label")

    def _read_rows(self, path: Path, columns: Sequence[str], add: Callable[[dict[str, str]], None]) -> None:
        """Give each row's cells, by column, to `add`, and note with its line what is wrong with it."""
        with self._noting_fault(path.name):
            content = read_file(path)
            self.hash = hashlib.sha256(self.hash + content).digest()
            lines = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", "surrogateescape", newline="")
            header = lines.readline()
            delimiter = ";" if ";" in header else ","
            told = telling(f"reading {path.name}, lines", check_lines(itertools.chain([header], lines)))
            rows = csv.reader(told, delimiter=delimiter, strict=True)
            names = [cell.strip().casefold().replace(" ", "_") for cell in next(rows, [])]
            if sorted(names) != sorted(columns):
                raise InvalidError(f"the first line must name the columns {delimiter.join(columns)}")
            # `_noting_fault` notes a bad row, and the loop goes on. It notes an overlong line, too, but that
            # ends the generator `check_lines`: so the next row is None, as after the last.
            while True:
                with self._noting_fault(f"{path.name}:{rows.line_num + 1}"):
                    if (row := next(rows, None)) is None:
                        break
                    if not "".join(row).strip() and len(row) in (0, 1, len(names)):  # an empty line
                        continue
                    if len(row) != len(names):
                        raise InvalidError(f"{len(row)} columns instead of {len(names)}")
                    add(dict(zip(names, map(str.strip, row), strict=True)))

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
    with contextlib.suppress(ValueError):
        day = time.strptime(date, "%d/%m/%Y")
        if time.strftime("%d/%m/%Y", day) == date:  # strptime alone takes 1/3/2019 and any script's digits
            return calendar.timegm(day)
    raise InvalidError(f"date {date!r} is no day dd/mm/yyyy")


async def fetch_tracks(url: str) -> bytes:
    """Return what `url` answers; raises InvalidError, with the reason, if it can't be had."""
    timeout, headers = aiohttp.ClientTimeout(total=FETCH_SECONDS), {"Accept-Encoding": "identity"}
    for number, wait in enumerate(FETCH_WAITS, 1):
        await asyncio.sleep(wait)
        try:
            # A compressed body could hold a thousand times of what it may, so it is not unpacked.
            async with aiohttp.request(
                "GET", url, headers=headers, timeout=timeout, raise_for_status=True, auto_decompress=False
            ) as answer:
                if (coding := answer.headers.get(hdrs.CONTENT_ENCODING, "identity")) != "identity":
                    raise InvalidError(f"it is compressed ({coding})")
                content = bytearray()
                async for piece in answer.content.iter_any():
                    content += piece
                    check_size(len(content))
                return bytes(content)
        except aiohttp.InvalidURL:
            raise InvalidError("it is no URL") from None
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or f"it took longer than {FETCH_SECONDS} s"
        log.warning("try %d of %d to get the tracks failed: %s", number, len(FETCH_WAITS), reason)
    raise InvalidError(reason)


# ── Storage ─────────────────────────────────────────────────────────────────────────────────────
# With --db, what is written is on disk first and visible second: the usage answers, SQLite remembers.

APPLICATION_ID = b"secs"  # in the file's header
MIGRATIONS = (
    """
    CREATE TABLE streams (
        user_id TEXT NOT NULL, track_id TEXT NOT NULL, label TEXT NOT NULL,
        stream_started_on INTEGER NOT NULL, seconds_streamed INTEGER NOT NULL,
        id INTEGER PRIMARY KEY AUTOINCREMENT);
    CREATE TABLE subscriptions (
        user_id TEXT PRIMARY KEY, product_type TEXT NOT NULL, fee INTEGER NOT NULL, origin TEXT NOT NULL,
        import INTEGER);  -- NULL where a client has set it
    CREATE TABLE keys (key TEXT PRIMARY KEY, hash BLOB NOT NULL, first_id INTEGER NOT NULL);
    CREATE TABLE imports (
        id INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, first_id INTEGER NOT NULL, size INTEGER NOT NULL);
    """,
    """
    -- Subscriptions as they were before the import `replaced_by`; to take it back puts them back.
    CREATE TABLE replaced (
        user_id TEXT NOT NULL, product_type TEXT NOT NULL, fee INTEGER NOT NULL, origin TEXT NOT NULL,
        import INTEGER, replaced_by INTEGER NOT NULL);
    ALTER TABLE streams ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
    UPDATE streams SET version = id;
    CREATE TABLE tombstones (id INTEGER PRIMARY KEY, version INTEGER NOT NULL);
    CREATE TABLE sequence (name TEXT NOT NULL, number INTEGER NOT NULL);
    INSERT INTO sequence VALUES (lower(hex(randomblob(4))), 0);
    CREATE TABLE closed_months (
        month TEXT PRIMARY KEY, closed_on INTEGER NOT NULL, fees INTEGER NOT NULL, revenue INTEGER NOT NULL);
    CREATE TABLE closed_labels (
        month TEXT NOT NULL, label TEXT NOT NULL, streams INTEGER NOT NULL, seconds_streamed INTEGER NOT NULL,
        amount INTEGER NOT NULL, amount_user_centric INTEGER NOT NULL, PRIMARY KEY (month, label));
    CREATE TABLE closed_totals (
        month TEXT NOT NULL, user_id TEXT NOT NULL, label TEXT NOT NULL, streams INTEGER NOT NULL,
        seconds_streamed INTEGER NOT NULL, PRIMARY KEY (month, user_id, label)) WITHOUT ROWID;
    CREATE TABLE closed_subscriptions (
        month TEXT NOT NULL, user_id TEXT NOT NULL, product_type TEXT NOT NULL, fee INTEGER NOT NULL,
        origin TEXT NOT NULL, PRIMARY KEY (month, user_id)) WITHOUT ROWID;
    CREATE TABLE adjustments (
        month TEXT NOT NULL, of_month TEXT NOT NULL, label TEXT NOT NULL, amount INTEGER NOT NULL,
        amount_user_centric INTEGER NOT NULL, PRIMARY KEY (month, of_month, label));
    """,
)

# Statements, each with its rows. One with {rows} takes many at a time, any other is run for each of them.
Statements = Sequence[tuple[str, Iterable[Any]]]
Apply = Callable[[], object]  # makes visible what is stored

INSERT_ROWS = 100  # at a time: after each the thread waits for the GIL, so one a row would take long
INSERT_STREAMS = "INSERT INTO streams VALUES {rows}"
CELLS = attrgetter(*FIELDS, "id", "version")  # of an event, as SQLite has them
SET_STREAM = "INSERT OR REPLACE INTO streams VALUES {rows}"
DELETE_STREAM = "DELETE FROM streams WHERE id = ?"
INSERT_TOMBSTONE = "INSERT INTO tombstones VALUES {rows}"
SET_SEQUENCE = "UPDATE sequence SET number = ?"
SET_SUBSCRIPTION = "INSERT OR REPLACE INTO subscriptions VALUES {rows}"

# What was paid stays to the cent, whatever a later version would work out.
CLOSED_TABLES = ("closed_months", "closed_labels", "closed_totals", "closed_subscriptions", "adjustments")
REOPEN_MONTH = tuple(f"DELETE FROM {table} WHERE month = ?" for table in CLOSED_TABLES)  # noqa: S608


def store_account(month: str, account: Account) -> Statements:
    """Return what stores the account of a month that is closed; its rows are made as they are stored."""
    rows: tuple[Iterable[Any], ...] = (
        [(month, account.closed_on, account.fees, account.revenue)],
        ((month, label, *line[:4]) for label, line in account.labels.items()),
        ((month, user, name, *total) for user, own in account.totals.items() for name, total in own.items()),
        ((month, user, *astuple(subscription)) for user, subscription in account.subscriptions.items()),
        ((month, *key, *cents) for key, cents in account.adjustments.items()),
    )
    return [*zip((f"INSERT INTO {table} VALUES {{rows}}" for table in CLOSED_TABLES), rows, strict=True)]  # noqa: S608


class StorageError(Exception):
    """The disk does not take what is to be stored, or the file cannot be used."""


def is_mounted_alone(path: str) -> bool:
    """Tell whether the file itself is a mount point, as of `docker -v`: its WAL would stay behind."""
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
        written = path.translate({ord(each): f"\\{ord(each):03o}" for each in " \t\n\\"})  # as proc(5) has it
        return written in (line.split(" ")[4] for line in mounts)
    return os.path.ismount(path)


@contextlib.contextmanager
def translate_errors() -> Iterator[None]:
    """Raise a StorageError for whatever makes the file unusable, damaged contents included."""
    try:
        yield
    except BlockingIOError:
        raise StorageError("another process uses it") from None
    except (OSError, sqlite3.OperationalError) as error:  # such as a full disk, or another process's lock
        raise StorageError(reason_of(error)) from None
    except (sqlite3.Error, TypeError, ValueError, LookupError) as error:
        raise StorageError(f"it is damaged: {error}") from None


class Database:
    """The SQLite file, its write-ahead log (WAL), and the index of that: usage.db, usage.db-wal, -shm."""

    @translate_errors()
    def __init__(self, path: Path, mode: str = "a+b") -> None:
        """Open the file, new or of any earlier version; raises StorageError and leaves others untouched.

        The mode "r+b" makes no new file.
        """
        self.failed = False
        # Whether the WAL may hold a commit whose sync has failed. The index does not list that, so nobody
        # reads it, and no checkpoint moves it into the file. But after a kill SQLite makes the index anew, of
        # all that is in the WAL, and what was refused would be there. So such a WAL must be emptied.
        self.wal_in_doubt = False
        self.last_commit = -math.inf
        path = path.absolute()  # to SQLite a name such as ":memory:" or "file:..." is no file
        real = os.path.realpath(path)
        self.lock = path.open(mode, buffering=0)  # it stays open: to close it would drop SQLite's locks, too
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened = os.fstat(self.lock.fileno())
        if not stat.S_ISREG(opened.st_mode) or opened.st_nlink > 1:  # the WAL goes by its name
            raise StorageError("it must be a plain file with one name (no hard links)")
        if is_mounted_alone(real):
            raise StorageError("it is mounted alone: mount its directory")
        # The header is read by hand, before SQLite opens the file. SQLite would make files beside a foreign
        # one. With immutable=1 it would not, but it would also ignore the WAL that a kill leaves beside ours.
        header = os.pread(self.lock.fileno(), 72, 0)
        if header and (header[:16] != b"SQLite format 3\0" or header[68:] != APPLICATION_ID):
            raise StorageError("it is no database of this program")
        self.connection = sqlite3.connect(path, check_same_thread=False, timeout=BUSY_SECONDS)
        (version,) = self.connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise StorageError(f"it is of version {version}, this program is of {len(MIGRATIONS)}")
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            of_file = f"PRAGMA application_id = 0x{APPLICATION_ID.hex()}; PRAGMA user_version = {number};"
            self.connection.executescript(f"BEGIN; {migration} {of_file} COMMIT;")
        # What a kill has left in the WAL may not be on disk: the checkpoint puts it there, before `load`.
        self.connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_checkpoint(TRUNCATE);"
        )
        self.wal, shm = Path(f"{real}-wal"), Path(f"{real}-shm")
        self.opened = {file: file.stat() for file in (path, self.wal, shm)}
        # The largest that were seen. The WAL may get shorter: `_begin` counts its frames.
        self.sizes = {file: self.opened[file].st_size for file in (path, shm)}
        self.index = shm.open("rb", buffering=0)  # it stays open, like `lock`
        (self.page_size,) = self.connection.execute("PRAGMA page_size").fetchone()

    def close(self) -> None:
        self.connection.close()
        self.index.close()
        self.lock.close()

    def _checkpoint(self) -> None:
        """Move what the index lists from the WAL into the file, and empty the WAL."""
        if self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:  # it waits for readers
            raise StorageError("another process reads the file")
        self.wal_in_doubt = False

    def _begin(self) -> None:
        """Begin a transaction in files that are whole; raises StorageError if they are not."""
        for file, opened in self.opened.items():
            now = file.stat() if file.exists() else None
            if not now or not os.path.samestat(now, opened):  # SQLite would go on in a file that is lost
                if file == self.wal:  # SQLite has it open still, and puts what it holds into the file
                    with contextlib.suppress(StorageError, sqlite3.Error):
                        self._checkpoint()
                raise StorageError(f"{file.name} has been {'replaced' if now else 'removed'}")
            if now.st_size < self.sizes.get(file, 0):
                raise StorageError(f"{file.name} has been truncated")
        if self.wal_in_doubt:
            self._checkpoint()
        self.connection.execute("BEGIN IMMEDIATE")  # from now on no other process can empty the WAL
        # At byte 16 the index has the number of the frames that are in the WAL (sqlite.org/walformat.html).
        frames = int.from_bytes(os.pread(self.index.fileno(), 4, 16), sys.byteorder)
        if frames and self.wal.stat().st_size < 32 + frames * (24 + self.page_size):
            raise StorageError(f"{self.wal.name} has been truncated")

    def _execute(self, statement: str, rows: Iterable[Any]) -> None:
        if "{rows}" not in statement:
            self.connection.executemany(statement, rows)
            return
        for some in batched(rows, INSERT_ROWS):
            place = f"({', '.join('?' * len(some[0]))})"
            places = ", ".join([place] * len(some))
            self.connection.execute(statement.format(rows=places), [*itertools.chain.from_iterable(some)])

    def commit(self, statements: Statements) -> None:
        """Store all of it or, with a StorageError, nothing; when this returns it is on disk."""
        try:
            self._begin()
            for statement, group in itertools.groupby(statements, key=itemgetter(0)):
                self._execute(statement, itertools.chain.from_iterable(rows for _, rows in group))
            self.wal_in_doubt = True  # until this has succeeded
            self.connection.commit()
            self.wal_in_doubt = False
        except Exception as error:
            self.failed = True
            with contextlib.suppress(StorageError, sqlite3.Error):
                self.connection.rollback()
                if self.wal_in_doubt:
                    self._checkpoint()  # if it fails, the next `_begin` does it
            raise StorageError(f"nothing can be stored: {error}") from None
        self.failed = False
        self.last_commit = time.monotonic()
        with contextlib.suppress(OSError):  # if a file has gone by now, the next commit says it
            self.sizes = {file: max(size, file.stat().st_size) for file, size in self.sizes.items()}

    @translate_errors()
    def take_in(self, imported: Import) -> None:
        """Store what is imported, unless the same has been before; raises StorageError."""
        execute = self.connection.execute
        if execute("SELECT 1 FROM imports WHERE hash = ?", [imported.hash]).fetchone():
            log.info("the import is stored already")
            return
        (number,) = execute("SELECT coalesce(max(id), 0) + 1 FROM imports").fetchone()
        if number > 1:
            log.warning("this is import %d, beside those stored before: are there streams in both?", number)
        first_id = self._last_number() + 1
        number_events(imported.events, first_id)
        users = ((user, *astuple(found), number) for user, found in imported.subscriptions.items())
        replaced = ((number, user) for user in imported.subscriptions)
        self.commit([
            (INSERT_STREAMS, telling("storing, streams", map(CELLS, imported.events))),
            ("INSERT INTO replaced SELECT *, ? FROM subscriptions WHERE user_id = ?", replaced),
            (SET_SUBSCRIPTION, users),
            ("INSERT INTO imports VALUES {rows}", [(number, imported.hash, first_id, len(imported.events))]),
            (SET_SEQUENCE, [(first_id + len(imported.events),)]),  # one more: the import is a change, too
        ])

    @translate_errors()
    def undo_import(self) -> str:
        """Take the latest import back, and return what that took; raises StorageError."""
        latest = """
            SELECT imports.id, first_id, size, count(streams.id), max(closed_months.month),
                (SELECT count(*) FROM subscriptions WHERE import = imports.id)
            FROM imports LEFT JOIN streams ON streams.id >= first_id AND streams.id < first_id + size
            LEFT JOIN closed_months ON month = strftime('%Y-%m', stream_started_on, 'unixepoch')
            GROUP BY imports.id ORDER BY imports.id DESC LIMIT 1
        """
        if not (found := self.connection.execute(latest).fetchone()):
            raise StorageError("it holds none")
        number, first_id, size, streams, closed, subscriptions = found
        if closed:
            raise StorageError(f"{closed} is closed: open it first")
        names = {"number": number, "first_id": first_id, "size": size, "last": self._last_number()}
        self.commit([(statement, [names]) for statement in (
            """INSERT INTO tombstones SELECT id, :last + row_number() OVER (ORDER BY id) FROM streams
                WHERE id >= :first_id AND id < :first_id + :size""",
            "DELETE FROM streams WHERE id >= :first_id AND id < :first_id + :size",
            "DELETE FROM subscriptions WHERE import = :number",  # and those that they have replaced come back
            # What has been set since then is not of this import: it stays, and is not replaced.
            """INSERT OR IGNORE INTO subscriptions SELECT user_id, product_type, fee, origin, import
                FROM replaced WHERE replaced_by = :number""",
            "DELETE FROM replaced WHERE replaced_by = :number",
            "DELETE FROM imports WHERE id = :number",
            # One more, for the subscriptions; where streams are gone already, some numbers are skipped.
            "UPDATE sequence SET number = :last + :size + 1",
        )])
        return f"import {number}: {streams} streams and {subscriptions} subscriptions"

    def _last_number(self) -> int:
        """Return the highest number in any table, so that none is given twice.

        `sequence` alone does not tell it in a file of version 1, or where somebody has changed a table.
        """
        (found,) = self.connection.execute("""
            SELECT coalesce(max(number), 0) FROM (
                SELECT number FROM sequence UNION ALL SELECT max(max(id), max(version)) FROM streams
                UNION ALL SELECT max(version) FROM tombstones UNION ALL SELECT seq FROM sqlite_sequence
                UNION ALL SELECT max(first_id + size) FROM imports UNION ALL SELECT max(first_id) FROM keys)
        """).fetchone()
        return int(found)

    @translate_errors()
    def load(self, usage: Usage, books: Books) -> None:
        """Put what is stored into `usage` and `books`."""
        execute = self.connection.execute
        usage.last_number = usage.sequence = self._last_number()
        # What somebody has put there by hand: such a row would be answered with 500 long after.
        damaged = """
            SELECT id FROM streams WHERE '' IN (user_id, track_id, label)
            OR stream_started_on NOT BETWEEN 0 AND ? OR seconds_streamed NOT BETWEEN 0 AND ?
            OR 'real' IN (typeof(stream_started_on), typeof(seconds_streamed))
        """
        highest_start = month_start("9999-12") + 31 * DAY - 1  # no later month has a name
        for (number,) in execute(damaged, [highest_start, HIGHEST_SECONDS]):
            raise ValueError(f"stream {number}")
        rows = telling("loading, streams", execute("SELECT * FROM streams"))
        # The last two cells are the id and the version. Adding them has `books` record them, too.
        usage.add([Event(*row[:-1]) if row[-1] == row[-2] else ChangedEvent(*row) for row in rows])
        usage.tombstones.put(Tombstone(*row) for row in execute("SELECT * FROM tombstones"))
        (usage.sequence_name,) = execute("SELECT name FROM sequence").fetchone()
        usage.keys = {key: (digest, first_id) for key, digest, first_id in execute("SELECT * FROM keys")}
        if execute("SELECT 1 FROM imports").fetchone():
            books.subscriptions.clear()  # of the three that are built in
        for user, *cells, _ in execute("SELECT * FROM subscriptions"):
            books.subscriptions[user] = Subscription(*cells)
        self._load_closed(books)

    def _load_closed(self, books: Books) -> None:
        """Put what was frozen into `books`; totals that are equal to those of now take no memory twice."""
        execute, closed, one_of_each = self.connection.execute, books.closed, lru_cache(None)(Subscription)
        for month, closed_on, fees, revenue in execute("SELECT * FROM closed_months"):
            closed[month] = Account(closed_on, {}, {}, fees, revenue, {}, {})
        for month, label, *figures in execute("SELECT * FROM closed_labels"):
            closed[month].labels[label] = Line(*figures)
        for month, user, *cells in execute("SELECT * FROM closed_subscriptions"):
            closed[month].subscriptions[user] = one_of_each(*cells)
        for month, of_month, label, *cents in execute("SELECT * FROM adjustments"):
            closed[month].adjustments[of_month, label] = (*cents,)
        months = books.months
        books.copy_on_record |= months.keys()  # for `closed` will share them
        rows = execute("SELECT * FROM closed_totals ORDER BY month, user_id")
        for (month, user), group in itertools.groupby(rows, key=itemgetter(0, 1)):
            own = {label: (streams, seconds) for _, _, label, streams, seconds in group}
            of_now = months.get(month, {}).get(user, {})
            closed[month].totals[user] = of_now if of_now == own else own
        for month, account in closed.items():
            if account.totals == (users := months.get(month, {})):
                # Nothing is late, whatever cents a later version of this program would work out.
                account.totals, account.late_cache = users, (books.versions[month], {})


@dataclass
class Change:
    """What waits to be stored, up to this number of the sequence, and then made visible.

    One with `decide`, as when a month is closed, depends on all changes before it. So it is committed alone:
    once these are visible, `decide` returns its statements and its `apply`, or raises a ConflictError.
    """

    number: int
    statements: Statements = ()
    apply: Apply = lambda: None
    decide: Callable[[], Steps[tuple[Statements, Apply]]] | None = None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Journal:
    """The queue of changes on their way into the database, and from there into the usage.

    First in, first out: what a follower of the sequence has seen has nothing missing before it.
    """

    def __init__(self, database: Database, usage: Usage, slices: TimeSlices) -> None:
        self.database, self.usage, self.slices = database, usage, slices
        self.waiting: list[Change] = []
        self.storing: asyncio.Task[None] | None = None
        self.thread = ThreadPoolExecutor(1)  # its own, so that no commit queues behind a report

    async def append(self, change: Change) -> None:
        """Have a change stored and then made visible; raises StorageError or a ConflictError.

        Between `next_number` and this no caller awaits anything: so changes wait in order of their numbers.
        """
        self.waiting.append(change)
        if not self.storing or self.storing.done():
            self.storing = asyncio.create_task(self._store_waiting())
        await asyncio.shield(change.done)

    async def _store_waiting(self) -> None:
        """Store what waits, in one commit, and make it visible, until nothing waits any more."""
        try:
            while self.waiting:
                await asyncio.sleep(0.001)  # more may come, for the same commit
                # All up to the first with `decide`; that one is alone.
                group = [*itertools.takewhile(lambda change: not change.decide, self.waiting)]
                group = group or self.waiting[:1]
                await self._store(group)
                del self.waiting[: len(group)]
        except Exception:
            # As a kill does, end the process: what is stored and what is visible could differ from now on.
            log.critical("the journal has failed; start again, nothing stored is lost", exc_info=True)
            logging.shutdown()
            os.abort()

    async def _store(self, group: Sequence[Change]) -> None:
        """Store the changes and make them visible, or have each raise why they are not stored."""
        try:
            for change in group:
                if change.decide:
                    work = change.decide()
                    change.statements, change.apply = await self.slices.finish(work, first=True)
            statements = [statement for change in group for statement in change.statements]
            statements.append((SET_SEQUENCE, [(group[-1].number,)]))
            await asyncio.get_running_loop().run_in_executor(self.thread, self.database.commit, statements)
        except (StorageError, ConflictError) as error:
            for change in group:
                change.done.set_exception(error)
            return
        began = time.monotonic()
        for change in group:
            change.apply()
            self.usage.sequence = change.number
            change.done.set_result(None)
            if time.monotonic() > began + SLICE_SECONDS:
                await asyncio.sleep(SLICE_SECONDS)  # not 0: a request takes several rounds of the event loop
                began = time.monotonic()

    async def close(self) -> None:
        """Close the file once nothing waits any more, as tests do; `serve` just ends the process."""
        if self.storing:
            await self.storing
        self.thread.shutdown()
        self.database.close()


# ── Simulation ──────────────────────────────────────────────────────────────────────────────────
# Events as client apps would send them, with the values of the coding challenge that this program answers.

USERS = ("user1", "user2", "user3")
TRACKS = ("track1", "track2", "track3")
LABELS = ("label1", "label2", "label3")


def simulate_batch(now: int, rng: random.Random) -> list[Event]:
    """Make 1 to 5 streams of 30 to 1,800 s that end at `now`: they start out of order, as in life.

    None starts before 1970: they are shorter where a clock stands at the first half hour of that year.
    """
    events = []
    for _ in range(rng.randint(1, 5)):
        seconds = min(rng.randint(30, 1_800), now)
        user, track, label = rng.choice(USERS), rng.choice(TRACKS), rng.choice(LABELS)
        events.append(Event(user, track, label, now - seconds, seconds))
    return events


async def tick(state: State, now: float, rng: random.Random) -> None:
    """Add a batch that ends at `now`."""
    await state.create(simulate_batch(int(now), rng))
    state.last_batch = state.batch_expected_since = time.monotonic()


async def simulate_history(state: State) -> None:
    """Add the batches of the `history` days before now, but not to a file that holds events."""
    config, now = state.config, state.clock()
    if state.journal and state.usage.count:
        return
    events = list[Event]()
    seconds = min(config.history * DAY, now - 1_800)  # no stream, of 1,800 s at most, began before 1970
    numbers = range(1, int(seconds / config.interval) + 1)  # the latest first
    for number in telling("simulating the history, batches", numbers):
        if len(events) >= state.usage.keep:
            log.warning("--keep ends the history after %.1f days", number * config.interval / DAY)
            break
        events += simulate_batch(int(now - number * config.interval), state.rng)
    if events:
        events.reverse()  # so ids come in order of time
        await state.create(events)


async def run_simulation(state: State) -> None:
    """Make a batch at once and then one every `interval` seconds, without drift.

    A batch that fails is logged and counted, and the next one comes. A process that was stopped for an hour
    does not make up for what it has missed.
    """
    if not state.config.simulate:
        return
    interval, began = state.config.interval, time.monotonic()
    state.batch_expected_since = began  # from then on /health tells when none has come
    while True:
        try:
            await tick(state, state.clock(), state.rng)
        except Exception as error:
            state.batch_errors += 1
            log.error("a simulated batch failed: %s", error, exc_info=not isinstance(error, StorageError))
        await asyncio.sleep(interval - (time.monotonic() - began) % interval)


# ── HTTP: requests ──────────────────────────────────────────────────────────────────────────────
# What comes in: who may ask, and what is asked for. The rules above know nothing of HTTP.

HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?)(:[0-9]*)?")  # the port may be empty
READING = (hdrs.METH_GET, hdrs.METH_HEAD)  # any other method writes
JSON_TYPES = ("application/json", "application/merge-patch+json")  # the second only for a PATCH

GROUP_BY = "|".join(",".join(by) for size in (1, 2, 3) for by in itertools.permutations(NAMES, size))


# What a parameter may be, what that is called, and what is made of it.
PARAMETERS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "from": (INTEGER.pattern, "an int", int),
    "to": (INTEGER.pattern, "an int", int),
    "group_by": (GROUP_BY, f"a comma list of {', '.join(NAMES)}", lambda text: tuple(text.split(","))),
    "window": (r"minute|hour|day|month", "minute, hour, day or month", str),
    "order": (r"asc|desc", "asc or desc", str),
    "format": (r"json|ndjson|csv", "json, ndjson or csv", str),
    "limit": (r"0{0,9}([1-9][0-9]{0,4}|100000)", "an int from 1 to 100000", int),
    # The id of a stream or, in the feed, a cursor: `get_changes` tells its parts.
    "after": (r"([0-9a-f]+-)?([0-9]{1,100}-)?[0-9]{1,100}", "0 or more, or what a Link says", str),
    "month": (r"(19[7-9]|[2-9][0-9]{2})[0-9]-(0[1-9]|1[0-2])", "a month as in 2019-03", str),
}
FILTERS = ("from", "to", *NAMES)


def parse_value(name: str, text: str) -> Any:
    """Return what a parameter says; raises InvalidError, which names it."""
    pattern, kind, convert = PARAMETERS[name]
    if not re.fullmatch(pattern, text):
        raise InvalidError(f"{name} must be {kind}")
    return convert(text)


@lru_cache(maxsize=64)
def parse_query(query: str, *parameters: str) -> Mapping[str, Any]:
    """Parse a query string. Each of NAMES may come more than once, so their values are sets.

    Raises InvalidError, which names the parameter.
    """
    asked: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        if name not in parameters:
            raise InvalidError(f"unknown parameter {name[:TEXT_CHARACTERS]!r}")
        if name in NAMES:
            asked[name] = asked.get(name, frozenset()) | {check_text(name, text)}
            continue
        if name in asked:
            raise InvalidError(f"{name} is given more than once")
        asked[name] = parse_value(name, text)
    return asked


def is_listed(request: web.Request, name: str, tag: str) -> bool:
    """Tell whether If-Match or If-None-Match, in all its lines, is `*` or lists this tag."""
    if name not in request.headers:
        return False
    listed = [each.strip() for line in request.headers.getall(name) for each in line.split(",")]
    return listed == ["*"] or tag in listed or (name == hdrs.IF_NONE_MATCH and f"W/{tag}" in listed)


def wanted_in(asked: Mapping[str, Any]) -> Wanted:
    """Return the names that are asked for, as `matching` takes them."""
    return tuple((name, asked[name]) for name in NAMES if name in asked)


async def read_body(request: web.Request) -> bytes:
    """Return the body of a write; raises an HTTPException if it is of another type, too long or too slow."""
    types = JSON_TYPES if request.method == hdrs.METH_PATCH else JSON_TYPES[:1]
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "").lower()
    if request.content_type not in types or coding not in ("", "identity"):
        needed = f"Content-Type: {' or '.join(types)}, and no Content-Encoding"
        raise web.HTTPUnsupportedMediaType(reason=f"a write needs {needed}")
    if (length := request.content_length or 0) > BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(BODY_BYTES, length)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"the body did not arrive within {BODY_SECONDS} s") from None
    if len(body) > LARGE_BODY_BYTES:
        await request.app[STATE].slices.yield_to_others()
    return body


def parse_json(body: bytes) -> object:
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError):
        raise InvalidError("the body is no JSON") from None


@lru_cache(maxsize=64)
def accepts_gzip(codings: str) -> bool:
    """Tell whether a client with this Accept-Encoding takes gzip: `gzip;q=0` says that it does not."""
    each = codings.lower().replace(" ", "").split(",")
    return any(re.fullmatch(r"gzip(;q=(1|0\.0*[1-9]).*)?", coding) for coding in each)


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
    if request.method in READING:
        return
    site, origin = request.headers.get("Sec-Fetch-Site", "none"), request.headers.get(hdrs.ORIGIN)
    if site not in ("same-origin", "none") or (origin and origin.partition("://")[2].lower() != host.lower()):
        raise web.HTTPForbidden(reason="a page of another origin may not write here")
    scheme, _, token = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    known = hmac.compare_digest(token.strip().encode("utf-8", "surrogateescape"), config.token.encode())
    if config.token and not (known and scheme.lower() == "bearer"):
        challenge = {hdrs.WWW_AUTHENTICATE: "Bearer"}
        raise web.HTTPUnauthorized(reason="a write needs Authorization: Bearer TOKEN", headers=challenge)


# ── HTTP: answers ───────────────────────────────────────────────────────────────────────────────
# One way out: a handler returns an `Answer`, and its `prepare` sends that. What depends on the data alone
# comes from `answer_cached`, what is about this moment from `answer_now`, and what goes wrong is answered by
# `answer_errors`.

MEDIA_TYPES = {
    "json": "application/json; charset=utf-8",
    "ndjson": "application/x-ndjson; charset=utf-8",
    "csv": "text/csv; charset=utf-8; header=present",
    "html": "text/html; charset=utf-8",
    "metrics": "text/plain; version=0.0.4; charset=utf-8",
}
SAFETY_HEADERS = (  # what keeps browsers from misusing an answer
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)
STATUSES = {InvalidError: 400, MissingError: 404, ConflictError: 409, StorageError: 503}

Headers = tuple[tuple[str, str], ...]
Pieces = Generator[bytes | None, None, None]  # of an answer; None is a step on the way to the next

http_date = lru_cache(formatdate)  # to write one takes as long as the rest of a head


@lru_cache(maxsize=64)
def write_head(status: int, length: int | None, keep_alive: bool, now: int, headers: Headers) -> bytes:
    """Write the head of an answer that is sent in the second `now`; without a `length` it comes in pieces."""
    connection = "keep-alive" if keep_alive else "close"
    headers += (("Date", http_date(now, usegmt=True)), ("Connection", connection))
    if length is not None and status != HTTPStatus.NOT_MODIFIED:
        headers += (("Content-Length", str(length)),)
    lines = (f"{name}: {value}\r\n" for name, value in (*headers, *SAFETY_HEADERS))
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{''.join(lines)}\r\n".encode()


class Answer(web.StreamResponse):
    """Bytes that are there, or pieces that are made: they are sent as they are, and forgotten.

    The class of aiohttp writes a head slowly, and keeps an answer until the connection's next request. So
    this one replaces what aiohttp uses of an answer: `prepare` and `write_eof`, `keep_alive` and, for the
    log, `body_length`.
    """

    keep_alive = True
    body_length = 0  # all that was sent, the head, too, as with aiohttp's own answers

    def __init__(self, status: int, body: bytes | Pieces = b"", headers: Headers = ()) -> None:
        super().__init__(status=status)
        self.body, self.more_headers = body, headers

    async def prepare(self, request: web.BaseRequest) -> None:
        """Send all of it, as fast as the client takes it: aiohttp calls this with what a handler returned.

        A request whose body has not been read to its end is its connection's last (RFC 9112, 9.3).
        """
        body, self.body = self.body, b""
        if request.transport:
            # `_write` then waits until the system has all of it. So what a handler has answered is sent, and
            # `serve` may end the process after the last handler.
            request.transport.set_write_buffer_limits(0)
        self.keep_alive = request.keep_alive and request.content.is_eof()
        if not isinstance(body, bytes):
            with contextlib.closing(body):  # or the traceback of an error would hold the chunks
                await self._send_pieces(cast("web.Request", request), body)
            return
        head = write_head(self.status, len(body), self.keep_alive, int(time.time()), self.more_headers)
        if request.method == hdrs.METH_HEAD:
            body = b""
        await self._write(request, head + body[:PIECE_BYTES])
        for at in range(PIECE_BYTES, len(body), PIECE_BYTES):  # or the connection would hold a copy of all
            await self._write(request, body[at : at + PIECE_BYTES])

    async def write_eof(self, data: bytes = b"") -> None:
        """Send nothing more."""

    async def _send_pieces(self, request: web.Request, pieces: Pieces) -> None:
        """Send `pieces`, short ones together, compressed if the client likes; yield to others in between."""
        chunked, headers, compressor = request.version >= aiohttp.HttpVersion11, self.more_headers, None
        if accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
            compressor = zlib.compressobj(wbits=31)  # a gzip stream
            headers += (("Content-Encoding", "gzip"),)
        if chunked:
            headers += (("Transfer-Encoding", "chunked"),)
        self.keep_alive &= chunked  # without chunks only the end of the connection ends the answer
        await self._write(request, write_head(self.status, None, self.keep_alive, int(time.time()), headers))
        if request.method == hdrs.METH_HEAD:
            return
        ready, size, until = list[bytes](), 0, time.monotonic() + SLICE_SECONDS
        for piece in pieces:
            ready.append(piece or b"")
            size += len(ready[-1])
            if size >= PIECE_BYTES:
                await self._write_chunk(request, b"".join(ready), chunked, compressor)
                ready, size = [], 0
            if time.monotonic() > until:
                await request.app[STATE].slices.yield_to_others()
                until = time.monotonic() + SLICE_SECONDS
        await self._write_chunk(request, b"".join(ready), chunked, compressor)
        await self._write_chunk(request, compressor.flush() if compressor else b"", chunked, None)
        await self._write(request, b"0\r\n\r\n" if chunked else b"")

    async def _write_chunk(self, request: web.Request, data: bytes, chunked: bool, packer: Any) -> None:
        if packer:
            data = await asyncio.to_thread(packer.compress, data)
        if data:
            await self._write(request, b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)

    async def _write(self, request: web.BaseRequest, data: bytes) -> None:
        """Write, and wait until the client has taken enough; raises ConnectionResetError if it does not."""
        transport = request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError
        transport.write(data)
        self.body_length += len(data)
        if request.protocol.writing_paused:
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await request.writer.drain()
            except TimeoutError:
                transport.abort()
                raise ConnectionResetError from None


def join_up_to(most: float, pieces: Pieces) -> Steps[bytes | None]:
    """Return `pieces` as one, or None if they are longer than `most` bytes."""
    made = bytearray()
    for piece in pieces:
        yield
        made += piece or b""
        if len(made) > most:
            return None
    return bytes(made)


class SingleFlight:
    """Answers: each is made once for all who wait and, if it is short, kept until the usage changes.

    What is made is bytes, or None for an answer that is too long: that is kept, too, or each who asks would
    have it tried anew. Each key names the moment that its answer is of.
    """

    def __init__(self, usage: Usage) -> None:
        self.usage = usage
        self.moment = 0  # in the sequence of changes, of what is kept
        self.kept: dict[object, bytes | None] = {}  # the latest come last
        self.flights: dict[object, asyncio.Task[bytes | None]] = {}
        self.waiters = Counter[object]()

    async def get(self, key: object, start: Callable[[], Any]) -> Any:
        """Return what is kept, or wait for what is made.

        If it is neither, `start` is called, before any await. The coroutine that it returns makes it, and is
        cancelled when nobody waits for it any more.
        """
        if self.moment != self.usage.sequence:
            self.moment, self.kept = self.usage.sequence, {}
        if key in self.kept:
            return self.kept[key]
        if key not in self.flights:
            self.flights[key] = asyncio.create_task(start())
        flight = self.flights[key]
        self.waiters[key] += 1
        try:
            made = await asyncio.shield(flight)
        finally:
            self.waiters[key] -= 1
            if not self.waiters[key]:
                del self.waiters[key], self.flights[key]
                flight.cancel()  # of one that is done this does nothing
        if len(made or b"") <= KEPT_BYTES:
            self.kept[key] = made  # maybe too late: then nobody asks for its key any more
            if len(self.kept) > KEPT_ANSWERS:
                del self.kept[next(iter(self.kept))]
        return made


@lru_cache(maxsize=64)
def cache_headers(etag: str, kind: str) -> Headers:
    """Return what tells a client how long it may keep an answer, and what it is."""
    return (
        ("ETag", f'W/"{etag}"'),
        ("Cache-Control", "no-cache"),
        ("Vary", "Accept-Encoding"),
        ("Content-Type", MEDIA_TYPES[kind]),
    )


async def answer_cached(
    request: web.Request,
    kind: str,
    key: object,
    make: Callable[[], Pieces],
    *more: tuple[str, str],
    own_etag: str | None = None,
    most: float = KEPT_BYTES,
) -> Answer:
    """Answer with what `make` makes, or with 304 if the client has it already.

    `key` is what was asked for, `more` are headers; what does not come from the data has an `own_etag`.
    `make` takes the data of the moment in which it is called, and returns pieces that are made later: so it
    is no generator function itself.

    An answer of up to `most` bytes is made whole, once for all who wait for it. For a longer one `make` is
    called again for each client, who gets the pieces as they are made, with the data of that later moment.
    With an infinite `most` all is made before the head is sent: so what is found to be wrong while it is made
    is answered with its own status.
    """
    state = request.app[STATE]
    etag = own_etag or state.usage.etag
    headers = cache_headers(etag, kind) + more
    name = (etag, key)  # the ETag, too, for an `own_etag` may change while the data do not

    # `get` calls `make`, if it does, before any await: so the data are those of `etag`.
    body = await state.answers.get(name, lambda: state.slices.finish(join_up_to(most, make())))
    if is_listed(request, hdrs.IF_NONE_MATCH, f'"{etag}"'):  # only now, for there could have been an error
        return Answer(304, headers=headers)
    if body is None:  # it is longer: so it is made anew, of what is now and under the ETag of that
        return Answer(200, make(), cache_headers(own_etag or state.usage.etag, kind) + more)
    if len(body) >= GZIP_BYTES and accepts_gzip(request.headers.get(hdrs.ACCEPT_ENCODING, "")):
        plain, headers = body, (*headers, ("Content-Encoding", "gzip"))
        body = await state.answers.get(("gzip", name), lambda: asyncio.to_thread(gzip.compress, plain, 6))
    return Answer(200, body, headers)


def write_list(kind: str, columns: Sequence[str], lines: Iterable[bytes]) -> Pieces:
    """Yield lines as json, ndjson or csv: those of csv end with a newline, the others begin with one."""
    if kind == "csv":
        yield (encode_cells(*columns) + CSV_END).encode()
        yield from lines
        return
    opening, end = (b"[", b"]") if kind == "json" else (b"", b"\n")
    yield opening
    nothing_yet = True
    for some in lines:  # they may be b"", where a filter leaves nothing
        separated = some.replace(b"\n", b",") if kind == "json" else some  # JSON has no newline in a text
        yield separated[1:] if nothing_yet else separated  # before the first line no separator
        nothing_yet = nothing_yet and not some
    if kind == "json" or not nothing_yet:
        yield end


def write_rows(kind: str, columns: Sequence[str], work: Steps[Iterable[Sequence[Any]]]) -> Pieces:
    """Yield the rows that `work` returns. For json and ndjson a column must have only texts or only ints."""
    template = "\n{" + ",".join(f'"{column}":%s' for column in columns) + "}"

    def lines(rows: list[Sequence[Any]]) -> bytes:
        if kind == "csv":
            return "".join([encode_cells(*row) + CSV_END for row in rows]).encode()
        # Column by column, for a column's first cell tells whether all are texts.
        cells = (map(quote, each) if isinstance(each[0], str) else each for each in zip(*rows, strict=True))
        return "".join([template % row for row in zip(*cells, strict=True)]).encode()

    rows = yield from work
    yield from write_list(kind, columns, map(lines, batched(rows, STEP_ROWS)))


def write_success(message: str, work: Steps[Any]) -> Pieces:
    """Yield a success of the API with what `work` returns, encoded step by step, for it may be long."""
    value = {"message": message, "data": (yield from work)}
    for some in batched(JSON.iterencode(value), CHUNK_EVENTS):
        yield "".join(some).encode()


def encode(value: Any) -> bytes:
    r"""Return compact JSON. What is no UTF-8, as in a file's name, becomes \udcff, which is JSON, too."""
    return JSON.encode(value).encode(errors="backslashreplace")


def answer_now(status: int, body: bytes | Pieces, kind: str = "json", **headers: str) -> Answer:
    """Answer with what is about this moment, so nobody may keep it."""
    headers |= {"Content-Type": MEDIA_TYPES[kind], "Cache-Control": "no-store"}
    return Answer(status, body, tuple(headers.items()))


def answer_success(message: str, data: bytes, status: int = 200, **headers: str) -> Answer:
    """Answer as every success of the API does; `data` is JSON."""
    return answer_now(status, b'{"message":%b,"data":%b}' % (quote(message).encode(), data), **headers)


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Have a request answered.

    If its client disconnects, it is cancelled (see `serve`), unless it is a write that is being stored.
    """
    state = request.app[STATE]
    # One connection may send many requests: so each waits for a round of the event loop.
    if request.method in READING:
        await asyncio.sleep(0)
        answer = await answer_errors(state, request, handler)
    elif state.journal:
        await asyncio.sleep(0)
        answer = await asyncio.shield(answer_errors(state, request, handler))
    else:  # it needs no shield: `State.store` awaits nothing, so what is cancelled is not being stored
        await state.slices.wait_to_write()
        answer = await answer_errors(state, request, handler)
    state.requests[answer.status // 100] += 1
    return answer


async def answer_errors(state: State, request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let in who may ask, and turn what the rules and aiohttp raise into answers without a traceback."""
    try:
        check_access(request, state.config)
        return await handler(request)
    except tuple(STATUSES) as error:
        if isinstance(error, StorageError):
            log.error("%s %r failed: %s", request.method, request.path, error)
        return answer_now(STATUSES[type(error)], encode({"error": str(error)}))
    except web.HTTPException as error:
        return answer_now(error.status, encode({"error": error.reason}), **error.headers)  # such as Allow
    except ConnectionError:
        return Answer(400)  # nobody gets it: the client disconnected before it had sent its body
    except Exception:
        log.exception("%s %r failed", request.method, request.path)
        return answer_now(500, encode({"error": "internal error"}))


async def add_safety_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Complete what is no Answer: aiohttp's 417 to an unknown Expect. The body may not come: so it closes."""
    response.headers.update((*SAFETY_HEADERS, ("Connection", "close")))
    response.force_close()


def read_page(path: Path) -> tuple[bytes, str]:
    """Return the page as it is on disk now, and the policy under which it runs; raises OSError.

    The policy names the scripts that the file loads, and its inline script and style by their hashes.
    Vue compiles the template in the page, for which it needs 'unsafe-eval'.
    """
    page = path.read_bytes().replace(b"\r\n", b"\n")  # as the HTML parser does before it hashes

    def hashes(inline: bytes) -> str:
        digests = (hashlib.sha256(text).digest() for text in re.findall(inline, page, re.DOTALL))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    loaded = b" ".join(re.findall(rb'<script[^>]* src="([^"]+)"', page)).decode()
    return page, (
        f"default-src 'none'; script-src {loaded} {hashes(rb'<script>(.*?)</script>')} 'unsafe-eval'; "
        f"style-src {hashes(rb'<style>(.*?)</style>')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────
# One for each route: it parses what is asked, has the sections above do it, and answers.

async def get_page(request: web.Request) -> Answer:
    """Show the page as it is on disk, or as it last was."""
    state = request.app[STATE]
    with contextlib.suppress(OSError):
        state.page = read_page(state.config.page)
    page, policy = state.page
    etag = hashlib.sha256(page).hexdigest()[:16]
    header = ("Content-Security-Policy", policy)
    return await answer_cached(
        request, "html", "page", lambda: (whole for whole in [page]), header, own_etag=etag
    )


def select(chunks: deque[Chunk], asked: Mapping[str, Any]) -> Iterator[Chunk]:
    """Yield the chunks with what is wanted of them, and hold only those that are yet to come."""
    newest_first, wanted = asked.get("order") == "desc", wanted_in(asked)
    while chunks:
        found = matching(chunks.pop() if newest_first else chunks.popleft(), wanted)
        yield Chunk(reversed(found)) if newest_first else found


async def get_usage(request: web.Request) -> Answer:
    """List the events that are asked for, or their totals."""
    state = request.app[STATE]
    query = request.rel_url.raw_query_string
    asked = parse_query(query, *FILTERS, "group_by", "window", "order", "limit", "format")
    kind, by, window = asked.get("format", "json"), asked.get("group_by", ()), asked.get("window")
    grouped, limit = bool(by or window), asked.get("limit")
    if grouped and "order" in asked:
        raise InvalidError("order is for events: rows of group_by and window have an order of their own")
    if asked.get("from", 0) > state.clock():
        return Answer(400)  # with an empty body: the coding challenge wants it so

    def make() -> Pieces:  # no generator: the chunks are those of now
        chunks = state.usage.by_start.between(asked.get("from", -math.inf), asked.get("to", math.inf))
        if grouped:
            columns = (*(["window_start"] if window else []), *by, "events", "seconds_streamed")
            return write_rows(kind, columns, aggregate(chunks, by, window, wanted_in(asked), limit))
        found = first_of(select(chunks, asked), limit or math.inf)
        return write_list(kind, FIELDS, (each.csv if kind == "csv" else each.json_lines for each in found))

    meant_anyway = {("order", "asc"), ("format", "json")}  # who says so gets the same answer as who does not
    key = "usage", frozenset(asked.items()) - meant_anyway
    return await answer_cached(request, kind, key, make, most=math.inf if grouped else KEPT_BYTES)


async def get_health(request: web.Request) -> Answer:
    """Tell whether all is well: 503 when the simulation has stopped or the last write failed."""
    state = request.app[STATE]
    age = time.monotonic() - state.last_batch
    late_from = state.batch_expected_since + max(LATE_SECONDS, 3 * state.config.interval)
    running = state.config.simulate and time.monotonic() < late_from
    database = state.journal and state.journal.database
    healthy = (running or not state.config.simulate) and not (database and database.failed)
    commit_age = time.monotonic() - database.last_commit if database else math.inf
    last_batch, last_commit = (round(each, 1) if each < math.inf else None for each in (age, commit_age))
    value = {
        "status": "ok" if healthy else "degraded",
        "events": state.usage.count,
        "simulation": {"running": running, "last_batch_age": last_batch, "errors": state.batch_errors},
        "storage": {"durable": database is not None, "last_commit_age": last_commit},
    }
    return answer_now(200 if healthy else 503, encode(value))


async def get_streams(request: web.Request) -> Answer:
    """List a page of streams in order of id."""
    state = request.app[STATE]
    asked = dict(parse_query(request.rel_url.raw_query_string, *FILTERS, "limit", "after"))
    limit, after = asked.pop("limit", 100), asked.pop("after", "0")
    if limit > PAGE_STREAMS:
        raise InvalidError(f"limit must be an int from 1 to {PAGE_STREAMS}")
    if not after.isdecimal():
        raise InvalidError("after must be an id")
    if asked.get("from", 0) > state.clock():
        raise InvalidError("from is in the future")
    # The page is of the events by id, the total of those by start, both of now: an await ends this moment.
    following, total = state.usage.by_id.between(int(after) + 1), state.usage.count
    filters = wanted_in(asked)
    if asked:
        since, until = asked.get("from", 0), asked.get("to", sys.maxsize)
        counted = state.usage.by_start.between(since, until)
        rows = await state.slices.finish(aggregate(counted, (), None, filters, None))
        total, _ = next(rows, (0, 0))  # streams and seconds, as it is grouped by nothing
        filters += (("stream_started_on", range(since, until)),)  # for `following`; `counted` was cut to it
    found = first_of((matching(chunk, filters) for chunk in following), limit + 1)
    page: list[Event] = list(itertools.chain(*await state.slices.finish(in_steps(found))))
    listed = b",".join(event.json_with_id for event in page[:limit])
    next_id = encode(page[limit - 1].id if len(page) > limit else None)
    body = b'{"message":"Found Streams","data":[%b],"total":%d,"next":%b}' % (listed, total, next_id)
    return answer_now(200, body)


async def post_streams(request: web.Request) -> Answer:
    """Store one event or an array of them: all or none, and once for an `Idempotency-Key`."""
    state = request.app[STATE]
    key = request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
        raise InvalidError("Idempotency-Key must be 1 to 255 printable ASCII characters")
    body = await read_body(request)
    digest = hashlib.sha256(body).digest()
    async with state.lock("key", key) if key else contextlib.nullcontext():
        known, first_id = state.usage.keys.get(key or "", (None, 0))  # a digest and the first id, if any
        if known not in (None, digest):
            raise web.HTTPUnprocessableEntity(reason="this Idempotency-Key came with another body before")
        value = parse_json(body)
        # A retry of what is stored is not in the future, even if the clock has been set back since.
        events = await state.slices.finish(parse_events(value, sys.maxsize if known else state.clock()))
        if known:  # the first answer is made again, whatever became of them
            number_events(events, first_id)
        else:
            if too_old := state.usage.find_too_old(events):
                index = f"[{events.index(too_old)}]: " if isinstance(value, list) else ""
                raise ConflictError(f"{index}--keep would drop it at once, as one of the oldest")
            await state.create(events, (key, digest) if key else None)
    headers = {"Idempotent-Replayed": "true"} if known else {}
    if isinstance(value, list):
        data = b",".join(event.json_with_id for event in events)
        return answer_success("Streams Created", b"[%b]" % data, 201, **headers)
    headers["Location"] = f"/api/v1/streams/{events[0].id}"
    return answer_stream("Stream Created", events[0], 201, **headers)


def answer_stream(message: str, stream: Event, status: int = 200, **headers: str) -> Answer:
    """Answer with one stream, under its strong ETag."""
    return answer_success(message, stream.json_with_id, status, ETag=stream.etag, **headers)


def find_stream(request: web.Request) -> Event:
    """Return the stream that the path names; raises InvalidError or MissingError."""
    text = request.match_info["id"]
    if not (text.isascii() and text.isdecimal()):
        raise InvalidError("Stream ID Invalid")
    return request.app[STATE].usage.find(int(text.lstrip("0")[:30] or "0"))  # no id has 30 digits


def check_version(request: web.Request, stream: Event) -> None:
    """Raise an HTTPException if there is an If-Match that does not list this version."""
    if hdrs.IF_MATCH in request.headers and not is_listed(request, hdrs.IF_MATCH, stream.etag):
        raise web.HTTPPreconditionFailed(reason=f"the stream is of another version: {stream.etag}")


async def get_stream(request: web.Request) -> Answer:
    """Show a stream."""
    stream = find_stream(request)
    if is_listed(request, hdrs.IF_NONE_MATCH, stream.etag):
        return Answer(304, headers=(("ETag", stream.etag), ("Cache-Control", "no-store")))
    return answer_stream("Found Stream", stream)


async def change_stream(request: web.Request) -> Answer:
    """Replace a stream (PUT), or change some of its fields (PATCH)."""
    state, old = request.app[STATE], find_stream(request)
    fields = parse_json(await read_body(request))
    async with state.lock("stream", old.id):
        old = find_stream(request)  # as it is now that the body has arrived
        if request.method == hdrs.METH_PATCH and isinstance(fields, dict):
            fields = {name: getattr(old, name) for name in FIELDS} | fields
        # A start that is kept is not in the future, even if the clock has been set back since.
        parsed = parse_event(fields, max(state.clock(), old.stream_started_on))
        check_version(request, old)
        new = ChangedEvent(**asdict(parsed) | {"id": old.id, "version": state.usage.next_number()})
        await state.store(new.version, [(SET_STREAM, [CELLS(new)])], lambda: state.usage.replace(old, new))
    return answer_stream("Stream Updated", new)


async def delete_stream(request: web.Request) -> Answer:
    """Remove a stream."""
    state, stream = request.app[STATE], find_stream(request)
    async with state.lock("stream", stream.id):
        stream = find_stream(request)
        check_version(request, stream)
        number = state.usage.next_number()
        statements: Statements = [(DELETE_STREAM, [(stream.id,)]), (INSERT_TOMBSTONE, [(stream.id, number)])]
        await state.store(number, statements, lambda: state.usage.remove([stream], number))
    return answer_stream("Stream Removed", stream)


async def get_changes(request: web.Request) -> Answer:
    """List what was created, changed or removed after a cursor, each stream once, as it is now.

    A cursor is

        NAME-AFTER        the client has read the sequence of this name up to the number AFTER
        NAME-AFTER-SINCE  the same, in a first reading in pages, which began when SINCE was the latest number

    A first reading ends when it has read up to SINCE. Not all tombstones are kept (`Usage.remove`). If one
    after AFTER is forgotten, the client has to begin anew, or it would keep a stream that is gone. In a first
    reading only those after SINCE count: what was removed before, the client never got.
    """
    state, usage = request.app[STATE], request.app[STATE].usage
    asked = parse_query(request.rel_url.raw_query_string, "after", "limit")
    cursor, limit = asked.get("after", "0").split("-"), asked.get("limit", math.inf)
    name = cursor.pop(0) if len(cursor) > 1 else usage.sequence_name  # AFTER alone will do
    after, since = int(cursor[0]), int(cursor[-1])  # without SINCE it is AFTER
    now = read_to = usage.sequence
    if after == 0:  # a first reading begins
        since = now
    forgotten = since < usage.tombstones_since
    if name != usage.sequence_name or forgotten or max(after, since) > now:
        raise web.HTTPGone(reason="what follows this number is not known here: begin anew with after=0")
    chunks: Iterable[Chunk] = first_of(usage.changes_after(after), limit)
    if "limit" in asked:
        chunks = page = await state.slices.finish(in_steps(chunks))
        if sum(map(len, page)) == limit:
            read_to = page[-1][-1].version
    # A first reading goes on up to SINCE. In any other `since` is AFTER, and has been read.
    following = f"{name}-{read_to}-{since}" if since > read_to else f"{name}-{read_to}"
    link = f'</api/v1/changes?after={following}>; rel="next"'
    # Most who poll have read everything: to them b"" is sent quicker than pieces that come to nothing.
    feed = (chunk.feed_lines for chunk in chunks) if after < now else b""
    return answer_now(200, feed, "ndjson", Link=link, Vary="Accept-Encoding")


async def get_users(request: web.Request) -> Answer:
    """List all who streamed or subscribe."""
    state = request.app[STATE]
    return await answer_cached(request, "json", "users", lambda: write_users(state.books.snapshot()))


def write_users(books: Books) -> Pieces:
    """Yield the users, in order of id."""
    users = yield from sort_in_steps(books.tracks.keys() | books.subscriptions.keys(), str)
    yield b'{"message":"Found Users","data":['
    for number, user in enumerate(users):
        yield (b"," if number else b"") + encode(describe_user(books, user))
    yield b"]}"


def parse_path(request: web.Request, fault: str) -> str:
    """Return the user or label that ends the path; raises InvalidError with the `fault`."""
    try:
        return check_text("", unquote(request.rel_url.raw_parts[-1], errors="strict"))
    except ValueError:  # an InvalidError is one, too
        raise InvalidError(fault) from None


async def get_user(request: web.Request) -> Answer:
    """Show what a user streamed and subscribes to."""
    described = describe_user(request.app[STATE].books, parse_path(request, "User ID Invalid"))
    return answer_success("Found User Stream Report", encode(described))


async def put_user(request: web.Request) -> Answer:
    """Set a user's subscription."""
    state, user = request.app[STATE], parse_path(request, "User ID Invalid")
    subscription = parse_subscription(parse_json(await read_body(request)))
    number, row = state.usage.next_number(), (user, *astuple(subscription), None)
    update = {user: subscription}
    await state.store(number, [(SET_SUBSCRIPTION, [row])], lambda: state.books.subscriptions.update(update))
    return answer_success("Subscription Set", encode(describe_user(state.books, user)))


async def answer_money(
    request: web.Request, title: str, asked: Mapping[str, Any], **formats: Callable[[Books], Pieces]
) -> Answer:
    """Answer with what the format that is asked for makes of the books.

    `title` is the answer's key in the cache, so it names all that is asked for; a CSV file is called so, too.
    """
    state, kind = request.app[STATE], asked.get("format", "json")
    named: Headers = ()
    if not (make := formats.get(kind)):
        raise InvalidError(f"format must be {' or '.join(formats)}")
    if kind == "csv":
        letters = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
        file = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")
        whole = percent_encode(title.strip().lower().replace(" ", "-"), safe="")  # with all letters
        names = f"filename=\"{file}.csv\"; filename*=UTF-8''{whole}.csv"
        named = (("Content-Disposition", f"attachment; {names}"),)
    return await answer_cached(
        request, kind, (title, kind), lambda: make(state.books.snapshot()), *named, most=math.inf
    )


async def get_report(request: web.Request) -> Answer:
    """Tell how much each label is owed, for a month or for all."""
    asked = parse_query(request.rel_url.raw_query_string, "month", "format")
    month = asked.get("month")
    return await answer_money(
        request,
        f"report {month or ''}",
        asked,
        json=lambda books: write_success("Found Label Stream Report", report(books, month)),
        csv=lambda books: write_rows("csv", REPORT_COLUMNS, report_by_month(books, month)),
    )


async def get_statement(request: web.Request) -> Answer:
    """Tell why a label is owed what it is owed for a month."""
    label = parse_path(request, "Label Invalid")
    asked = parse_query(request.rel_url.raw_query_string, "month", "format")
    if not (month := asked.get("month")):
        raise InvalidError("month is missing")
    return await answer_money(
        request,
        f"statement {month} {label}",
        asked,
        json=lambda books: write_success("Found Label Statement", statement(books, month, label)),
        csv=lambda books: write_rows("csv", PAYER_COLUMNS, payer_rows(books, month, label)),
    )


async def get_months(request: web.Request) -> Answer:
    """List the months, the latest first."""
    asked = parse_query(request.rel_url.raw_query_string)  # it has no parameters
    return await answer_money(
        request, "months", asked, json=lambda books: write_success("Found Months", month_rows(books))
    )


async def put_month(request: web.Request) -> Answer:
    """Close a month or open it again."""
    state, month = request.app[STATE], parse_value("month", request.match_info["month"])
    status = check_keys("the month", parse_json(await read_body(request)), {"status"})["status"]
    if status not in ("open", "closed"):
        raise InvalidError("status must be open or closed")

    def decide() -> Steps[tuple[Statements, Apply]]:
        """Work out what is to be frozen or forgotten."""
        now, books = state.clock(), state.books
        if reason := books.obstacle(month, status, now):
            raise ConflictError(reason)
        if status == "open":
            return [(statement, [(month,)]) for statement in REOPEN_MONTH], lambda: books.closed.pop(month)
        account = yield from account_of(books.snapshot(), month, int(now))
        return store_account(month, account), lambda: books.closed.update({month: account})

    async with state.lock("months"):
        if (month in state.books.closed) != (status == "closed"):
            if not state.journal:
                raise ConflictError("without --db no month can be closed: nothing could be kept")
            # Not for what it returns: it fills `late_cache` of the accounts, which all snapshots share. All
            # other writes wait while the journal runs `decide`: so that has less to do.
            await state.slices.finish(unpaid(state.books.snapshot()))
            await state.journal.append(Change(state.usage.next_number(), decide=decide))
        rows = await state.slices.finish(month_rows(state.books.snapshot(), month))
    return answer_success(f"Month {status.capitalize()}", encode(rows[0]))


async def get_metrics(request: web.Request) -> Answer:
    """Tell Prometheus how the program fares."""
    state, lines = request.app[STATE], list[str]()

    def tell(name: str, kind: str, said: str, *values: str) -> None:
        lines.extend((f"# HELP {name} {said}", f"# TYPE {name} {kind}", *(name + value for value in values)))

    statuses = (f'{{status="{first}xx"}} {state.requests[first]}' for first in (2, 3, 4, 5))
    tell("usage_events", "gauge", "Events that are kept.", f" {state.usage.count}")
    tell("usage_sequence", "counter", "Number of the latest change.", f" {state.usage.sequence}")
    tell("usage_requests_total", "counter", "Requests that were answered.", *statuses)
    tell("usage_simulation_errors_total", "counter", "Batches that failed.", f" {state.batch_errors}")
    tell("process_resident_memory_bytes", "gauge", "Resident memory.", f" {resident_memory()}")
    if state.journal and (age := time.monotonic() - state.journal.database.last_commit) < math.inf:
        tell("usage_last_commit_age_seconds", "gauge", "Seconds since the last commit.", f" {age:.3f}")
    return answer_now(200, "\n".join([*lines, ""]).encode(), "metrics")


def resident_memory() -> int:
    """Return the resident memory in bytes; where there is no /proc, the most that it has been."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


STREAM_PATH = "/api/v1/{_:streams?}/{id:[^/]+}"  # both spellings are in use
USER_PATH = "/api/v1/users/{user_id:[^/]+}"

ROUTES = (
    web.get("/", get_page),
    web.get("/usage", get_usage),
    web.get("/health", get_health),
    web.get("/metrics", get_metrics),
    web.get("/api/v1/streams", get_streams),
    web.post("/api/v1/streams", post_streams),
    web.get("/api/v1/changes", get_changes),
    web.get(STREAM_PATH, get_stream),
    web.put(STREAM_PATH, change_stream),
    web.patch(STREAM_PATH, change_stream),
    web.delete(STREAM_PATH, delete_stream),
    web.get("/api/v1/users", get_users),
    web.get(USER_PATH, get_user),
    web.put(USER_PATH, put_user),
    web.get("/api/v1/report", get_report),
    web.get("/api/v1/report/{label:[^/]+}", get_statement),
    web.get("/api/v1/months", get_months),
    web.put("/api/v1/months/{month:[^/]+}", put_month),
)


# ── The application ─────────────────────────────────────────────────────────────────────────────
# What the handlers share, made from a Config alone, and the tasks that live as long as it does.

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
    page: Path = Path(__file__).parent / "index.html"


@dataclass
class State:
    """What the handlers share; `clock` tells Unix seconds."""

    config: Config
    usage: Usage
    books: Books
    rng: random.Random  # of the simulation
    slices: TimeSlices
    journal: Journal | None
    page: tuple[bytes, str]  # and its policy
    clock: Callable[[], float]
    answers: SingleFlight
    last_batch: float = -math.inf  # of the simulation, in monotonic seconds; before the first there is none
    batch_expected_since: float = math.inf  # none is expected before the simulation begins
    batch_errors: int = 0
    requests: Counter[int] = field(default_factory=Counter)  # answered, by the status' first digit
    locks: WeakValueDictionary[object, asyncio.Lock] = field(default_factory=WeakValueDictionary)

    def lock(self, *name: object) -> asyncio.Lock:
        """Return the lock of what has this name, so that one change of it waits for the other."""
        return self.locks.setdefault(name, asyncio.Lock())  # it lives while somebody has it or waits for it

    async def store(self, number: int, statements: Statements, apply: Apply) -> None:
        """Make the change with this number: stored first, visible second; raises StorageError."""
        if self.journal:
            await self.journal.append(Change(number, statements, apply))
        else:
            apply()
            self.usage.sequence = self.usage.last_number  # what `keep` then drops has numbers, too

    async def create(self, events: Sequence[Event], key: tuple[str, bytes] | None = None) -> None:
        """Number and keep `events`, and the idempotency key, with the body's hash, that they came with."""
        first_id = self.usage.next_number(len(events))
        number_events(events, first_id)

        def apply() -> None:
            self.usage.add(events)
            if key:
                self.usage.keys[key[0]] = key[1], first_id

        keys = [("INSERT INTO keys VALUES {rows}", [(*key, first_id)])] if key else []
        await self.store(events[-1].id, [(INSERT_STREAMS, map(CELLS, events)), *keys], apply)


@contextlib.asynccontextmanager
async def own_simulation(app: web.Application) -> AsyncIterator[None]:
    """Fill in the history, then run the simulation for as long as the application lives."""
    state = app[STATE]
    await simulate_history(state)
    task = asyncio.create_task(run_simulation(state))
    yield
    task.cancel()


def create_app(
    config: Config, imported: Import | None = None, clock: Callable[[], float] = time.time
) -> web.Application:
    """Build the application; raises OSError for the page, StorageError for the database."""
    page = read_page(config.page)
    app = web.Application(middlewares=[guard], client_max_size=BODY_BYTES)
    database = Database(config.db) if config.db else None
    books = Books({**SUBSCRIPTIONS})
    usage = Usage(books.record, math.inf if database else config.keep)
    if database:
        if imported:
            database.take_in(imported)
        database.load(usage, books)
    elif imported:
        books.subscriptions = {**imported.subscriptions}
        number_events(imported.events, usage.next_number(len(imported.events)))
        usage.add(imported.events)
        usage.sequence = usage.last_number
    rng = random.Random(config.random_seed)  # noqa: S311 - no secret comes of it
    slices = TimeSlices()
    journal = Journal(database, usage, slices) if database else None
    app[STATE] = State(config, usage, books, rng, slices, journal, page, clock, SingleFlight(usage))
    app.add_routes(ROUTES)
    app.on_response_prepare.append(add_safety_headers)
    if journal:
        app.on_cleanup.append(lambda _: journal.close())
    app.cleanup_ctx.append(own_simulation)
    return app


# ── Command line ────────────────────────────────────────────────────────────────────────────────
# The process: its options, its outputs, its signals, and how it starts and ends.


class Output(logging.Handler):
    """Standard output or error, which a thread writes to: the server never waits for who reads it.

    What finds the queue full is dropped, and what cannot be written stops nothing. `logging.shutdown` closes
    both, as they are handlers.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._write, args=(descriptor,), daemon=True)
        self.thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        self.say(f"{self.format(record)}\n")

    def say(self, text: str) -> None:
        if self.texts.qsize() < OUTPUT_LINES:
            self.texts.put(text)

    def close(self) -> None:
        """Wait until all is written, half a second at most."""
        self.texts.put(None)
        self.thread.join(0.5)

    def _write(self, descriptor: int) -> None:
        for text in iter(self.texts.get, None):
            with contextlib.suppress(OSError):
                os.write(descriptor, text.encode("utf-8", "backslashreplace"))


output = lru_cache(Output)  # one for each file descriptor, 1 or 2


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, without the usage: that is for `--help`."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        output(1 if file is sys.stdout else 2).say(message)


def parse_number(kind: type[int] | type[float], low: float, high: float, text: str) -> float:
    """Return what an option says if that is a number from `low` to `high`."""
    with contextlib.suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")


parse_port = partial(parse_number, int, 0, 65_535)

PARSER = Parser(
    description="Collect usage events and share out royalties.",
    epilog="In the environment HOST and PORT are defaults, and USAGE_TOKEN is what a write then needs:\n"
    "  USAGE_TOKEN=s3cret PORT=8000 python server.py --db usage.db",
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
)
option = PARSER.add_argument
option("--host", help="address to listen on (HOST or 127.0.0.1)")
option("--port", type=parse_port, help="port; 0 picks a free one (PORT or 8080)")
option("--interval", default=Config.interval, type=partial(parse_number, float, 0.001, DAY),
       metavar="SECONDS", help="time between two simulated batches (%(default)s)")
option("--no-simulation", dest="simulate", action="store_false", help="simulate nothing from now on")
option("--history", default=Config.history, type=partial(parse_number, float, 0, 3_650), metavar="DAYS",
       help="simulate the DAYS before now, too")
option("--random-seed", type=int, metavar="N", help="make the simulation repeatable")
option("--keep", default=Config.keep, type=partial(parse_number, int, 1, 10**9), metavar="N",
       help="without --db: keep N events at most (%(default)s)")
option("--db", type=Path, metavar="FILE", help="keep everything in an SQLite file")
option("--import", dest="directory", type=Path, metavar="DIR",
       help="load users.csv, streaming.csv and tracks.json")
option("--tracks", metavar="FILE_OR_URL", help="the tracks of an import (DIR/tracks.json)")
option("--undo-import", action="store_true", help="with --db: take the latest import back, and end")
option("--allow-host", action="append", default=[], metavar="NAME",
       help="a further name that requests may come in under; repeatable")
option("--version", action="version", version=f"%(prog)s {__version__}", help="say the version, and end")
option("-v", "--verbose", action="store_true", help="log each request")


def parse_options(environment: Mapping[str, str], arguments: Sequence[str]) -> argparse.Namespace:
    """Return what the command line and the environment say, or exit with status 2 and what is wrong."""
    options = PARSER.parse_args(arguments)
    if options.host is None:
        options.host = environment.get("HOST") or "127.0.0.1"
    if options.port is None:
        try:
            options.port = parse_port(environment.get("PORT") or "8080")
        except argparse.ArgumentTypeError as error:
            PARSER.error(f"PORT in the environment: {error}")
    options.token = environment.get("USAGE_TOKEN", "").strip()  # a file with a secret ends with a newline
    if "USAGE_TOKEN" in environment and not (options.token and options.token.isprintable()):
        PARSER.error("USAGE_TOKEN is empty or no printable text; unset it if a write is to need no token")
    for name in options.allow_host:
        if not is_own_name(name, (name.lower(),)):  # it allows itself: so it is its form that is wrong
            PARSER.error(f"--allow-host: {name!r} is no plain host name such as usage.example.com")
    options.allow_host = tuple(map(str.lower, options.allow_host))
    if options.tracks and not options.directory:
        PARSER.error("--tracks goes with --import")
    if options.undo_import and (options.directory or not options.db):
        PARSER.error("--undo-import goes " + ("without --import" if options.db else "with --db"))
    return options


def read_import(directory: Path, tracks: str | None) -> Import:
    """Return what is to be imported, or exit with status 2 and what is wrong with it."""
    source = tracks or str(directory / "tracks.json")
    remote = source.lower().startswith(("http://", "https://"))
    try:
        content = asyncio.run(fetch_tracks(source)) if remote else read_file(Path(source))
        return Import(directory, content, time.time())
    except (OSError, ValueError) as error:
        PARSER.error(f"cannot read the tracks from {source}: {reason_of(error)}")
    except ImportFailedError as error:
        PARSER.exit(2, f"{error}\n")


def listen(host: str, port: int) -> socket.socket:
    """Open the port, before any work begins, so that one that is taken is known at once, or exit."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family)
        # Else the kernel holds megabytes for a slow reader, and takes nothing more until most of it is read.
        # A reader that needs WRITE_SECONDS for that would be disconnected.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, PIECE_BYTES)
        return listener
    except (OSError, UnicodeError) as error:
        reason = reason_of(error).partition(" (while attempting to bind")[0]
        PARSER.error(f"cannot listen on {host}, port {port}: {reason}; --host or --port names another")


def tidy_log(record: logging.LogRecord) -> bool:
    """Leave out that a client sent no HTTP or has gone; say in one line that no more connections fit in."""
    error = record.exc_info[1] if record.exc_info else None
    if getattr(error, "errno", None) == errno.EMFILE:
        record.msg = "no connection can be taken: all file descriptors are in use (ulimit -n)"
        record.args = record.exc_info = None
    return not isinstance(error, (http_exceptions.HttpProcessingError, ConnectionError))


def await_signal(serving: threading.Event, signalled: Future[None]) -> None:
    """Wait for SIGINT or SIGTERM, and end the process.

    While it starts, this ends it at once. While it serves, `serve` does or, after END_SECONDS, this.
    """
    signal.sigwait(SIGNALS)
    if serving.is_set():
        signalled.set_result(None)
        time.sleep(END_SECONDS)
    os._exit(0)  # all that was acknowledged is stored


async def serve(
    app: web.Application, listener: socket.socket, serving: threading.Event, signalled: Future[None]
) -> NoReturn:
    """Answer until the first signal; then answer what is under way, and end the process."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(4))  # each thread keeps memory
    runner = web.AppRunner(
        app,
        access_log_format='%a "%r" %s %b',  # no header: it may hold any control character above 127
        auto_decompress=False,  # a small body could become very large
        handler_cancellation=True,  # when the client disconnects, see `guard`
        lingering_time=LINGER_SECONDS,
    )
    await runner.setup()
    serving.set()
    # asyncio takes `backlog` connections at a stretch, and logs an error for each that it cannot take:
    # so it gets 1, and the system afterwards how many may wait.
    site = web.SockSite(runner, listener, backlog=1)
    await site.start()
    listener.listen(1024)
    output(1).say(f"Listening on {site.name}\n")
    await asyncio.wrap_future(signalled)
    await site.stop()
    await asyncio.sleep(0)  # lets the requests that have come begin
    server = cast("web.Server", runner.server)
    server.pre_shutdown()
    await server.shutdown(1.5)  # seconds; it waits up to twice that for the requests under way
    logging.shutdown()
    os._exit(0)  # to free all events, to close the database or to end a report would take seconds


def set_up_process() -> None:
    """Set what holds for the whole process: its outputs, memory, log and limits."""
    for _ in range(3):  # fill 0, 1 and 2 if they are closed, or the database could become one of them
        os.open(os.devnull, os.O_RDWR)
    with contextlib.suppress(AttributeError):  # not every C library has mallopt
        for limit in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: so much free memory goes back
            ctypes.CDLL(None).mallopt(limit, 512 * 1024)
    gc.set_threshold(10_000, 10, 10)  # seldom, for requests leave few cycles behind
    sys.setswitchinterval(SWITCH_SECONDS)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s", handlers=[output(2)])
    output(2).addFilter(tidy_log)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # many shells allow 256 or 1,024 until they are asked
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Run the program: status 0 after Ctrl-C or SIGTERM, 2 and one line if it cannot start."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # before any thread begins: each inherits that
    # A thread waits for the signal, so neither a disk nor a busy event loop can keep the process alive.
    serving, signalled = threading.Event(), Future[None]()
    threading.Thread(target=await_signal, args=(serving, signalled), daemon=True).start()
    set_up_process()
    options = parse_options(os.environ, sys.argv[1:])
    logging.getLogger("aiohttp.access").disabled = not options.verbose
    try:
        if options.undo_import:
            output(1).say(f"Took back {Database(options.db, 'r+b').undo_import()}\n")
            return
        listener = listen(options.host, options.port)
        given = vars(options).items()
        config = Config(**{name: value for name, value in given if name in Config.__annotations__})
        if not options.token and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            log.warning("others can reach this: without USAGE_TOKEN it is for a gateway to say who may write")
        # While it serves, no variable holds what was imported: with --db that would be in memory twice.
        app = create_app(config, options.directory and read_import(options.directory, options.tracks))
        asyncio.run(serve(app, listener, serving, signalled))
    except StorageError as error:
        task = "take back an import of" if options.undo_import else "use the database"
        PARSER.error(f"cannot {task} {options.db}: {error}")
    except OSError as error:  # of the page
        PARSER.error(f"cannot serve: {error}")


if __name__ == "__main__":
    main()
