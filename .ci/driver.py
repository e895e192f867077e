"""What the scripts here have in common: the real program as a process, and requests over plain sockets."""

import asyncio
import contextlib
import resource
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

SERVER = Path(__file__).parents[1] / "server.py"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Program:
    """A process that says where it listens: the server or, with its `command`, another."""

    def __init__(self, *options: str, command: tuple[str | Path, ...] = (SERVER, "--port=0")) -> None:
        """Start it, and wait until it listens.

        Allow this process, but not that one, as many connections as the system does.
        """
        with tempfile.NamedTemporaryFile(delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, *command, *options], stdout=subprocess.PIPE, stderr=log, text=True
            )
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        assert self.process.stdout  # noqa: S101
        line = self.process.stdout.readline().strip()
        host, _, port = line.removeprefix("Listening on http://").partition(":")
        if not port:
            raise SystemExit(self.log.read_text("utf-8"))
        self.address = host, int(port)
        self.pid = self.process.pid

    def memory(self) -> int:
        """Return how much memory it has, in kB."""
        return int(Path(f"/proc/{self.pid}/status").read_text("utf-8").split("VmRSS:")[1].split()[0])

    def kill(self) -> None:
        """Leave it no time for anything."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Have it end."""
        self.process.terminate()
        self.process.wait()
        self.log.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def running(*options: str) -> AsyncIterator[Program]:
    """Run the server."""
    program = Program(*options)
    try:
        yield program
    finally:
        program.end()


def request(method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
    """Write a request; each of the headers ends with CRLF."""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def header(head: bytes, name: bytes) -> bytes:
    """Return the value of a header, whose name is given in lower case."""
    at = head.lower().find(b"\r\n" + name + b": ")
    return head[at + len(name) + 4 :].split(b"\r\n", 1)[0] if at >= 0 else b""


async def ask(connection: Connection, message: bytes) -> bytes:
    """Send a request, read its answer to the end, and return the status and the headers."""
    reader, writer = connection
    writer.write(message)
    head = await reader.readuntil(b"\r\n\r\n")
    if header(head, b"transfer-encoding") == b"chunked":
        while size := int(await reader.readline(), 16):
            await reader.readexactly(size + 2)
        await reader.readline()
    else:
        await reader.readexactly(int(header(head, b"content-length") or 0))
    return head[9:]
