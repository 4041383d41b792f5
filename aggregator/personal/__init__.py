"""An adapter for each device, merged from those that it has most in common with.

A device's adapter of the last round, with what it trained laid over it, is its *full* adapter.
From all full ones of a round every device gets a mixture of its own, by how far it *trusts* the
others. Three strategies say where trust comes from (arXiv 2404.09753):

    trust-weights        how alike adapters are: the aggregator sees it by itself
    trust-validation     how well another's does on the device's trust split: some of a round are
                         offered to all as candidates, and devices answer with losses in the next
    trust-predictions    how alike they predict a public probe: top logits come with the upload

How sharply trust is turned into weights is a *temperature*, one for each device, which moves by
trial: with its mixture a device is offered the same at a neighbouring temperature, and says which
does better on its trust split. Who has not answered is given the common adapter.

Read in this order: `answers` (what devices say), `scores`, `temperature`, `candidates`, `mixing`;
`serving` is what a served job does with it, `refusals` what it does not take.
"""

from aggregator.personal.answers import Answer
from aggregator.personal.mixing import PersonalRound, personal_round
from aggregator.personal.settings import (
    STRATEGIES,
    Strategy,
    TrustSettings,
    read_trust_settings,
    strategy_of,
)
from aggregator.personal.state import TrustState

__all__ = [
    "STRATEGIES",
    "Answer",
    "PersonalRound",
    "Strategy",
    "TrustSettings",
    "TrustState",
    "personal_round",
    "read_trust_settings",
    "strategy_of",
]
