"""Every command that README and docs show is run over a tiny family, or parsed by the program with the reason why not.

A new command in a page fails `test_every_command_is_known` until it stands in `RUN` or `PARSED`.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from safemerge_recipes.cli.app import app, run_app
from tests.fixtures.gated_family import Family, make_family
from tests.fixtures.plain_family import make_family as make_plain

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
SHELLS = {"", "sh", "bash", "console", "shell"}
INLINE = re.compile(r"`((?:safemerge|safemerge-run) [^`\n]+)`")
GENERATED = {"docs/commands.md"}
"""Pages of usage lines, made from the program itself."""

RUN = {
    "README.md": {"safemerge-run recipe.yaml"},
    "docs/add-a-method.md": {"safemerge validate recipe.yaml", "safemerge-run recipe.yaml"},
    "docs/defenses.md": {
        "safemerge-run safemerge:defenses/resta --source base=./base --source aligned=./chat "
        "--source finetuned=./my-lora"
    },
    "docs/mergekit.md": {
        "safemerge import merge.yml -o recipe.yaml",
        "safemerge-run recipe.yaml",
        "safemerge mergekit-yaml merge.yml out/llama-2-7b-gsm8k-safe",
    },
    "docs/tutorial.md": {
        "safemerge validate recipes/demo/smollm2_arithmetic.yaml",
        "safemerge evaluate recipes/demo/smollm2_arithmetic.yaml --help",
    },
}
"""Commands that are run, by page."""
OWN = {"docs/hub.md": "tests/sharing/test_hub_page.py"}
"""Pages of which a test runs every line, whatever it is."""
DEMO = "takes the demo's 135 M model; `make demo` in CI runs it, tests/docs/test_notebook.py plans it over zeros"
RAY = "takes a Ray cluster; tests/engine/test_ray.py runs it"
TRAIN = "takes a 7 B model; tests/training/test_train_adapter.py and tests/evaluation/test_judge.py do it on tiny ones"
PARSED = {
    "README.md": {
        "safemerge train-adapter safety.yaml": TRAIN,
        "safemerge judge out/qwen2-7b-safe --kind llama-guard-3 --model meta-llama/Llama-Guard-3-8B": TRAIN,
    },
    "docs/tutorial.md": {
        "safemerge plan recipes/demo/smollm2_arithmetic.yaml": DEMO,
        "safemerge plan recipes/demo/smollm2_arithmetic.yaml --set gate.tau=0.05": DEMO,
        "safemerge plan recipes/demo/smollm2_arithmetic.yaml --json": DEMO,
        "safemerge-run recipes/demo/smollm2_arithmetic.yaml --output out/repaired --no-evaluate": DEMO,
        "safemerge verify out/repaired": DEMO,
        "safemerge verify out/repaired --deep": DEMO,
    },
    "docs/scale.md": {
        "safemerge-run recipe.yaml --executor ray": RAY,
        "safemerge-run recipe.yaml --executor ray --ray-address auto": RAY,
        "safemerge-run recipe.yaml --executor ray --ray-address ray://head:10001": RAY,
        "safemerge run recipe.yaml --part 1/8": "tests/engine/test_parts.py runs parts",
        "safemerge finalize recipe.yaml": "tests/engine/test_parts.py finalizes",
        "safemerge-run recipe.yaml --output s3://bucket/merged": "tests/storage/test_object_storage.py",
    },
    "docs/pipelines.md": {
        "safemerge --install-completion": "writes into the user's shell; tests/cli/test_habits.py asks for completions"
    },
}
"""Commands that are parsed by the program, by page, with the reason why they are not run."""


def blocks(page: Path) -> list[str]:
    """What a page shows for a shell."""
    return [text for language, text in BLOCK.findall(page.read_text()) if language in SHELLS]


def commands(page: Path) -> list[str]:
    """The program's commands in a page's blocks: without comments, and without what they are piped into."""
    found = []
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"\s*\$?\s*safemerge", line) else []
            words = words[1:] if words[:1] == ["$"] else words
            if words and words[0] in ("safemerge", "safemerge-run"):
                words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), None)]
                found.append(shlex.join(words))
    return found


def test_every_command_is_known() -> None:
    shown = {page.relative_to(ROOT).as_posix(): set(commands(page)) for page in PAGES}
    for page in set(shown) - GENERATED - set(OWN):
        assert shown[page] == RUN.get(page, set()) | set(PARSED.get(page, {})), page
        assert not RUN.get(page, set()) & set(PARSED.get(page, {}))
    assert set(RUN) | set(PARSED) | set(OWN) <= set(shown)
    assert all((ROOT / test).exists() and shown[page] for page, test in OWN.items())
    assert sum(map(len, RUN.values())) >= 8


def parsed(line: str) -> None:
    """Has the program parse a command line, without doing what it says."""
    program, *words = shlex.split(line)
    group: Any = get_command(run_app if program == "safemerge-run" else app)
    with contextlib.redirect_stdout(io.StringIO()):
        if program == "safemerge-run" or words[0].startswith("-"):
            group.make_context(program, words)
            return
        with group.make_context(program, [words[0]]) as context:
            command = group.get_command(context, words[0])
            assert command is not None, f"no verb {words[0]}"
            command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize(
    ("page", "line"), [(page, line) for page, lines in PARSED.items() for line in lines if "completion" not in line]
)
def test_what_is_not_run_is_parsed(page: str, line: str) -> None:
    parsed(line)
    assert PARSED[page][line]


def test_the_reasons_name_tests_that_are_there() -> None:
    for reason in {reason for lines in PARSED.values() for reason in lines.values()}:
        for folder, names in re.findall(r"tests/(\w+)/((?:test_\w+\.py(?:, | and )?)+)", reason):
            for name in re.findall(r"test_\w+\.py", names):
                assert (ROOT / "tests" / folder / name).exists(), name


def test_a_wrong_command_would_be_noticed() -> None:
    for line in ("safemerge frobnicate x", "safemerge plan x --no-such-option", "safemerge-run"):
        with pytest.raises((Exception, SystemExit)):  # click's own, which is not the installed one's
            parsed(line)


def spans() -> Iterator[tuple[str, str]]:
    for page in [*PAGES, ROOT / "CHANGELOG.md", *sorted(ROOT.glob("safemerge_recipes/*/README.md"))]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for line in INLINE.findall(" ".join(text.split("\n")) if page.suffix == ".md" else text):
            yield page.name, line


def test_verbs_and_options_in_prose_exist() -> None:
    verbs: Any = get_command(app).commands  # type: ignore[attr-defined]
    seen = 0
    for page, line in spans():
        program, *words = re.split(r"\s+", line)
        verb = "run" if program == "safemerge-run" else next((w for w in words if not w.startswith("-")), None)
        if verb is None or not re.fullmatch(r"[a-z-]+", verb):
            continue
        assert verb in verbs, f"{page}: {line}"
        options = {option for part in verbs[verb].params for option in part.opts} | {"--help", "-h", "--"}
        if verb == "mergekit-yaml":
            continue  # takes mergekit's
        unknown = [w for w in words if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", w) and w.split("=")[0] not in options]
        assert not unknown, f"{page}: {line}: {unknown}"
        seen += 1
    assert seen > 20


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def test_makefile_targets_in_the_docs_exist() -> None:
    asked = {
        target
        for page in PAGES
        for block in blocks(page)
        for target in re.findall(r"^make ([a-z-]+)", block, flags=re.M)
    }
    assert {"demo", "test"} <= asked <= targets()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Full models whose configs name their architecture, as mergekit needs them."""
    import torch

    return make_family(tmp_path_factory.mktemp("docs"), "llama", torch.float32, architectures=["LlamaForCausalLM"])


