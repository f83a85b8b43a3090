"""Never slower than plain decoding: a scripted machine whose phases become slower and faster, on a clock of its own."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny_draft import make_draft
from tiny_stock import make_qwen

from eagle import MSDModel, TreeConfig
from eagle.decode.adaptive.guard import FIRST_CYCLES, PROBES, Guard, Pace, Work
from eagle.decode.drafter import Drafter
from eagle.families import load_target

PLAIN, DRAFT, VERIFY = 15.0, 13.0, 24.0
GOOD, USELESS = 4.5, 1.0
"""New tokens of a cycle with a tree."""
BEGIN, END, CYCLES, WINDOW = 100, 300, 600, 32


class Machine(NamedTuple):
    """Factors on the durations of a plain cycle, of drafting and of a tree's verification; tokens of a tree's cycle."""

    plain: float = 1.0
    draft: float = 1.0
    verify: float = 1.0
    tokens: float = GOOD


class Cycle(NamedTuple):
    drafted: bool
    seconds: float
    plain_seconds: float
    """What plain decoding would have taken for the same tokens, then."""


def run(
    script: Callable[[int], Machine], pace: Pace | None = None, measured: bool = True, noise: float = 0.03
) -> list[Cycle]:
    """Cycles of a request. ``measured``: the durations of the machine without load are known beforehand."""
    chance, guard = random.Random(0), Guard(pace or Pace(), PLAIN if measured else 1.0)
    cycles = []
    for number in range(CYCLES):
        machine, drafts = script(number), guard.should_draft()
        vary = [chance.gauss(1.0, noise), chance.gauss(1.0, noise)]
        tokens = machine.tokens if drafts else 1.0
        if drafts:
            real = Work(DRAFT * machine.draft * vary[0], VERIFY * machine.verify * vary[1])
        else:
            real = Work(0.0, PLAIN * machine.plain * vary[1])
        known = Work(DRAFT, VERIFY) if drafts else Work(0.0, PLAIN)
        guard.learn(real, known if measured else Work(float(drafts), 1.0), tokens)
        cycles.append(Cycle(drafts, real.sum, tokens * PLAIN * machine.plain))
    return cycles


def run_whole(script: Callable[[int], Machine], ahead: int) -> list[Cycle]:
    """`run` without known durations, in whole cycles as `Decoder._follow` decodes them: only their sums are measured,
    and ``ahead`` cycles are launched before the guard learns from one."""
    chance, guard = random.Random(0), Guard(Pace())
    cycles: list[Cycle] = []
    while len(cycles) < CYCLES:
        if not guard.should_draft():
            machine = script(len(cycles))
            seconds = PLAIN * machine.plain * chance.gauss(1.0, 0.03)
            guard.learn(Work(0.0, seconds), Work(0.0, 1.0), 1.0)
            cycles.append(Cycle(False, seconds, PLAIN * machine.plain))
            continue
        flights: list[Machine] = []
        while len(cycles) < CYCLES:
            while len(flights) <= ahead and guard.wants_another(len(flights)):
                flights.append(script(len(cycles) + len(flights)))
            if not flights:
                break
            machine = flights.pop(0)
            seconds = (DRAFT * machine.draft + VERIFY * machine.verify) * chance.gauss(1.0, 0.03)
            guard.learn(Work(0.0, seconds), Work(1.0, 1.0), machine.tokens)
            cycles.append(Cycle(True, seconds, machine.tokens * PLAIN * machine.plain))
    return cycles


def speedup(cycles: list[Cycle]) -> float:
    return sum(cycle.plain_seconds for cycle in cycles) / sum(cycle.seconds for cycle in cycles)


def worst(cycles: list[Cycle]) -> float:
    """The lowest speed-up of `WINDOW` cycles in a row."""
    return min(speedup(cycles[start : start + WINDOW]) for start in range(len(cycles) - WINDOW + 1))


def under_load(load: Machine) -> Callable[[int], Machine]:
    return lambda number: load if BEGIN <= number < END else Machine()


def cycles_to_return(cycles: list[Cycle]) -> int:
    """Cycles after the end of the load until eight in a row draft."""
    return next(n for n in range(CYCLES - END) if all(cycle.drafted for cycle in cycles[END + n : END + n + 8]))


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize(
    "load",
    [
        *(Machine(factor, factor, factor) for factor in (1.5, 2, 4, 10)),
        *(Machine(draft=factor) for factor in (1.5, 2, 3)),
        *(Machine(verify=factor) for factor in (1.5, 2)),
        *(Machine(draft=factor, verify=factor) for factor in (1.5, 2)),
        Machine(plain=3.0), Machine(1.5, 3.0, 3.0),
    ],
)  # fmt: skip
def test_no_window_is_slower_than_plain_and_speed_returns(load: Machine, measured: bool) -> None:
    cycles = run(under_load(load), measured=measured)
    assert worst(cycles) >= 0.95
    assert cycles_to_return(cycles) <= WINDOW
    undisturbed = GOOD * PLAIN / (DRAFT + VERIFY)
    assert speedup(cycles[END + WINDOW :]) > 0.97 * undisturbed
    assert speedup(cycles[:BEGIN]) > 0.93 * undisturbed  # two plain cycles are measured


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("load", [Machine(4, 4, 4), Machine(draft=3), Machine(draft=2, verify=2), Machine(1.5, 3, 3)])
def test_whole_cycles(load: Machine, ahead: int) -> None:
    """Nothing is known but the sum of a cycle, and that late."""
    cycles = run_whole(under_load(load), ahead)
    assert worst(cycles) >= 0.95
    assert cycles_to_return(cycles) <= WINDOW
    for tokens in (1.0, 1.5, 2.0):
        assert speedup(run_whole(lambda _, tokens=tokens: Machine(tokens=tokens), ahead)) > 0.97  # type: ignore[misc]


@pytest.mark.parametrize(("load", "least"), [(Machine(verify=3.0), 0.9), (Machine(draft=3.0, verify=3.0), 0.8)])
def test_a_much_slower_phase_is_noticed_within_a_few_cycles(load: Machine, least: float) -> None:
    """The cycles that notice it are slow already."""
    cycles = run(under_load(load))
    assert worst(cycles) >= least
    assert speedup(cycles[BEGIN + 8 : END]) > 0.95


@pytest.mark.parametrize("tokens", [1.0, 1.5, 2.0])
def test_a_text_that_the_draft_does_not_know_is_noticed_more_slowly(tokens: float) -> None:
    """Acceptance varies from cycle to cycle, so it counts as an average of about ten."""
    cycles = run(under_load(Machine(tokens=tokens)))
    assert worst(cycles) >= 0.7
    assert speedup(cycles[BEGIN + WINDOW : END]) > 0.95
    assert cycles_to_return(cycles) <= 4 * WINDOW


@pytest.mark.parametrize("measured", [True, False])
def test_a_useless_draft_costs_less_than_three_percent(measured: bool) -> None:
    pace = Pace()
    first, second = (run(lambda number: Machine(tokens=USELESS), pace, measured) for _ in range(2))
    assert speedup(first) > 0.97
    assert speedup(second) > 0.97 and worst(second) >= 0.93
    assert sum(cycle.drafted for cycle in second) >= 2  # it tries again


def shared_core(tokens: float, seed: int) -> Callable[[int], Machine]:
    """Another process gets the core for a while: for some cycles in a row everything takes 2.2 times as long."""
    chance, factors = random.Random(seed), [1.0]
    while len(factors) < CYCLES + 2:
        factors.append(chance.choice([1.0, 2.2]) if chance.random() < 0.25 else factors[-1])
    return lambda number: Machine(*[factors[number]] * 3, tokens)


@pytest.mark.parametrize(("tokens", "least"), [(1.0, 0.957), (1.5, 0.925), (2.0, 0.944), (4.5, 0.97)])
def test_a_core_that_another_process_shares(tokens: float, least: float) -> None:
    """Means of ten requests, over the best of drafting always and never."""
    best = max(1.0, tokens * PLAIN / (DRAFT + VERIFY))
    for decode in (lambda script: run(script, measured=False), lambda script: run_whole(script, 1)):
        assert sum(speedup(decode(shared_core(tokens, seed))) for seed in range(10)) / 10 > least * best


def test_a_context_that_grows_makes_drafting_lose_and_plain_decoding_takes_over() -> None:
    cycles = run(lambda number: Machine(plain=1 + number / 600, verify=1 + number / 100))
    assert worst(cycles) >= 0.9
    assert sum(cycle.drafted for cycle in cycles[20:50]) > 25
    assert sum(cycle.drafted for cycle in cycles[300:]) < 30


def test_plain_cycles_are_rare_where_drafting_pays() -> None:
    cycles = run(lambda number: Machine(), noise=0.0)
    assert sum(not cycle.drafted for cycle in cycles) == 2 + CYCLES // PROBES[-1][1]


def test_plain_cycles_are_few_where_durations_vary_much() -> None:
    cycles = run(lambda number: Machine(), measured=False, noise=0.3)
    assert sum(not cycle.drafted for cycle in cycles) < CYCLES / 7


def test_a_good_draft_may_begin_with_useless_cycles() -> None:
    cycles = run(lambda number: Machine(tokens=1.0 if number < FIRST_CYCLES else GOOD))
    assert all(cycle.drafted for cycle in cycles[6:100])


def test_what_one_request_learns_holds_for_the_next() -> None:
    pace = Pace()
    run(lambda number: Machine(), pace)
    assert all(cycle.drafted for cycle in run(lambda number: Machine(), pace)[:8])


def test_requests_of_several_threads_share_what_is_known() -> None:
    """Threads change in the middle of each other's decisions."""
    pace, interval = Pace(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            loads = [Machine(), Machine(tokens=USELESS), Machine(verify=3.0), Machine(3.0, 3.0, 3.0)]
            cycles = list(pool.map(lambda load: run(lambda number: load, pace), loads * 4))
    finally:
        sys.setswitchinterval(interval)
    assert all(len(each) == CYCLES for each in cycles)


@pytest.mark.parametrize("compiled", [False, pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("agree", [0.5, 1.0])
def test_answers_do_not_depend_on_its_decisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agree: float, compiled: bool | str
) -> None:
    """Pauses of many lengths, in a batch whose sequences accept different numbers of tokens, and alone."""
    base = make_qwen(tmp_path / "base")
    target = load_target(base, dtype=torch.float32)
    draft = make_draft(tmp_path / "draft", target, agree=agree)
    msd = MSDModel.from_pretrained(base, draft, dtype=torch.float32, compile=compiled)
    chance = random.Random(1)
    decisions = [kind for _ in range(40) for kind in [True] * chance.randint(1, 2) + [False] * chance.randint(0, 12)]
    monkeypatch.setattr(Guard, "should_draft", lambda self: decisions.pop())
    monkeypatch.setattr(Guard, "learn", lambda self, real, expected, tokens: None)
    prompts = [msd.target.chat_prompt(text) for text in ("How many?", "Which colour has the first of them?", "Why?")]
    inputs = msd.target.prepare(prompts[:1] if compiled else prompts)
    wanted = target.model.generate(**inputs, max_new_tokens=60, do_sample=False)
    output = msd.generate(**inputs, max_new_tokens=60, temperature=0.0)
    assert torch.equal(output.sequences, wanted)
    assert {1} < set(output.stats.tree_sizes)


def test_a_draft_reads_what_it_missed_in_a_pause(tmp_path: Path) -> None:
    """Two sequences with 23 and 17 unread rows: at once, and in cycles of one row and more."""
    base = make_qwen(tmp_path / "base")
    msd = MSDModel.from_pretrained(base, make_draft(tmp_path / "draft", load_target(base)), dtype=torch.float32)
    target, draft, tree = msd.target, msd.draft, TreeConfig(depth=3, top_k=2, total_tokens=6)
    assert draft is not None
    generator = torch.Generator().manual_seed(0)
    counts = (23, 17)
    hidden = [torch.randn(count, target.hidden_size, generator=generator) for count in counts]
    tokens = [torch.randint(0, 300, (count,), generator=generator) for count in counts]
    inputs = target.prepare([target.chat_prompt("How many?"), target.chat_prompt("Why?")])
    drafted = []
    with torch.inference_mode():
        for parts in (1, 17):
            drafter = Drafter(draft, target.head, 200, tree, batch=2)
            for index, prefill in enumerate(target.prefill_each(inputs, target.new_cache(2, 200))):
                prompt = inputs["input_ids"][index : index + 1, inputs["attention_mask"][index].bool()]
                drafter.start(index, prefill, prompt, prompt[0, :1])
            for part in range(parts):
                share = [slice(count * part // parts, count * (part + 1) // parts) for count in counts]
                drafter.extend(
                    [values[own] for values, own in zip(hidden, share, strict=True)],
                    [values[own] for values, own in zip(tokens, share, strict=True)],
                )
            drafted.append(drafter.expand(tree))
    assert torch.equal(drafted[0].tokens, drafted[1].tokens)
    torch.testing.assert_close(drafted[0].scores, drafted[1].scores, atol=1e-4, rtol=1e-4)
