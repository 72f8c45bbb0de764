"""The configuration: one frozen value.

Every number that an operator may want to change stands here with its unit, its default and a sentence;
docs/reference/configuration.md is drawn from it. `config_file` reads it; acting on it is not here.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Literal

import msgspec

from interlock.core.scheduled_actions import UpkeepTimes

ENVIRONMENT_PREFIX = "INTERLOCK_"


class DriverConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the state drivers serve requests. `[driver]` in the file, `INTERLOCK_DRIVER_*` in the environment."""

    guest_shutdown_timeout_ms: int = 30_000
    """How long a soft stop or reboot waits for the guest to power itself off before it is powered off hard, in ms. The
    time also runs while QEMU does not respond."""
    guest_shutdown_retry_ms: int = 3_000
    """How often the guest is asked to power off, by guest agent and power button in turn, in ms. A guest that still
    boots misses the first request."""
    heartbeat_ms: int = 5_000
    """How often a worker that waits for a guest checks it and reports that it is alive, in ms."""
    inspect_retry_ms: int = 500
    """How long to wait before inspecting a guest again that does not respond, in ms; doubled up to 16 times this."""
    unknown_attempts_max: int = 5
    """How many times an operation is performed again whose guest does not respond, before it fails."""
    unknown_timeout_ms: int = 300_000
    """How long an operation waits in total for a guest that does not respond, before it fails, in ms. The time in which
    the host is away does not count; its lease does."""
    silence_timeout_ms: int = 1_800_000
    """How long an operation may make no progress at all before it fails, in ms."""
    progress_interval_ms: int = 1_000
    """How often the progress of an operation is recorded and sent, in ms; of a shorter one only the end."""
    converge_timeout_ms: int = 300_000
    """How long a live migration may send again what its guest writes, after the first pass, in ms. Then it is
    cancelled, and the guest continues at the source. 0: no limit."""
    progress_interval_max_ms: int = 15_000
    """The longest interval between progress events of an operation with little progress, in ms."""
    dumps_max: int = 5
    """How many memory dumps are kept of an instance; one more removes the oldest."""
    drain_ms: int = 2_000
    """How long a server that is being stopped waits for operations in flight, in ms; the next server resumes the
    rest."""


class UpkeepConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Scheduled actions of a server. `[upkeep]` in the file, `INTERLOCK_UPKEEP_*` in the environment."""

    resize_confirm_window_ms: int = 24 * 3_600_000
    """How long after a resize it is confirmed, unless it was confirmed or reverted, in ms; 0: never."""
    reclaim_after_ms: int = 7 * 24 * 3_600_000
    """How long after a soft delete the instance is deleted, in ms; 0: never."""
    offload_after_ms: int = 0
    """How long after a shelve the instance is offloaded, in ms; 0: never."""
    retry_ms: int = 10_000
    """How long to wait before retrying an action that was denied or failed, in ms; doubled each time, up to an hour."""

    @property
    def times(self) -> UpkeepTimes:
        """Return the times after which an action is due."""
        return UpkeepTimes(
            resize_confirm_window_ms=self.resize_confirm_window_ms,
            reclaim_after_ms=self.reclaim_after_ms,
            offload_after_ms=self.offload_after_ms,
        )


class QemuConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """QEMU processes and timeouts. `[qemu]` in the file, `INTERLOCK_QEMU_*` in the environment."""

    cpu_model: str = "auto"
    """The CPU model of guests, as QEMU names it. `auto`: `host` with KVM, `kvm64` without."""
    translation_cache_mib: int = 32
    """How much translated guest code `tcg` keeps per VM, in MiB; counts on top of the guest's memory."""
    processes_max: int = 500
    """The largest number of guests on this host."""
    users_first: int = 1_900_000_000
    """The first of the user and group ids that VMs run as, each with one of its own, if the server is root. They must
    belong to nobody else on the host, containers included; these are in no range that systemd or useradd assigns."""
    users_max: int = 65_536
    """How many user ids, from `users_first` on, are for VMs."""
    program_paths: tuple[str, ...] = ()
    """Files and folders that QEMU needs besides itself, the system's libraries and /usr/share/qemu, such as those of a
    QEMU in /opt. VMs can read them. In an environment variable: separated by spaces."""
    threads_extra: int = 256
    """How many threads a VM's process may have beyond one for each vCPU."""
    memory_overhead_mib: int = 512
    """How much memory a VM's process may use beyond its guest's memory and translation cache, in MiB, where the host
    has cgroups; of more, the kernel ends it. The page cache of its disks counts, and is freed first."""
    cpu_weight: int = 100
    """The share of the processors that a VM gets for each vCPU when they are scarce, where the host has cgroups; 100 is
    that of a process group without a weight."""
    io_weight: int = 100
    """The share of disk I/O that a VM gets when it is scarce, 1 to 10,000, likewise."""
    open_files_max: int = 512
    """How many files a VM's process may have open: its disks, and one for each forwarded connection."""
    address_space_extra_mib: int = 2048
    """Address space that a VM's process may have beyond its guest's memory and translation cache, in MiB."""
    hotplug_ports: int = 8
    """How many disks and additional network interfaces a guest can have together, one of them a root disk. Attaching
    more is denied; existing devices stay."""
    display: bool = True
    """Whether guests have a display, for screenshots and VNC; applies from a guest's next start."""
    memory_stall_timeout_ms: int = 60_000
    """How long saving or restoring a guest's memory (suspend, resume, crash dump) may make no progress, in ms."""
    memory_look_interval_ms: int = 200
    """How often the progress of saving or restoring a guest's memory is checked, in ms."""
    console_bytes_max: int = 4 * 1024 * 1024
    """The size at which a serial console's log is rotated, in bytes: it is moved to `console.log.1`, which is
    overwritten."""
    console_check_interval_ms: int = 5_000
    """How often the size of the console logs is checked, in ms."""
    console_reader_bytes_max: int = 262_144
    """How much of a live console is buffered for a slow reader, in bytes; of more, the middle is dropped."""
    agent_timeout_ms: int = 2_000
    """How long a guest agent may take to answer before it counts as absent, in ms."""
    freeze_timeout_ms: int = 10_000
    """How long a guest agent may take to freeze its file systems for a copy, or to thaw them, in ms."""
    start_timeout_ms: int = 15_000
    """How long a new QEMU process may take until it responds, in ms."""
    detach_timeout_ms: int = 10_000
    """How long a guest may take to release a disk or a network interface, in ms."""
    kill_timeout_ms: int = 10_000
    """How long the kernel may take to end a killed process (it may wait for a disk), in ms."""
    liveness_interval_ms: int = 5_000
    """How often each guest's QEMU is checked, in ms."""
    liveness_timeout_ms: int = 15_000
    """How long a QEMU process may not respond before its guest counts as not responding, in ms; it is detected at
    most two intervals later. While it saves or sends the guest's memory, `memory_stall_timeout_ms` applies."""
    go_on_free_mib: int = 16
    """How much free space the file systems of a guest's disks need before a guest that was paused on a full disk is
    resumed automatically, in MiB. Checked every `liveness_interval_ms`, while there is such a guest."""
    image_tool_timeout_ms: int = 60_000
    """How long the creation of an empty disk may take, in ms."""
    copy_silence_timeout_ms: int = 60_000
    """How long the copy of a disk may make no progress before it fails, in ms. Its total time is not limited."""
    copy_look_interval_ms: int = 250
    """How often the progress of the copy of a disk is checked, in ms."""
    copy_bytes_per_s: int = 0
    """How fast a disk of a running guest is copied, in bytes per second; 0: no limit."""
    export_write_timeout_ms: int = 10_000
    """How long a write of the guest may wait until the data that it overwrites is saved for an export of its disk, in
    ms; after that the export fails, and the guest continues."""
    migration_bytes_per_s: int = 0
    """How fast the memory of a guest is sent to another host, in bytes per second; 0: no limit."""
    migration_address: str = "127.0.0.1"
    """The address of this host for incoming live migrations; on any free TCP port."""
    migration_unencrypted: bool = False
    """Allow unencrypted live migration with hosts of an earlier version. Set it on the server and both hosts."""
    firmware_ms: int = 250
    """How long a guest that begins to boot is not reset, in ms: a reset while its firmware relocates itself in memory
    makes it hang permanently, also after further resets."""
    reset_settle_ms: int = 2_000
    """Resets within this time of one another count as one, in ms: the firmware resets the machine when it starts, which
    looks like a reset by the guest."""


class HostsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hosts beside the server's own. `[hosts]` in the file, `INTERLOCK_HOSTS_*` in the environment."""

    lease_ms: int = 15_000
    """How long an agent may run its guests after its last contact with the server, in ms; then it ends them, so that
    they can be evacuated. 0: no limit; only an admin can then fence a host."""
    lease_margin_ms: int = 5_000
    """How long after the end of its lease a host counts as fenced, in ms: the time needed to end its guests."""
    image_unused_ms: int = 7 * 24 * 3_600_000
    """How long a copy of an image stays on a host where no VM needs it, in ms; 0: until the image is deleted."""
    shared_dir: str = ""
    """A folder that hosts share, with the same path on each, for the root disks of new VMs on this host and on every
    host whose agent announces it or a parent of it (`--shared`). Empty: root disks are in each host's own folder. An
    agent without `--shared` announces it."""
    own_in_any: bool = True
    """Whether `any` can be the server's own host. With false, VMs are created there only by its name, or by default."""
    evacuate: Literal["never", "auto", "from-image"] = "never"
    """Whether VMs without a setting of their own are evacuated automatically once their host is fenced. `auto`: if no
    root disk is lost; `from-image`: also if it is, starting again from the image."""
    certificate_ms: int = 30 * 24 * 3_600_000
    """How long a host's certificate is valid, in ms; renewed after a third of it, and when its agent connects."""
    require_client_certificates: bool = False
    """Whether an agent needs the certificate of its host besides its token; without one it needs a secret of
    `interlock host enroll`. Needs TLS."""
    enrolment_ms: int = 3_600_000
    """How long a secret of `interlock host enroll` is valid, in ms."""
    moves_max: int = 8
    """How many VMs the server moves at a time from hosts that are drained or fenced."""
    silence_ms: int = 15_000
    """How long an agent may send nothing before its connection counts as broken, in ms."""


class ClockConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine's wall clock. `[clock]` in the file, `INTERLOCK_CLOCK_*` in the environment."""

    jump_ms: int = 10_000
    """The difference from which the wall clock counts as having jumped, in ms. Jumps are reported; ages do not follow
    them."""
    grace_ms: int = 600_000
    """How long after a jump forward, or after the machine was off, no irreversible action is scheduled, in ms: time to
    correct the clock."""


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on the clients of the HTTP API. `[http]` in the file, `INTERLOCK_HTTP_*` in the environment."""

    url_bytes_max: int = 8_192
    """The longest URL of a request, in bytes; a longer one is answered with 414."""
    header_bytes_max: int = 32_768
    """The largest size of a request's headers together, in bytes; more is answered with 431."""
    headers_max: int = 100
    """The largest number of headers of a request; more are answered with 431."""
    header_timeout_ms: int = 10_000
    """How long a client may take until the headers of a request are complete, in ms; then it is answered with 408, and
    a connection without any request is closed."""
    body_timeout_ms: int = 20_000
    """How long each 64 KiB of a request's body may take, and the rest of it, in ms; then it is answered with 408."""
    idle_timeout_ms: int = 20_000
    """How long a connection is kept open between two requests, in ms."""
    send_timeout_ms: int = 30_000
    """How long a client may not receive any of a response that waits for it, in ms; then its connection is closed."""
    connections_max: int = 4_096
    """The largest number of connections of clients, but at most half of the files that the process may have open; more
    are answered with 503. With TLS they are closed. Agents have as many of their own."""
    connections_per_client_max: int = 1_024
    """The largest number of connections from one address (IPv6: one /64 network); more are treated in the same way."""
    token_requests_per_s: float = 2_000.0
    """How many requests a second a token may make in the long run; more are answered with 429."""
    token_requests_burst: int = 10_000
    """How many requests a token may make at once, before `token_requests_per_s` holds."""
    requests_max: int = 128
    """How many requests are served at the same time, without those that wait for their client or for an event; more are
    answered with 503 at once, so that those that are served do not wait for each other."""
    token_requests_max: int = 96
    """How many requests of one token are served at the same time; more are answered with 429."""
    auth_failures_per_s: float = 1.0
    """How many requests a second without a valid token are answered with 401 in the long run, by address; more are
    answered with 429. Valid tokens are not affected."""
    auth_failures_burst: int = 50
    """How many requests without a valid token one address may make at once, before `auth_failures_per_s` holds."""
    streams_max: int = 1_000
    """The largest number of event streams; more are answered with 503."""
    token_streams_max: int = 100
    """The largest number of event streams of one token; more are answered with 429."""
    stream_stall_ms: int = 10_000
    """How long the reader of an event stream may receive nothing of what waits for it, in ms; then the stream ends, and
    the reader resumes it with `Last-Event-ID`."""
    metrics_token: str = ""
    """A secret of at least 16 characters that reads `/metrics` and nothing else, for a monitoring system. Empty: only
    an admin's token reads it."""


class TokensConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Access tokens. `[tokens]` in the file, `INTERLOCK_TOKENS_*` in the environment."""

    lifetime_max_ms: int = 0
    """How long the secret of a token may be valid, in ms; also the default of `interlock token create`. 0: no limit.
    The first admin token and that of `interlock token recover` do not expire."""
    last_use_interval_ms: int = 60_000
    """How often the times at which tokens were last used are written, in ms."""


class AuditConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The audit log. `[audit]` in the file, `INTERLOCK_AUDIT_*` in the environment."""

    keep_ms: int = 90 * 24 * 3_600_000
    """How long entries are kept, in ms; 0: for ever."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of a server. Top level of the file, `INTERLOCK_*` in the environment."""

    data_dir: str = ""
    """The folder of the database, images, volumes and guests. Default: /var/lib/interlock as root, else
    ~/.local/share/interlock."""
    listen_host: str = "127.0.0.1"
    """The address to listen on. Anything but loopback needs TLS, or `allow_plain_http`."""
    listen_port: int = 7420
    """The TCP port to listen on; 0 takes any free one, which `server.json` in the data folder then names."""
    tls_certificate: str = ""
    """A PEM file with the certificate and its chain; together with `tls_key` it turns TLS on."""
    tls_key: str = ""
    """A PEM file with the certificate's private key."""
    tls_names: tuple[str, ...] = ()
    """Names and addresses of the server, for a certificate of its own CA instead of `tls_certificate`; clients trust
    `tls/ca.pem` of the data folder. In an environment variable: separated by spaces."""
    allow_plain_http: bool = False
    """Allow an address that is not loopback without TLS."""
    host: str = ""
    """The name of this host. Default: the system's hostname."""
    hypervisor: Literal["qemu", "simulated"] = "qemu"
    """What runs the guests. `simulated` runs none, and is for trials."""
    policy: str = "standard"
    """A built-in policy's name, or a policy file. If it is invalid at a start, the last policy in force stays."""
    policy_explore_ms: int = 20_000
    """How long the reachable states of a policy are explored by default before it is put in force, in ms; 0: not at
    all. One that extends `standard` takes about eight seconds."""
    policy_explore_ms_max: int = 60_000
    """The longest walk that a request to load a policy may ask for, in ms."""
    policy_check_ms_max: int = 30_000
    """How long reading and checking a policy may take, besides the walk, in ms."""
    policy_memory_mib_max: int = 4_096
    """The address space of the process that checks a policy, in MiB."""
    policy_keys: tuple[str, ...] = ()
    """Public keys whose certificates stand for the exploration of a policy (`interlock policy key`). In an environment
    variable: separated by spaces."""
    policy_body_bytes_max: int = 4_194_304
    """The largest body of a request to load a policy, in bytes."""
    qemu_binary: str = "qemu-system-x86_64"
    """QEMU's program: a name on the PATH, or a path."""
    accelerator: Literal["auto", "tcg", "kvm"] = "auto"
    """What executes guest code. `auto`: KVM if /dev/kvm works and the guests' user may open it, else `tcg`, QEMU's
    emulation, which runs anywhere. With `kvm` the server does not start without it."""
    qmp_timeout_ms: int = 5_000
    """How long QEMU may take to answer a QMP command before the outcome is unknown, in ms."""
    request_body_bytes_max: int = 262_144
    """The largest body of a request that is not an upload, in bytes."""
    upload_bytes_max: int = 64 * 1024**3
    """The largest image that may be uploaded, in bytes."""
    image_bytes_max: int = 64 * 1024**3
    """The largest size of an image after conversion, in bytes."""
    image_conversion_timeout_ms: int = 600_000
    """How long the conversion of an image may take, in ms."""
    image_fetch_timeout_ms: int = 21_600_000
    """How long the download of an image may take, in ms."""
    instance_memory_mib_max: int = 65_536
    """The most memory of an instance, in MiB."""
    volume_gib_max: int = 16_384
    """The largest volume, in GiB."""
    log_format: Literal["text", "json"] = "text"
    """How the server writes its log, to standard error."""
    host_memory_mib: int = 0
    """The memory that instances may claim on this host, in MiB. 0: the host's memory without
    `host_memory_reserved_mib`, and no limit for `simulated` guests."""
    host_memory_reserved_mib: int = 512
    """The memory that is reserved for the host if `host_memory_mib` is 0, in MiB."""
    host_vcpus_overcommit: float = 16.0
    """How many vCPUs instances may claim for each CPU of this host."""
    host_disk_overcommit: float = 4.0
    """How much disk root disks and volumes may claim, as a multiple of the data folder's file system. Disks are
    sparse."""
    host_disk_reserved_gib: int = 1
    """How much of the data folder's file system must stay free when a disk is claimed, in GiB."""
    disk_low_mib: int = 512
    """The free space on the data folder's file system below which `/readyz` and a gauge warn, in MiB."""
    disk_reserve_mib: int = 4
    """The space reserved inside the database for a full disk, so that some hundred VMs can still be stopped and
    deleted, in MiB. Its log reserves as much again."""
    driver: DriverConfig = DriverConfig()
    upkeep: UpkeepConfig = UpkeepConfig()
    qemu: QemuConfig = QemuConfig()
    http: HttpConfig = HttpConfig()
    hosts: HostsConfig = HostsConfig()
    clock: ClockConfig = ClockConfig()
    tokens: TokensConfig = TokensConfig()
    audit: AuditConfig = AuditConfig()

    @property
    def folder(self) -> Path:
        if self.data_dir:
            return Path(self.data_dir).expanduser()
        if os.geteuid() == 0:
            return Path("/var/lib/interlock")
        return Path("~/.local/share/interlock").expanduser()

    @property
    def tls(self) -> bool:
        """Whether the server has TLS."""
        return bool(self.tls_certificate or self.tls_names)

    @property
    def certificates(self) -> Path:
        """The folder of this host's certificate, and of the server's CA."""
        return self.folder / "tls"


def is_loopback(host: str) -> bool:
    """Whether a host name or address reaches this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
