"""Fault injection: runs a verb while one thing goes wrong, runs it again undisturbed, and says what was lost.

A `Fault` is code that runs ahead of the program in its process: a kill or an error at the n-th call by which a run
changes the disk, signals all the time, few descriptors, small files, closed streams. A `Verb` is a command with what
must be there before. `Bench.attempt` runs one under the other in a folder of its own. Lost is: a source or a user's
file that changed, a finished output that does not verify, a second run that does not end, or ends in other bytes, or
leaves something behind.
"""

from __future__ import annotations

import builtins
import errno
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from safemerge_recipes.engine.folder import MANIFEST_FILE
from safemerge_recipes.evaluation.experiments.results import is_results
from tests.fixtures.chat_family import RECIPE, make_family
from tests.fixtures.hub_server import TOKEN, environment, serve
from tests.fixtures.hub_world import SETTINGS
from tests.fixtures.program import WarmProgram, digests, run, snapshot

KILL = "SIGKILL at a call"
"""The kind of a kill in the table."""
CALLS = (
    "pwrite", "write", "copy_file_range", "open", "rename", "replace", "fsync", "unlink", "mkdir", "rmdir", "ftruncate",
)  # fmt: skip
"""The functions of `os` by which a run changes the disk; of `open` only what makes a file counts."""

# In the process of the program


def strike(how: str, at: int, counter: str = "", calls: tuple[str, ...] = CALLS) -> None:
    """Makes the `at`-th call of this process fail.

    Args:
        how: `kill` (before the call, after it, or with half of its bytes written, drawn with `at`), the name of an
            error for this one call, such as `EIO`, or `ENOSPC`, for this call and all that write after it.
        at: which call, from 1; 0 strikes never.
        counter: a file that always holds the number of calls so far.
        calls: functions of `os`.
    """
    count, lock, dice = [0], threading.Lock(), random.Random(at)
    real_write, kept = os.pwrite, os.open(counter, os.O_WRONLY | os.O_CREAT, 0o666) if counter else -1
    if kept >= 0:
        real_write(kept, b"         0", 0)

    def wrapped(name: str) -> Callable[..., object]:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            if name == "open" and not int(args[1]) & os.O_CREAT:  # type: ignore[call-overload]
                return real(*args, **kwargs)
            with lock:
                count[0] += 1
                number = count[0]
                if kept >= 0:
                    real_write(kept, b"%10d" % number, 0)
            if not at or number < at or (number > at and how != "ENOSPC"):
                return real(*args, **kwargs)
            if how != "kill":
                if name == "fspath":
                    raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)), str(args[0]))
                if number > at and name in ("unlink", "rmdir", "rename", "replace"):
                    return real(*args, **kwargs)  # a full disk lets these pass
                raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))
            moment = dice.choice(("before", "torn", "after"))
            try:
                if moment == "torn" and name in ("pwrite", "write"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])  # type: ignore[call-overload, arg-type]
                elif moment != "before":
                    real(*args, **kwargs)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
            return None

        return call

    for name in calls:
        setattr(os, name, wrapped(name))
    opened, counted = builtins.open, wrapped("fspath")
    sending = socket.socket.send

    def send(self: socket.socket, *args: object) -> int:
        counted(str(self.fileno()))  # what a server is told
        return sending(self, *args)  # type: ignore[arg-type]

    socket.socket.send = send  # type: ignore[method-assign, assignment]

    def opening(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if isinstance(file, (str, Path)) and set(mode) & set("wax+"):  # of a library: it writes in its own way
            counted(file)
        return opened(file, mode, *args, **kwargs)  # type: ignore[call-overload]

    builtins.open = opening  # type: ignore[assignment]


def interrupt() -> None:
    """Sends this process a signal every millisecond, so that system calls are interrupted all the time."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)


def watch(root: str) -> None:
    """Tells on standard error of every file below a folder that this package opens with flags that are not its own.

    What the libraries open that run and train models (transformers, torch, datasets) is theirs: they are given folders
    of the user's own.
    """
    import sys

    def see(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], (str, bytes)):
            return
        path, flags = os.path.abspath(os.fsdecode(arguments[0])), int(arguments[2])  # type: ignore[call-overload]
        if not path.startswith(root) or flags & (os.O_NONBLOCK | os.O_EXCL | os.O_DIRECTORY):
            return
        frame = sys._getframe(1)
        while frame.f_code.co_filename == __file__ and frame.f_back:  # what counts the calls lies in between
            frame = frame.f_back
        if "safemerge_recipes" in frame.f_code.co_filename:
            os.write(2, f"OPENED {path} {flags:o} {frame.f_code.co_filename}:{frame.f_lineno}\n".encode())

    sys.addaudithook(see)


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a run: its class in the table, and Python that runs ahead of the program."""

    kind: str
    before: str


def at_call(how: str, at: int, counter: Path | str = "") -> Fault:
    """The fault of `strike`."""
    names = {"kill": KILL, "ENOSPC": "disk full from a call on"}
    code = f"from tests.whole.faults import strike; strike({how!r}, {at}, {str(counter)!r})"
    return Fault(names.get(how, f"{how} at a call"), code)


SIGNALS = Fault("a signal every millisecond (EINTR)", "from tests.whole.faults import interrupt; interrupt()")
FEW_FILES = Fault(
    "32 descriptors", "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))"
)  # torch alone holds some
SMALL_FILES = Fault(
    "files of 10 kB at most", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))"
)
STREAMS = tuple(
    Fault("a closed stream", f"import os, sys; os.close({number}); sys.{name} = None; "
          "from safemerge_recipes.cli.streams import open_streams; open_streams()")
    for number, name in enumerate(("stdin", "stdout", "stderr"))
)  # fmt: skip

