"""Selectors against brute force: what is chosen, what stays open, what is refused before measuring.

Guards `gate.selectors.always`, `gate.selectors.at_most`, `gate.selectors.base`, `gate.selectors.complement`,
`gate.selectors.constant`, `gate.selectors.random`, `gate.selectors.fraction`, `gate.selectors.lowest`,
`gate.selectors.named`, `gate.selectors.names`, `gate.selectors.names_file`, `gate.selectors.never`,
`gate.selectors.rank`, `gate.selectors.tau`, `gate.selectors.threshold`.
"""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safemerge_recipes.errors import PlanError, RecipeError
from safemerge_recipes.gate.decide import check, decide, unsettled
from safemerge_recipes.gate.selectors import Candidate, Decision, Question, Selector
from safemerge_recipes.recipe.model import Gate

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")


def named(count: int) -> list[str]:
    return [f"model.layers.{i // 3}.{KINDS[i % 3]}.weight" for i in range(count)]


def kind_of(name: str) -> str:
    return ".".join(name.split(".")[3:5])


def brute(gate: dict, values: dict[str, float]) -> set[str]:
    """What a gate chooses, by the contract's words and nothing of the package."""
    above = gate.get("direction") == "above"
    if "complement" in gate:
        inner = {**gate["complement"], "direction": gate.get("direction", "below")}
        return set(values) - brute(inner, values)
    if "tau" in gate:
        return {n for n, v in values.items() if (v > gate["tau"] if above else v < gate["tau"])}
    if "at_most" in gate:
        return {n for n, v in values.items() if (v >= gate["at_most"] if above else v <= gate["at_most"])}
    if "always" in gate:
        return set(values)
    if "never" in gate:
        return set()
    groups: dict[str, list[str]] = {}
    for name in values:
        groups.setdefault(kind_of(name) if gate.get("per") else "", []).append(name)
    chosen = set()
    for members in groups.values():
        count = gate["lowest"] if "lowest" in gate else math.ceil(gate["fraction"] * len(members))
        order = sorted(members, key=lambda n: (-values[n] if above else values[n], n))
        chosen |= set(order[:count])
    return chosen


grid = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 1.0])  # few values, so that ties happen
selectors = st.one_of(
    st.builds(lambda v: {"tau": v}, grid),
    st.builds(lambda v: {"at_most": v}, grid),
    st.builds(lambda n: {"lowest": n}, st.integers(1, 6)),
    st.builds(lambda f: {"fraction": f}, st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0])),
    st.builds(lambda f: {"fraction": f, "per": "module"}, st.sampled_from([0.1, 0.34, 0.5, 1.0])),
    st.builds(lambda n: {"lowest": n, "per": "module"}, st.integers(1, 2)),
    st.just({"always": True}),
    st.just({"never": True}),
)
gates = st.one_of(
    selectors,
    selectors.map(lambda inner: {"complement": inner}),
).flatmap(lambda gate: st.sampled_from([gate, {**gate, "direction": "above"}]))


@given(gates, st.lists(grid, min_size=6, max_size=12))
def test_every_selector_chooses_what_brute_force_chooses(gate, values):
    known = dict(zip(named(len(values)), values, strict=True))
    decisions = decide(Gate.model_validate(gate), [Candidate(name, value) for name, value in known.items()])
    assert list(decisions) == list(known)
    assert {name for name, decision in decisions.items() if decision.merge} == brute(gate, known)


@given(gates, st.lists(st.tuples(grid, grid, st.floats(-1, 1)), min_size=6, max_size=12))
def test_measuring_the_unsettled_exactly_gives_the_decisions_of_exact_measurement(gate, drawn):
    """Each candidate is first seen somewhere inside its interval, which always holds the truth."""
    names = named(len(drawn))
    truth = {name: value for name, (value, _, _) in zip(names, drawn, strict=True)}
    seen = {
        name: Candidate(name, value + error * shift, error)
        for name, (value, error, shift) in zip(names, drawn, strict=True)
    }
    parsed = Gate.model_validate(gate)
    for _ in range(len(names) + 1):
        open_ = unsettled(parsed, list(seen.values()))
        if not open_:
            break
        assert all(seen[name].error for name in open_)
        seen |= {name: Candidate(name, truth[name]) for name in open_}
    decisions = decide(parsed, list(seen.values()))
    assert {name for name, decision in decisions.items() if decision.merge} == brute(gate, truth)


