"""Merge the updates of a round: every rule is a weighting x a combination.

                     what the shares of the devices are spread over
                     evenly          among the holders     anchored to the previous
                   ┌───────────────┬─────────────────────┬──────────────────────────
    factor average │ fedavg        │                     │
                   │ hetlora       │                     │
    product        │ flexlora      │ segment             │ anchored, geomed, krum
    stack          │ flora         │                     │

A *weighting* says how much each device counts (its share: by examples, by norm) and how much
each of its directions does. A *combination* turns one module's weighted updates into one pair
of factors; `rule` puts both together. The named rules are one line each in `rules`; an empty square
is a rule nobody has published, and one line away. What another package brings is in `installed`.

What a job says in `[rule_settings]` comes between the two halves and combines with any rule:
`votes` changes how much each device counts, `robust` does so by how far changes lie apart,
`carried` adds what earlier rounds left.

Read in this order: `round_view` (what a rule sees), `lowrank` (the algebra), `weighting`, `votes`,
`combine`, `rule`, `rules`, and `trust` (one result a device instead of one for all).
"""

from aggregator.merge.round_view import Memory, Merged, RoundView, Update
from aggregator.merge.rule import Rule
from aggregator.merge.rules import RULES, merge

__all__ = ["RULES", "Memory", "Merged", "RoundView", "Rule", "Update", "merge"]