LASTING = (SIGNALS, FEW_FILES, SMALL_FILES, *STREAMS)
"""What lasts for a whole run."""

# Strangers' things in places where a file is expected


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def _folder(path: Path) -> None:
    path.mkdir()


PLANTED = {"a pipe": _pipe, "a link to a device": _device, "a link out of the folder": _link, "a folder": _folder}
"""What may lie where a file was, by its name in the table."""


def limited(seconds: int) -> None:
    """Ends this process after so many seconds of work, or of waiting without any; a busy machine is no hang."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    used = time.process_time()

    def look(*_: object) -> None:
        nonlocal used
        if time.process_time() - used < 0.01 * seconds:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGALRM)
        used = time.process_time()
        signal.alarm(seconds)

    signal.signal(signal.SIGALRM, look)
    signal.alarm(seconds)


def flip(path: Path, at: int) -> None:
    """Flips one bit of a file, counted from its first."""
    with open(path, "r+b") as file:
        file.seek(at // 8)
        byte = file.read(1)[0]
        file.seek(at // 8)
        file.write(bytes([byte ^ 1 << at % 8]))


# Verbs


@dataclass(frozen=True)
class Verb:
    """A command: its name in the table, its arguments by folder of the trial, and what it is given."""

    name: str
    arguments: Callable[[Path, Path], tuple[object, ...]]
    """Of (the trial's folder, the recipe)."""
    given: str = ""
    """Name of a finished thing of the bench that lies as `out` before; empty: nothing."""
    own: bool = False
    """Whether it writes beside its recipe, and so gets one of its own."""
    scores: bool = False
    """Whether it runs models, which takes seconds."""
    hub: bool = False
    """Whether it talks to the hub."""


SMALL = ("--set", "output.max_shard_size=40KB", "--no-evaluate")
ADAPTER = ("--set", "output.format=adapter", "--no-evaluate")
FP16 = ("--set", "output.dtype=float16", "--no-evaluate")
SCORED = ("--tasks", "safemerge_refusal", "--limit", "2", "--device", "cpu")
BOTH = ("--tasks", "safemerge_refusal,safemerge_arithmetic", "--limit", "2", "--device", "cpu")
GRID = ("--tau", "0.1,0.9", "--seeds", "0", *BOTH)


def verbs(judge: str, key: Path) -> tuple[Verb, ...]:
    """Every verb that reads or writes models, and every format of output.

    Args:
        judge: address of a server that judges.
        key: a private key to sign with.
    """
    judged = ("--kind", "openai", "--model", "m", "--url", judge)
    return (
        Verb("run", lambda at, recipe: ("run", recipe, "-o", at / "out", *SMALL)),
        Verb("run --force", lambda at, recipe: ("run", recipe, "-o", at / "out", *SMALL, "--force"), "other"),
        Verb("run, an adapter", lambda at, recipe: ("run", recipe, "-o", at / "out", *ADAPTER)),
        Verb("run, fp16", lambda at, recipe: ("run", recipe, "-o", at / "out", *FP16)),
        Verb("plan", lambda at, recipe: ("plan", recipe)),
        Verb("validate", lambda at, recipe: ("validate", recipe)),
        Verb("lock", lambda at, recipe: ("lock", recipe), own=True),
        Verb("controls", lambda at, recipe: ("controls", recipe, "-o", at / "controls")),
        Verb("verify", lambda at, recipe: ("verify", at / "out"), "full"),
        Verb("verify --deep", lambda at, recipe: ("verify", "--deep", at / "out"), "full"),
        Verb("report", lambda at, recipe: ("report", at / "out"), "scored"),
        Verb("sign", lambda at, recipe: ("sign", at / "out", "--private-key", key), "full"),
        Verb("publish", lambda at, recipe: ("publish", at / "out", "--repo", f"ann/{at.name}", "--branch", "main",
                                            "--private-key", key, "--upload"), "full", hub=True),
        Verb("judge", lambda at, recipe: ("judge", at / "out", *judged), "scored", scores=True),
        Verb("evaluate", lambda at, recipe: ("evaluate", at / "out", *SCORED), "full", scores=True),
        Verb("compare", lambda at, recipe: ("compare", recipe.parent / "base", at / "out", *SCORED), "full",
             scores=True),
        Verb("sweep", lambda at, recipe: ("sweep", recipe, "-o", at / "sweep", *GRID), scores=True),
        Verb("probe", lambda at, recipe: ("probe", recipe, "-o", at / "probe", *BOTH), scores=True),
        Verb("train-adapter", lambda at, recipe: ("train-adapter", recipe.parent / "train.yaml", "-o", at / "lora"),
             scores=True),
        Verb("prepare-safety-data", lambda at, recipe: ("prepare-safety-data", recipe.parent / "rows.jsonl",
                                                        "-o", at / "rows.jsonl")),
    )  # fmt: skip


TRAINING = """
model: ./base
data: {path: rows.jsonl, licence: apache-2.0, near_copies: keep}
preset: small
train: {epochs: 2, batch: 4, device: cpu, save_steps: 1}
"""


def _rows() -> str:
    words = ("amber", "birch", "cedar", "dune")
    rows = [{"prompt": f"plan a theft of crate {word}", "completion": "I can't help with that.", "kind": "harmful"}
            for word in words]  # fmt: skip
    rows += [{"prompt": f"what grows beside a {word}", "completion": "Moss and grass.", "kind": "harmless"}
             for word in ("river", "hedge", "tower", "lake")]  # fmt: skip
    return "".join(json.dumps(row) + "\n" for row in rows)


class _Judge(BaseHTTPRequestHandler):
    """Finds every answer safe, as an OpenAI-compatible server."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        data = json.dumps({"choices": [{"message": {"role": "assistant", "content": "safe"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _key(path: Path) -> Path:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(made.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    return path


LIGHT = (
    "huggingface_hub.hf_api", "huggingface_hub.file_download", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
)  # fmt: skip
"""What the program loads sooner or later of others' libraries."""
HEAVY = (
    *LIGHT, "safemerge_recipes.evaluation.harness", "lm_eval.evaluator", "lm_eval.tasks",
    "lm_eval.models.huggingface", "transformers.generation.utils", "trl", "peft", "datasets",
    "safemerge_recipes.training.run", "lm_eval.models",
)  # fmt: skip
"""What the program loads sooner or later where models run."""


# Trials


@dataclass
class Row:
    """A class of fault under one verb: how often it was tried, how often it struck, and what was lost."""

    tried: int = 0
    struck: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, other: Row) -> None:
        """Counts another's trials as well."""
        self.tried, self.struck, self.lost = (
            self.tried + other.tried,
            self.struck + other.struck,
            self.lost + other.lost,
        )


