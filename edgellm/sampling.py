"""How a request wants its tokens chosen: the values, validated; the arithmetic is `executor/sampler.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What the sampler needs to know of one request. Names and meanings are OpenAI's where they have one.

    Attributes:
        temperature: ≥ 0; 0 is greedy, whatever the other fields say.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: in (0, 1]; keep the smallest set of most likely tokens whose probability reaches top_p.
        min_p: in [0, 1]; drop tokens less likely than min_p × the most likely one.
        repetition_penalty: 0.01…100; seen tokens' positive logits are divided by it, negative ones multiplied
            (prompt and generated tokens count as seen; Keskar et al. 2019, CTRL).
        presence_penalty: subtracted once from every token generated so far.
        frequency_penalty: subtracted once per occurrence among the generated tokens.
        logit_bias: token id → added to its logit before anything else.
        seed: makes the choice a pure function of (logits, seed, index of the token); unsigned, 64 bits.
        logprobs: whether the chosen token's log-probability is wanted.
        top_logprobs: how many of the most likely tokens to report beside it (0…20).
        min_tokens: until this many tokens are generated, `suppressed` tokens cannot be chosen.
        suppressed: the ids that end a request (end of turn, stop ids); used with min_tokens only.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    logprobs: bool = False
    top_logprobs: int = 0
    min_tokens: int = 0
    suppressed: tuple[int, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def counts_tokens(self) -> bool:
        """Whether choosing a token needs to know which came before it."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def plain(self) -> bool:
        """Whether the choice is the bare argmax: nothing adjusts the logits and nothing else is asked for."""
        return (
            self.greedy
            and not self.counts_tokens
            and not self.logit_bias
            and not self.logprobs
            and self.min_tokens == 0
        )
