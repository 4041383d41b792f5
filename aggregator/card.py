"""The model card of an exported adapter: README.md with the fields that hubs read.

See https://huggingface.co/docs/hub/model-cards for the fields at its head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from aggregator.places import Place
from aggregator.view.models import RoundView
from protocol.adapter import Adapter
from protocol.messages import Job

CARD = "README.md"


def model_card(job: Job, place: Place, adapter: Adapter, rounds: Sequence[RoundView]) -> str:
    """Return the card of an adapter, with what the job's rounds up to its version came to."""
    told = [one for one in rounds if one.version is not None and one.version <= place.version]
    told.sort(key=lambda one: one.number)
    whose = f"device {place.who}'s own" if place.who else "the fleet's shared"
    tokens = job.training.steps * job.training.tokens_per_step
    return f"""---
base_model: {json.dumps(job.base.name)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- federated-learning
- tunefleet
---

# {job.job}: {whose} adapter, version {place.version}

A LoRA adapter that devices trained on text of their own, which never left them. An aggregator
merged what they sent, round by round, with Tunefleet.

- base: {job.base.name}, {job.base.parameters:,} parameters; SHA-256 of its weights, as Tunefleet
  takes it: `{job.base.sha256}`
- rank {adapter.rank}, scale {adapter.scale:g}, {len(adapter.layers)} modules; devices trained ranks
  of {", ".join(map(str, job.ladder))}
- rule `{job.rule}`, remainder {job.remainder}, directions {job.directions}
- each device and round: {job.training.steps} steps, {tokens:,} tokens, learning rate
  {job.training.learning_rate:g}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "THIS FOLDER")
```

## Rounds

The loss is the mean over the round's devices, each on held-out text of its own, of the version that
the round started from; nats a token.

| round | devices | loss before it |
|---|---|---|
{_rows(told)}
"""


def _rows(rounds: list[RoundView]) -> str:
    rows = []
    for one in rounds:
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        rows.append(f"| {one.number} | {one.counted} | {loss} |")
    return "\n".join(rows) or "| none yet | | |"
