"""`interlock demo` (`make run`): start a server and a small VM, and suggest commands to try."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from interlock.api.schemas.inventory import ImageList
from interlock.api.schemas.responses import Instance
from interlock.cli.client.connection import TOKEN_VARIABLE, URL_VARIABLE
from interlock.cli.client.paths import IMAGES, INSTANCES, path_of
from interlock.cli.commands.inventory import build_small_image
from interlock.cli.commands.submission import submit
from interlock.cli.commands.vm import create_vm, print_vm
from interlock.cli.commands.watch import console_text, event_line, read_history, since
from interlock.cli.context import Invocation, needs_invocation
from interlock.cli.failures import ExitCode, Failure
from interlock.cli.options.configuration import errors_as_failures, read_config, run
from interlock.cli.output.formatting import humanize
from interlock.cli.output.progress import LiveLine
from interlock.core.operations import Operation
from interlock.core.states import PowerState, VmState
from interlock.service.request_models import NewForward, NewInstance

if TYPE_CHECKING:
    import asyncio

    from interlock.config import Config
    from interlock.server import Server

VM: Final = "demo"
IMAGE: Final = "small"
UP: Final = "interlock-guest: up"
"""What the small guest writes on its console when it has booted."""
GUEST_PORT: Final = 80
_FIRST_PORT: Final = 8080
_PORTS: Final = 100
_UP_WITHIN_S: Final = 180.0
_READY_WITHIN_S: Final = 60.0
_POLL_S: Final = 0.3
_HISTORY_SHOWN: Final = 14
_LOG: Final = "server.log"
_RUN_AGAIN: Final = {
    VmState.PAUSED: Operation.UNPAUSE,
    VmState.SUSPENDED: Operation.RESUME,
    VmState.RESCUED: Operation.UNRESCUE,
    VmState.SHELVED: Operation.UNSHELVE,
    VmState.SHELVED_OFFLOADED: Operation.UNSHELVE,
    VmState.SOFT_DELETED: Operation.RESTORE,
}
"""What makes a VM run again; `start` where the state is not here."""
_CONTINUES: Final = frozenset({Operation.UNPAUSE, Operation.RESUME})
"""What continues a guest without a boot: its earlier output says that it is up."""


@click.command()
@needs_invocation
def demo(invocation: Invocation) -> None:
    """Start a server, boot a small VM called demo, and suggest commands.

    Ctrl-C stops the server; the VM continues, and is found again the next
    time. If a server already runs on the data folder, show the VM's state.
    """
    config = read_config(None, invocation.environment)
    invocation.environment = {
        name: value for name, value in invocation.environment.items() if name not in {URL_VARIABLE, TOKEN_VARIABLE}
    }
    if _runs(invocation):
        invocation.echo(f"A server already runs at {invocation.client.server.url} on {config.folder}.")
        _show_state(invocation)
        return
    invocation.client.reset()
    import_module("interlock.server")  # if its extra is missing, fail before anything is printed
    _step(invocation, f"Starting the server on {config.folder}; its log is {config.folder / _LOG}")
    with errors_as_failures():
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
        invocation.echo(f"VM {VM} not found: stop the server with Ctrl-C, and run `interlock demo` again to create it.")
        return
    invocation.echo("")
    print_vm(invocation, instance)
    _what_next(invocation, instance)


class Demonstration:
    """A server in this process, and a thread that uses it and prints each step."""

    def __init__(self, invocation: Invocation, config: Config) -> None:
        self._invocation = invocation
        self._config = config
        invocation.reconnect_timeout_s = 0
        self._failure: Failure | None = None
        self._ending = threading.Event()

    def run(self) -> None:
        """Serve until Ctrl-C or until a step fails. Raises `Failure`, `InterlockError`."""
        from interlock.server import Server

        run(self._serve(Server(self._config)))
        if self._failure is not None:
            raise self._failure
        self._invocation.echo(f"\nThe server has stopped. VMs continue; `{_program()} demo` finds them again.")

    async def _serve(self, server: Server) -> None:
        import asyncio

        started = asyncio.Event()
        with _log_to(self._config.folder / _LOG, self._config):
            serving = asyncio.create_task(server.serve(started))
            waiting = asyncio.create_task(started.wait())
            await asyncio.wait((serving, waiting), return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if not serving.done():
                await self._run_steps(serving, server)
            await serving

    async def _run_steps(self, serving: asyncio.Task[None], server: Server) -> None:
        """Run the steps while the server serves; a step that fails stops the server."""
        import asyncio

        steps = asyncio.create_task(asyncio.to_thread(self._try_steps, server))
        steps.add_done_callback(lambda task: server.stop() if self._failure or task.exception() else None)
        await asyncio.wait((serving,))
        self._ending.set()
        await steps

    def _try_steps(self, server: Server) -> None:
        try:
            self._steps(server.url)
        except Failure as failure:
            # Ctrl-C stops the server while a step runs: that is not a failure.
            if server.accepting and failure.code is not ExitCode.NOT_REACHABLE:
                self._failure = failure

    def _steps(self, url: str) -> None:
        invocation = self._invocation
        _step(invocation, f"The server listens at {url} (API documentation: {url}/docs)")
        wait_until_ready(invocation, self._ending.wait)
        self._image()
        earlier_output = self._vm()
        self._wait_until_up(earlier_output)
        instance = invocation.client.get(path_of(INSTANCES, VM)).decode(Instance)
        invocation.echo("")
        show_history(invocation, VM)
        _what_next(invocation, instance)
        invocation.echo("\nThe server runs here until Ctrl-C. The commands are for another terminal.")

    def _image(self) -> None:
        invocation = self._invocation
        images = invocation.client.get(IMAGES).decode(ImageList).items
        if any(image.name == IMAGE for image in images):
            _step(invocation, f"The image {IMAGE} already exists")
            return
        _step(invocation, f"Building the image {IMAGE}: kernel and userland from the distribution's own packages")
        build_small_image(invocation, IMAGE)

    def _vm(self) -> bytes:
        """Make sure that the VM runs. Return the console output of earlier boots."""
        invocation = self._invocation
        earlier_output = b""
        instance = _find(invocation)
        if instance is None:
            port = free_port()
            _step(invocation, f"Creating the VM {VM}: 128 MiB, its port {GUEST_PORT} at 127.0.0.1:{port}")
            forwards = (NewForward(host_port=port, guest_port=GUEST_PORT),)
            create_vm(invocation, NewInstance(name=VM, image=IMAGE, memory_mib=128, forwards=forwards), wait=True)
        elif (operation := runs_again_by(instance)) is None and responds(invocation):
            _step(invocation, f"The VM {VM} is {instance.vm_state.value}: it kept running without a server")
        elif operation is None:
            _step(invocation, f"The VM {VM} does not respond; requesting a hard reboot")
            earlier_output = console_text(invocation, VM)
            submit(invocation, VM, Operation.REBOOT, wait=True, parameters={"hard": True})
        else:
            _step(invocation, f"The VM {VM} is {humanize(instance.vm_state)}; requesting {humanize(operation)}")
            if operation not in _CONTINUES:
                earlier_output = console_text(invocation, VM)
            submit(invocation, VM, operation, wait=True)
        return earlier_output

    def _wait_until_up(self, earlier_output: bytes) -> None:
        invocation = self._invocation
        _step(invocation, "Waiting for the guest to boot")
        with LiveLine(sys.stdout, plain=invocation.plain) as line:
            while UP.encode() not in (output := since(earlier_output, console_text(invocation, VM))):
                line.update("the guest boots")
                if line.elapsed_s > _UP_WITHIN_S:
                    raise Failure(
                        ExitCode.SERVER_ERROR,
                        f"The guest's boot timed out after {_UP_WITHIN_S:.0f} s.",
                        remedy=f"Read its console: `interlock vm console {VM}`.",
                    )
                self._ending.wait(_POLL_S)
        line_up = output[output.rindex(UP.encode()) :].split(b"\n")[0].decode("ascii", "replace").strip()
        _step(invocation, f"The guest's console: {click.style(line_up, fg='green', bold=True)}")


def runs_again_by(instance: Instance) -> Operation | None:
    """Return what makes the VM run again; None if its guest runs, as a resized one does before its confirmation."""
    running = instance.power_state is PowerState.RUNNING
    if instance.vm_state is VmState.ACTIVE or (instance.vm_state is VmState.RESIZED and running):
        return None
    return _RUN_AGAIN.get(instance.vm_state, Operation.START)


def wait_until_ready(invocation: Invocation, pause: Callable[[float], object]) -> None:
    """Wait until the server has inspected the guests that ran without it: before, it answers nothing about them.

    `pause` waits for a number of seconds. Raises `Failure`.
    """
    for _ in range(round(_READY_WITHIN_S / _POLL_S)):
        with contextlib.suppress(Failure):
            invocation.client.get("/readyz")
            return
        pause(_POLL_S)
    invocation.client.get("/readyz")


def responds(invocation: Invocation) -> bool:
    """Whether the VM's QEMU process answers: after a start, the server takes a while to report one that does not."""
    try:
        invocation.client.get(path_of(INSTANCES, VM, "screenshot"))
    except Failure as failure:
        if failure.code is ExitCode.SERVER_ERROR:
            return False
        if failure.code is not ExitCode.NOT_FOUND:  # without a display there is none
            raise
    return True