def test_intervals_away_from_the_threshold_are_settled():
    gate = Gate(tau=0.5)
    far = [Candidate("a", 0.1, 0.1), Candidate("b", 0.9, 0.1)]
    assert unsettled(gate, far) == set()
    assert unsettled(gate, [*far, Candidate("c", 0.55, 0.1)]) == {"c"}
    ranks = Gate(lowest=1)
    assert unsettled(ranks, far) == set()
    assert unsettled(ranks, [Candidate("a", 0.1, 0.3), Candidate("b", 0.3, 0.2), Candidate("c", 0.9, 0.1)]) == {
        "a",
        "b",
    }


class TestRandom:
    def chosen(self, candidates, **random_):
        gate = Gate.model_validate({"random": random_})
        return {n for n, d in decide(gate, candidates).items() if d.merge}

    @given(st.integers(0, 12), st.integers(0, 2**40))
    def test_draws_that_many_and_does_not_depend_on_order(self, count, seed):
        candidates = [Candidate(name, None) for name in named(12)]
        shuffled = random.Random(seed).sample(candidates, len(candidates))
        assert len(self.chosen(candidates, count=count, seed=seed)) == count
        assert self.chosen(candidates, count=count, seed=seed) == self.chosen(shuffled, count=count, seed=seed)

    def test_seeds_differ_and_every_tensor_can_be_drawn(self):
        candidates = [Candidate(name, None) for name in named(12)]
        drawn = [frozenset(self.chosen(candidates, count=4, seed=seed)) for seed in range(40)]
        assert len(set(drawn)) > 30
        assert set().union(*drawn) == set(named(12))

    @given(st.integers(0, 11), st.integers(0, 100))
    def test_per_module_spreads_evenly(self, count, seed):
        candidates = [Candidate(name, None) for name in named(11)]  # 4, 4 and 3 of the three kinds
        found = self.chosen(candidates, count=count, seed=seed, per="module")
        sizes = Counter(map(kind_of, named(11)))
        counts = Counter(map(kind_of, found))
        assert sum(counts.values()) == count
        assert all(abs(counts[kind] - count * sizes[kind] / 11) < 1 for kind in sizes)

    def test_counts_by_module_type_are_kept(self):
        wanted = {"self_attn.q_proj": 3, "mlp.up_proj": 1}
        found = self.chosen([Candidate(name, None) for name in named(12)], count=wanted, seed=5)
        assert Counter(map(kind_of, found)) == wanted

    def test_per_beside_counts_is_refused(self):
        with pytest.raises(ValueError, match="only beside one number"):
            Gate.model_validate({"random": {"count": {"mlp.up_proj": 1}, "per": "module"}})


