"""`interlock demo`: a server, a real VM, and what is worth trying next. This is what `make run` runs."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interlock.api.schemas import ImageList, Instance, NewForward, NewInstance
from interlock.cli.connection import TOKEN_VARIABLE, URL_VARIABLE
from interlock.cli.exit_codes import ExitCode
from interlock.cli.failures import Failure
from interlock.cli.inventory import build_small_image
from interlock.cli.invocation import Invocation, needs_invocation
from interlock.cli.live_line import LiveLine
from interlock.cli.naming import IMAGES, INSTANCES, path_of
from interlock.cli.server import read_config, run, told
from interlock.cli.submitting import submit
from interlock.cli.vm import create_vm, print_vm
from interlock.cli.watching import console_text, event_line, read_history, since
from interlock.core.operations import Operation
from interlock.core.states import VmState

if TYPE_CHECKING:
    import asyncio

    from interlock.config import Config
    from interlock.wiring import Server

VM: Final = "demo"
IMAGE: Final = "small"
UP: Final = "interlock-guest: up"
"""What the small guest writes on its console when all of it has been started."""
GUEST_PORT: Final = 80
_FIRST_PORT: Final = 8080
_PORTS: Final = 100
_UP_WITHIN_S: Final = 180.0
_LOOK_AGAIN_S: Final = 0.3
_HISTORY_SHOWN: Final = 14
_LOG: Final = "server.log"


@click.command()
@needs_invocation
def demo(invocation: Invocation) -> None:
    """Serve, boot a small real VM, and show what to try.

    The VM is called demo. Ctrl-C ends the server; the VM goes on, and is found
    again the next time. If a server runs on the data folder already, this shows
    the VM's state and ends.
    """
    config = read_config(None, invocation.environment)
    invocation.environment = {
        name: value for name, value in invocation.environment.items() if name not in {URL_VARIABLE, TOKEN_VARIABLE}
    }
    if _runs(invocation):
        invocation.say(f"A server runs already at {invocation.client.server.url} on {config.folder}.")
        _show_state(invocation)
        return
    invocation.client.forget()
    _step(invocation, f"Starting the server on {config.folder}; its log is {config.folder / _LOG}")
    with told():
        Demonstration(invocation, config).run()


def _runs(invocation: Invocation) -> bool:
    try:
        invocation.client.get("/healthz")
    except Failure as failure:
        if failure.code is not ExitCode.NOT_REACHABLE:
            raise
        return False
    return True


def _show_state(invocation: Invocation) -> None:
    try:
        instance = invocation.client.get(path_of(INSTANCES, VM)).decode(Instance)
    except Failure as failure:
        if failure.code is not ExitCode.NOT_FOUND:
            raise
        invocation.say(f"It has no VM {VM}: end it with Ctrl-C where it runs, and `make run` again makes one.")
        return
    invocation.say("")
    print_vm(invocation, instance)
    _what_next(invocation, instance)


class Demonstration:
    """A server in this process, and the story that is told beside it in a thread."""

    def __init__(self, invocation: Invocation, config: Config) -> None:
        self._invocation = invocation
        self._config = config
        invocation.patience_s = 0
        self._failure: Failure | None = None
        self._ending = threading.Event()

    def run(self) -> None:
        """Serve until Ctrl-C, or until the story cannot go on. Raises `Failure`, `InterlockError`."""
        from interlock.wiring import Server

        run(self._serve(Server(self._config)))
        if self._failure is not None:
            raise self._failure
        self._invocation.say(f"\nThe server has ended. VMs go on without it; `{_program()} demo` finds them again.")

    async def _serve(self, server: Server) -> None:
        import asyncio

        started = asyncio.Event()
        with _log_to(self._config.folder / _LOG, self._config):
            serving = asyncio.create_task(server.serve(started))
            waiting = asyncio.create_task(started.wait())
            await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not serving.done():
                await self._beside(serving, server)
            await serving

    async def _beside(self, serving: asyncio.Task[None], server: Server) -> None:
        """Tell the story while the server serves; a story that cannot go on ends the server."""
        import asyncio

        story = asyncio.create_task(asyncio.to_thread(self._tell, server))
        story.add_done_callback(lambda told: server.stop() if self._failure or told.exception() else None)
        await asyncio.wait((serving,))
        self._ending.set()
        await story

    def _tell(self, server: Server) -> None:
        try:
            self._story(server.url)
        except Failure as failure:
            # Ctrl-C in the middle of the story takes the server away from under it.
            if server.ready and failure.code is not ExitCode.NOT_REACHABLE:
                self._failure = failure

    def _story(self, url: str) -> None:
        invocation = self._invocation
        _step(invocation, f"The server listens at {url} (API documentation: {url}/docs)")
        self._image()
        said_before = self._vm()
        self._wait_until_up(said_before)
        instance = invocation.client.get(path_of(INSTANCES, VM)).decode(Instance)
        invocation.say("")
        show_history(invocation, VM)
        _what_next(invocation, instance)
        invocation.say("\nThe server runs here until Ctrl-C. The commands are for another terminal.")

    def _image(self) -> None:
        invocation = self._invocation
        images = invocation.client.get(IMAGES).decode(ImageList).items
        if any(image.name == IMAGE for image in images):
            _step(invocation, f"The image {IMAGE} is there already")
            return
        _step(invocation, f"Building the image {IMAGE}: kernel and userland from the distribution's own packages")
        build_small_image(invocation, IMAGE)

    def _vm(self) -> bytes:
        """See that the VM runs. What its guest said in an earlier life, which must not be taken for news."""
        invocation = self._invocation
        said_before = b""
        instance = _find(invocation)
        if instance is None:
            port = free_port()
            _step(invocation, f"Creating the VM {VM}: 128 MiB, its port {GUEST_PORT} at 127.0.0.1:{port}")
            forwards = (NewForward(host_port=port, guest_port=GUEST_PORT),)
            create_vm(invocation, NewInstance(name=VM, image=IMAGE, memory_mib=128, forwards=forwards), wait=True)
        elif instance.vm_state is VmState.PAUSED:
            _step(invocation, f"The VM {VM} is paused; letting it go on")
            submit(invocation, VM, Operation.UNPAUSE, wait=True)
        elif instance.vm_state is VmState.ACTIVE:
            _step(invocation, f"The VM {VM} is {instance.vm_state.value}: it has outlived the server before")
        else:
            _step(invocation, f"The VM {VM} is {instance.vm_state.value}; starting it")
            said_before = console_text(invocation, VM)
            submit(invocation, VM, Operation.START, wait=True)
        return said_before

    def _wait_until_up(self, said_before: bytes) -> None:
        invocation = self._invocation
        _step(invocation, "Waiting until the guest says on its console that it is up")
        with LiveLine(sys.stdout, plain=invocation.plain) as line:
            while UP.encode() not in (said := since(said_before, console_text(invocation, VM))):
                line.tell("the guest boots")
                if line.elapsed_s > _UP_WITHIN_S:
                    raise Failure(
                        ExitCode.SERVER_ERROR,
                        f"The guest did not say that it is up within {_UP_WITHIN_S:.0f} s.",
                        remedy=f"See what it said: `interlock vm console {VM}`.",
                    )
                self._ending.wait(_LOOK_AGAIN_S)
        answer = said[said.rindex(UP.encode()) :].split(b"\n")[0].decode("ascii", "replace").strip()
        _step(invocation, f"The guest says: {click.style(answer, fg='green', bold=True)}")


def _find(invocation: Invocation) -> Instance | None:
    try:
        return invocation.client.get(path_of(INSTANCES, VM)).decode(Instance)
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND:
            return None
        raise


@contextlib.contextmanager
def _log_to(path: Path, config: Config) -> Iterator[None]:
    """Send the server's log to a file, so that the story can be read."""
    from interlock.service.server_log import configure_logging

    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as log:
        with contextlib.redirect_stderr(log):
            configure_logging(config)
        yield