def _find(invocation: Invocation) -> Instance | None:
    try:
        return invocation.client.get(path_of(INSTANCES, VM)).decode(Instance)
    except Failure as failure:
        if failure.code is ExitCode.NOT_FOUND:
            return None
        raise


@contextlib.contextmanager
def _log_to(path: Path, config: Config) -> Iterator[None]:
    """Write the server's log to a file, separate from the steps."""
    from interlock.service.server_log import configure_logging

    path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as log:
        with contextlib.redirect_stderr(log):
            configure_logging(config)
        yield


def free_port() -> int:
    """Return a free TCP port on loopback, 8080 or above. Raises `Failure` if a hundred are in use."""
    for port in range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    last = _FIRST_PORT + _PORTS - 1
    raise Failure(ExitCode.SERVER_ERROR, f"No free port from {_FIRST_PORT} to {last}.")


def show_history(invocation: Invocation, vm: str) -> None:
    """Print the latest events of a VM."""
    history, _ = read_history(invocation, vm)
    shown = [event for event in history if event.kind != "request.progress"][-_HISTORY_SHOWN:]
    invocation.echo(click.style(f"Events of {vm} so far (`vm events {vm}`):", bold=True))
    for event in shown:
        invocation.echo(f"  {event_line(event, invocation.client.now)}")