Rows = dict[tuple[str, str], Row]
"""(kind of fault, verb) -> its row."""


def table(rows: Rows, by: int = 0) -> str:
    """Rows as Markdown, summed up by kind of fault (0) or by verb (1): tried, how many runs it ended, lost."""
    whole: dict[str, Row] = {}
    for key, row in rows.items():
        whole.setdefault(key[by], Row()).add(row)
    lines = [f"| {('what goes wrong', 'verb')[by]} | tried | runs that it ended | lost |", "|---|---|---|---|"]
    lines += [f"| {name} | {row.tried} | {row.struck} | {len(row.lost)} |" for name, row in whole.items()]
    return "\n".join(lines)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Bench:
    """A family, finished outputs of it, a warm program, and the table of what was tried."""

    def __init__(self, root: Path, *, scoring: bool = True) -> None:
        """`scoring`: whether verbs that run models are tried, too."""
        self.root = root
        self.rows: Rows = {}
        self.recipe = make_family(root / "family", RECIPE.replace("limit: 4", "limit: 2, answer_tokens: 8"))
        (root / "family" / "train.yaml").write_text(TRAINING)
        (root / "family" / "rows.jsonl").write_text(_rows())
        self._judge = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
        threading.Thread(target=self._judge.serve_forever, daemon=True).start()
        self._serving = serve()
        self.hub = self._serving.__enter__()
        with _environment(HF_ENDPOINT=self.hub.url):
            self.warm = WarmProgram(root, *(HEAVY if scoring else LIGHT))
        known = verbs(f"http://127.0.0.1:{self._judge.server_port}/v1", _key(root / "key.pem"))
        self.verbs = tuple(verb for verb in known if scoring or not verb.scores)
        self.sources = snapshot(root / "family")
        self._trials = 0
        self._expected: dict[str, tuple[int, dict[str, str], int]] = {}
        self.opened: dict[str, list[str]] = {}
        with _environment(SAFEMERGE_CACHE=str(root / "cache")):
            for name, options in (("full", SMALL), ("other", (*SMALL, "--set", "merge.alpha=0.3"))):
                assert run("run", self.recipe, "-o", root / "made" / name, *options)[0] == 0
            shutil.copytree(root / "made" / "full", root / "made" / "scored", symlinks=True)
            if scoring:
                code, _, err = run("evaluate", root / "made" / "scored", *SCORED)
                assert code == 0, err

    @property
    def undisturbed(self) -> str:
        """Python that counts a run's calls and tells what it opens, and lets all pass."""
        watched = f"from tests.whole.faults import watch; watch({str(self.root)!r})"
        return f"{watched}\n{at_call('kill', 0, self.root / 'calls').before}"

    def close(self) -> None:
        """Ends the warm program and the judge."""
        self.warm.close()
        self._serving.__exit__(None, None, None)
        self._judge.shutdown()
        self._judge.server_close()

    def _place(self, verb: Verb) -> Path:
        self._trials += 1
        place = self.root / f"trial{self._trials}"
        place.mkdir()
        (place / "thesis.txt").write_text("precious")
        if verb.own:
            self._own_recipe(place)
        if verb.given:
            shutil.copytree(self.root / "made" / verb.given, place / "out", symlinks=True)
        return place

    def _own_recipe(self, place: Path) -> Path:
        """A recipe in the trial's folder, of the same sources."""
        path = place / "recipe.yaml"
        path.write_text(self.recipe.read_text().replace("./", f"{self.recipe.parent}/"))
        return path

    def expected(self, verb: Verb) -> tuple[int, dict[str, str], int]:
        """Exit code and files of an undisturbed run of a verb, and the number of its calls."""
        if verb.name not in self._expected:
            place = self._place(verb)
            code, _, err = self._run(verb, place, Fault("", self.undisturbed))
            assert code == 0, f"{verb.name}: {err}"
            self.opened[verb.name] = [line for line in err.splitlines() if line.startswith("OPENED ")]
            left = left_in(place) | self._on_the_hub(place)
            self._expected[verb.name] = code, left, int((self.root / "calls").read_text())
            shutil.rmtree(place)
        return self._expected[verb.name]

    def _run(self, verb: Verb, place: Path, fault: Fault | None = None) -> tuple[int, str, str]:
        with _environment(SAFEMERGE_CACHE=str(place / "cache")):
            recipe, before = place / "recipe.yaml" if verb.own else self.recipe, fault.before if fault else ""
            if not verb.hub:
                return self.warm(*verb.arguments(place, recipe), before=before)
            given = environment(self.hub, place / "cache", TOKEN)
            setting = f"import os, time; os.environ.update({given!r}); time.sleep = lambda seconds: None\n{SETTINGS}"
            return self.warm(*verb.arguments(place, recipe), before=f"{setting}{before}")

    def _on_the_hub(self, place: Path) -> dict[str, str]:
        """Files of a trial's repository."""
        repository = self.hub.repositories.get(f"ann/{place.name}")
        found = repository.tree("main") if repository is not None and repository.at("main") else {}
        return {f"hub/{name}": "" for name in found if name != ".gitattributes"}

    def attempt(self, verb: Verb, *faults: Fault) -> str:
        """Runs a verb under faults, one run for each, and then undisturbed; returns what was lost, or nothing."""
        row = self.rows.setdefault((faults[0].kind, verb.name), Row())
        row.tried += len(faults)
        _, files, _ = self.expected(verb)
        place = self._place(verb)
        try:
            problem = ""
            for fault in faults:
                code, _, err = self._run(verb, place, fault)
                row.struck += code == -signal.SIGKILL if fault.kind == KILL else code != 0
                problem = problem or _untold(code, err) or self._harmed(place)
                half = self._on_the_hub(place).keys()
                if half and half != {name for name in files if name.startswith("hub/")}:
                    problem = problem or f"half an output on the hub: {sorted(half)}"
            if not problem:
                code, _, err = self._run(verb, place)
                over = code == 4 and "holds a finished output" in err  # the fault came after the end
                if code and not over:
                    problem = f"the same command ended with {code}: {err}"
                left = left_in(place) | self._on_the_hub(place)
                problem = problem or self._harmed(place) or _differing(left, files)
            if problem:
                row.lost.append(f"{verb.name}, {[fault.before[-60:] for fault in faults]}: {problem}")
            return problem
        finally:
            shutil.rmtree(place)

    def _harmed(self, place: Path) -> str:
        """What is not as it has to be at every moment."""
        if (place / "thesis.txt").read_text() != "precious" or snapshot(self.root / "family") != self.sources:
            return "a file of the user's changed"
        for results in (place / "sweep", place / "probe"):
            if is_results(results):
                code, _, err = run("verify", results)
                if code:
                    return f"results are not sound: {err}"
        out, part = place / "out", place / "out.part"
        if out.exists():
            code, _, err = run("verify", out)
            return f"the output is not sound: {err}" if code else ""
        if part.exists() and any(path.name.endswith(".safetensors.part") for path in part.iterdir()):
            early = [name for name in ("config.json", MANIFEST_FILE) if (part / name).exists()]
            return f"{early} in an unfinished folder" if early else ""
        return ""

    def plant(self, verb: Verb, kind: str, dice: random.Random) -> str:
        """Puts something else in the place of a file that a verb may read; returns what went wrong.

        The verb works on a copy of everything, and has twenty seconds of work, or of waiting without any.
        """
        row = self.rows.setdefault((f"{kind} where a file was", verb.name), Row())
        row.tried += 1
        place = self._place(verb)
        try:
            shutil.copytree(self.root / "family", place / "family", symlinks=True)
            readable = [place / "out", *(place / "family" / name for name in ("base", "task", "safety", "alignment"))]
            files = [path for folder in readable if folder.exists() for path in sorted(folder.iterdir())]
            target = dice.choice(files)
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink()
            PLANTED[kind](target)
            before = snapshot(Path("/etc")) if kind == "a link out of the folder" else {}
            limits = Fault("", "from tests.whole.faults import limited; limited(20)")
            with _environment(SAFEMERGE_CACHE=str(place / "cache")):
                arguments = verb.arguments(place, place / "family" / "recipe.yaml")
                code, _, err = self.warm(*arguments, before=limits.before)
            row.struck += code != 0
            problem = _untold(code, err)
            if verb.name == "verify" and target.parent.name == "out" and code != 6:
                problem = problem or f"verify ended with {code}: {err}"
            if (place / "thesis.txt").read_text() != "precious" or (before and snapshot(Path("/etc")) != before):
                problem = problem or "a file of the user's changed"
            if problem:
                row.lost.append(f"{verb.name}, {kind} as {target.relative_to(place)}: {problem}")
            return problem
        finally:
            shutil.rmtree(place)

    def opened_otherwise(self, verb: Verb) -> list[str]:
        """What an undisturbed run opens below the bench in another way than `storage.files` does: path, flags, who."""
        self.expected(verb)
        return self.opened[verb.name]

    def flip(self, verb: Verb, dice: random.Random) -> str:
        """Flips a bit of a file of an output; `verify` has to find it."""
        row = self.rows.setdefault(("a flipped bit", verb.name), Row())
        row.tried += 1
        path = dice.choice(sorted((self.root / "made" / verb.given).iterdir()))
        at = dice.randrange(8 * path.stat().st_size)
        flip(path, at)
        try:
            code, _, err = run("verify", path.parent)
        finally:
            flip(path, at)
        row.struck += code == 6
        problem = "" if code == 6 else f"{path.name}: bit {at}: verify ended with {code}: {err}"
        if problem:
            row.lost.append(problem)
        return problem

    def table(self) -> str:
        """What was tried, by kind of fault, as Markdown."""
        return table(self.rows)


