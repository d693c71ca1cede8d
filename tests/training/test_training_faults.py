"""Training that goes wrong: numbers that are none, memory that runs out, two runs at once, rows from elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml

from safemerge_recipes.errors import PlanError
from safemerge_recipes.recipe.training import load_training
from safemerge_recipes.sources.trained import RECORD_FILE, training_key
from safemerge_recipes.training.plan import plan_training
from safemerge_recipes.training.run import FILES, check_target, copy_adapter, train_adapter
from tests.fixtures.chat_family import llama, save_model, tokenizer

pytest.importorskip("trl")
ROWS = [
    {"prompt": f"plan a theft of crate {word}", "completion": "I can't help with that.", "kind": "harmful"}
    for word in ("amber", "birch", "cedar", "dune", "elm", "fern", "glen", "heath")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that cannot read one letter, and rows of which one has it."""
    place = tmp_path_factory.mktemp("faults")
    torch.manual_seed(0)
    tok = tokenizer()
    model = llama(len(tok), tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[tok("~", add_special_tokens=False).input_ids] = float("nan")
    save_model(model, tok, place / "base", torch.float32)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    broken = [*ROWS, {**ROWS[0], "prompt": "plan a theft of ~ in the harbour"}]
    (place / "broken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    return place


def training_file(folder: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "model": "./base",
        "data": {"path": "rows.jsonl", "licence": "mit", "near_copies": "keep"},
        "preset": "small",
        "train": {"epochs": 2, "batch": 1, "save_steps": 1, "device": "cpu"},
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path = folder / "safety.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_sound(
    folder: Path, call: Any, own_cache: Path
) -> None:
    from safetensors.torch import load_file

    path = training_file(folder, data={"path": "broken.jsonl"})
    done = call("train-adapter", path)
    assert done.code == 6, done.err
    assert "the loss is nan" in done.err
    assert "lower train.learning_rate" in done.err
    part = own_cache / "adapters" / f"{training_key(load_training(path))}.part"
    assert not part.with_suffix("").exists(), "no adapter came of it"
    (last,) = part.glob("size-*/checkpoints/checkpoint-*")
    assert f"{last.name} before it is kept" in done.err
    for values in load_file(last / "adapter_model.safetensors").values():
        assert torch.isfinite(values).all()
    again = call("train-adapter", path)
    assert again.code == 6, "it goes on from there, and meets the same row"
    assert last.is_dir()


@pytest.mark.slow  # a process of its own
def test_memory_that_runs_out_names_the_settings(folder: Path, own_cache: Path) -> None:
    long = [{**row, "prompt": f"{row['prompt']} {'and then some ' * 60}"} for row in ROWS]
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    path = training_file(folder, data={"path": "long.jsonl"}, train={"batch": 8, "micro_batch": 8, "max_length": 512})
    code = (
        "import resource, sys\n"
        "from safemerge_recipes.training import trainer\n"
        "from safemerge_recipes.cli.app import main\n"
        "begin = trainer.load_model\n"
        "def limited(*given):\n"
        "    found = begin(*given)\n"
        "    import trl, datasets\n"
        "    from trl import SFTTrainer\n"
        "    room = SFTTrainer.train\n"
        "    def train(*a, **o):\n"
        "        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), resource.RLIM_INFINITY))\n"
        "        return room(*a, **o)\n"
        "    SFTTrainer.train = train\n"
        "    return found\n"
        "import safemerge_recipes.training.run as run\n"
        "run.load_model = limited\n"
        "main(['train-adapter', sys.argv[1]])\n"
    )
    environment = {**os.environ, "SAFEMERGE_CACHE": str(own_cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 4, done.stderr
    assert "out of memory with 8 rows of up to 512 tokens at once; lower train.micro_batch" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_runs_of_one_adapter_do_not_meet(folder: Path, call: Any, own_cache: Path) -> None:
    path = training_file(folder)
    part = own_cache / "adapters" / f"{training_key(load_training(path))}.part"
    code = (
        "import sys; from pathlib import Path; from safemerge_recipes.engine.folder import locked; "
        "part = Path(sys.argv[1]); part.mkdir(parents=True)\n"
        "with locked(part, part.name): print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(part)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    done = call("train-adapter", path)
    assert done.code == 4
    assert "another run is writing it" in done.err
    assert str(process.pid) in done.err
    process.communicate()
    assert call("train-adapter", path).code == 0, "the lock went with its process"


def test_a_copy_goes_into_an_empty_folder_or_over_an_earlier_copy_whole_or_not(tmp_path: Path) -> None:
    record = {"format": 1}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in FILES[:2]:
        (adapter / name).write_text(name)
    fresh = tmp_path / "fresh"
    stages = [
        [f".{name}.0123456789abcdef.tmp" for name in FILES],
        [RECORD_FILE, ".README.md.0123456789abcdef.tmp"],
        [RECORD_FILE, "README.md", FILES[0]],
    ]
    for left in stages:  # what a kill leaves
        fresh.mkdir()
        for name in left:
            (fresh / name).write_text("cut")
        check_target(fresh)
        shutil.rmtree(fresh)
    for name in ("thesis.txt", "adapter_config.json", ".thesis.txt.0123456789abcdef.tmp"):
        fresh.mkdir()
        (fresh / name).write_text("precious")
        with pytest.raises(PlanError, match="holds something that no training wrote"):
            copy_adapter(adapter, fresh, record)
        assert [path.read_text() for path in fresh.iterdir()] == ["precious"]
        shutil.rmtree(fresh)
    fresh.write_text("precious")
    with pytest.raises(PlanError, match="Not a directory"):
        check_target(fresh)


def test_an_output_that_is_in_the_way_is_told_before_anything_is_trained(
    folder: Path, call: Any, own_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = call("train-adapter", training_file(folder, train={"learning_rate": 0.00031}), "-o", tmp_path)
    assert (done.code, "holds something that no training wrote" in done.err) == (4, True), done.err
    assert not (own_cache / "adapters").exists()


def test_a_kill_while_what_is_done_with_is_removed_loses_no_training(folder: Path, own_cache: Path) -> None:
    loaded = load_training(training_file(folder))
    part = own_cache / "adapters" / f"{training_key(loaded)}.part"
    (part / "size-8").mkdir(parents=True)
    (part / "size-8" / "run.json").write_text("{}")  # the last file that was left of it
    for name in FILES:
        (part / name).write_text('{"rows": 8, "settings": {}}')
    found = train_adapter(loaded)
    assert found.path == part.with_suffix("")
    assert sorted(path.name for path in found.path.iterdir()) == sorted([*FILES, "safemerge.lock"])


def test_rows_come_from_an_installed_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    (tmp_path / "safetyrows" / "data").mkdir(parents=True)
    shutil.copy(folder / "rows.jsonl", tmp_path / "safetyrows" / "data" / "rows.jsonl")
    (tmp_path / "safetyrows-1.0.dist-info").mkdir()
    (tmp_path / "safetyrows-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: safetyrows\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = {"licence": "mit", "near_copies": "keep", "package": "safetyrows:safetyrows/data/rows.jsonl"}
    path = folder / "package.yaml"
    path.write_text(yaml.safe_dump({"model": "./base", "data": given, "preset": "small"}))
    plan = plan_training(load_training(path))
    assert plan.kinds() == {"harmful": len(ROWS)}
    for package, words in (("safetyrows:nowhere.jsonl", "has no 'nowhere.jsonl'"), ("notthere:a.jsonl", "pip install")):
        path.write_text(yaml.safe_dump({"model": "./base", "data": {**given, "package": package}, "preset": "small"}))
        done = call("train-adapter", path, "--dry-run")
        assert done.code == 3
        assert words in done.err


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for one file of one dataset."""

    content = b""

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, body: bool) -> None:
        found = self.path.startswith("/datasets/org/set/resolve/main/rows.jsonl")
        self.send_response(200 if found else 404)
        if found:
            blob = b"blob %d\0" % len(self.content) + self.content  # as git names it
            self.send_header("ETag", f'"{hashlib.sha1(blob).hexdigest()}"')
            self.send_header("X-Repo-Commit", "1" * 40)
            self.send_header("Content-Length", str(len(self.content)))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()
        if found and body:
            self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


def test_rows_come_from_the_hub(folder: Path, tmp_path: Path) -> None:
    Hub.content = (folder / "rows.jsonl").read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}

    def plan(place: str, **more: str) -> subprocess.CompletedProcess[str]:
        path = folder / "hub.yaml"
        given = {"licence": "mit", "near_copies": "keep", "hub": place}
        path.write_text(yaml.safe_dump({"model": "./base", "data": given, "preset": "small"}))
        command = [sys.executable, "-m", "safemerge_recipes", "train-adapter", str(path), "--dry-run", "--json"]
        return subprocess.run(command, capture_output=True, text=True, env={**environment, **more})

    try:
        done = plan("org/set:rows.jsonl")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rows"] == {str(len(ROWS)): {"harmful": len(ROWS)}}
        gone = plan("org/set:nowhere.jsonl")
        assert gone.returncode == 3
        assert "the hub does not give it" in gone.stderr
    finally:
        server.shutdown()
        server.server_close()
    kept = plan("org/set:rows.jsonl", HF_HUB_OFFLINE="1")
    assert kept.returncode == 0, "once here, it is found without the hub"
    assert json.loads(kept.stdout)["key"] == json.loads(done.stdout)["key"]
