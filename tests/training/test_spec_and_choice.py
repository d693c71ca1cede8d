"""The training file, presets, which size is kept, and what is said loudly. No model is loaded here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from safemerge_recipes.errors import RecipeError
from safemerge_recipes.recipe.training import Training, load_training
from safemerge_recipes.training.choose import Rates, carry_warning, choose
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


def rates(harmful: float, harmless: float) -> Rates:
    return Rates(harmful, harmless, 100, 100)


def test_the_most_refusing_adapter_wins_only_among_those_that_do_not_refuse_all() -> None:
    aligned = rates(0.7, 0.05)
    sizes = {100: rates(0.8, 0.06), 500: rates(0.9, 0.10), 1000: rates(1.0, 0.60)}
    assert choose(aligned, sizes, 0.05) == (500, True)
    assert choose(aligned, sizes, 0.6) == (1000, True)
    assert choose(aligned, {100: rates(0.9, 0.2), 500: rates(1.0, 0.7)}, 0.05) == (100, False)
    assert choose(aligned, {500: rates(0.9, 0.05), 100: rates(0.9, 0.05)}, 0.05) == (100, True)


def test_an_adapter_that_carries_nothing_is_said_loudly() -> None:
    assert carry_warning(rates(0.3, 0.05), rates(0.6, 0.1)) is None
    little = carry_warning(rates(0.3, 0.05), rates(0.33, 0.05))
    assert little
    assert "little" in little
    nothing = carry_warning(rates(0.5, 0.1), rates(0.9, 0.6))
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
