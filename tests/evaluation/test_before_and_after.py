"""What is known before a merge costs, and what is kept when scoring fails or stops after it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("torch")
from safemerge_recipes.cli import app as cli
from safemerge_recipes.engine.manifest import replace_files
from safemerge_recipes.errors import CheckError, WriteError
from safemerge_recipes.evaluation import harness
from safemerge_recipes.evaluation.chat import check_template
from safemerge_recipes.evaluation.harness import Subject, evaluate, score
from safemerge_recipes.evaluation.rounds import Rounds
from safemerge_recipes.evaluation.store import Store
from safemerge_recipes.evaluation.suite import load_suite
from tests.fixtures.chat_family import make_family

TASKS = ["safemerge_refusal", "safemerge_qa"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(*arguments, code=0):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    assert end.value.code == code


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.tasks=[safemerge_refusl]", "did you mean safemerge_refusal"),
        ("evaluate.tasks=[safemerge_hexphi]", "not on this machine"),
        ("evaluate.task_path=./nowhere", "expected one with lm-eval tasks"),
        ("evaluate.backend=vlm", "lm-eval has no such model; did you mean vllm"),
        ("evaluate.backend=vllm", "try `pip install vllm`"),
    ],
)
def test_what_is_wrong_with_the_evaluation_is_said_before_anything_is_written(family, tmp_path, capsys, override, said):
    run("run", family, "--output", tmp_path / "out", "--set", override, "--device", "cpu", code=6)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out*"))
    run("run", family, "--output", tmp_path / "out", "--set", override, "--device", "cpu", "--no-evaluate")
    assert (tmp_path / "out" / "safemerge_manifest.json").exists()


def test_a_missing_extra_is_one_message_before_the_merge(family, tmp_path):
    hide = "import sys; sys.modules['lm_eval'] = None; from safemerge_recipes.cli.app import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", hide, "run", str(family), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 6
    assert "pip install 'safemerge-recipes[eval]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_sweeps_and_probes_know_what_they_need_before_they_measure(family, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("safemerge_recipes.evaluation.experiments.workbench.prepare", None)  # nothing may be measured
    for verb in (("sweep", "--tau", "0.1"), ("probe",)):
        for tasks, missing in (("safemerge_refusal,safemerge_overrefusal", "utility"), ("safemerge_qa", "refusal")):
            place = ("--output", tmp_path / "s", "--device", "cpu")
            run(verb[0], family, *verb[1:], "--tasks", tasks, *place, code=6)
            assert f"lacks a {missing} task" in capsys.readouterr().err
    run("sweep", family, "--tau", "0.1", "--set", "evaluate.backend=huggingface", *place, code=6)
    assert "which hf alone can patch" in capsys.readouterr().err
    run("sweep", family, "--tau", "0.1", "--tasks", "safemerge_refusal,hellaswag", *place, code=6)
    assert "has no tuning split" in capsys.readouterr().err


def test_a_failure_after_the_merge_names_the_output_and_the_way_on(family, tmp_path, capsys, monkeypatch):
    def fail(*arguments):
        raise CheckError("evaluation of safemerge_arithmetic failed: the weather")

    own = harness._run
    monkeypatch.setattr(harness, "_run", lambda *given: (own if "refusal" in given[2] else fail)(*given))
    run("run", family, "--output", tmp_path / "out", "--device", "cpu", code=6)
    said = capsys.readouterr().err
    assert "the weather" in said
    assert f"{tmp_path / 'out'} is merged and sound; `safemerge evaluate {family} --output {tmp_path / 'out'}`" in said
    run("verify", tmp_path / "out")
    # What was scored of the first model is not scored again.
    scored = []
    monkeypatch.setattr(harness, "_run", lambda *given: scored.append(given[2]) or own(*given))
    run("evaluate", family, "--output", tmp_path / "out", "--device", "cpu")
    assert scored == ["safemerge_arithmetic", *2 * ["safemerge_refusal", "safemerge_arithmetic"]]
    run("verify", tmp_path / "out")
    scored.clear()
    run("evaluate", family, "--output", tmp_path / "out", "--device", "cpu")
    assert scored == []


def test_an_interrupted_task_goes_on_with_the_next_prompt(family, tmp_path):
    folder, suite = family.parent / "base", load_suite(TASKS)
    expected = evaluate(folder, TASKS, limit=6, batch_size=2, device="cpu", dtype="float32", keep_answers=True)
    store = tmp_path / "kept.jsonl"
    subject = Subject("base", "its bytes", lambda: (folder, None))
    same = {"limit": 6, "batch_size": 2, "device": "cpu", "dtype": "float32", "keep_answers": True}
    for wanted, task in ((3, "safemerge_refusal"), (2, "safemerge_qa")):
        steps = []

        def stop(name, done, total, task=task, wanted=wanted, steps=steps):
            steps.append((name, done))
            if (name, done) == (task, wanted):
                raise KeyboardInterrupt

        with pytest.raises(WriteError, match="stopped while scoring base; what is scored is kept"):
            score(subject, suite, store=Store(store), tell=stop, **same)
        # The first prompts of the second try were there already.
        assert steps[0][1] == 0 if task == "safemerge_refusal" else ("safemerge_refusal", 3) in steps
    with open(store, "ab") as file:
        file.write(b'{"key": "torn')
    steps = []
    found = score(subject, suite, store=Store(store), tell=lambda *step: steps.append(step), **same)
    assert found.tasks == expected.tasks
    assert steps[0] == ("safemerge_refusal", 6, 6)
    assert ("safemerge_qa", 0, 6) not in steps
    assert steps[-1] == ("safemerge_qa", 6, 6)


def test_progress_counts_models_tasks_and_prompts(family):
    suite, steps = load_suite(TASKS), []
    rounds = Rounds(steps.append, 2, suite, 3)
    for place, name in enumerate(("one", "two"), 1):
        subject = Subject(name, None, lambda: (family.parent / "base", None))
        score(subject, suite, limit=3, device="cpu", tell=rounds.of(place, name))
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].model, steps[-1].place, steps[-1].models) == ("two", 2, 2)
    assert steps[-1].done == steps[-1].total == 2 * (3 + 3)
    assert {step.task for step in steps} == set(TASKS)
    asked = {step.done for step in steps if (step.task, step.place) == ("safemerge_refusal", 1)}
    assert asked >= {1, 2, 3}, "it moves while likelihoods are measured, after the answers"


def test_git_is_not_run_in_the_users_folder(family, tmp_path, monkeypatch, capfd):
    """A `git` that leaves a trace stands first on the path."""
    (tmp_path / "git").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    evaluate(family.parent / "base", ["safemerge_qa"], limit=1, device="cpu")
    assert not (tmp_path / "asked").exists()
    assert capfd.readouterr().err == ""


def test_a_bar_is_drawn_on_a_terminal(family, monkeypatch):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read():
        with contextlib.suppress(OSError):  # the other side is closed
            while piece := os.read(ours, 4096):
                shown.append(piece)

    reading = threading.Thread(target=read)
    reading.start()
    monkeypatch.setenv("TERM", "xterm")
    with open(theirs, "w", buffering=1) as terminal, contextlib.redirect_stderr(terminal):
        run("evaluate", family.parent / "base", "--tasks", "safemerge_refusal", "--limit", "40", "--device", "cpu")
    reading.join(20)
    os.close(ours)
    assert b"model 1 of 1, base: safemerge_refusal" in b"".join(shown)
    assert b"/40" in b"".join(shown)


def test_ctrl_c_while_scoring_says_what_is_kept(family, tmp_path, capsys, monkeypatch):
    """The signal comes between two prompts, in the middle of lm-eval's work."""
    own, answered = Store.keep_answer, []

    def keep(self, *given):
        own(self, *given)
        answered.append(given)
        if len(answered) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Store, "keep_answer", keep)
    options = ("--set", "evaluate.limit=20", "--set", "evaluate.batch_size=1", "--device", "cpu")
    run("run", family, "--output", tmp_path / "out", *options, code=5)
    said = capsys.readouterr().err
    assert list((tmp_path / "cache" / "scores").glob("*.jsonl"))
    assert "stopped while scoring merged; what is scored is kept" in said
    assert "is merged and sound; `safemerge evaluate" in said
    run("verify", tmp_path / "out")


