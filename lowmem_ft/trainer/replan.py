"""The plan of a run that goes on.

A plan follows from what memory is free and how fast the machine multiplies just then. Made anew it may have other
micro-batches, another loss chunk, another precision (`quant.bits: auto`) or other sequences (`policy.objective:
context`), and the run would not end as if nobody had stopped it. So a run keeps what its plan decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lowmem_ft.core.config import RunConfig
from lowmem_ft.core.plan import Plan, Policy
from lowmem_ft.planner.solver import make_plan

_OF_SUMS = ("micro_batch_tokens", "loss_chunk_tokens", "mlp_tile_tokens", "experts_together")  # the results show it
_OF_MEMORY = (
    "resident_blocks", "keep_blocks", "keep_attention", "recompute_mlp_act", "stream_embeddings", "optimizer_on"
)  # fmt: skip


def plan_again(config: RunConfig, before: Plan) -> Plan:
    """A plan for the rest of a run that followed `before`.

    What the config leaves open is decided as before, and where that no longer fits at least all that shows in the
    results. With another budget, other pins or other lengths than before all is planned anew, but for what of
    precision and lengths the plan chose.
    """
    said = before.run_config
    settled = _settled(config, before)
    same = (config.budget, config.policy, settled.data.seq_len) == (said.budget, said.policy, said.data.seq_len)
    for pinned in _pinned(settled, before.policy) if same else ():
        plan = make_plan(pinned)
        if plan.fits and plan.policy == before.policy:  # what was weighed beside it is known from then
            plan = replace(plan, alternatives=before.alternatives, frontier=before.frontier, reason=before.reason)
        if plan.fits:
            return _as_given(plan, config)
    return _as_given(make_plan(settled), config)


def _settled(config: RunConfig, before: Plan) -> RunConfig:
    """`config` with the precision and the lengths that the plan before has chosen, where they are the plan's to choose.
    Weights were trained for the one, and the data's cursor counts in the others."""
    said = before.run_config
    changed: dict[str, Any] = {}
    if config.quant.bits == "auto":
        changed["quant"] = config.quant.model_copy(update={"bits": before.policy.bits})
    if config.policy.objective == said.policy.objective == "context":
        changed["data"] = config.data.model_copy(update={"seq_len": said.data.seq_len})
        changed["train"] = config.train.model_copy(update={"tokens_per_step": said.train.tokens_per_step})
        changed["policy"] = config.policy.model_copy(update={"objective": "speed"})
    return config.model_copy(update=changed)


def _pinned(config: RunConfig, policy: Policy) -> Iterator[RunConfig]:
    """`config` with all decisions of `policy` that it leaves open, then with those alone that show in the results."""
    for names in (_OF_SUMS + _OF_MEMORY, _OF_SUMS):
        pins = {name: getattr(policy, name) for name in names}
        if "keep_blocks" in pins and policy.offload_blocks + policy.recompute_blocks:
            pins["activations"] = "offload" if policy.offload_blocks else "recompute"
        own = config.policy.model_dump(exclude_none=True)
        yield config.model_copy(update={"policy": config.policy.model_copy(update={**pins, **own})})


def _as_given(plan: Plan, config: RunConfig) -> Plan:
    """`plan` as one for `config`, which did not pin so much; but with the lengths that were planned."""
    planned = plan.run_config
    lengths: dict[str, Any] = {}
    if config.policy.objective == "context":
        lengths = {"data": planned.data, "train": planned.train}
    return replace(plan, config=config.model_copy(update=lengths).model_dump(mode="json"))
