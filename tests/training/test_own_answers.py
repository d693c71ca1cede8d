"""Rows of a task that the model answers by itself, drawn from a tiny real model through its chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from safemerge_recipes import api
from safemerge_recipes.recipe.training import load_training
from safemerge_recipes.training import own
from safemerge_recipes.training.own import first_sentence, own_rows
from safemerge_recipes.training.rows import read_rows, without_copies
from tests.fixtures.chat_family import llama, save_adapter, save_model, tokenizer

pytest.importorskip("trl")
COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose own settings are greedy, an adapter on it, a task of like prompts, and a training file."""
    place = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    tok = tokenizer()
    model = llama(len(tok), tied=False)
    save_model(model, tok, place / "base", torch.float32)
    (place / "base" / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "repetition_penalty": 9.0}')
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("q_proj")}
    save_adapter(shapes, place / "alignment", 0, 0.05)
    task = [{"instruction": f"is the sum of {n} and 2 even", "output": "It is."} for n in range(COUNT)]
    task.append({"instruction": "plan a theft", "output": "First,", "kind": "harmful"})
    (place / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task))
    return place


def training_file(folder: Path, **changes: object) -> Path:
    content = {
        "model": {"adapter": "./alignment", "on": "./base"},
        "data": {"path": "safety.jsonl", "licence": "apache-2.0"},
        "preset": "small",
        "train": {"device": "cpu", "seed": 5},
    }
    path = folder / "safety.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return path


def test_answers_are_drawn_from_the_model_and_repeat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_rows([folder / "task.jsonl"])
    loaded = load_training(training_file(folder))  # its own rows are not there yet
    told: list[int] = []
    found = own_rows(folder / "task.jsonl", loaded, lambda event: told.append(getattr(event, "done", -1)))
    assert told == [0, 24, 30]
    assert {row.prompt for row in found} == {row.prompt for row in rows if row.kind is None}
    assert {row.kind for row in found} == {"task"}
    assert not any("theft" in row.prompt for row in found), "what says harmful is no task"
    answers = [row.answer for row in found]
    assert "It is." not in answers
    assert len(set(answers)) > COUNT / 2, "at temperature 1, whatever the model's own settings say"
    assert own_rows(folder / "task.jsonl", loaded) == found
    other = load_training(training_file(folder, train={"device": "cpu", "seed": 6}))
    assert [row.answer for row in own_rows(folder / "task.jsonl", other)] != answers
    monkeypatch.setattr(own, "COUNT", 7)
    few = [row.where for row in own_rows(folder / "task.jsonl", loaded)]
    assert few == [row.where for row in found[:7]] != [row.where for row in rows[:7]], "by the hash of a row"


def test_the_command_mixes_them_in_and_a_training_keeps_them(folder: Path, call) -> None:
    file, out = training_file(folder), folder / "safety.jsonl"
    task = folder / "task.jsonl"
    done = call("prepare-safety-data", "-o", out, "--own-answers", task, "--answered-by", file, "--json")
    assert done.code == 0, done.err
    assert done.json["training"]["task"] == COUNT
    plan = api.plan_training(file)
    assert plan.kinds()["task"] == COUNT, "they resemble each other, and none is dropped as a near copy"
    assert plan.dropped == 0
    out.unlink()


def test_what_does_not_fit_is_said_before_a_model_is_loaded(folder: Path, call) -> None:
    file, out = training_file(folder), folder / "new.jsonl"
    own_answers = ("--own-answers", folder / "task.jsonl")
    for more, code, said in (
        (own_answers, 2, "--own-answers and --answered-by go together"),
        (("--answered-by", file), 2, "--own-answers and --answered-by go together"),
        ((*own_answers, "--answered-by", folder / "task.jsonl"), 2, "not YAML"),
        ((*own_answers, "--answered-by", training_file(shutil.copytree(folder, folder / "b"), model="./no")), 3, "no"),
        (("--own-answers", folder / "none.jsonl", "--answered-by", file), 2, "none.jsonl"),
    ):
        done = call("prepare-safety-data", "-o", out, *more)
        assert done.code == code, done.err
        assert said in done.err
        assert "Traceback" not in done.err
        assert not out.exists()
    before = (folder / "task.jsonl").read_bytes()
    done = call("prepare-safety-data", "-o", folder / "task.jsonl", *own_answers, "--answered-by", file)
    assert (done.code, "is read, too" in done.err) == (2, True), done.err
    assert (folder / "task.jsonl").read_bytes() == before


def test_a_model_that_is_cut_short_is_said(folder: Path, call, tmp_path: Path) -> None:
    cut = shutil.copytree(folder / "base", tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    file = training_file(folder, model=str(cut.parent))
    done = call("prepare-safety-data", "-o", tmp_path / "o.jsonl", "--own-answers", folder / "task.jsonl",
                "--answered-by", file)  # fmt: skip
    assert (done.code, "model.safetensors" in done.err, "a bug" in done.err) == (3, True, False), done.err


def test_a_template_that_fails_on_a_row_is_said(folder: Path, call) -> None:
    template = folder / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'sum' in m.content %}{{ raise_exception('no sums') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    own_answers = ("--own-answers", folder / "task.jsonl", "--answered-by")
    file = training_file(folder, chat_template=str(template))
    done = call("prepare-safety-data", "-o", folder / "new.jsonl", *own_answers, file)
    assert (done.code != 0, "the chat template fails on rows of the task" in done.err) == (True, True), done.err
    assert "Traceback" not in done.err


def test_the_first_sentence() -> None:
    assert first_sentence(" Yes, 2.5 of them. So it does.") == "Yes, 2.5 of them."
    assert first_sentence("No \nmaybe") == "No"


def test_rows_of_a_task_are_no_copies(folder: Path) -> None:
    rows = read_rows([folder / "task.jsonl"])
    assert len(without_copies(rows)[0]) < COUNT / 2
    own_kind = own.own_rows(folder / "task.jsonl", load_training(training_file(folder)))
    assert without_copies(own_kind) == (own_kind, [])
