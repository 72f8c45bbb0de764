"""Which second identities a soak tries: each folder, whatever the first agent does, healed in both orders."""

from __future__ import annotations

import itertools
import random

from soak.identities import First, Folder, drawn

MOVED = Folder.IN_ITS_PLACE


def test_every_kind_of_second_identity_is_drawn_and_only_what_can_be_healed() -> None:
    chance = random.Random(1)
    contests = [drawn(chance, may_take_over=True) for _ in range(1_000)]
    kinds = {(one.folder, one.first, one.second_goes_first) for one in contests}
    possible = set(itertools.product(Folder, First, (False, True)))
    assert kinds == {one for one in possible if one[0] is not MOVED or one[1:] == (First.KILLED, True)}
    beyond = {(one.folder, one.first) for one in contests if one.beyond}
    fresh = {(Folder.FRESH, First.STOPPED), (Folder.FRESH, First.KILLED)}
    assert beyond == fresh | {(MOVED, First.KILLED)}
    assert not any(drawn(chance, may_take_over=False).beyond for _ in range(100))
