"""From the policy that a search ends with to a faster one, a single decision at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem_ft.core.plan import Policy
from lowmem_ft.planner.answer import Answer, Option
from lowmem_ft.planner.choices import Place, replace_rows

if TYPE_CHECKING:
    from lowmem_ft.planner.search import Search

NEAR = 1.02  # estimates of what lies beside the context that are this much above the budget are weighed too
LACKS = 1.08  # how many times the budget an estimate must be for nothing to fit
STEPS = 6  # that are weighed in vain before a search ends


def lacks_room(search: Search, budget: int, place: Place) -> bool:
    """Whether nothing fits with the optimizer there, by traces that a search wants, too: those of tiles it may not."""
    least = search.least_of(search.choices.keep[0], place, search.rows[0])
    return not least.mlp_tile_tokens and search.option(least).process > search.times(budget, LACKS)


def improved(search: Search, answer: Answer, options: dict[Policy, Option]) -> Answer:
    """`answer`, or what single steps from it lead to that fits and is faster. Where estimates promised too much of what
    was better, what a search goes on to may be the slowest by far."""
    refused, tried = 0, {answer.weighed.policy}
    while refused < STEPS:
        steps = [search.option(it) for it in _steps(search, answer.weighed.policy) if it not in tried]
        steps = [options.get(it.policy, it) for it in steps if it.seconds < answer.weighed.seconds]
        near = [it for it in steps if it.process <= search.times(answer.budget, NEAR)]
        if not near:
            break
        option = min(near, key=search.order)
        tried.add(option.policy)
        other = search.answer(search.scales.weigh(option.policy), (), answer.budget)
        options[option.policy] = replace(option, allocated=other.weighed.allocated, process=other.process)
        if other.fits and search.rank(other) < search.rank(answer):
            answer = other
        else:
            refused += 1
    return replace(answer, options=tuple(options.values()))


def with_acts_kept(search: Search, answer: Answer, options: dict[Policy, Option]) -> Answer:
    """`answer`, all of whose blocks keep, or the same with what MLPs' activation functions gave kept, too, if that fits
    with as many streamed blocks as it then takes, and is faster. Where blocks compute again, memory for one that does
    not is worth more; and on a CPU the pages of what is kept take as long as to compute it."""
    policy, asked = answer.weighed.policy, search.config.policy
    keeps = policy.recompute_mlp_act and policy.keep_blocks == search.scales.depth and search.device.kind != "cpu"
    if not (keeps and answer.fits and asked.recompute_mlp_act is None and asked.objective == "speed"):
        return answer
    same = search.option(replace(policy, recompute_mlp_act=False))
    options[same.policy] = same  # whatever it takes: more memory may buy it
    option = search.fewest_streamed(same.policy, answer.budget)
    if option is not None and option.seconds < answer.weighed.seconds:
        other = search.answer(search.scales.weigh(option.policy), (), answer.budget)
        options[option.policy] = replace(option, allocated=other.weighed.allocated, process=other.process)
        answer = other if other.fits and search.rank(other) < search.rank(answer) else answer
    return replace(answer, options=tuple(options.values()))


def _steps(search: Search, policy: Policy) -> Iterator[Policy]:
    """Policies that differ in a single decision that may make it faster."""
    choices, seq_len = search.choices, search.config.data.seq_len
    more = (rows for rows in search.rows if rows * seq_len > policy.micro_batch_tokens)
    yield from (replace_rows(policy, rows, seq_len, search.tokens) for rows in list(more)[:1])
    chunks = (it for it in choices.chunks(policy) if it > policy.loss_chunk_tokens)
    yield from (replace(policy, loss_chunk_tokens=chunk) for chunk in chunks)
    keep, offload = policy.keep_blocks + 1, max(0, policy.offload_blocks - 1)
    if keep in choices.keep:
        for level in choices.levels[choices.levels.index(policy.stream_embeddings) :][:2]:
            below = replace(policy, stream_embeddings=level)
            yield choices.blocks(below, keep, streamed=policy.streamed_blocks, offload=offload)
    if not policy.keep_attention and True in search.attentions:
        yield replace(policy, keep_attention=True)


def sort_of(policy: Policy) -> Hashable:
    """The same for policies whose estimates are wrong by about as much."""
    computing = policy.micro_batch_tokens, policy.loss_chunk_tokens, policy.keep_attention, policy.mlp_tile_tokens
    return *computing, policy.experts_together, policy.stream_embeddings, policy.offload_blocks > 0
