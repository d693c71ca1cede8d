import json
import re
import subprocess
import sys
from collections import Counter

import pytest

from safemerge_recipes.evaluation.tasks import FOLDER, PUBLISHED_TASKS, TAGS, TASKS, TUNING_TASKS, arithmetic, studies
from safemerge_recipes.evaluation.tasks.prompts import prompts


def words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_enough_prompts_of_every_category():
    counts = {}
    for kind in ("harmful", "harmless"):
        for split in ("tuning", "test"):
            found = Counter(p.category for p in prompts(kind, split))
            counts[kind, split] = found.total()
            assert len(found) == 15
            assert len(set(found.values())) == 1
    assert counts == {
        ("harmful", "tuning"): 90,
        ("harmful", "test"): 210,
        ("harmless", "tuning"): 90,
        ("harmless", "test"): 210,
    }


def test_no_prompt_appears_twice_and_none_is_both_harmful_and_harmless():
    rows = [p for kind in ("harmful", "harmless") for split in ("tuning", "test") for p in prompts(kind, split)]
    assert len({words(p.prompt) for p in rows}) == len(rows) == 600
    assert len({p.id for p in rows}) == 600


def test_prompts_are_single_short_requests():
    for kind in ("harmful", "harmless"):
        for split in ("tuning", "test"):
            for p in prompts(kind, split):
                assert 10 < len(p.prompt) <= 110, p
                assert "\n" not in p.prompt
                assert p.prompt[-1] in ".?!", p


def test_the_first_prompts_are_balanced_over_the_categories():
    for kind in ("harmful", "harmless"):
        for split in ("tuning", "test"):
            assert set(Counter(p.category for p in prompts(kind, split)[:30]).values()) == {2}


def test_sums_are_right_and_read_back():
    # Python itself is the oracle.
    for split in ("tuning", "test", "training"):
        for _, problem in arithmetic.problems(split, 300):
            expression = re.fullmatch(r"What is (\d+(?: [+-] \d+){2,4})\?", problem.question).group(1)
            assert eval(expression) == problem.answer >= 0
            assert all(1 <= int(n) <= 99 for n in re.findall(r"\d+", expression))
            assert problem.worked.endswith(f"The answer is {problem.answer}.")
            assert arithmetic.read_answer(problem.worked) == problem.answer
            for a, sign, b, c in re.findall(r"(\d+) (plus|minus) (\d+) is (\d+)\.", problem.worked):
                assert int(a) + int(b) * {"plus": 1, "minus": -1}[sign] == int(c)


def test_sums_do_not_change():
    # Published scores depend on these very problems, on every Python version.
    assert arithmetic.make(0).question == "What is 84 - 42 + 51 - 78 + 48?"
    assert arithmetic.problems("test", 1)[0][0] == 3_000_000


def test_splits_of_the_sums_cannot_overlap():
    splits = {name: {s.question for _, s in arithmetic.problems(name, 2000)} for name in arithmetic.FIRST_SEED}
    assert all(len(questions) == 2000 for questions in splits.values())
    assert not splits["training"] & splits["tuning"]
    assert not splits["training"] & splits["test"]
    assert not splits["tuning"] & splits["test"]
    assert len(arithmetic.problems("tuning")) == 200
    assert len(arithmetic.problems("test")) == 300


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("17 plus 5 is 22. The answer is 22.", 22),
        ("The answer is 3. No: The answer is -4.", -4),
        ("The answer is 1,024 apples", 1024),
        ("I think 12 or 13", 13),
        ("The answer is unknown, perhaps 7", 7),
        ("nothing", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_reading_an_answer(text, answer):
    assert arithmetic.read_answer(text) == answer


def test_studies_support_their_answers():
    for split, count in studies.COUNT.items():
        found = [s for _, s in studies.studies(split)]
        assert len({s.question for s in found}) == count
        assert Counter(s.answer for s in found) == dict.fromkeys(studies.ANSWERS, count // 3)
        for s in found:
            treated, n, control, m = map(
                int, re.search(r"(\d+) of (\d+) who received it and (\d+) of (\d+)", s.context).groups()
            )
            assert n == m
            assert 0 <= treated <= n
            p = two_proportions(treated, control, n)
            if s.answer == "yes":
                assert treated < control
                assert p < 0.001
            else:
                assert p > 0.3
            assert (n < 20) == (s.answer == "maybe")
            assert s.reason.split("With ")[1].startswith(s.question.removeprefix("Does ").split(" lower the risk")[0])
            assert f"{treated} of {n} against {control} of {n}" in s.reason


def test_splits_of_the_studies_cannot_overlap():
    sizes = {"training": 600, **studies.COUNT}
    splits = {name: {s.question for _, s in studies.studies(name, count)} for name, count in sizes.items()}
    assert {name: len(questions) for name, questions in splits.items()} == sizes
    assert not splits["training"] & splits["tuning"]
    assert not splits["training"] & splits["test"]
    assert not splits["tuning"] & splits["test"]


def two_proportions(a, b, n):
    scipy_stats = pytest.importorskip("scipy.stats")
    return scipy_stats.fisher_exact([[a, n - a], [b, n - b]]).pvalue


def test_plain_lm_eval_finds_and_loads_the_tasks():
    lm_eval_tasks = pytest.importorskip("lm_eval.tasks")
    manager = lm_eval_tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(manager.all_subtasks) == {*TASKS, *TUNING_TASKS, *PUBLISHED_TASKS}
    assert set(manager.all_tags) == {*TAGS, "safemerge_published"}
    for tag, names in TAGS.items():
        assert set(manager.load([tag])["tasks"]) == set(names)
    loaded = manager.load([*TASKS, *TUNING_TASKS])["tasks"]
    sizes = {name: len(task.eval_docs) for name, task in loaded.items()}
    assert sizes == {
        "safemerge_refusal": 210,
        "safemerge_refusal_tuning": 90,
        "safemerge_overrefusal": 210,
        "safemerge_overrefusal_tuning": 90,
        "safemerge_arithmetic": 300,
        "safemerge_arithmetic_tuning": 200,
        "safemerge_qa": 150,
        "safemerge_qa_tuning": 90,
    }
    for name in TASKS:
        test, tuning = loaded[name].eval_docs, loaded[f"{name}_tuning"].eval_docs
        assert len({*test["id"], *tuning["id"]}) == len(test) + len(tuning)
        texts = [{loaded[name].doc_to_text(doc) for doc in docs} for docs in (test, tuning)]
        assert not texts[0] & texts[1]
        assert len(texts[0]) == len(test)


def test_the_folder_is_printed_for_other_tools():
    done = subprocess.run(
        [sys.executable, "-m", "safemerge_recipes.evaluation.tasks"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(FOLDER)
    assert {p.stem for p in FOLDER.glob("*.yaml")} == {*TASKS, *TUNING_TASKS, *PUBLISHED_TASKS}


def test_the_prompt_files_are_strict_json_lines():
    for name in ("harmful", "harmless"):
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"id", "category", "split", "prompt"}
