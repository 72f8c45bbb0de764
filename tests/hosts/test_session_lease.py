"""A lease is renewed in one thread and ended in another, and one of the two comes first."""

from __future__ import annotations

import threading

from interlock.hypervisors.remote.protocol import LeaseGranted, Ping, Renew, decode, encode
from interlock.hypervisors.remote.session_lease import SessionLease


def test_a_renewal_is_granted_until_the_lease_has_ended() -> None:
    lease = SessionLease()
    assert (lease.renewed_s, lease.renew(5), lease.renew(4), lease.renewed_s) == (0, True, True, 5)
    assert (lease.end(unless_after_s=4), lease.renew(6)) == (False, True)
    assert (lease.end(unless_after_s=6), lease.renew(7), lease.renewed_s) == (True, False, 6)
    lease.resume()
    assert (lease.renew(8), lease.end(), lease.renew(9), lease.renewed_s) == (True, True, False, 8)


def test_only_renewals_are_answered_and_only_while_there_is_a_lease() -> None:
    lease = SessionLease()
    answer = lease.reply(encode(Renew(number=7, disk_free_mib=1)))
    assert answer is not None
    assert decode(answer) == LeaseGranted(number=7)
    assert lease.renewed_s > 0
    assert [lease.reply(frame) for frame in (encode(Ping(number=1)), b"nothing", b"", bytes(1 << 20))] == [None] * 4
    lease.end()
    assert lease.reply(encode(Renew(number=8))) is None


def test_who_ends_a_lease_knows_of_every_renewal_before_and_none_comes_after() -> None:
    for _ in range(50):
        lease, granted = SessionLease(), [0.0]
        ready = threading.Barrier(2)

        def renew(
            lease: SessionLease = lease, granted: list[float] = granted, ready: threading.Barrier = ready
        ) -> None:
            ready.wait()
            while lease.renew(granted[-1] + 1):
                granted.append(granted[-1] + 1)

        renewing = threading.Thread(target=renew)
        renewing.start()
        ready.wait()
        seen_s = lease.renewed_s
        while not lease.end(seen_s):
            seen_s = lease.renewed_s
        renewing.join()
        assert granted[-1] == lease.renewed_s == seen_s
