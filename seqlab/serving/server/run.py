"""Running the server: uvicorn, with a drain on SIGTERM and SIGINT that loses no stream."""

import asyncio
import contextlib
import pathlib
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn

from seqlab.serving.server.app import Service, application


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `serve`, which drains first."""
        yield


def serve(
    service: Service,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drain_seconds: float = 30.0,
    state_folder: pathlib.Path | None = None,
    say: Callable[[str], None] = print,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit code.

    Then new requests are refused, those there are get `drain_seconds` to finish, and the states of the rest
    are written to `state_folder`, one file per stream that `Batcher.receive` continues. A second signal ends
    the wait.

    Args:
      port: 0 for any free one.
      say: told where the server listens, and what was saved.
    """
    return asyncio.run(_serve(service, host, port, drain_seconds, state_folder, say))


async def _serve(
    service: Service,
    host: str,
    port: int,
    drain_seconds: float,
    folder: pathlib.Path | None,
    say: Callable[[str], None],
) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=1024)
    config = uvicorn.Config(application(service), log_level="warning", timeout_graceful_shutdown=5)
    server, asked = _Server(config), asyncio.Event()
    hurry, code = asyncio.Event(), 0

    def stop(number: int) -> None:
        nonlocal code
        code = 128 + number
        (hurry if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    service.batcher.start()
    name = f"[{host}]" if ":" in host else host
    say(f"{service.name}: http://{name}:{listening.getsockname()[1]}")
    running = asyncio.create_task(server.serve(sockets=[listening]))
    waiting = asyncio.create_task(asked.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    service.draining = True
    if not running.done():
        until = time.monotonic() + drain_seconds
        while service.batcher.requests() and not hurry.is_set() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(_save, service, folder, say)
        server.should_exit = True
    waiting.cancel()
    await running
    service.batcher.close()
    return code


def _save(service: Service, folder: pathlib.Path | None, say: Callable[[str], None]) -> None:
    """Hand the remaining streams over to files."""
    saved = 0
    for request in service.batcher.requests():
        try:
            data = service.batcher.hand_over(request)
        except ValueError:  # it has ended meanwhile
            continue
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{int(time.time())}-{id(request):x}.request"
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
            saved += 1
    if saved:
        say(f"{folder}: saved the states of {saved} unfinished streams")