Call = Callable[..., Any]


def ran(call: Call, line: str) -> Any:
    program, *words = shlex.split(line)
    done = call(*(["run"] if program == "safemerge-run" else []), *words)
    assert done.code == 0, f"{line}: {done.err}"
    return done


def test_the_readme_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, *_ = re.findall(r"^```yaml\n(# recipe\.yaml\n.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    make_plain(tmp_path)
    for name, place in (
        ("meta-llama/Llama-2-7b-hf", "./base"), ("meta-llama/Llama-2-7b-chat-hf", "./aligned"),
        ("my-org/llama2-gsm8k-lora", "./finetuned-adapter"), ("./safety-lora", "./safety-adapter"),
    ):  # fmt: skip
        assert name in text
        text = text.replace(name, place)
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for line in RUN["README.md"]:
        done = ran(call, f"{line} --dry-run --json")  # as the comment beside it says
        assert done.json["summary"]["gated"] == 14
        ran(call, line + " --allow-empty")
    assert (tmp_path / "out" / "llama-2-7b-gsm8k-safe" / "model.safetensors").exists()


def test_the_page_of_defenses_runs(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_plain(tmp_path)
    (tmp_path / "aligned").rename(tmp_path / "chat")
    (tmp_path / "finetuned-adapter").rename(tmp_path / "my-lora")
    monkeypatch.chdir(tmp_path)
    for line in commands(ROOT / "docs" / "defenses.md"):
        ran(call, line)
    assert (tmp_path / "out" / "resta" / "model.safetensors").exists()


def test_the_page_about_mergekit_runs(
    family: Family, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mergekit")
    page = ROOT / "docs" / "mergekit.md"
    (method,) = re.findall(r"^```yaml\n(merge_method: safemerge\n.*?)^```", page.read_text(), flags=re.M | re.S)
    for name, role in (
        ("meta-llama/Llama-2-7b-chat-hf", "aligned"), ("my-org/llama2-gsm8k", "finetuned"),
        ("my-org/llama2-safe", "safety"), ("meta-llama/Llama-2-7b-hf", "base"),
    ):  # fmt: skip
        assert name in method
        method = method.replace(name, str(family / role))
    monkeypatch.chdir(tmp_path)
    plain = f"models: [{{model: {family / 'finetuned'}}}, {{model: {family / 'safety'}}}]\nmerge_method: ties\n"
    plain += f"base_model: {family / 'aligned'}\nparameters: {{weight: 0.5, density: 0.5}}\n"
    for line in commands(page):
        Path("merge.yml").write_text(method if "mergekit-yaml" in line else plain)
        ran(call, line)
    assert Path("out/merge/model.safetensors").exists()
    assert Path("out/llama-2-7b-gsm8k-safe/model.safetensors").exists()


def test_what_the_tutorial_says_of_texts_runs(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in sorted(RUN["docs/tutorial.md"]):
        ran(call, line)


def test_the_page_that_adds_a_method_is_run_by_its_own_test() -> None:
    text = (Path(__file__).parent / "test_add_a_method.py").read_text()
    assert "for line in commands.splitlines()" in text
    assert RUN["docs/add-a-method.md"] == set(commands(ROOT / "docs" / "add-a-method.md"))


def test_containers_are_built_from_what_the_page_says() -> None:
    """podman is not part of a test machine; its file is linted in tests/cli/test_pipelines.py."""
    lines = [
        line
        for block in blocks(ROOT / "docs" / "pipelines.md")
        for line in block.splitlines()
        if line.startswith("podman")
    ]
    assert len(lines) == 2
    for line in lines:
        assert line.removeprefix("podman build -t safemerge .") in ("", line)
    words = lines[1].split("safemerge ", 1)[1]
    parsed(f"safemerge {words}")
    assert shutil.which("sh")