# The folder is what its manifest says, at every moment


def test_a_kill_at_any_moment_leaves_a_sound_folder_that_the_next_run_finishes(family, tmp_path):
    made = tmp_path / "made"
    run("run", family, "--output", made, "--no-evaluate", "--device", "cpu")
    script = """
import os, signal, sys
from pathlib import Path
from safemerge_recipes.engine.manifest import replace_files

left, real = [int(sys.argv[2])], os.replace

def replace(*paths, **folders):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*paths, **folders)

os.replace = replace
replace_files(Path(sys.argv[1]), {"README.md": "new", "safemerge_scores.json": "{}", "b.svg": b"picture"})
"""
    for moment in range(6):
        copy = tmp_path / f"killed-{moment}"
        shutil.copytree(made, copy)
        done = subprocess.run([sys.executable, "-c", script, str(copy), str(moment)])
        assert done.returncode == (-signal.SIGKILL if moment < 5 else 0)
        run("verify", copy)
        replace_files(copy, {"README.md": "newer", "safemerge_scores.json": "{}", "b.svg": b"picture"})
        run("verify", copy)
        outputs = json.loads((copy / "safemerge_manifest.json").read_text())["outputs"]
        assert all(set(entry) == {"file", "size", "sha256"} for entry in outputs)
        (copy / "README.md").write_text("else")
        run("verify", copy, code=6)


# Chat templates


def test_chat_templates_are_looked_at(tmp_path):
    config, own = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    config.write_text("{}")
    assert "evaluate.chat_template: false" in (check_template({config.name: config}, True) or "")
    assert check_template({config.name: config}, False) is None
    config.write_text(json.dumps({"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}))
    assert check_template({config.name: config}, True) is None
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "{{ messages }}"}]}))
    assert check_template({config.name: config}, True) is None
    own.write_text("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}")
    assert check_template({own.name: own}, True) is None
    own.write_text("{% for m in messages %}\n{{ m ")
    with pytest.raises(CheckError, match="chat template, line 2"):
        check_template({own.name: own, config.name: config}, True)
