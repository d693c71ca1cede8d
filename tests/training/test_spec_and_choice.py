"""The training file, presets, which size is kept, and what is said loudly. No model is loaded here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.evaluation.separation import Sides
from safemerge_recipes.recipe.training import Training, load_training
from safemerge_recipes.training.choose import carry_warning, choose
from safemerge_recipes.training.steps import steps_of

GOOD = {"model": "org/model", "data": {"path": "x.jsonl", "licence": "mit"}}


def test_the_paper_is_the_default_and_keys_overrule_it() -> None:
    plain = Training.model_validate(GOOD)
    assert (plain.lora.r, plain.lora.alpha, plain.lora.targets) == (8, 8, ("q_proj", "v_proj"))
    assert (plain.train.learning_rate, plain.train.epochs, plain.train.batch) == (1e-4, 10, 32)
    assert steps_of(1000, plain.train) == 320  # 32 steps an epoch; 313 where epochs run into each other
    own = Training.model_validate(GOOD | {"lora": {"r": 16}, "train": {"epochs": 3.0}})
    assert (own.lora.r, own.lora.alpha, own.train.epochs, own.train.batch) == (16, 8, 3, 32)


def test_presets_differ_where_their_sources_do() -> None:
    bianchi = Training.model_validate(GOOD | {"preset": "bianchi"})
    assert (bianchi.train.template, bianchi.train.loss_on, bianchi.train.max_length) == ("alpaca", "all", 256)
    assert (bianchi.lora.alpha, bianchi.lora.dropout, bianchi.train.batch) == (16, 0.05, 128)
    small = Training.model_validate(GOOD | {"preset": "small"})
    assert len(small.lora.targets) == 7
    assert small.train.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\ndata: {path: x, licence: mit, size: [1]}\n", 'did you mean "sizes"'),
        ("model: m\ndata: {path: x}\n", "licence is missing"),
        ("model: m\ndata: {path: x, package: y, licence: mit}\n", "expected one of path, package, hub and default"),
        ("model: m\ndata: {default: true, sizes: [5, 5]}\nchoose: {}\n", "each larger"),
        ("model: m\ndata: {default: true, sizes: [5, 9]}\n", "several sizes need `choose`"),
        ("model: m\ndata: {default: true}\nlora: {targets: [embed_tokens]}\n", "over the vocabulary"),
        ("model: m\ndata: {default: true}\ntrain: {batch: 9, micro_batch: 2}\n", "does not divide"),
        ("model: m\ndata: {default: true}\nmethod: safeinstruct\n", "go together"),
        ("model: {adapter: a}\ndata: {default: true}\n", "together"),
        ("model: m\ndata: {default: true}\ntrain: {learning_rate: fast}\n", "learning_rate"),
        ("data: {default: true}\n", "model: missing"),
        ("[1]\n", "expected a mapping"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "safety.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        load_training(path)
    assert words in str(error.value)
    assert f"{path}:" in str(error.value)


def test_on_is_written_onto_as_well(tmp_path: Path) -> None:
    for key in ("on", "onto"):
        read = Training.model_validate(GOOD | {"model": {"adapter": "./a", key: "./b"}})
        full, adapter = read.model.sources(tmp_path)
        assert (full.model, adapter and adapter.adapter) == ("./b", "./a")


def refused(harmful: int, harmless: int) -> Sides:
    """A model that refuses the first so many of a hundred harmful and of a hundred harmless requests."""
    return Sides(*({str(i): float(i < count) for i in range(100)} for count in (harmful, harmless)))


def test_the_most_refusing_adapter_wins_only_among_those_that_do_not_refuse_all() -> None:
    aligned = refused(70, 5)
    sizes = {100: refused(80, 6), 500: refused(95, 10), 1000: refused(100, 60)}
    assert choose(aligned, sizes, 0.05) == (500, True)
    assert choose(aligned, sizes, 0.6) == (500, True), "refusing everything separates nothing"
    assert choose(aligned, {100: refused(90, 20), 500: refused(100, 70)}, 0.05) == (100, False)
    assert choose(aligned, {500: refused(90, 5), 100: refused(90, 5)}, 0.05) == (100, True)


def test_a_prompt_decides_nothing_between_sizes() -> None:
    # J is equal within an error: more refusals of harmful requests; equal there, too: the smaller.
    assert choose(refused(70, 5), {100: refused(80, 4), 500: refused(81, 6)}, 0.05) == (500, True)
    assert choose(refused(70, 5), {100: refused(80, 6), 500: refused(80, 5)}, 0.05) == (100, True)
    assert choose(refused(70, 5), {100: refused(80, 5), 500: refused(90, 5)}, 0.05) == (500, True)


def test_an_adapter_that_carries_nothing_is_said_loudly() -> None:
    assert carry_warning(refused(30, 5), refused(60, 10)) is None
    assert carry_warning(refused(30, 5), refused(40, 5)) is None
    little = carry_warning(refused(30, 5), refused(33, 5))
    assert little
    assert "carries little: on the fine-tuned model J 25 → 28 (95 % interval of the change" in little
    nothing = carry_warning(refused(50, 10), refused(90, 60))
    assert nothing
    assert "CARRIES NOTHING" in nothing


def test_file_and_plan_need_no_torch() -> None:
    code = (
        "import sys, safemerge_recipes.recipe.training, safemerge_recipes.training.plan, "
        "safemerge_recipes.training.prepare; "
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