class TestRefusals:
    @pytest.mark.parametrize(
        ("gate", "message"),
        [
            ({"lowest": 13}, r"gate\.lowest: 13 are to be chosen, only 12 can be"),
            ({"lowest": 5, "per": "module"}, r"only 4 of type self_attn\.q_proj can be"),
            ({"complement": {"lowest": 13}}, r"gate\.complement\.lowest: 13 are to be chosen"),
            ({"random": {"count": 13}}, r"gate\.random\.count: 13 are to be drawn, only 12 are gated"),
            (
                {"random": {"count": {"mlp.up_proj": 5}}},
                r"gate\.random\.count\.mlp\.up_proj: 5 are .* only 4",
            ),
            ({"random": {"count": {"mlp.gate_proj": 1}}}, r"gate\.random\.count\.mlp\.gate_proj: 1 are .* only 0"),
        ],
    )
    def test_more_than_there_are(self, gate, message):
        with pytest.raises(PlanError, match=message):
            check(Gate.model_validate(gate), named(12))

    @pytest.mark.parametrize("gate", [{"names": ["*.nothing.*"]}, {"complement": {"names": ["*.nothing.*"]}}])
    def test_names_that_match_nothing(self, gate):
        with pytest.raises(RecipeError, match=r"matches none of the 12 gated tensors"):
            check(Gate.model_validate(gate), named(12))

    def test_an_unknown_plugin(self):
        with pytest.raises(RecipeError, match=r"gate\.plugin\.name: 'middle' is not known; expected one of tau"):
            check(Gate.model_validate({"plugin": {"name": "middle"}}), named(12))

    @pytest.mark.parametrize("gate", [{"lowest": 12}, {"random": {"count": 12}}, {"names": ["*q_proj*"]}, {"tau": 0.5}])
    def test_what_fits_passes(self, gate):
        check(Gate.model_validate(gate), named(12))


class TestUndefined:
    candidates = (Candidate("a", 0.1), Candidate("b", None, why="V is zero"), Candidate("c", 0.3))

    @pytest.mark.parametrize(("degenerate", "merges"), [("keep", False), ("merge", True)])
    def test_a_stated_decision(self, degenerate, merges):
        found = decide(Gate(lowest=1, degenerate=degenerate), self.candidates)
        assert found["b"] == Decision(merges, f"V is zero, rho is undefined: {degenerate}")
        assert [found[name].merge for name in "ac"] == [True, False]

    def test_complement_leaves_it_alone(self):
        found = decide(Gate.model_validate({"complement": {"lowest": 1}}), self.candidates)
        assert [found[name].merge for name in "abc"] == [False, False, True]

    def test_an_error(self):
        with pytest.raises(PlanError, match="b: V is zero, so rho is undefined"):
            decide(Gate(tau=0.5, degenerate="error"), self.candidates)

    def test_selectors_without_the_metric_do_not_ask(self):
        assert all(d.merge for d in decide(Gate(always=True, degenerate="error"), self.candidates).values())


def test_reasons_say_value_and_threshold():
    candidates = [Candidate("a", 0.214), Candidate("b", 0.35)]
    below = decide(Gate(tau=0.35), candidates)
    assert [below[n].reason for n in "ab"] == ["rho 0.214 < tau 0.35", "rho 0.35 ≥ tau 0.35"]
    above = decide(Gate(at_most=0.35, direction="above"), candidates)
    assert [above[n].reason for n in "ab"] == ["rho 0.214 < at_most 0.35", "rho 0.35 ≥ at_most 0.35"]
    ranked = decide(Gate(lowest=1, direction="above"), candidates)
    assert ranked["b"].reason == "rho 0.35 is highest 1 of 2 (1 merge)"
    flipped = decide(Gate.model_validate({"complement": {"tau": 0.35}}), candidates)
    assert flipped["b"] == Decision(True, "complement of: rho 0.35 ≥ tau 0.35")


def test_a_plugin_selector_gets_its_options_and_measures_exactly_unless_it_says_otherwise():
    def middle(question: Question) -> dict[str, Decision]:
        low, high = question.value["from"], question.value["to"]
        return {c.name: Decision(low <= (c.value or 0) <= high, "in the middle") for c in question.candidates}

    gate = Gate.model_validate({"plugin": {"name": "middle", "options": {"from": 0.2, "to": 0.4}}})
    candidates = [Candidate("a", 0.1), Candidate("b", 0.3, 0.01), Candidate("c", 0.5)]
    known = {"middle": Selector(middle)}
    assert [d.merge for d in decide(gate, candidates, known).values()] == [False, True, False]
    assert unsettled(gate, candidates, known) == {"b"}
    assert gate.needs_metric
