"""The nano guest: the smallest kernel that a hypervisor's adapter can be tested with, made here byte by byte.

It boots in some 70 ms, says `interlock-nano: up` on its serial console and then sleeps between timer ticks. It obeys
the power button and lets go of disks that are unplugged. It needs no compiler: `_program` is its source, `_Assembler`
the few instructions that it is made of. Nothing here knows a hypervisor; the ports are those of the q35 machine.
"""

from __future__ import annotations

import hashlib
import struct
from enum import StrEnum
from pathlib import Path
from typing import Final

from interlock.core.records import Image

GREETING: Final = "interlock-nano: up"
"""The line that the guest writes on its serial console as soon as it runs; its command line follows on the next."""

HERE: Final = "interlock-nano: here"
"""The line that it writes when the key `h` is pressed."""

MEMORY_MIB: Final = 16
"""Memory with which the guest runs comfortably."""


class Act(StrEnum):
    """What the guest does by itself, some time after its greeting.

    Beside that a key pressed on its keyboard makes it act at once: `o` powers off, `r` reboots, `p` panics, `i` makes
    it ignore the power button and the unplugging of disks, `c` makes it cooperate again, `h` makes it say `HERE`.
    """

    NOTHING = "nothing"
    POWER_OFF = "power-off"
    PANIC = "panic"
    REBOOT = "reboot"
    """Once in the life of its memory: after the reboot it does nothing."""
    IGNORE = "ignore"
    """Ignore the power button and the unplugging of disks, from its first moment."""
    DIRTY = "dirty"
    """Write to 8 MiB of its memory again and again, as fast as it can."""
    DIRTY_SLOWLY = "dirty-slowly"
    """Write to those 8 MiB in turn, 256 KiB with each tick of its timer: 12.5 MiB a second while it is not slowed."""


