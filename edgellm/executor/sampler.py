"""The host's sampler: a row of logits to one token, and what the request wants to know about it.

The order of a row's adjustments, each skipped where the request does not ask for it:
    mask → logit_bias → min_tokens → repetition, presence, frequency penalty → argmax, if greedy
    otherwise → temperature → top_k → top_p → min_p → inverse CDF over the ids that are left, in their order
Log-probabilities are the model's own: the log-softmax of the logits as they came.

The choice is a pure function of (logits, SamplingParams, tokens before it, index of the token): it does not
depend on the batch, its order, or on other slots. Equal logits go to the lower id. All working memory is
allocated once. An adjusted row is float32 like the logits; sums of probabilities are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgellm.errors import ExecutorFault
from edgellm.executor.base import NO_TOKEN
from edgellm.executor.philox import uniform
from edgellm.sampling import SamplingParams

_BLOCK = 64
"""A row is padded to a multiple of this, so that it can be looked at as a matrix of blocks."""

_FIRST_NUCLEUS = 256
"""How many candidates top_p looks at before it takes a histogram of the whole row."""

_LEVELS_PER_NAT = 8
_LEVELS = 1024
"""The histogram's bins: an eighth of a nat each, far beyond where float32's exp is 0."""

_MAX_BIAS = 1e30
"""Far beyond any logit, and still finite in float32 after a penalty, which is 0.01…100."""

_MAX_INVERSE_TEMPERATURE = 1e30
"""Keeps 0 · (1/T) from being NaN when T is almost nothing; every other token is at −inf by then."""


class Sampled(NamedTuple):
    """The sampler's part of an `executor.base.Result`, in its shapes."""

    token: NDArray[np.int32]
    logprob: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


@dataclass(slots=True)
class _Slot:
    """A slot's sampling state; `seen` counts the distinct tokens listed in the sampler's `_seen` row."""

    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))
    plain: bool = True
    index: int = 0
    last: int = -1
    seen: int = 0
    bias_ids: NDArray[np.intp] | None = None
    bias: NDArray[np.float32] | None = None
    suppressed: NDArray[np.intp] | None = None


