"""Sources and outputs in object storage, against a server of the S3 protocol, well and ill.

Guards `storage.remote`, `sources.mirror`, `engine.object_store` and `engine.shared_output`.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from safemerge_recipes.engine import object_store
from safemerge_recipes.errors import PlanError
from safemerge_recipes.storage import remote
from tests.fixtures import s3_server as s3
from tests.fixtures.program import digests, finish, run, spawn
from tests.fixtures.sharded_family import LORA, MODEL_ROLES, make_adapter, make_family, write_recipe

pytest.importorskip("s3fs")
SHARDS = {"path": "out", "max_shard_size": "8KB"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The server's."""
    with pytest.MonkeyPatch.context() as patch, s3.server(patch) as found:
        yield found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, address: str) -> Iterator[Path]:
    """A family here and in the bucket, and what a run makes of it here in `expected`."""
    root = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMERGE_CACHE", str(root / "cache"))
        recipe = make_family(root)
        assert run("run", write_recipe(root, output=SHARDS), "--output", root / "expected")[0] == 0
        for role in MODEL_ROLES:
            s3.upload(root / role, f"in/{role}")
        assert recipe.exists()
        yield root


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    monkeypatch.setattr(remote, "WAIT", 0.01)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its waits between tries lie in its code
    monkeypatch.setenv("SAFEMERGE_CACHE", str(tmp_path / "cache"))
    for name, value in (("AWS_MAX_ATTEMPTS", "1"), ("AWS_RETRY_MODE", "standard")):
        monkeypatch.setenv(name, value)


def _recipe(tmp_path: Path, *, urls: bool = True, root: Path | None = None, **parts: object) -> Path:
    where = f"s3://{s3.BUCKET}/in" if urls else str(root)
    path: Path = write_recipe(
        tmp_path, sources={role: f"{where}/{role}" for role in MODEL_ROLES}, output=SHARDS, **parts
    )
    return path