def nano_guest(folder: Path, act: Act = Act.NOTHING, after_ms: int = 500) -> Image:
    """Write the guest's kernel into `folder` and return it as an image of kind `kernel`.

    Args:
        folder: where to write; one file per behaviour.
        act: what the guest does by itself.
        after_ms: how long after its greeting it does that, in milliseconds, in steps of 20.
    """
    kernel = _elf(_program(act, ticks=max(1, after_ms // _TICK_MS)))
    path = folder / f"nano-{act.value}-{after_ms}.elf"
    path.write_bytes(kernel)
    path.chmod(0o644)
    return Image(
        id=f"nano-{act.value}-{after_ms}",
        name=f"nano-{act.value}",
        kind="kernel",
        path=str(path),
        cmdline="nano",
        size_bytes=len(kernel),
        sha256=hashlib.sha256(kernel).hexdigest(),
    )


_LOAD_ADDRESS: Final = 0x100000
_HEADERS_BYTES: Final = 52 + 32
_STACK_TOP: Final = 0x180000
_TICKS: Final = 0x180000
"""Where it counts timer ticks."""
_IGNORING: Final = 0x180004
_REBOOTED: Final = 0x180008
"""Where it remembers across a reset, which leaves memory alone, that it has rebooted."""
_REBOOTED_MARK: Final = 0x52454254
_DIRTIED: Final = 0x400000
"""Where the memory is that is written to again and again."""
_DIRTIED_BYTES: Final = 0x800000
_PAGE_BYTES: Final = 0x1000
_DIRTIED_A_TICK_SHIFT: Final = 18
_TICK_MS: Final = 20
_TIMER_DIVISOR: Final = 1193182 * _TICK_MS // 1000


class _Assembler:
    """Puts bytes one after the other, and fills in the addresses of labels at the end."""

    def __init__(self, origin: int) -> None:
        self._origin = origin
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        self._fixes: list[tuple[int, str, bool]] = []

    def label(self, name: str) -> None:
        self._labels[name] = self._origin + len(self._code)

    def put(self, code: bytes | str) -> None:
        """Append bytes; text is hexadecimal."""
        self._code += bytes.fromhex(code) if isinstance(code, str) else code

    def put_number(self, code: str, number: int) -> None:
        """Append an instruction that ends in a 32-bit number."""
        self.put(code)
        self.put(struct.pack("<I", number))

    def put_address(self, code: str, label: str) -> None:
        """Append an instruction that ends in the 32-bit address of a label."""
        self.put(code)
        self._fixes.append((len(self._code), label, False))
        self.put(bytes(4))

    def jump(self, code: str, label: str) -> None:
        """Append a jump or call, whose operand counts from the next instruction."""
        self.put(code)
        self._fixes.append((len(self._code), label, True))
        self.put(bytes(4))

    def out_byte(self, port: int, value: int) -> None:
        self.put_number("ba", port)  # mov edx, port
        self.put(bytes((0xB0, value, 0xEE)))  # mov al, value; out dx, al

    def align(self) -> None:
        self.put(bytes(-len(self._code) % 8))

    def assemble(self) -> bytes:
        for place, label, relative in self._fixes:
            base = self._origin + place + 4 if relative else 0
            struct.pack_into("<i", self._code, place, self._labels[label] - base)
        return bytes(self._code)


_JUMP: Final = "e9"
_JUMP_IF_EQUAL: Final = "0f84"
_JUMP_IF_NOT: Final = "0f85"
_JUMP_IF_BELOW: Final = "0f82"
_CALL: Final = "e8"
_ACTIONS: Final = {Act.POWER_OFF: "power_off", Act.PANIC: "panic", Act.REBOOT: "reboot_once"}


def _program(act: Act, ticks: int) -> bytes:
    guest = _Assembler(_LOAD_ADDRESS + _HEADERS_BYTES)
    magic, flags = 0x1BADB002, 0
    guest.put(struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF))  # the multiboot header
    guest.put(bytes(4))
    _begin(guest, ignoring=act is Act.IGNORE)
    _greet(guest)
    guest.label("sleep")
    guest.put("fb90fa" if act is Act.DIRTY else "fbf4fa")  # sti; nop or hlt; cli
    guest.put_number("ff05", _TICKS)  # inc dword [ticks]
    if act in {Act.DIRTY, Act.DIRTY_SLOWLY}:
        _dirty(guest, whole=act is Act.DIRTY)
    if act in _ACTIONS:
        guest.put_number("813d", _TICKS)
        guest.put(struct.pack("<I", ticks))  # cmp dword [ticks], ticks
        guest.jump(_JUMP_IF_EQUAL, _ACTIONS[act])
    _obey_keyboard(guest)
    guest.put_number("803d", _IGNORING)
    guest.put("00")  # cmp byte [ignoring], 0
    guest.jump(_JUMP_IF_NOT, "sleep")
    _obey_power_button(guest)
    _obey_unplugging(guest)
    guest.jump(_JUMP, "sleep")
    _ends(guest)
    _write_routine(guest)
    _tables(guest)
    return guest.assemble()


def _begin(guest: _Assembler, *, ignoring: bool) -> None:
    """Own segments and interrupt table, a 50 Hz timer as the only interrupt, and the power button switched on."""
    guest.label("entry")
    guest.put_number("fabc", _STACK_TOP)  # cli; mov esp, stack
    guest.put("89df")  # mov edi, ebx: the multiboot information
    guest.put_address("0f0115", "segments_pointer")  # lgdt
    guest.put_address("ea", "segments_loaded")  # jmp 8:...
    guest.put("0800")
    guest.label("segments_loaded")
    guest.put("66b810008ed88ec08ed0")  # mov ax, 0x10; mov ds, ax; mov es, ax; mov ss, ax
    guest.put_address("0f011d", "interrupts_pointer")  # lidt
    guest.out_byte(0x21, 0xFE)
    guest.out_byte(0xA1, 0xFF)
    guest.out_byte(0x43, 0x34)
    guest.out_byte(0x40, _TIMER_DIVISOR & 0xFF)
    guest.out_byte(0x40, _TIMER_DIVISOR >> 8)
    # Firmware that was disturbed by a key as it started leaves the keyboard switched off.
    guest.out_byte(0x64, 0x60)
    guest.out_byte(0x60, 0x44)
    guest.out_byte(0x64, 0xAE)
    for _ in range(2):
        # The first may be taken for the end of what the firmware had begun.
        guest.out_byte(0x60, 0xF4)
    for place, value in ((_TICKS, 0), (_IGNORING, int(ignoring))):
        guest.put_number("c705", place)  # mov dword [place], value
        guest.put(struct.pack("<I", value))
    guest.put_number("b8", 0x8000F840)  # mov eax, the south bridge's PMBASE
    guest.put_number("ba", 0xCF8)
    guest.put("ef")  # out dx, eax
    guest.put_number("ba", 0xCFC)
    guest.put("ed")  # in eax, dx
    guest.put_number("25", 0xFF80)  # and eax, ...
    guest.put("89c5")  # mov ebp, eax: where the power management registers are
    guest.put("8d550266b8000166ef")  # lea edx, [ebp+2]; mov ax, power button; out dx, ax


def _greet(guest: _Assembler) -> None:
    guest.put_address("be", "greeting")  # mov esi, ...
    guest.jump(_CALL, "write")
    guest.put("8b7710")  # mov esi, [edi+16]: the command line
    guest.jump(_CALL, "write")
    guest.put_address("be", "line_end")
    guest.jump(_CALL, "write")


def _dirty(guest: _Assembler, *, whole: bool) -> None:
    """Write to each page of the memory that is for that, or of the part of it whose turn it is."""
    size = _DIRTIED_BYTES if whole else 1 << _DIRTIED_A_TICK_SHIFT
    guest.put_number("a1", _TICKS)  # mov eax, [ticks]
    guest.put(bytes((0xC1, 0xE0, _DIRTIED_A_TICK_SHIFT)))  # shl eax, ...
    guest.put_number("25", 0 if whole else _DIRTIED_BYTES - 1)  # and eax, ...
    guest.put_number("05", _DIRTIED)  # add eax, ...
    guest.put("89c7")  # mov edi, eax
    guest.put_number("b9", size // _PAGE_BYTES)  # mov ecx, ...
    guest.label("dirty_page")
    guest.put("ff07")  # inc dword [edi]
    guest.put_number("81c7", _PAGE_BYTES)  # add edi, ...
    guest.put("49")  # dec ecx
    guest.jump(_JUMP_IF_NOT, "dirty_page")


def _obey_keyboard(guest: _Assembler) -> None:
    """All keys that wait: the machine keeps few of them, and forgets those that are pressed while it has no room."""
    guest.label("keyboard")
    guest.put("e464a801")  # in al, 0x64; test al, 1
    guest.jump(_JUMP_IF_EQUAL, "no_key")
    guest.put("e460")  # in al, 0x60
    for scan_code, target in ((0x18, "power_off"), (0x13, "reboot"), (0x19, "panic")):
        guest.put(bytes((0x3C, scan_code)))  # cmp al, ...
        guest.jump(_JUMP_IF_EQUAL, target)
    guest.put("3c23")  # cmp al, h
    guest.jump(_JUMP_IF_NOT, "not_here")
    guest.put_address("be", "here")  # mov esi, ...
    guest.jump(_CALL, "write")
    guest.jump(_JUMP, "keyboard")
    guest.label("not_here")
    for scan_code, ignoring, label in ((0x17, 1, "not_ignore"), (0x2E, 0, "not_cooperate")):
        guest.put(bytes((0x3C, scan_code)))
        guest.jump(_JUMP_IF_NOT, label)
        guest.put_number("c605", _IGNORING)  # mov byte [ignoring], ...
        guest.put(bytes((ignoring,)))
        guest.label(label)
    guest.jump(_JUMP, "keyboard")
    guest.label("no_key")


def _obey_power_button(guest: _Assembler) -> None:
    guest.put("89ea66ed66a90001")  # mov edx, ebp; in ax, dx; test ax, power button
    guest.jump(_JUMP_IF_NOT, "power_off")


def _obey_unplugging(guest: _Assembler) -> None:
    """Eject whatever the machine asks back, on every bus, by the registers of ACPI PCI hotplug."""
    guest.put("31c9")  # xor ecx, ecx
    guest.label("next_bus")
    guest.put("89c8")  # mov eax, ecx
    guest.put_number("ba", 0xCD0)
    guest.put("ef")  # out dx, eax: choose the bus
    guest.put_number("ba", 0xCC4)
    guest.put("ed85c0")  # in eax, dx; test eax, eax: the slots that are asked back
    guest.jump(_JUMP_IF_EQUAL, "nothing_asked")
    guest.put_number("ba", 0xCC8)
    guest.put("ef")  # out dx, eax: eject
    guest.label("nothing_asked")
    guest.put("4183f920")  # inc ecx; cmp ecx, 32
    guest.jump(_JUMP_IF_BELOW, "next_bus")


def _ends(guest: _Assembler) -> None:
    guest.label("power_off")
    guest.put("8d550466b8002066ef")  # lea edx, [ebp+4]; mov ax, sleep; out dx, ax
    guest.jump(_JUMP, "sleep")
    guest.label("panic")
    guest.out_byte(0x505, 1)
    guest.jump(_JUMP, "sleep")
    guest.label("reboot_once")
    guest.put_number("813d", _REBOOTED)
    guest.put(struct.pack("<I", _REBOOTED_MARK))
    guest.jump(_JUMP_IF_EQUAL, "sleep")
    guest.put_number("c705", _REBOOTED)
    guest.put(struct.pack("<I", _REBOOTED_MARK))
    guest.label("reboot")
    guest.out_byte(0xCF9, 0x06)
    guest.jump(_JUMP, "sleep")


def _write_routine(guest: _Assembler) -> None:
    """Write the text at esi, up to its zero byte, on the serial port."""
    guest.label("write")
    guest.put("ac84c0")  # lodsb; test al, al
    guest.jump(_JUMP_IF_EQUAL, "written")
    guest.put("88c3")  # mov bl, al
    guest.put_number("ba", 0x3FD)
    guest.label("not_empty")
    guest.put("eca820")  # in al, dx; test al, 0x20
    guest.jump(_JUMP_IF_EQUAL, "not_empty")
    guest.put_number("ba", 0x3F8)
    guest.put("88d8ee")  # mov al, bl; out dx, al
    guest.jump(_JUMP, "write")
    guest.label("written")
    guest.put("c3")  # ret


_VECTORS: Final = 16
_TIMER_VECTOR: Final = 8
_SPURIOUS_VECTOR: Final = 15


def _tables(guest: _Assembler) -> None:
    guest.label("timer")
    guest.put("50b020e62058cf")  # push eax; mov al, 0x20; out 0x20, al; pop eax; iret
    guest.label("spurious")
    guest.put("cf")
    guest.align()
    guest.label("segments")
    guest.put("0000000000000000 ffff0000009acf00 ffff00000092cf00")
    guest.label("interrupts")
    # A gate splits its address in two; everything lies below 0x110000, so that the upper half is known here.
    upper = struct.pack("<H", _LOAD_ADDRESS >> 16)
    gates = {_TIMER_VECTOR: "timer", _SPURIOUS_VECTOR: "spurious"}
    for vector in range(_VECTORS):
        if vector in gates:
            address = guest._labels[gates[vector]] & 0xFFFF
            guest.put(struct.pack("<HHH", address, 8, 0x8E00) + upper)
        else:
            guest.put(bytes(8))
    guest.label("segments_pointer")
    guest.put(struct.pack("<H", 3 * 8 - 1))
    guest.put_address("", "segments")
    guest.label("interrupts_pointer")
    guest.put(struct.pack("<H", _VECTORS * 8 - 1))
    guest.put_address("", "interrupts")
    guest.label("greeting")
    guest.put(GREETING.encode() + b"\r\ninterlock-nano: started with: \0")
    guest.label("here")
    guest.put(HERE.encode())
    guest.label("line_end")
    guest.put(b"\r\n\0")


def _elf(program: bytes) -> bytes:
    """Wrap the program as a 32-bit ELF executable with one segment that holds the whole file."""
    size = _HEADERS_BYTES + len(program)
    entry = _LOAD_ADDRESS + _HEADERS_BYTES + 16
    identity = b"\x7fELF" + bytes((1, 1, 1)) + bytes(9)
    header = identity + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    segment = struct.pack("<IIIIIIII", 1, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 7, 0x1000)
    return header + segment + program