class Sampler:
    """Samples for a fixed number of slots.

    Args:
        slots: how many.
        vocab_size: V, the width of a row of logits.
        max_seq_len: bounds the distinct tokens that a slot can have seen; None: the vocabulary bounds them.
    """

    def __init__(self, slots: int, vocab_size: int, *, max_seq_len: int | None = None) -> None:
        self._vocab = vocab_size
        self._slots = [_Slot() for _ in range(slots)]
        padded = -(-vocab_size // _BLOCK) * _BLOCK
        # The columns past the vocabulary stay −inf for ever: nothing below can choose them.
        self._padded = np.full(padded, -np.inf, np.float32)
        self._row = self._padded[:vocab_size]
        self._weights = np.zeros(padded, np.float32)
        self._rows = np.arange(slots)
        # 0: never seen; n ≥ 1: seen, of which n − 1 times generated (a prompt's token starts at 1).
        self._counts = np.full((slots, vocab_size), 0, np.int32)
        self._seen = np.full((slots, min(vocab_size, max_seq_len or vocab_size)), 0, np.int32)

    def bind(self, slot: int, params: SamplingParams, history: NDArray[np.int32]) -> None:
        """Give the slot to a new request; `history` int32 [n] are its prompt's tokens, all below V."""
        state = self._slots[slot]
        self._counts[slot, self._seen[slot, : state.seen]] = 0
        state.params = params
        state.plain = params.plain
        state.index = 0
        state.last = -1
        state.seen = 0
        state.bias_ids = state.bias = state.suppressed = None
        if params.logit_bias:
            state.bias_ids = np.fromiter(params.logit_bias.keys(), np.intp, len(params.logit_bias))
            bias = np.fromiter(params.logit_bias.values(), np.float64, len(params.logit_bias))
            state.bias = bias.clip(-_MAX_BIAS, _MAX_BIAS).astype(np.float32)
        if params.min_tokens and params.suppressed:
            state.suppressed = np.array(params.suppressed, np.intp)
        if params.counts_tokens:
            distinct = np.unique(history)
            state.seen = len(distinct)
            self._seen[slot, : state.seen] = distinct
            self._counts[slot, distinct] = 1

    def last_token(self, slot: int) -> int:
        """The token sampled last for the slot: what FEEDBACK stands for."""
        return self._slots[slot].last

    def record(self, slot: int, token: int) -> None:
        """Take note of a token that a device chose: the next one's index is one more."""
        state = self._slots[slot]
        state.last = token
        state.index += 1
        if state.params.counts_tokens:
            self._count(slot, state, token)

    def sample(
        self, slots: Sequence[int], logits: NDArray[np.float32], mask: NDArray[np.uint32] | None = None
    ) -> Sampled:
        """Choose a token for each row. `logits` is not changed.

        Args:
            slots: the slot of each row, each at most once.
            logits: float32 [R, V]; −inf stands for a token that cannot be.
            mask: uint32 [R, ceil(V / 32)] as in `executor.base.Step`, or None. Where min_tokens suppresses
                all that it allows, the mask wins: a complete grammar allows nothing but the end. A row whose
                mask allows nothing gets NO_TOKEN, and its slot's state does not change.

        Raises:
            ExecutorFault: a row has a NaN or +inf, or is −inf everywhere; the message names the slot, and no
                slot's state has changed.
        """
        states = [self._slots[slot] for slot in slots]
        if mask is None and all(state.plain for state in states):
            token = self._argmax(slots, logits)
            logprob = np.full(len(slots), np.nan, np.float32)
            top_ids, top_logprobs = np.empty((len(slots), 0), np.int32), np.empty((len(slots), 0), np.float32)
        else:
            token = np.empty(len(slots), np.int32)
            logprob = np.full(len(slots), np.nan, np.float32)
            wanted = max(state.params.top_logprobs if state.params.logprobs else 0 for state in states)
            wanted = min(wanted, self._vocab)
            top_ids = np.full((len(slots), wanted), -1, np.int32)
            top_logprobs = np.full((len(slots), wanted), np.nan, np.float32)
            for i, (slot, state) in enumerate(zip(slots, states, strict=True)):
                if mask is None and state.plain:
                    token[i] = self._argmax((slot,), logits[i : i + 1])[0]
                    continue
                row_mask = None if mask is None else mask[i]
                token[i] = self._choose(slot, state, logits[i], row_mask)
                if state.params.logprobs and token[i] != NO_TOKEN:
                    logprob[i] = self._report(
                        logits[i], token[i], state.params.top_logprobs, top_ids[i], top_logprobs[i]
                    )
        # Only now, when no row can fail any more, does the state advance.
        for slot, chosen in zip(slots, token.tolist(), strict=True):
            if chosen != NO_TOKEN:
                self.record(slot, chosen)
        return Sampled(token, logprob, top_ids, top_logprobs)

    def _argmax(self, slots: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.int32]:
        # The first NaN if there is one, otherwise the first of the largest.
        token: NDArray[np.int32] = logits.argmax(axis=1).astype(np.int32)
        best = logits[self._rows[: len(slots)], token]
        if not np.isfinite(best).all():
            raise _not_finite(
                [slot for slot, value in zip(slots, best, strict=True) if not np.isfinite(value)]
            )
        return token

    def _choose(
        self, slot: int, state: _Slot, logits: NDArray[np.float32], mask: NDArray[np.uint32] | None
    ) -> int:
        if not math.isfinite(logits.max()):  # NaN carries through max
            raise _not_finite([slot])
        if not self._adjust(slot, state, logits, mask):
            return NO_TOKEN
        params = state.params
        row = self._row
        best = int(row.argmax())
        if params.greedy or params.top_k == 1:
            return best
        row -= row[best]
        with np.errstate(over="ignore"):
            row *= np.float32(min(1.0 / params.temperature, _MAX_INVERSE_TEMPERATURE))
        u = uniform(params.seed, state.index)
        kept = self._truncate(params)
        if kept is None:
            return self._draw_from_all(u)
        ids, weights = kept
        return int(ids[_draw(weights, u)])

    def _adjust(
        self, slot: int, state: _Slot, logits: NDArray[np.float32], mask: NDArray[np.uint32] | None
    ) -> bool:
        """Leave the row's logits, as the request wants them changed, in `_row`; whether any token is left."""
        row, params = self._row, state.params
        np.copyto(row, logits)
        if mask is not None:
            words = np.ascontiguousarray(mask, "<u4").view(np.uint8)
            np.copyto(row, -np.inf, where=np.unpackbits(words, count=self._vocab, bitorder="little") == 0)
            if row.max() == -np.inf:
                return False
        if state.bias_ids is not None and state.bias is not None:
            row[state.bias_ids] += state.bias
        if state.suppressed is not None and state.index < params.min_tokens:
            kept = row[state.suppressed]
            row[state.suppressed] = -np.inf
            if row.max() == -np.inf:
                row[state.suppressed] = kept
        if params.counts_tokens and state.seen:
            ids = self._seen[slot, : state.seen]
            values = row[ids]
            if params.repetition_penalty != 1.0:
                penalty = np.float32(params.repetition_penalty)
                values = np.where(values > 0, values / penalty, values * penalty)
            generated = self._counts[slot, ids] - 1
            values -= np.float32(params.frequency_penalty) * generated.astype(np.float32)
            values -= np.float32(params.presence_penalty) * (generated > 0)
            row[ids] = values
        return True

    def _truncate(self, params: SamplingParams) -> tuple[NDArray[np.intp], NDArray[np.float64]] | None:
        """What top_k, top_p and min_p keep of `_row`: ids, ascending, and their weights; None: all of it.

        The row's maximum is 0, so a weight is a probability relative to the most likely token.
        """
        row = self._row
        if 0 < params.top_k < self._vocab:
            ids = self._most_likely(params.top_k)
            if params.top_p < 1.0:
                weights = _exp(row[ids])
                ids = ids[: _nucleus(weights, params.top_p * float(weights.sum()))]
            ids.sort()
        elif params.top_p < 1.0:
            ids = self._nucleus_of_all(params.top_p)
        elif params.min_p > 0.0:
            # A little more than min_p keeps, since log and exp round; the exact comparison follows.
            ids = np.flatnonzero(row >= np.float32(math.log(params.min_p) - 1e-3))
        else:
            return None
        weights = _exp(row[ids])
        if params.min_p > 0.0:
            likely = weights >= params.min_p
            ids, weights = ids[likely], weights[likely]
        return ids, weights

    def _nucleus_of_all(self, top_p: float) -> NDArray[np.intp]:
        """The smallest set of most likely tokens whose probability reaches top_p, ascending.

        Only a part of the vocabulary is sorted: the most likely few hundred, which nearly always do, or else
        the tokens of that one level of likelihood at which the sum reaches top_p.
        """
        row = self._row
        total = self._weigh_all()
        ids = self._most_likely(min(_FIRST_NUCLEUS, self._vocab))
        ends = self._weights[ids].cumsum(dtype=np.float64)
        if ends[-1] >= top_p * total:
            ids = ids[: int(ends.searchsorted(top_p * total, side="left")) + 1]
            ids.sort()
            return ids
        level = np.minimum(row * -_LEVELS_PER_NAT, _LEVELS - 1).astype(np.intp)
        sums = np.bincount(level, self._weights[: self._vocab], _LEVELS)
        ends = sums.cumsum()
        enough = top_p * float(ends[-1])
        border = int(ends.searchsorted(enough, side="left"))
        at_border = np.flatnonzero(level == border)
        at_border = at_border[np.argsort(-row[at_border], kind="stable")]
        size = _nucleus(_exp(row[at_border]), enough - float(ends[border] - sums[border]))
        kept = level < border
        kept[at_border[:size]] = True
        return np.flatnonzero(kept)

    def _weigh_all(self) -> float:
        """Fill `_weights` with exp of the row, which is at most 0, and return their sum."""
        np.exp(self._padded, out=self._weights)
        return float(self._weights.reshape(-1, _BLOCK).sum(axis=1).sum(dtype=np.float64))

    def _most_likely(self, count: int) -> NDArray[np.intp]:
        """The `count` ids with the largest values in `_row`, largest first, equal ones by id; no −inf."""
        row = self._row
        # Every column has a largest value: the count-th largest of them bounds the row's from below.
        columns = self._padded.reshape(_BLOCK, -1).max(axis=0)
        if count < len(columns):
            bound = np.partition(columns, len(columns) - count)[len(columns) - count]
        elif count < self._vocab:
            bound = np.partition(row, self._vocab - count)[self._vocab - count]
        else:
            bound = np.float32(-np.inf)
        ids = np.flatnonzero(row >= max(bound, np.finfo(np.float32).min))
        return ids[np.argsort(-row[ids], kind="stable")[:count]]

    def _draw_from_all(self, u: float) -> int:
        """Inverse CDF over the whole row: first the block, then the token in it."""
        np.exp(self._padded, out=self._weights)
        blocks = self._weights.reshape(-1, _BLOCK)
        sums = blocks.sum(axis=1).astype(np.float64)
        ends = sums.cumsum()
        target = u * ends[-1]
        block = min(int(ends.searchsorted(target, side="right")), int(sums.nonzero()[0][-1]))
        inside = blocks[block].astype(np.float64)
        return block * _BLOCK + _draw(inside, (target - (ends[block] - sums[block])) / inside.sum())

    def _report(
        self,
        logits: NDArray[np.float32],
        token: int,
        top: int,
        top_ids: NDArray[np.int32],
        top_logprobs: NDArray[np.float32],
    ) -> float:
        """The token's log-probability; fills the first `top` entries of the two arrays."""
        np.subtract(logits, logits.max(), out=self._row)
        normalizer = math.log(self._weigh_all())
        if top:
            ids = self._most_likely(min(top, self._vocab))
            top_ids[: len(ids)] = ids
            top_logprobs[: len(ids)] = self._row[ids] - normalizer
        return float(self._row[token]) - normalizer

    def _count(self, slot: int, state: _Slot, token: int) -> None:
        counts = self._counts[slot]
        if counts[token] == 0:
            counts[token] = 1
            self._seen[slot, state.seen] = token
            state.seen += 1
        counts[token] += 1


def _exp(values: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.exp(values).astype(np.float64)


def _nucleus(weights: NDArray[np.float64], enough: float) -> int:
    """How many of the weights, from the front, it takes to reach `enough`; all, if they do not."""
    return min(int(weights.cumsum().searchsorted(enough, side="left")) + 1, len(weights))


def _draw(weights: NDArray[np.float64], u: float) -> int:
    """Index of the weight whose share of the sum holds u; never one of weight 0."""
    ends = weights.cumsum()
    index = int(ends.searchsorted(u * ends[-1], side="right"))
    # u · sum may round up to the sum itself, or u may be a rounding error above 1.
    return index if index < len(ends) else int(weights.nonzero()[0][-1])


def _not_finite(slots: list[int]) -> ExecutorFault:
    return ExecutorFault(f"the logits of slot {', '.join(map(str, slots))} are not finite")
