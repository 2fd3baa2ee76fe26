"""A step composed of few blocks is the step that was traced whole, and a step leaves nothing behind."""

from __future__ import annotations

import gc
import random
from collections.abc import Hashable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from lowmem_ft.core.config import RunConfig
from lowmem_ft.planner.compose import Pieces, Place, holders, peaks, segments, shorten, turns, windows
from lowmem_ft.planner.cut import block_kinds
from lowmem_ft.planner.simulate import Stage
from lowmem_ft.planner.steps import HEADS, Class, classes_of
from lowmem_ft.planner.trace import Event, Trace, with_key
from tests.models import tiny_config
from tests.unit.planner.policies import policy

DEPTH = 12
DEEP: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": DEPTH},
    "gemma2": {"num_hidden_layers": DEPTH},
    "gemma3": {"num_hidden_layers": DEPTH},
    "deepseek_v3": {"num_hidden_layers": DEPTH},
    "gpt_oss": {"num_hidden_layers": DEPTH},
    "falcon": {"num_hidden_layers": DEPTH},
    "gpt2": {"n_layer": DEPTH},
    "gpt_neo": {"num_layers": DEPTH, "attention_types": [[["global", "local"], DEPTH // 2]]},
}


def unrolled(places: Sequence[Place], depth: int) -> list[Event]:
    """The events of a composed step, as if it had been traced whole."""
    return [
        with_key(event, turn.firsts[origin] + ordinal, place.at)
        for place, turn in zip(places, turns(places, depth), strict=True)
        for (event, _), (origin, ordinal) in zip(turn.events, turn.pieces, strict=True)
    ]


def stage(name: str, folder: Path, **sections: Any) -> Stage:
    """A deep tiny model of architecture `name`, of which there is a config only."""
    tiny_config(name, **DEEP[name]).save_pretrained(folder)
    config = RunConfig.from_dict({"model": str(folder), "data": {"seq_len": 64}, **sections})
    return Stage(config, policy(), kind="cpu")


def seen(events: list[Event]) -> list[tuple[int, str, str]]:
    """What must agree."""
    return [(e.nbytes, e.op, e.phase) for e in events]


@pytest.mark.parametrize("layers", [[DEPTH - 1], [4, 5, 7], [0]], ids=str)
@pytest.mark.parametrize("keep", [0, DEPTH])
def test_a_composed_step_that_trains_some_layers(layers: list[int], keep: int, tmp_path: Path) -> None:
    check_composed(stage("llama", tmp_path, adapter={"layers": layers}), keep)


@pytest.mark.parametrize("keep", [0, 5, DEPTH])
@pytest.mark.parametrize("name", DEEP)
def test_a_composed_step_is_the_whole_step(name: str, keep: int, tmp_path: Path) -> None:
    check_composed(stage(name, tmp_path), keep)


@pytest.mark.parametrize(
    ("name", "keep", "offload"),
    [("llama", 0, DEPTH), ("llama", 2, 6), ("gemma3", 0, DEPTH), ("deepseek_v3", 3, DEPTH - 3)],
)
def test_a_composed_step_whose_inputs_lie_below(name: str, keep: int, offload: int, tmp_path: Path) -> None:
    check_composed(stage(name, tmp_path), keep, offload)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt2"])
def test_a_composed_step_with_a_learnt_prompt(name: str, method: str, tmp_path: Path) -> None:
    learnt = {"peft_type": method, "num_virtual_tokens": 4}
    made = stage(name, tmp_path, adapter={"method": "peft", "peft": learnt}, data={"seq_len": 64, "packing": False})
    assert not made.whole, "blocks do not know how many there are"
    check_composed(made, DEPTH)


@pytest.mark.parametrize("layers", [[DEPTH - 1], [4]], ids=str)
def test_blocks_below_what_is_trained_put_nothing_down(layers: list[int], tmp_path: Path) -> None:
    check_composed(stage("llama", tmp_path, adapter={"layers": layers}), 0, DEPTH)


def check_composed(made: Stage, keep: int, offload: int = 0) -> None:
    classes = classes_of(block_kinds(made.ready.model), keep, offload)
    only = shorten(classes)
    assert len(only) < DEPTH
    whole = made.step(policy(), keep=keep, offload=offload)
    wanted = [event for event, _ in chain.from_iterable(segment.events for segment in segments(whole, {}))]
    pieces = Pieces()
    own = [classes[at] for at in only]
    pieces.add(own, segments(step_of(made, own, only), {}))
    places = pieces.step(classes)
    found = unrolled(places, DEPTH)
    assert made.held + peaks(places)[0] == max(whole.curve())
    assert seen(found) == seen(wanted)
    assert holders(places) == whole.holders()
    keys: dict[int, int] = {}
    for composed, traced in zip(found, wanted, strict=True):
        if traced.nbytes > 0:
            keys[traced.key] = composed.key
        else:
            assert composed.key == keys.get(traced.key, -traced.key), "the same piece is given back"


def step_of(made: Stage, own: Sequence[Class], only: Sequence[int]) -> Trace:
    """A step through these blocks, which are of these classes."""
    counts = {it: sum(treatment == it for _, treatment, _ in own) for it in ("keep", "offload")}
    return made.step(policy(), keep=counts["keep"], offload=counts["offload"], only=only)


def test_shortening_keeps_every_window() -> None:
    generator = random.Random(0)
    for _ in range(200):
        period = [generator.randrange(3) for _ in range(generator.randint(1, 6))]
        depth, keep = generator.randint(1, 60), generator.randint(0, 60)
        classes = classes_of([period[at % len(period)] for at in range(depth)], keep, generator.randint(0, depth))
        only = shorten(classes)
        assert only == sorted(set(only))
        assert set(windows([classes[at] for at in only])) == set(windows(classes))
    assert shorten([0] * 80) == [0, 1, 79]


@pytest.mark.parametrize("keep", [0, DEPTH])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "falcon"])
def test_a_step_leaves_nothing_for_the_garbage_collector(name: str, keep: int, tmp_path: Path) -> None:
    """What only a collection frees would be held for an unknown while, and no plan could say how much it is."""
    made = stage(name, tmp_path)
    gc.collect()
    gc.disable()
    try:
        made.step(policy(), keep=keep)
        left = [(event.op, event.nbytes) for event in made.tracer.alive() if event.phase != "load"]
    finally:
        gc.enable()
    assert left == []


