"""Every verb under every fault: nothing is lost, and the same command goes on.

Guards `engine.folder`, `engine.resume`, `evaluation.store` and `storage.files`; the slow test is the table of
docs/reliability.md.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.program import run
from tests.whole import faults, reliability
from tests.whole.faults import KILL, Bench, at_call

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("faults"),
]
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"), scoring=False)
    yield made
    made.close()


def test_verbs_killed_anywhere_lose_nothing(bench: Bench) -> None:
    dice = random.Random(13)
    for verb in reliability.writing(bench)[::3]:
        assert reliability.kill(bench, verb, dice, 2) == ""


@pytest.mark.parametrize("every", [5, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", faults.PLANTED)
def test_no_verb_waits_for_what_is_no_file_or_follows_it(bench: Bench, kind: str, every: int) -> None:
    dice = random.Random(kind)
    for verb in bench.verbs[dice.randrange(every) :: every]:
        assert bench.plant(verb, kind, dice) == ""


@pytest.mark.parametrize("first", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_report_killed_at_a_call_leaves_no_temporary_files(bench: Bench, first: int) -> None:
    verb = next(verb for verb in bench.verbs if verb.name == "report")
    for at in range(first, bench.expected(verb)[2], 4):
        assert bench.attempt(verb, at_call("kill", at)) == ""


def test_every_open_of_every_verb_goes_the_one_way(bench: Bench) -> None:
    for verb in bench.verbs:
        assert bench.opened_otherwise(verb) == [], verb.name


def test_the_watch_sees_what_is_opened_otherwise(bench: Bench) -> None:
    """Also through the functions that count calls."""
    path, own = bench.root / "seen.txt", "safemerge_recipes/own.py"
    path.write_text("x")
    opens = f"import os; os.close(os.open({str(path)!r}, os.O_RDONLY)); open({str(path)!r}).close()"
    before = f"{bench.undisturbed}\nexec(compile({opens!r}, {own!r}, 'exec'))"
    code, _, err = bench.warm("--version", before=before)
    assert (code, err.count("OPENED")) == (0, 2), err


@pytest.mark.slow
def test_every_open_of_verbs_that_run_models_is_ours_or_a_library_s(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("lm_eval")
    made = Bench(tmp_path_factory.mktemp("opened"))
    try:
        for verb in made.verbs:
            assert made.opened_otherwise(verb) == [], verb.name
    finally:
        made.close()


@pytest.mark.parametrize("how", reliability.ERRORS)
def test_a_disk_that_fails_at_any_call_stops_a_verb_and_no_more(bench: Bench, how: str) -> None:
    dice = random.Random(how)
    for verb in reliability.writing(bench)[::9]:
        assert reliability.fail(bench, verb, dice, how) == ""


@pytest.mark.parametrize(
    "fault", [faults.SIGNALS, faults.FEW_FILES, faults.SMALL_FILES, faults.STREAMS[1]], ids=lambda fault: fault.kind
)
@pytest.mark.parametrize("other", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_lasts_for_a_whole_run_loses_nothing(bench: Bench, fault: faults.Fault, other: int) -> None:
    verb = bench.verbs[2 + (len(fault.kind) + other) % 2]  # an adapter or a model
    assert bench.attempt(verb, fault) == ""


def test_the_harness_sees_what_is_lost(bench: Bench) -> None:
    """A program that loses a user's file, an output or its working rules is told."""
    row = len(reliability.losses(bench.rows))
    empty = f"import glob; open(glob.glob('{bench.root}/trial*/thesis.txt')[0], 'w').close()"
    assert "user's changed" in bench.attempt(bench.verbs[0], faults.Fault("lossy", empty))
    assert len(reliability.losses(bench.rows)) == row + 1
    del bench.rows["lossy", bench.verbs[0].name]


def test_a_flipped_bit_is_found_where_it_was_flipped(bench: Bench) -> None:
    out = bench.root / "flipped"
    shutil.copytree(bench.root / "made" / "full", out)
    for path in sorted(out.iterdir()):
        at = path.stat().st_size * 8 // 2
        faults.flip(path, at)
        assert run("verify", out)[0] == 6, path.name
        faults.flip(path, at)
    assert run("verify", out)[0] == 0


def test_the_table_counts_what_was_tried(bench: Bench) -> None:
    assert bench.attempt(bench.verbs[0], at_call("kill", 5)) == ""
    line = next(line for line in bench.table().splitlines() if "SIGKILL" in line)
    tried, struck, lost = (int(cell) for cell in line.strip("|").split("|")[1:])
    assert tried >= struck >= 1
    assert lost == 0


def test_a_campaign_goes_on_where_it_stopped(bench: Bench, tmp_path: Path) -> None:
    results, steps = tmp_path / "results.jsonl", reliability.steps(bench)
    first = [next(steps) for _ in range(4)]
    rows = {(KILL, verb.name): [[KILL, verb.name, 3, 2, []]] for what, verb in first if what == "kill"}
    lines = [{"step": n, "what": w, "verb": v.name, "rows": rows.get((KILL, v.name), []) if w == "kill" else []}
             for n, (w, v) in enumerate(first)]  # fmt: skip
    results.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert reliability.read_results(results) == lines
    found = reliability.summed(lines)
    assert sum(row.struck for row in found.values()) == 2 * len(rows)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{reliability.BEGIN}\nearlier\n{reliability.END}\nafter\n")
    reliability.write_table(found, page, "told")
    assert "earlier" not in page.read_text()
    assert f"| {KILL} | {3 * len(rows)} | {2 * len(rows)} | 0 |" in page.read_text()


@pytest.mark.slow
def test_five_hundred_kills_over_all_verbs(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("lm_eval")
    place = tmp_path_factory.mktemp("all")
    made = Bench(place)
    try:
        rows = reliability.campaign(made, 500, place / "results.jsonl")
    finally:
        made.close()
    assert reliability.losses(rows) == []
    assert sum(row.struck for (kind, _), row in rows.items() if kind == KILL) >= 500