def test_from_a_bucket_into_a_bucket(family: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    code, printed, err = run("run", recipe, "--output", f"s3://{s3.BUCKET}/out/", "--json")
    assert code == 0, err
    assert json.loads(printed)["output"] == f"s3://{s3.BUCKET}/out"
    there = s3.download("out", tmp_path / "copy")
    assert digests(there) == digests(family / "expected")
    assert run("verify", there)[0] == 0
    assert not [name for name in s3.names("out") if "safemerge_parts" in name]
    manifest = json.loads((there / "safemerge_manifest.json").read_text())
    before = json.loads((family / "expected" / "safemerge_manifest.json").read_text())
    assert [one["sha256"] for one in manifest["inputs"]] == [one["sha256"] for one in before["inputs"]]
    for path in there.rglob("*"):
        assert path.is_dir() or b"not-a-secret" not in path.read_bytes()
        assert path.is_dir() or b"AKIATESTING" not in path.read_bytes()
        assert path.name == "safemerge_recipe.yaml" or path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
    code, _, err = run("run", recipe, "--output", f"s3://{s3.BUCKET}/out")
    assert code == 4
    assert "holds a finished output" in err
    code, _, err = run("run", recipe, "--output", f"s3://{s3.BUCKET}/out", "--force", "--set", "merge.alpha=0.5")
    assert code == 0, err
    assert digests(s3.download("out", tmp_path / "other")) != digests(there)


def test_weights_stay_where_they_are(family: Path, tmp_path: Path) -> None:
    assert run("run", _recipe(tmp_path), "--output", tmp_path / "here")[0] == 0
    assert digests(tmp_path / "here") == digests(family / "expected")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert list((tmp_path / "cache").rglob("tokenizer.json"))


def test_an_adapter_in_a_bucket(family: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "lora", {**LORA, "layers_to_transform": [0]})
    s3.upload(tmp_path / "lora", "lora")
    outputs = []
    for number, place in enumerate([str(tmp_path / "lora"), f"s3://{s3.BUCKET}/lora"]):
        path = write_recipe(
            tmp_path, gate={"always": True},
            sources={role: str(family / role) for role in ("base", "aligned", "safety")} | {"finetuned": place},
        )  # fmt: skip
        code, _, err = run("run", path, "--output", tmp_path / str(number))
        assert code == 0, err
        outputs.append({p.name: p.read_bytes() for p in (tmp_path / str(number)).glob("*.safetensors")})
    assert outputs[0] == outputs[1]


def test_parts_into_a_bucket(family: Path, tmp_path: Path) -> None:
    recipe, out = _recipe(tmp_path), f"s3://{s3.BUCKET}/parts"
    for part in ("2/2", "1/2", "1/2"):
        code, _, err = run("run", recipe, "--part", part, "--output", out)
        assert code == 0, err
    assert "safemerge_manifest.json" not in s3.names("parts")
    code, _, err = run("finalize", recipe, "--output", out)
    assert code == 0, err
    assert digests(s3.download("parts", tmp_path / "copy")) == digests(family / "expected")


def test_a_killed_run_goes_on_by_listing(family: Path, tmp_path: Path) -> None:
    recipe, out = _recipe(tmp_path, urls=False, root=family), f"s3://{s3.BUCKET}/killed"
    die = """
import os
from safemerge_recipes.engine.object_store import ObjectStore
seal, left = ObjectStore.seal, [3]
def seal_and_die(self, shard):
    seal(self, shard)
    left[0] -= 1
    if not left[0]:
        os._exit(9)
ObjectStore.seal = seal_and_die
"""
    code, _, _ = finish(spawn("run", recipe, "--output", out, "--workers", "1", before=die))
    assert code == 9
    code, printed, err = run("run", recipe, "--output", out, "--json")
    assert code == 0, err
    assert (
        0
        < json.loads(printed)["resumed"]
        < len(json.loads((family / "expected/model.safetensors.index.json").read_text())["weight_map"])
    )
    assert digests(s3.download("killed", tmp_path / "copy")) == digests(family / "expected")


def test_a_receipt_of_another_recipe_counts_for_nothing(family: Path, tmp_path: Path) -> None:
    recipe, out = _recipe(tmp_path, urls=False, root=family), f"s3://{s3.BUCKET}/mixed"
    assert run("run", recipe, "--part", "1/2", "--output", out, "--set", "merge.alpha=0.1")[0] == 0
    assert run("run", recipe, "--output", out)[0] == 0
    assert digests(s3.download("mixed", tmp_path / "copy")) == digests(family / "expected")


def _weights(path: str) -> bool:
    return ".safetensors" in path and "receipt" not in path and "index" not in path and "list-type" not in path


def test_a_store_that_throttles_and_cuts_off_costs_time(
    family: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}
    lock = threading.Lock()

    def trouble(method: str, path: str, body: bytes) -> object:
        with lock:
            seen[method] = seen.get(method, 0) + 1
            if seen[method] % 5 == 2:
                return s3.SLOW_DOWN
            if method == "GET" and seen[method] % 7 == 3 and _weights(path):
                return 100
        return None

    with s3.proxy(address, trouble) as ill:  # type: ignore[arg-type]
        s3.use(monkeypatch, ill)
        code, _, err = run("run", _recipe(tmp_path), "--output", f"s3://{s3.BUCKET}/ill")
    s3.use(monkeypatch, address)
    assert code == 0, err
    assert digests(s3.download("ill", tmp_path / "copy")) == digests(family / "expected")


@pytest.mark.parametrize(
    ("what", "expected", "mended"),
    [
        ("fails", (3, 5), True), ("lies about a size", (5,), True),  # while reading, and while writing
        ("forbids writing", (4,), False), ("ends early", (3, 5), False),
        pytest.param("forbids writing", (4,), True, marks=pytest.mark.slow),
        pytest.param("ends early", (3, 5), True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_store_that_stays_ill_is_one_message(
    family: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, what: str, expected: tuple[int, ...],
    mended: bool,
) -> None:  # fmt: skip
    def trouble(method: str, path: str, body: bytes) -> object:
        if what == "fails" and method == "GET" and _weights(path):
            return s3.SLOW_DOWN
        if what == "forbids writing" and method in ("PUT", "POST"):
            return s3.FORBIDDEN
        if what == "lies about a size" and method == "HEAD" and _weights(path) and "/out-" in path:
            return 200, {"Content-Length": "17", "ETag": '"x"', "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}, b""
        if what == "ends early" and method == "GET" and _weights(path) and "finetuned" in path:
            return 9
        return None

    out = f"s3://{s3.BUCKET}/out-{what.replace(' ', '-')}"
    with s3.proxy(address, trouble) as ill:  # type: ignore[arg-type]
        s3.use(monkeypatch, ill)
        code, _, err = run("run", _recipe(tmp_path), "--output", out)
    s3.use(monkeypatch, address)
    assert code in expected, err
    assert len(err.strip().splitlines()) == 1
    for secret in ("not-a-secret", "Traceback", "a bug in"):
        assert secret not in err
    assert "safemerge_manifest.json" not in s3.names(out.rpartition("/")[2])
    if mended:
        code, _, err = run("run", _recipe(tmp_path), "--output", out)
        assert code == 0, err


def _answer(code: str, status: int, message: str = "") -> Exception:
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    answer = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    found: Exception = translate_boto_error(ClientError(answer, "PutObject"))
    return found


def test_full_is_told_by_code_and_status_and_by_nothing_else() -> None:
    aiohttp = pytest.importorskip("aiohttp")
    asked = aiohttp.RequestInfo("http://store/x", "PUT", {}, "http://store/x")  # type: ignore[arg-type]
    full = [
        _answer("XMinioStorageFull", 507), _answer("QuotaExceeded", 403), _answer("507", 507),
        aiohttp.ClientResponseError(asked, (), status=507), OSError(errno.ENOSPC, "of a mounted one"),
    ]  # fmt: skip
    other = [
        _answer("AccessDenied", 403, "507 objects are locked"), _answer("SlowDown", 503, "byte 507 of QuotaExceeded"),
        aiohttp.ClientResponseError(asked, (), status=500, message="507"), OSError(errno.EIO, "at 507"),
    ]  # fmt: skip
    for number, error in enumerate([*full, *other]):
        with pytest.raises(OSError, match=r"\w") as found, remote.told("s3://bucket/x"):
            raise error
        assert (found.value.errno == errno.ENOSPC) == (number < len(full)), error
        assert remote.is_final(found.value) == (number < len(full) or isinstance(error, PermissionError))


@pytest.mark.slow
@pytest.mark.parametrize("full", [s3.FULL, s3.OVER_QUOTA], ids=["MinIO", "Ceph"])
def test_a_full_bucket_is_one_message_and_the_run_goes_on_when_there_is_room(
    family: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch, full: tuple[int, dict[str, str], bytes]
) -> None:
    sealed: list[str] = []

    def trouble(method: str, path: str, body: bytes) -> object:
        if method in ("PUT", "POST") and _weights(path):
            sealed.append(path)
            return full if len(sealed) > 2 else None
        return None

    name = f"full-{full[0]}"
    recipe, out = _recipe(tmp_path, urls=False, root=family), f"s3://{s3.BUCKET}/{name}"
    with s3.proxy(address, trouble) as ill:  # type: ignore[arg-type]
        s3.use(monkeypatch, ill)
        code, _, err = run("run", recipe, "--output", out, "--workers", "1")
    s3.use(monkeypatch, address)
    assert code == 5, err
    assert len(err.strip().splitlines()) == 1
    assert "no space left in the store" in err
    assert "goes on from there" in err
    code, printed, err = run("run", recipe, "--output", out, "--json")
    assert code == 0, err
    assert json.loads(printed)["resumed"] > 0
    assert digests(s3.download(name, tmp_path / "copy")) == digests(family / "expected")


def test_urls_that_are_refused(tmp_path: Path, family: Path) -> None:
    recipe = _recipe(tmp_path, urls=False, root=family)
    for out, says in [
        ("s3://key:secret@bucket/out", "holds credentials"),
        ("s3://bucket/out?X-Amz-Signature=1", "without query"),
        ("ftp://host/out", "is not known"),
        ("s3://nobody-has-this-bucket/out", "expected a bucket"),
    ]:
        code, _, err = run("run", recipe, "--output", out)
        assert code == 4, err
        assert says in err
        assert ":secret@" not in err
    code, _, err = run("run", recipe, "--source", f"finetuned=s3://{s3.BUCKET}/nothing", "--output", tmp_path / "x")
    assert code == 3, err
    assert "check the URL" in err or "not there" in err
    code, _, err = run("run", _recipe(tmp_path), "--output", f"s3://{s3.BUCKET}/in")
    assert code == 4
    assert "overlaps sources.base" in err
    with pytest.raises(PlanError, match=r"safemerge-recipes\[gs\]"):
        remote.check_url("gs://bucket/x", "x")


def test_a_listing_in_a_strangers_folder_is_not_believed(family: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "sources" / "stranger"
    shutil.copytree(family / "finetuned", stranger)
    (stranger.parent / "listing.json").write_text(json.dumps({"url": "s3://elsewhere/x", "files": {}}))
    path = write_recipe(
        tmp_path, sources={role: str(family / role) for role in MODEL_ROLES} | {"finetuned": str(stranger)}
    )
    assert run("plan", path)[0] == 0


class _Sent:
    """What an upload's library is given."""

    closed = False

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def write(self, view: memoryview) -> None:
        """Notes the size."""
        self.sizes.append(len(view))

    def close(self) -> None:
        """Notes the end."""
        self.closed = True


def test_an_upload_is_given_whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PART", 10)
    sent = _Sent()
    upload = object_store._Upload(sent)
    for size in (3, 25, 0, 2, 4):
        upload.write(memoryview(bytes(size)))
    upload.complete()
    assert upload.at == 34
    assert sent.sizes == [10, 10, 10, 4]
    assert sent.closed


def test_what_waits_to_be_sent_counts_as_memory(family: Path, tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, urls=False, root=family)
    code, _, err = run("run", recipe, "--output", "memory://bucket/small", "--max-memory", "120MB")
    assert code == 4
    assert "alone needs 132." in err


def test_memory_is_a_store_too(family: Path, tmp_path: Path) -> None:
    import fsspec

    assert run("run", _recipe(tmp_path, urls=False, root=family), "--output", "memory://here/out")[0] == 0
    fs = fsspec.filesystem("memory")
    fs.get("/here/out", str(tmp_path / "copy"), recursive=True)
    assert digests(tmp_path / "copy") == digests(family / "expected")
