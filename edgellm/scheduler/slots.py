"""KV slots, the tokens that each still holds, and the choice of one for a new prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WORTH_COPYING = 16
"""Tokens of prefix that a copy must bring; fewer are computed again in less time than the call takes."""

WORTH_WAITING = 32
"""Tokens of prefix, being computed right now for another request, that are worth waiting a step for."""


class Slot:
    """One slot's contents, as far as the scheduler knows them.

    Attributes:
        index: the executor's name for it.
        tokens: int32 [max_seq_len]; the first `known` are the ids of what was fed, or is going to be.
        known: ids known to the host. A token that is fed back before its step was collected is not known yet.
        computed: tokens whose KV the steps scheduled so far leave in the slot: the next row's `past`.
        resident: the same for the steps collected so far.
        last_step: number of the last step with a row of this slot.
        taken: whether a request holds it.
        last_used: grows from release to release; 0 for a slot that was never used.
    """

    __slots__ = ("computed", "index", "known", "last_step", "last_used", "resident", "taken", "tokens")

    def __init__(self, index: int, max_seq_len: int) -> None:
        self.index = index
        self.tokens: NDArray[np.int32] = np.zeros(max_seq_len, np.int32)
        self.known = 0
        self.computed = 0
        self.resident = 0
        self.last_step = 0
        self.taken = False
        self.last_used = 0

    @property
    def retained(self) -> int:
        """Tokens of which both the KV and the ids are certain: what another request may build on."""
        return min(self.resident, self.known)

    def append(self, token: int) -> None:
        """Note the id of the token sampled after all known ones."""
        self.tokens[self.known] = token
        self.known += 1

    def shared(self, prompt: NDArray[np.int32], limit: int, computed: int = 1) -> int:
        """Length of the common prefix with `prompt`, looking at `limit` tokens of the slot.

        The last `computed` tokens of the prompt do not count: they are computed whatever a slot holds, the
        very last one because its logits are wanted.
        """
        length = max(0, min(limit, len(prompt) - computed))
        differs = self.tokens[:length] != prompt[:length]
        first = int(differs.argmax()) if length else 0
        return first if length and differs[first] else length


class Choice(NamedTuple):
    """Where a prompt goes: into `slot`, keeping `reused` tokens, copied from `source` if that is set."""

    slot: Slot
    reused: int
    source: Slot | None


class Slots:
    """All slots of an executor. A slot is free when no request holds it and no open step has a row of it.

    Args:
        smallest_chunk: the executor's; so many of a prompt's tokens are computed at least.
    """

    def __init__(self, count: int, max_seq_len: int, smallest_chunk: int = 1) -> None:
        self._slots = [Slot(index, max_seq_len) for index in range(count)]
        self._smallest_chunk = smallest_chunk
        self._releases = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> Slot:
        return self._slots[index]

    def free(self, collected: int) -> list[Slot]:
        """Slots that a request could take; `collected` is the number of the last step collected."""
        return [slot for slot in self._slots if not slot.taken and slot.last_step <= collected]

    def choose(self, prompt: NDArray[np.int32], free: Sequence[Slot]) -> Choice | None:
        """The slot of `free` in which the prompt costs least, or None if it is better to wait a step.

        The longest common prefix wins, wherever it is. A free slot that holds it is taken as it is when at
        least half of what it retains is used: the same conversation goes on. Otherwise the slot that was used
        longest ago is sacrificed and the prefix is copied into it, so that a shared system prompt does not
        cost another conversation its history; running slots are copied from in the same way.
        """
        last = self._smallest_chunk
        shared = {slot.index: slot.shared(prompt, slot.retained, last) for slot in self._slots}
        source = max(self._slots, key=lambda slot: (shared[slot.index], slot in free))
        best = shared[source.index]
        for slot in self._slots:
            coming = min(slot.computed, slot.known)
            if coming > slot.retained and slot.shared(prompt, coming, last) >= best + WORTH_WAITING:
                return None
        in_place = max(free, key=lambda slot: (shared[slot.index], -slot.retained, -slot.last_used))
        reused = shared[in_place.index]
        if reused + WORTH_COPYING > best and 2 * reused >= in_place.retained:
            return Choice(in_place, reused, None)
        victim = min(free, key=lambda slot: (slot.retained > 0, slot.last_used))
        if shared[victim.index] + WORTH_COPYING > best:
            return Choice(victim, shared[victim.index], None)
        return Choice(victim, best, source)

    def take(self, choice: Choice, prompt: NDArray[np.int32]) -> None:
        """Give the chosen slot to a request with this prompt."""
        slot = choice.slot
        slot.tokens[: len(prompt)] = prompt
        slot.known = len(prompt)
        slot.computed = slot.resident = choice.reused
        slot.taken = True

    def release(self, slot: Slot) -> None:
        """Take the slot back from its request; its tokens stay as a prefix for others."""
        self._releases += 1
        slot.last_used = self._releases
        slot.taken = False
