"""What the scripts here have in common: the real program as a process, and requests over plain sockets."""

import asyncio
import contextlib
import resource
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

SERVER = Path(__file__).parents[1] / "server.py"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Program:
    """A process of the program."""

    address: tuple[str, int]
    pid: int
    log: Path

    def memory(self) -> int:
        """Return how much memory it has, in kB."""
        return int(Path(f"/proc/{self.pid}/status").read_text("utf-8").split("VmRSS:")[1].split()[0])


@contextlib.asynccontextmanager
async def running(*options: str) -> AsyncIterator[Program]:
    """Run the server; allow this process, but not that one, as many connections as the system does."""
    with tempfile.NamedTemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, SERVER, "--port=0", *options, stdout=asyncio.subprocess.PIPE, stderr=log
        )
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        assert process.stdout  # noqa: S101
        line = (await process.stdout.readline()).decode().strip()
        host, port = line.removeprefix("Listening on http://").split(":")
        try:
            yield Program((host, int(port)), process.pid, Path(log.name))
        finally:
            with contextlib.suppress(ProcessLookupError):  # it may have been killed
                process.terminate()
            await process.wait()


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
