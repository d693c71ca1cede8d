"""Nothing of the user's is emptied, overwritten or followed through a link."""

import pytest

from safemerge_recipes.engine.folder import LOCK_FILE, MANIFEST_FILE, check_part, locked
from tests.fixtures.program import digests, run, snapshot
from tests.fixtures.sharded_family import make_family


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("family"))


def a_folder(place):
    place.mkdir(parents=True)
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter1.txt").write_text("precious")


def a_link(place):
    a_folder(place.with_name("elsewhere"))
    place.symlink_to("elsewhere")


def a_dangling_link(place):
    place.symlink_to("nowhere")


def a_file(place):
    place.write_text("precious")


def a_false_journal(place):
    a_folder(place)
    (place / "journal.jsonl").write_text('{"engine": 1, "inputs": {}}\n')
    (place / "journal").symlink_to("journal.jsonl")


def a_locked_folder(place):
    a_folder(place)
    (place / LOCK_FILE).write_text("process 1 on somewhere\n")


@pytest.mark.parametrize("make", [a_folder, a_link, a_dangling_link, a_file, a_false_journal, a_locked_folder])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_lies_where_the_working_folder_goes_is_left_alone(tmp_path, recipe, make, force):
    make(tmp_path / "out.part")
    before = snapshot(tmp_path)
    code, _, err = run("run", recipe, "--output", tmp_path / "out", *force)
    assert code == 4
    assert "out.part" in err
    assert "choose another --output" in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_finished_output_named_like_a_working_folder_is_left_alone(tmp_path, recipe, force):
    assert run("run", recipe, "--output", tmp_path / "out.part")[0] == 0
    before = digests(tmp_path / "out.part")
    code, _, err = run("run", recipe, "--output", tmp_path / "out", *force)
    assert code == 4
    assert "finished output" in err
    assert digests(tmp_path / "out.part") == before


def test_a_run_killed_before_its_last_rename_goes_on(tmp_path, recipe):
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    before = digests(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.part")
    (tmp_path / "out.part" / LOCK_FILE).write_text("process 1 on somewhere\nout.part\n")
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert digests(tmp_path / "out") == before


def test_a_folder_named_like_the_replaced_output_is_left_alone(tmp_path, recipe):
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    a_folder(tmp_path / ".out.safemerge-replaced")
    code, _, err = run("run", recipe, "--output", tmp_path / "out", "--force", "--set", "output.dtype=float16")
    assert code == 4
    assert ".out.safemerge-replaced" in err
    assert (tmp_path / ".out.safemerge-replaced" / "thesis" / "chapter1.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["safemerge_report.html", "README.md"])
def test_a_report_follows_no_link_that_a_stranger_planted(tmp_path, recipe, name):
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    mine = tmp_path / "authorized_keys"
    mine.write_text("mine")
    (tmp_path / "out" / f".{name}.tmp").symlink_to("../authorized_keys")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).symlink_to("../authorized_keys")
    run("report", tmp_path / "out")
    assert mine.read_text() == "mine"
    assert not (tmp_path / "out" / name).is_symlink()


def test_a_lock_is_no_link(tmp_path, recipe):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / LOCK_FILE).symlink_to("../mine")
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 4
    assert mine.read_text() == "mine"


def test_small_files_are_written_whole_under_a_name_of_their_own(tmp_path):
    from safemerge_recipes.storage.files import write_file, written

    write_file(tmp_path / "a", "old")
    with pytest.raises(TypeError), written(tmp_path / "a") as file:
        file.write("not bytes")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_manifest_is_the_last_sign(tmp_path, recipe):
    """A folder with a manifest and no journal is whole."""
    assert run("run", recipe, "--output", tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / MANIFEST_FILE).exists()
    assert not (tmp_path / "out" / LOCK_FILE).exists()


@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_a_lock_whose_writing_failed_still_tells_whose_the_folder_is(tmp_path, monkeypatch, call):
    part = tmp_path / "out.part"
    part.mkdir()
    (part / MANIFEST_FILE).write_text("{}")  # of the output that is being replaced
    with locked(part, part.name):
        pass

    def fail(*_):
        raise InterruptedError(4, "Interrupted system call")

    with monkeypatch.context() as patch:
        patch.setattr(f"os.{call}", fail)
        with pytest.raises(InterruptedError), locked(part, part.name):
            pass
    check_part(part)
