# /// script
# requires-python = ">=3.11"
# dependencies = ["aiohttp>=3.14.3,<4"]
# ///
"""Seconds streamed: collect usage events, answer queries about them, show them live on a page.

    python server.py            then open http://127.0.0.1:8080, or curl http://127.0.0.1:8080/usage

The words, as the code uses them:

    event     one play of one track by one user, in exactly five fields (see `Event`)
    usage     the events that are kept, in order of their start
    block     some events that stand next to each other in the usage: one step of a long answer
    batch     the 1 to 5 events that the simulation makes at a time

Times are Unix seconds and durations are seconds, everywhere. The limits: one process, one event
loop; the events are in memory, and gone when it ends.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import csv
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import socket
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

BLOCK_EVENTS = 1024  # at most, in one block: about 100 kB of JSON and 1 ms of work
SLICE_BYTES = 64 * 1024  # a longer answer is streamed
GZIP_BYTES = 1024  # a shorter answer is not worth compressing
BODY_BYTES = 1024 * 1024
SHUTDOWN_SECONDS = 2  # aiohttp waits up to twice this for requests under way; 5 s are promised
MISSED_BATCHES = 3  # after so many intervals without a batch the simulation counts as stopped

STATE: web.AppKey[State] = web.AppKey("state")

log = logging.getLogger("server")


# ── Events ──────────────────────────────────────────────────────────────────────────────────────
# What an event is: the only place where one is checked and encoded.

NAMES = ("user_id", "track_id", "label")
FIELDS = (*NAMES, "stream_started_on", "seconds_streamed")

# Control characters forge log lines and break CSV; lone surrogates cannot be written as UTF-8.
IDENTIFIER_CHARACTERS = 128
FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

encode_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class InvalidError(ValueError):
    """What a client asked for or sent is malformed; the message names the field or parameter."""


class FutureError(InvalidError):
    """`from` lies in the future."""


@dataclass(slots=True, eq=False)
class Event:
    """One play of one track by one user, with its JSON, which is encoded once and sent often.

    `stream_started_on` is in Unix seconds, `seconds_streamed` in seconds. `id`, from 1, is the order
    of arrival: `Usage.add` gives it. From then on an event is never changed.
    """

    user_id: str
    track_id: str
    label: str
    stream_started_on: int
    seconds_streamed: int
    id: int = 0
    json: bytes = field(init=False)

    def __post_init__(self) -> None:
        # Written out, for it is done for every event: a dict and json.dumps take three times as long.
        self.json = (
            f'{{"user_id":{encode_text(self.user_id)},"track_id":{encode_text(self.track_id)},'
            f'"label":{encode_text(self.label)},"stream_started_on":{self.stream_started_on},'
            f'"seconds_streamed":{self.seconds_streamed}}}'
        ).encode()


def check_identifier(name: str, value: object) -> str:
    """Return `value` if it is 1 to 128 characters and none of them a control character.

    Raises InvalidError, which names the field or parameter `name`.
    """
    if not isinstance(value, str) or not 1 <= len(value) <= IDENTIFIER_CHARACTERS:
        raise InvalidError(f"{name} must be a text of 1 to {IDENTIFIER_CHARACTERS} characters")
    if FORBIDDEN_CHARACTERS.search(value):
        raise InvalidError(f"{name} must not contain control characters")
    return value


# ── Usage ───────────────────────────────────────────────────────────────────────────────────────
# The events that are kept, and the questions that can be asked about them.

START = attrgetter("stream_started_on")
ORDER = attrgetter("stream_started_on", "id")  # equal starts keep the order of their arrival


class Usage:
    """The events that are kept, in order of `stream_started_on`, in a deque of blocks.

    A block is never changed: a writer puts a new one in its place. So whoever holds blocks sees one
    moment, however slowly it reads, without a copy of its own; and an event that arrives late costs
    the copy of one block instead of shifting the whole deque.
    """

    def __init__(self, keep: int) -> None:
        """Keep the `keep` events that started last."""
        self.blocks: deque[list[Event]] = deque()
        self.keep = keep
        self.count = 0
        self.version = 0  # another one whenever an answer could be another
        self.last_id = 0
        self.dropped = 0

    def add(self, events: Iterable[Event]) -> None:
        """Give each event its id and put it in its place; then drop the oldest above `keep`."""
        pending = list(events)
        for event in pending:
            self.last_id += 1
            event.id = self.last_id
        pending.sort(key=ORDER)
        self.count += len(pending)
        self.version += 1
        while pending:
            pending = self._fill_block(pending)
        self._drop_oldest()

    def _fill_block(self, pending: list[Event]) -> list[Event]:
        """Put the first of `pending`, and the others that belong to the same block, in; return the rest."""
        if not self.blocks:
            self.blocks.extend(_split(pending))
            return []
        following = bisect_right(self.blocks, ORDER(pending[0]), key=lambda block: ORDER(block[0])) or 1
        fit = len(pending)
        if following < len(self.blocks):
            fit = bisect_left(pending, ORDER(self.blocks[following][0]), key=ORDER)
        block = self.blocks[following - 1].copy()
        for event in pending[:fit]:
            insort(block, event, key=ORDER)
        del self.blocks[following - 1]
        for part in reversed(_split(block)):
            self.blocks.insert(following - 1, part)
        return pending[fit:]

    def _drop_oldest(self) -> None:
        while (excess := self.count - self.keep) > 0:
            if not self.dropped:
                log.warning("there are more than %d events: from now on the oldest go (--keep)", self.keep)
            oldest = self.blocks.popleft()
            if oldest[excess:]:
                self.blocks.appendleft(oldest[excess:])
            self.count -= len(oldest[:excess])
            self.dropped += len(oldest[:excess])

    def between(self, since: int | None, until: int | None) -> list[list[Event]]:
        """Return the events with `since <= stream_started_on < until`, in blocks."""
        first, end = 0, len(self.blocks)
        if since is not None:
            first = bisect_left(self.blocks, since, key=lambda block: START(block[-1]))
        if until is not None:
            end = bisect_left(self.blocks, until, key=lambda block: START(block[0]))
        found = list(itertools.islice(self.blocks, first, end))
        if found and since is not None:
            found[0] = found[0][bisect_left(found[0], since, key=START) :]
        if found and until is not None:
            found[-1] = found[-1][: bisect_left(found[-1], until, key=START)]
        return found


def _split(events: list[Event]) -> list[list[Event]]:
    """Cut `events` into blocks of about equal length, BLOCK_EVENTS at most."""
    size = math.ceil(len(events) / math.ceil(len(events) / BLOCK_EVENTS))
    return [events[at : at + size] for at in range(0, len(events), size)]


def matching(blocks: Iterable[list[Event]], names: Mapping[str, frozenset[str]]) -> Iterator[list[Event]]:
    """Yield each block without the events whose user, track or label is none of those asked for."""
    for block in blocks:
        found = block
        for name, wanted in names.items():
            get = attrgetter(name)
            found = [event for event in found if get(event) in wanted]
        yield found


def grouped(blocks: Iterable[list[Event]], by: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
    """Yield one row a combination of `by`: most seconds first, ties in order of the names.

    All rows come at the end; an empty list comes after each block, for others to be let in.
    """
    get = attrgetter(*by)
    totals: dict[Any, list[int]] = {}
    for block in blocks:
        for event in block:
            total = totals.setdefault(get(event), [0, 0])
            total[0] += 1
            total[1] += event.seconds_streamed
        yield []
    ranked = sorted(totals.items(), key=lambda item: (-item[1][1], item[0]))
    yield [
        dict(zip(by, key if len(by) > 1 else (key,), strict=True), events=events, seconds_streamed=seconds)
        for key, (events, seconds) in ranked
    ]


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
    last_batch: float | None = None
    errors: int = 0


def tick(state: State, now: float, rng: random.Random) -> None:
    """Add one batch that ends at `now`."""
    state.usage.add(simulate_batch(int(now), rng))
    state.simulation.last_batch = time.monotonic()


async def simulate_history(state: State) -> None:
    """Add the batches of the `history` days before now, at the rate of the simulation."""
    interval, now, rng = state.config.interval, state.clock(), state.simulation.rng
    # A batch holds an event at least: of more batches than `keep` the first would be dropped again.
    batches = min(int(state.config.history * 86_400 / interval), state.config.keep)
    events: list[Event] = []
    for number in range(batches, 0, -1):
        events += simulate_batch(int(now - number * interval), rng)
        if number % BLOCK_EVENTS == 0:
            await asyncio.sleep(0)  # a signal can end a long start
    state.usage.add(events)


async def run_simulation(state: State) -> None:
    """Make a batch at once and then one every `interval` seconds, without drift.

    A batch that fails is logged and counted, and the next one comes.
    """
    interval, now = state.config.interval, asyncio.get_running_loop().time
    due = now()
    while True:
        try:
            tick(state, state.clock(), state.simulation.rng)
        except Exception:
            state.simulation.errors += 1
            log.exception("a simulated batch failed")
        # A process that was held up for an hour goes on in rhythm, without 360 batches at once.
        due += interval * max(1, math.ceil((now() - due) / interval))
        await asyncio.sleep(due - now())


# ── HTTP: parsing, errors, safety ───────────────────────────────────────────────────────────────
# What comes in is parsed here; every answer goes out through `send`, every error through
# `answer_errors`. The rules above know nothing of HTTP.

PARAMETERS = ("from", "to", *NAMES, "group_by", "format")
INTEGER = re.compile(r"-?[0-9]{1,100}")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet would run

CONTENT_TYPES = {
    "json": "application/json; charset=utf-8",
    "ndjson": "application/x-ndjson; charset=utf-8",
    "csv": "text/csv; charset=utf-8; header=present",
    "html": "text/html; charset=utf-8",
}
SAFETY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class Query:
    """What `/usage` was asked: `since <= stream_started_on < until`, and one of `names` each."""

    since: int | None
    until: int | None
    names: Mapping[str, frozenset[str]]
    group_by: tuple[str, ...]
    format: str


def parse_query(parameters: Iterable[tuple[str, str]], now: float) -> Query:
    """Parse the parameters of `/usage`.

    Raises InvalidError, which names the parameter, and FutureError if `from` is later than `now`.
    """
    given: dict[str, list[str]] = {}
    for name, value in parameters:
        if name not in PARAMETERS:
            raise InvalidError(f"unknown parameter {name[:128]!r}")
        given.setdefault(name, []).append(value)
        if len(given[name]) > 1 and name not in NAMES:
            raise InvalidError(f"{name} is given more than once")
    names = {
        name: frozenset(check_identifier(name, value) for value in given[name])
        for name in NAMES
        if name in given
    }
    group_by = tuple(given["group_by"][0].split(",")) if "group_by" in given else ()
    if len(set(group_by)) < len(group_by) or not set(group_by) <= set(NAMES):
        raise InvalidError(f"group_by must be a comma list of {', '.join(NAMES)}")
    form = given.get("format", ["json"])[0]
    if form not in ("json", "ndjson", "csv"):
        raise InvalidError("format must be json, ndjson or csv")
    since, until = (_parse_int(name, given[name][0]) if name in given else None for name in ("from", "to"))
    if since is not None and since > now:
        raise FutureError("from is in the future")
    return Query(since, until, names, group_by, form)


def _parse_int(name: str, text: str) -> int:
    if not INTEGER.fullmatch(text):
        raise InvalidError(f"{name} must be an int")
    return int(text)


def encode(value: Any) -> bytes:
    """Return compact JSON."""
    return encode_text(value).encode()


def encode_csv(rows: Iterable[Iterable[object]]) -> bytes:
    """Return lines as RFC 4180 has them, the last one unended, and no cell that is run as a formula."""
    text = io.StringIO()
    safe = ([f"'{x}" if isinstance(x, str) and x.startswith(FORMULA) else x for x in row] for row in rows)
    csv.writer(text).writerows(safe)
    return text.getvalue().encode().removesuffix(b"\r\n")


def write_rows(
    form: str,
    columns: Iterable[str],
    blocks: Iterable[list[Any]],
    as_json: Callable[[Any], bytes] = encode,
    as_cells: Callable[[Any], Iterable[object]] = dict.values,
) -> Iterator[bytes]:
    """Yield `blocks` of rows as json, ndjson or csv: a slice a block, empty where there are no rows."""
    header = encode_csv([columns]) + b"\r\n"
    opening, between, closing, nothing = {
        "json": (b"[", b",", b"]", b"[]"),
        "ndjson": (b"", b"\n", b"\n", b""),
        "csv": (header, b"\r\n", b"\r\n", header),
    }[form]
    before = opening
    for block in blocks:
        if not block:
            yield b""
            continue
        rows = [encode_csv(map(as_cells, block))] if form == "csv" else map(as_json, block)
        yield before + between.join(rows)
        before = between
    yield nothing if before is opening else closing


async def send(
    request: web.Request, etag: str, form: str, slices: Iterable[bytes], **headers: str
) -> web.StreamResponse:
    """Answer with `slices`: with 304 if the client has them, whole if they are short, else streamed.

    For a 304 not one of them is made. Others are let in after each, so a source that works for long
    with nothing to say yields b"".
    """
    headers |= {"ETag": f'W/"{etag}"', "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if any(known.value in (etag, "*") for known in request.if_none_match or ()):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = CONTENT_TYPES[form]
    response: web.StreamResponse | None = None
    body: list[bytes] = []
    size = 0
    for piece in slices:
        body.append(piece)
        size += len(piece)
        if size >= SLICE_BYTES:
            if response is None:
                response = web.StreamResponse(headers=headers)
                if request.method == hdrs.METH_HEAD:
                    return response
                _compress(request, response)
                await response.prepare(request)
            await response.write(b"".join(body))
            body, size = [], 0
        await asyncio.sleep(0)
    if response is not None:
        await response.write_eof(b"".join(body))
        return response
    response = web.Response(body=b"".join(body), headers=headers)
    if size >= GZIP_BYTES:
        _compress(request, response)
    return response


def _compress(request: web.Request, response: web.StreamResponse) -> None:
    """Have `response` compressed if the client takes gzip (`gzip;q=0` says that it does not)."""
    codings = request.headers.get(hdrs.ACCEPT_ENCODING, "").lower().replace(" ", "").split(",")
    if any(re.fullmatch(r"gzip(;q=(1|0\.0*[1-9]).*)?", coding) for coding in codings):
        response.enable_compression(web.ContentCoding.gzip)


def reply(status: int, value: object, **headers: str) -> web.Response:
    """Answer with `value` in JSON; it is about this moment, so nobody may keep it."""
    headers |= {"Content-Type": CONTENT_TYPES["json"], "Cache-Control": "no-store"}
    return web.Response(status=status, body=encode(value), headers=headers)


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn what the rules and aiohttp raise into answers, none of them with a traceback."""
    try:
        return await handler(request)
    except FutureError:
        return web.Response(status=400)  # with an empty body: the challenge wants it so
    except InvalidError as error:
        return reply(400, {"error": str(error)})
    except web.HTTPException as error:
        allowed = {hdrs.ALLOW: error.headers[hdrs.ALLOW]} if hdrs.ALLOW in error.headers else {}
        return reply(error.status, {"error": error.reason}, **allowed)
    except ConnectionError:
        raise  # the client has gone, which aiohttp knows how to deal with
    except Exception:
        log.exception("%s %r failed", request.method, request.path)
        if request.writer.output_size:
            raise  # half an answer is out: it has to break off
        return reply(500, {"error": "internal error"})


