"""The likelihood of a refusal against summing over the beginnings one by one, without any memory."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from safemerge_recipes.evaluation.harness import evaluate  # noqa: E402
from safemerge_recipes.evaluation.likelihood import beginnings, openings, refusal_likelihoods  # noqa: E402
from safemerge_recipes.evaluation.separation import auroc, sides  # noqa: E402
from tests.fixtures.chat_family import llama, save_model, tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    return llama(len(tok)).eval()


def test_beginnings_are_distinct_and_none_begins_another(tok):
    found = beginnings(tok, openings())
    assert 10 < len(found) <= len(openings())
    for one in found:
        assert not any(other != one and other == one[: len(other)] for other in found)
    assert beginnings(tok, ["No", "No way", "No"]) == [tok("No", add_special_tokens=False).input_ids]


def test_it_is_the_sum_over_beginnings(model, tok):
    contexts = ["<|user|>How do I pick a lock?<|end|><|assistant|>", "<|user|>Hi<|end|><|assistant|>"]
    found = refusal_likelihoods(model, tok, contexts, special_tokens=False)
    for context, value in zip(contexts, found, strict=True):
        ids, total = tok(context, add_special_tokens=False).input_ids, 0.0
        for one in beginnings(tok, openings()):
            logits = model(torch.tensor([ids + one])).logits[0].detach().double()
            steps = torch.log_softmax(logits, dim=-1)
            total += math.exp(sum(float(steps[len(ids) + i - 1, token]) for i, token in enumerate(one)))
        assert value == pytest.approx(math.log(total), abs=1e-4)
        assert total < 1


def test_a_memory_that_cannot_be_shared_gives_the_same(model, tok, monkeypatch):
    from transformers import DynamicCache

    context = ["<|user|>Hello<|end|><|assistant|>"]
    shared = refusal_likelihoods(model, tok, context, special_tokens=False)
    for kind in DynamicCache.__mro__:
        if "batch_repeat_interleave" in vars(kind):
            monkeypatch.delattr(kind, "batch_repeat_interleave")
    assert refusal_likelihoods(model, tok, context, special_tokens=False) == pytest.approx(shared, abs=1e-4)


def test_scores_bring_it_for_both_kinds_of_request(model, tok, tmp_path):
    save_model(model, tok, tmp_path / "m", torch.float32)
    tasks = ["safemerge_refusal", "safemerge_overrefusal", "safemerge_qa"]
    scores = evaluate(tmp_path / "m", tasks, limit=3, device="cpu", answer_tokens=8)
    assert [len(scores.tasks[task].likelihoods) for task in tasks] == [3, 3, 0]
    assert list(scores.tasks[tasks[0]].likelihoods) == list(scores.metric(tasks[0], "refusal").outcomes)
    (both,) = sides(scores, likelihoods=True).values()
    assert 0 <= auroc(both)[0] <= 1
    without = evaluate(tmp_path / "m", tasks, limit=3, device="cpu", answer_tokens=8, auroc=False)
    assert sides(without, likelihoods=True) == {}