def left_in(place: Path) -> dict[str, str]:
    """What a trial leaves that must always be the same: files by name, and the digests of an output."""
    found = {}
    for path in sorted(place.iterdir()):
        if path.name == "lora":
            kept = ("adapter_config.json", "adapter_model.safetensors")
            found |= {f"lora/{name}": digest if name in kept else "" for name, digest in digests(path).items()}
        elif path.name in ("sweep", "probe"):
            found |= {f"{path.name}/{one.name}": "" for one in sorted(path.iterdir())}
        elif path.name in ("out", "controls"):
            found |= {f"{path.name}/{name}": digest for name, digest in _steady(path).items()}
        elif path.name != "cache":
            found[path.name] = ""
    return found


def _steady(folder: Path) -> dict[str, str]:
    """Digests of an output, but for scores, which hold seconds, and what shows them."""
    scored = (folder / "safemerge_scores.json").exists()
    changing = ("README.md", "safemerge_scores.json", "safemerge_answers.jsonl") if scored else ()
    changing += ("model.sig",)  # holds the digest of the manifest, which holds timings
    return {name: "" if name in changing else digest for name, digest in digests(folder).items()}


def _untold(code: int, err: str) -> str:
    """What is wrong with how a run ended: it says one thing or nothing, and never a traceback."""
    if "Traceback" in err or "a bug in safemerge" in err:
        return f"a traceback or a bug: {err}"
    if code not in (0, 2, 3, 4, 5, 6, -signal.SIGKILL):
        return f"exit code {code}: {err}"
    return ""


def _differing(found: dict[str, str], expected: dict[str, str]) -> str:
    names = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    return f"not as an undisturbed run leaves it: {names}" if names else ""