def test_shortening_to_what_is_wanted() -> None:
    """Those windows are there, in few blocks; all others are such as some block of the whole has, but at the ends."""
    classes: list[Hashable] = [0, *[1] * 40, *[2] * 39]
    every = windows(classes)
    first, turn, last = every[0], every[40], every[-1]
    assert turn == (1, 1, 2)
    assert shorten(classes, {first}) == [0, 1]
    assert shorten(classes, {turn})[1:] == [40, 41]
    for wanted in ({first}, {turn}, {last}, {first, turn}, {first, last}, set(every)):
        only = shorten(classes, wanted)
        found = windows([classes[at] for at in only])
        assert wanted <= set(found)
        assert set(found[1:-1]) <= set(every)
        assert len(only) <= 7


@pytest.mark.parametrize("keep", [0, 5])
def test_wanted_windows_of_fewer_blocks_are_the_same(keep: int, tmp_path: Path) -> None:
    """What estimates take from traces of a few windows is what a trace of all of them has."""
    made = stage("deepseek_v3", tmp_path)
    classes = classes_of(block_kinds(made.ready.model), keep)

    def traced(only: list[int]) -> Pieces:
        pieces, own = Pieces(), [classes[at] for at in only]
        pieces.add(own, segments(step_of(made, own, only), {}, "device"))
        return pieces

    every = traced(shorten(classes))
    for window in set(windows(classes)):
        few = traced(shorten(classes, {window}))
        for part in ("forward", "backward"):
            one, other = every.by_window[part, window], few.by_window[part, window]
            assert (one.delta, one.high) == (other.delta, other.high)


@pytest.mark.parametrize("keep", [0, DEPTH])
@pytest.mark.parametrize("sections", [{}, {"train": {"objective": "dpo"}}], ids=["text", "preferences"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_loss_that_is_traced_without_what_follows_is_that_of_a_step(
    name: str, sections: dict[str, Any], keep: int, tmp_path: Path
) -> None:
    made = stage(name, tmp_path, **sections)

    def loss(**how: Any) -> tuple[list[Any], int]:
        """Sizes of what happens in the head, and where pieces come from; and how many segments there are."""
        found = segments(made.step(policy(), keep=keep, **how), made.tracer.seconds)
        heads = [it for it in found if it.part in HEADS]
        return [[(e.nbytes, e.op, e.tier, birth) for e, birth in it.events] for it in heads], len(found)

    made.step(policy(), keep=keep)
    gc.collect()
    gc.disable()  # as while a plan is made
    try:
        before = made.tracer.alive()
        whole, parts = loss()
        alone, fewer = loss(through="loss")
        assert made.tracer.alive() == before, "nothing of a step that was not finished is held"
    finally:
        gc.enable()
    assert alone == whole
    assert fewer <= parts - DEPTH
    assert loss() == (whole, parts)