def free_port() -> int:
    """A TCP port on loopback that nothing listens on, from 8080 on. Raises `Failure` if a hundred are taken."""
    for port in range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    last = _FIRST_PORT + _PORTS - 1
    raise Failure(ExitCode.SERVER_ERROR, f"Every port from {_FIRST_PORT} to {last} is taken; the demo needs one.")


def show_history(invocation: Invocation, vm: str) -> None:
    """Print the newest part of a VM's history."""
    history, _ = read_history(invocation, vm)
    shown = [event for event in history if event.kind != "request.progress"][-_HISTORY_SHOWN:]
    invocation.say(click.style(f"What has happened to {vm} so far (`vm events {vm}`):", bold=True))
    for event in shown:
        invocation.say(f"  {event_line(event, invocation.client.now)}")


def _step(invocation: Invocation, text: str) -> None:
    invocation.say(f"{click.style('==>', fg='cyan', bold=True)} {text}")


def _what_next(invocation: Invocation, instance: Instance) -> None:
    """Print commands worth trying."""
    program = _program()
    freeze = f"kill -STOP $(pgrep -f guest=interlock-{instance.id})"
    tries = [
        (f"{program} vm reboot {VM} --wait", "its phases as they happen"),
        (f"{program} why {VM} unpause", "what would be answered, and why"),
        (f"{program} vm stop {VM}; {program} vm reboot {VM}", "refused, with the reason"),
        (f"{freeze}; {program} vm pause {VM}; {program} why {VM} stop", "a frozen VM, and the way out"),
    ]
    if instance.forwards:
        tries.append((f"curl http://127.0.0.1:{instance.forwards[0].host_port}/", "the guest's own web server"))
    else:
        tries.append((f"{program} vm console {VM} --follow", "what the guest says"))
    invocation.say(click.style("\nWorth trying:", bold=True))
    for command, meaning in tries:
        invocation.say(f"  {click.style('# ' + meaning, dim=True)}\n  {command}")


def _program() -> str:
    """How this program was called, as the reader can call it too."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m interlock"
    with contextlib.suppress(ValueError):
        return str(called.resolve().relative_to(Path.cwd()))
    return called.name