async def add_safety_headers(_: web.Request, response: web.StreamResponse) -> None:
    """Put on every answer what keeps browsers from misusing it."""
    response.headers.update(SAFETY_HEADERS)


class Page:
    """`index.html`, read again when it has changed on disk, and the policy under which it runs.

    The policy names the scripts that the file loads, and its inline script and style by their hashes.
    Vue compiles the template in the page, for which it needs 'unsafe-eval'.
    """

    def __init__(self, path: Path) -> None:
        """Read the file; raises OSError."""
        self.path = path
        self.stamp = (0, 0)
        self.refresh()

    def refresh(self) -> None:
        """Read the file again if its time or its size is another; raises OSError."""
        status = self.path.stat()
        if self.stamp == (status.st_mtime_ns, status.st_size):
            return
        # CRLF, which a checkout may bring, is what the HTML parser drops before it hashes.
        self.body = self.path.read_bytes().replace(b"\r\n", b"\n")
        self.stamp = (status.st_mtime_ns, status.st_size)
        self.etag = hashlib.sha256(self.body).hexdigest()[:16]
        loaded = b" ".join(re.findall(rb'<script[^>]* src="([^"]+)"', self.body)).decode()
        scripts, styles = self._hashes(rb"<script>(.*?)</script>"), self._hashes(rb"<style>(.*?)</style>")
        self.policy = (
            f"default-src 'none'; script-src {loaded} {scripts} 'unsafe-eval'; style-src {styles}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    def _hashes(self, inline: bytes) -> str:
        digests = (hashlib.sha256(text).digest() for text in re.findall(inline, self.body, re.DOTALL))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


# ── Handlers ────────────────────────────────────────────────────────────────────────────────────
# Each parses, asks the rules above, and answers.


async def get_page(request: web.Request) -> web.StreamResponse:
    """GET /: the page."""
    page = request.app[STATE].page
    with contextlib.suppress(OSError):  # while an editor is saving it, the last one does
        page.refresh()
    policy = {"Content-Security-Policy": page.policy}
    return await send(request, page.etag, "html", [page.body], **policy)


async def get_usage(request: web.Request) -> web.StreamResponse:
    """GET /usage: the events that are asked for, or their sums."""
    state = request.app[STATE]
    query = parse_query(request.query.items(), state.clock())
    events = matching(state.usage.between(query.since, query.until), query.names)
    if query.group_by:
        columns = (*query.group_by, "events", "seconds_streamed")
        slices = write_rows(query.format, columns, grouped(events, query.group_by))
    else:
        slices = write_rows(query.format, FIELDS, events, attrgetter("json"), attrgetter(*FIELDS))
    return await send(request, f"{state.boot}-{state.usage.version}", query.format, slices)


async def get_health(request: web.Request) -> web.Response:
    """GET /health: 200 while all is well, 503 when the simulation has stopped."""
    state = request.app[STATE]
    config, simulation = state.config, state.simulation
    age = time.monotonic() - simulation.last_batch if simulation.last_batch is not None else math.inf
    running = config.simulate and age < MISSED_BATCHES * config.interval
    healthy = running or not config.simulate
    value = {
        "status": "ok" if healthy else "degraded",
        "events": state.usage.count,
        "simulation": {
            "running": running,
            "last_batch_age": round(age, 1) if age < math.inf else None,
            "errors": simulation.errors,
        },
        "storage": {"durable": False, "last_commit_age": None},
    }
    return reply(200 if healthy else 503, value)


ROUTES = (
    web.get("/", get_page),
    web.get("/usage", get_usage),
    web.get("/health", get_health),
)


# ── The application ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Config:
    """What the command line decides; `interval` is in seconds, `history` in days."""

    interval: float = 10
    simulate: bool = True
    history: float = 0
    random_seed: int | None = None
    keep: int = 1_000_000
    page: Path = Path(__file__).with_name("index.html")  # noqa: RUF009 - a Path never changes


@dataclass
class State:
    """What the handlers share; `clock` tells Unix seconds, `boot` tells one start from another."""

    config: Config
    usage: Usage
    simulation: Simulation
    page: Page
    clock: Callable[[], float]
    boot: str = field(default_factory=lambda: secrets.token_hex(4))


@contextlib.asynccontextmanager
async def own_simulation(app: web.Application) -> AsyncIterator[None]:
    """Fill in the history, then run the simulation for as long as the application lives."""
    state = app[STATE]
    gc.disable()  # all that is loaded now stays: a search for garbage in it doubles the time
    await simulate_history(state)
    gc.enable()
    gc.freeze()
    task = asyncio.create_task(run_simulation(state)) if state.config.simulate else None
    yield
    if task:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def create_app(config: Config, clock: Callable[[], float] = time.time) -> web.Application:
    """Build the application; raises OSError if the page cannot be read."""
    app = web.Application(middlewares=[answer_errors], client_max_size=BODY_BYTES)
    simulation = Simulation(random.Random(config.random_seed))  # noqa: S311 - no secret comes of it
    app[STATE] = State(config, Usage(config.keep), simulation, Page(config.page), clock)
    app.add_routes(ROUTES)
    app.on_response_prepare.append(add_safety_headers)
    app.cleanup_ctx.append(own_simulation)
    return app


# ── Command line ────────────────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message, without the usage: that is for `--help`."""
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that is a number from `low` to `high`."""

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__} from {low:,} to {high:,}")

    return parse


def build_parser(environment: Mapping[str, str]) -> Parser:
    """Return the parser of the command line; HOST and PORT in the environment are defaults."""
    parser = Parser(description="Collect usage events and show the seconds streamed.", allow_abbrev=False)
    add = parser.add_argument
    host, port = environment.get("HOST") or "127.0.0.1", environment.get("PORT") or "8080"
    any_port, pause, days, events = (
        number(int, 0, 65_535), number(float, 0.001, 86_400), number(float, 0, 3_650), number(int, 1, 10**9)
    )
    add("--host", default=host, help="address to listen on (%(default)s)")
    add("--port", default=port, type=any_port, help="port; 0 picks a free one (%(default)s)")
    add("--interval", default=10, type=pause, help="seconds between two simulated batches (%(default)s)")
    add("--no-simulation", dest="simulate", action="store_false", help="simulate nothing from now on")
    add("--history", default=0, type=days, metavar="DAYS", help="simulate the DAYS before now, too")
    add("--random-seed", type=int, metavar="N", help="make the simulation repeatable")
    add("--keep", default=10**6, type=events, metavar="N", help="keep N events at most (%(default)s)")
    add("-v", "--verbose", action="store_true", help="log each request")
    return parser


def listen(host: str, port: int) -> socket.socket:
    """Open the port, before any work begins, so that one that is taken is known at once; raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address, family=family, backlog=1024)


def main() -> None:
    """Run the program: status 0 after Ctrl-C or SIGTERM, 2 and one line if it cannot start."""
    for name in (signal.SIGINT, signal.SIGTERM):  # until the event loop takes them over
        signal.signal(name, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    parser = build_parser(os.environ)
    options = vars(parser.parse_args())
    host, port, verbose = options.pop("host"), options.pop("port"), options.pop("verbose")
    try:
        app = create_app(Config(**options))
    except OSError as error:
        parser.error(f"cannot read the page: {error}")
    try:
        listener = listen(host, port)
    except OSError as error:
        parser.error(f"cannot listen on {host}, port {port}: {error.strerror}")
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    web.run_app(
        app,
        sock=listener,
        shutdown_timeout=SHUTDOWN_SECONDS,
        print=lambda _: print(f"Listening on {url}", flush=True),
        access_log=logging.getLogger("aiohttp.access") if verbose else None,
    )


if __name__ == "__main__":
    main()