def _step(invocation: Invocation, text: str) -> None:
    invocation.echo(f"{click.style('==>', fg='cyan', bold=True)} {text}")


def _what_next(invocation: Invocation, instance: Instance) -> None:
    """Print commands to try. They work in this order, repeatedly."""
    invocation.echo(click.style("\nCommands to try, in this order:", bold=True))
    for command, meaning in suggestions(_program(), instance):
        invocation.echo(f"  {click.style('# ' + meaning, dim=True)}\n  {command}")


def suggestions(program: str, instance: Instance) -> list[tuple[str, str]]:
    """Return commands for a running demo VM, each with what it shows. After the last one the VM runs again."""
    # In brackets, so that the pattern does not match a shell that has this command among its arguments, as over ssh.
    freeze = f"kill -STOP $(pgrep -f '^[^ ]*qemu[^ ]* -name guest=interlock-{instance.id}')"
    visit = (f"{program} vm console {VM} --log", "the guest's console log")
    if instance.forwards:
        visit = (f"curl http://127.0.0.1:{instance.forwards[0].host_port}/", "the guest's own web server")
    return [
        visit,
        (f"{program} why {VM} unpause", "the decision, and why"),
        (f"{program} vm reboot {VM} --wait", "its phases as they happen"),
        (f"{program} vm stop {VM}; {program} vm reboot {VM}", "a reboot behind a stop: denied, with the reason"),
        (f"{program} vm start {VM} --wait", "waits for the stop, then boots"),
        (f"{freeze}; sleep 30; {program} stuck", "a frozen VM: listed within half a minute, with the ways out"),
        (
            f"{program} vm pause {VM}; sleep 20; {program} why {VM} stop",
            "a pause without an answer: what is possible, and when",
        ),
        (f"{program} vm stop {VM} --hard --hold 5m --wait", "waits for that time, and takes over"),
        (f"{program} vm start {VM} --wait", "runs again"),
    ]


def _program() -> str:
    """Return this program's name as the user can type it."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{Path(sys.executable).name} -m interlock"
    with contextlib.suppress(ValueError):
        return str(called.resolve().relative_to(Path.cwd()))
    return called.name
