"""Artifacts on every file system: complete, resumed, damaged, mismatched, locked, their lineage."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nla_ray.cluster.errors import user_message
from nla_ray.run import location, lock
from nla_ray.run.artifact import Run
from nla_ray.run.location import Location
from nla_ray.run.log import stage_progress
from nla_ray.run.manifest import FileRecord, Manifest, check_disjoint, check_lineage
from nla_ray.run.metrics import MetricsLog
from nla_ray.settings.presets import nano, override


def run_at(where: str | Path, **sections: dict) -> Run:
    return Run(dataclasses.replace(override(nano(), **sections), run_dir=str(where)))


@pytest.fixture(params=["local", "file", "memory", "s3"])
def where(request, tmp_path: Path) -> str:
    """A run directory on each kind of file system."""
    if request.param == "local":
        return str(tmp_path / "run")
    if request.param == "file":
        return f"file://{tmp_path}/run"
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return request.getfixturevalue("s3_uri")(uuid.uuid4().hex)


# Publishing ---------------------------------------------------------------------------------------


def test_an_artifact_is_complete_when_its_manifest_is_there(where: str) -> None:
    run = run_at(where)
    artifact = run.open_artifact("corpus", "corpus")
    assert not artifact.complete and run.find("corpus") is None
    (artifact.location / "part-00000.parquet").write_bytes(b"rows")
    (artifact.location / "deep" / "notes.txt").write_text("hello")
    (artifact.location / "scratch" / "checkpoint").write_bytes(b"lost")
    (artifact.location / "half.tmp").write_bytes(b"lost")
    manifest = artifact.publish(documents={"train": ["b", "a", "b"]}, metrics={"rows": 4})
    assert set(manifest.files) == {"part-00000.parquet", "deep/notes.txt"}
    assert manifest.files["deep/notes.txt"] == FileRecord(
        size=5, sha256="2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    )
    assert manifest.documents == {"train": ["a", "b"]}
    assert not (artifact.location / "scratch" / "checkpoint").exists()
    again = run_at(where)
    assert again.find("corpus") == manifest
    assert again.open_artifact("corpus", "corpus").complete
    assert again.verified("corpus", manifest, "deep/notes.txt").read_text() == "hello"


def test_the_manifest_holds_the_resolved_configuration_and_the_versions(where: str) -> None:
    run = run_at(where, corpus={"seed": 5})
    manifest = run.open_artifact("corpus", "corpus").publish()
    assert manifest.config == {"corpus": {**manifest.config["corpus"], "seed": 5}}
    assert manifest.environment["ray"].startswith("2.") and "python" in manifest.environment


def test_an_interrupted_stage_is_continued_with_the_files_it_has(where: str) -> None:
    artifact = run_at(where).open_artifact("corpus", "corpus")
    (artifact.location / "part-00000.parquet").write_bytes(b"first")
    again = run_at(where).open_artifact("corpus", "corpus")
    assert not again.complete
    assert (again.location / "part-00000.parquet").read_bytes() == b"first"
    assert set(again.publish().files) == {"part-00000.parquet"}


@pytest.mark.parametrize("published", [True, False])
def test_another_configuration_on_the_same_directory_is_an_error_that_names_the_field(
    where: str, published: bool
) -> None:
    artifact = run_at(where).open_artifact("corpus", "corpus")
    if published:
        artifact.publish()
    with pytest.raises(
        ValueError,
        match=(
            r"artifact 'corpus' .*corpus.chunk_chars: there 420, here 99.*Repeat the flags it was"
            r" made with, use another --run-dir"
        ),
    ):
        run_at(where, corpus={"chunk_chars": 99}).open_artifact("corpus", "corpus")
    run_at(where, sft={"epochs": 9}).open_artifact(
        "corpus", "corpus"
    )  # a section that does not shape it


def test_another_parent_is_an_error_that_names_it(where: str) -> None:
    run = run_at(where)
    corpus = run.open_artifact("corpus", "corpus").publish()
    run.open_artifact("labels", "label", parents={"corpus": corpus}).publish()
    other = dataclasses.replace(corpus, files={"new": FileRecord(size=1, sha256="00")})
    assert other.fingerprint != corpus.fingerprint
    with pytest.raises(
        ValueError, match=f"parent corpus: there {corpus.fingerprint}, here {other.fingerprint}"
    ):
        run.open_artifact("labels", "label", parents={"corpus": other})


def test_a_missing_artifact_is_an_error_that_names_the_job(where: str) -> None:
    with pytest.raises(
        ValueError, match=r"artifact 'corpus': got none .*python jobs/corpus.py --preset nano"
    ):
        run_at(where).require("corpus")


def test_files_written_into_the_local_folder_land_in_the_artifact(where: str) -> None:
    run = run_at(where)
    artifact = run.open_artifact("sft", "sft")
    with artifact.local_folder() as folder:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "config.json").write_text("{}")
    manifest = artifact.publish()
    assert set(manifest.files) == {"adapter/config.json"}
    with run.local_copy("sft", manifest, "adapter") as folder:
        assert (folder / "config.json").read_text() == "{}"


def test_what_was_written_into_the_local_folder_outlives_an_error_and_a_kill(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location, "_COPY_SECONDS", 0.05)
    artifact = run_at(where).open_artifact("sft", "sft")
    with pytest.raises(RuntimeError, match="cut off"), artifact.local_folder() as folder:
        (folder / "half.tmp").write_text("on its way")
        (folder / "first").write_text("1")
        deadline = time.monotonic() + 30
        # Copied while the work goes on: a kill would leave it.
        while not (artifact.location / "first").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (folder / "second").write_text("2")
        raise RuntimeError("cut off")
    with artifact.local_folder() as folder:
        assert [(folder / name).read_text() for name in ("first", "second")] == ["1", "2"]
        (folder / "first").unlink()
    assert set(artifact.publish().files) == {"second"}, "what was removed is removed everywhere"


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_file_is_one_message_that_names_it(where: str, damage: str) -> None:
    run = run_at(where)
    artifact = run.open_artifact("corpus", "corpus")
    file = artifact.location / "part-00000.parquet"
    file.write_bytes(b"four")
    manifest = artifact.publish()
    if damage == "gone":
        file.delete()
    else:
        file.write_bytes(b"fouR" if damage == "changed" else b"fo")
    with pytest.raises(
        ValueError, match=r"part-00000.parquet: got .*expected 4 bytes.*The file is damaged; delete"
    ):
        run.verified("corpus", manifest, "part-00000.parquet")


def test_an_edited_manifest_is_refused(where: str) -> None:
    run = run_at(where)
    run.open_artifact("corpus", "corpus").publish()
    path = run.root / "corpus" / "manifest.json"
    edited = json.loads(path.read_text())
    edited["files"]["extra"] = {"size": 1, "sha256": "00"}
    path.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match=r"manifest.json: got fingerprint .*The file was edited"):
        run.find("corpus")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"fingerprint": "x", "files": {}}',
        '{"fingerprint": "x", "files": {"a": {}}}',
    ],
)
def test_what_is_no_manifest_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match=r"here.json: not a manifest of schema 1"):
        Manifest.from_json(content, "here.json")


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path) -> None:
    location = Location.of(tmp_path / "file.json")
    location.write_text("old")
    with pytest.raises(TypeError):
        location.write_bytes("not bytes")  # type: ignore[arg-type]
    assert location.read_text() == "old"


# Locks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_two_runs_on_one_directory_are_refused(kind: str, tmp_path: Path, request) -> None:
    where = {
        "local": lambda: str(tmp_path),
        "memory": lambda: f"memory://{uuid.uuid4().hex}",
        "s3": lambda: request.getfixturevalue("s3_uri")(uuid.uuid4().hex),
    }[kind]()
    with (
        run_at(where).locked(),
        pytest.raises(
            ValueError, match=f"got a lock held by process {os.getpid()} on .*expected a free one"
        ),
        run_at(where).locked(),
    ):
        pass
    with run_at(where).locked():
        pass


LOCK_AND_DIE = """
import dataclasses, os, sys
from nla_ray.run.artifact import Run
from nla_ray.settings.presets import nano

with Run(dataclasses.replace(nano(), run_dir=sys.argv[1])).locked():
    os.kill(os.getpid(), 9)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", LOCK_AND_DIE, str(tmp_path)]
    assert subprocess.run(command, env=environment).returncode == -9
    with run_at(tmp_path).locked():
        pass


def claims_in(where: str) -> Location:
    """The folder of a run on a store that holds the claims on it."""
    return Location.of(where) / ".claims"


def write_claim(where: str, name: str, age_seconds: float = 0.0) -> None:
    claim = {"owner": f"process of {name}", "time": time.time() - age_seconds}
    (claims_in(where) / f"{name}.json").write_text(json.dumps(claim))


def test_a_lease_that_nobody_renews_is_taken_over() -> None:
    where = f"memory://{uuid.uuid4().hex}"
    write_claim(where, "the dead", age_seconds=91)
    with run_at(where).locked():
        [name] = claims_in(where).list_files()
        assert name != "the dead.json"
    assert claims_in(where).list_files() == []


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_of_many_that_start_at_one_moment_never_two_hold_a_run(kind: str, request) -> None:
    make = request.getfixturevalue("s3_uri") if kind == "s3" else "memory://{}".format
    for _ in range(4):
        where = make(uuid.uuid4().hex)
        held, refused, start = [], [], threading.Barrier(6)

        def begin(where=where, held=held, refused=refused, start=start) -> None:
            root = Location.of(where)
            start.wait()
            try:
                held.append(lock.Lease(root))
            except ValueError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=begin) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) <= 1 and len(held) + len(refused) == 6
        assert all("got a lock held by" in message for message in refused)
        assert len(claims_in(where).list_files()) == len(held), "who is refused leaves no claim"
        for lease in held:
            lease.release()
        with run_at(where).locked():
            pass


@pytest.fixture
def interruptible() -> Iterator[None]:
    """What a job sets too: a process that a shell starts in the background ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_process_that_was_frozen_until_another_took_over_stops(
    monkeypatch: pytest.MonkeyPatch, told: list[str], interruptible: None
) -> None:
    where = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.6)
    with pytest.raises(KeyboardInterrupt), run_at(where).locked():
        [own] = claims_in(where).list_files()
        (claims_in(where) / own).delete()  # as another process does that takes over
        write_claim(where, "another", age_seconds=-60)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)
    assert any("taken over by process of another; this job stops" in line for line in told)
    assert claims_in(where).list_files() == ["another.json"]


def test_a_start_that_is_refused_does_not_stop_the_process_that_holds_the_run(
    monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    where, write, renewals = f"memory://{uuid.uuid4().hex}", Location.write_text, []

    def counted(location: Location, content: str) -> None:
        renewals.append(location)
        write(location, content)

    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.6)
    with run_at(where).locked():
        monkeypatch.setattr(Location, "write_text", counted)
        claim = {"owner": "one about to be refused", "time": time.time() + 60}
        write(claims_in(where) / "refused.json", json.dumps(claim))
        deadline = time.monotonic() + 30
        while len(renewals) < 3:
            assert time.monotonic() < deadline, "the holder stopped renewing"
            time.sleep(0.02)
    assert not any("taken over" in line for line in told)
    assert claims_in(where).list_files() == ["refused.json"]


def test_of_two_that_renew_their_claims_the_one_that_sees_it_stops(
    monkeypatch: pytest.MonkeyPatch, told: list[str], interruptible: None
) -> None:
    where = f"memory://{uuid.uuid4().hex}"
    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.6)
    with pytest.raises(KeyboardInterrupt), run_at(where).locked():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            write_claim(where, "another", age_seconds=-60)
            time.sleep(0.1)
    assert any("taken over by process of another; this job stops" in line for line in told)


def test_a_start_that_is_cut_off_leaves_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    where = f"memory://{uuid.uuid4().hex}"

    def cut_off(self: lock.Lease) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(lock.Lease, "_others", cut_off)
    with pytest.raises(KeyboardInterrupt):
        lock.Lease(Location.of(where))
    assert claims_in(where).list_files() == []


def test_a_lease_outlives_a_renewal_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    where, write, writes = f"memory://{uuid.uuid4().hex}", Location.write_text, []

    def away_once(location: Location, content: str) -> None:
        writes.append(content)
        if len(writes) == 2:
            raise OSError("the store is away")
        write(location, content)

    monkeypatch.setattr(lock, "_LEASE_SECONDS", 0.15)
    monkeypatch.setattr(Location, "write_text", away_once)
    with run_at(where).locked():
        deadline = time.monotonic() + 30
        while len(writes) < 4:
            assert time.monotonic() < deadline, "no renewal after the one that failed"
            time.sleep(0.02)


# File systems that refuse -------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A file system of 256 kB, and a function that makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder, lambda: subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_message_and_damages_nothing(small_disk) -> None:
    folder, _ = small_disk
    artifact = run_at(folder).open_artifact("corpus", "corpus")
    (artifact.location / "part-00000.parquet").write_bytes(b"a" * 50_000)
    with pytest.raises(OSError) as caught:
        (artifact.location / "part-00001.parquet").write_bytes(b"b" * 500_000)
    assert caught.value.errno == errno.ENOSPC
    message = user_message(caught.value)
    assert message and "no space left on device" in message and "make room" in message
    assert artifact.location.list_files() == ["part-00000.parquet", "started.json"], (
        "no half-written file is left"
    )
    (artifact.location / "part-00001.parquet").write_bytes(b"b" * 5_000)
    assert len(run_at(folder).open_artifact("corpus", "corpus").publish().files) == 2


def test_a_read_only_run_directory_is_one_message(small_disk) -> None:
    folder, make_read_only = small_disk
    run_at(folder).open_artifact("corpus", "corpus").publish()
    make_read_only()
    with (
        pytest.raises(
            ValueError,
            match=r"got Read-only file system, expected a folder that can be written.*--run-dir",
        ),
        run_at(folder).locked(),
    ):
        pass
    assert run_at(folder).open_artifact("corpus", "corpus").complete, (
        "what is complete can still be read"
    )


def test_a_scheme_that_no_file_system_speaks_is_one_message() -> None:
    with pytest.raises(
        ValueError, match=r"run directory: got 'nowhere://x', expected a local path or a URI"
    ):
        run_at("nowhere://x")


# Lineage ------------------------------------------------------------------------------------------


def learned_from(name: str, *train: str, validation: tuple[str, ...] = ()) -> Manifest:
    return Manifest(
        name=name,
        config={},
        config_hash="0",
        documents={"train": list(train), "validation": list(validation)},
    )


def test_a_report_on_documents_nobody_learned_from_passes() -> None:
    sft, grpo = learned_from("sft", "a", "b"), learned_from("grpo", "a", validation=("v",))
    check_lineage(["t1", "t2"], {"sft": sft, "grpo": grpo})


@pytest.mark.parametrize(
    ("use", "ancestor"),
    [
        ("train", learned_from("sft", "a", "t1")),
        ("validation", learned_from("sft", "a", validation=("t1",))),
    ],
)
def test_a_test_document_that_an_ancestor_learned_from_or_was_chosen_on_is_an_error(
    use: str, ancestor: Manifest
) -> None:
    with pytest.raises(
        ValueError,
        match=(
            rf"lineage: 1 documents of the report were in the {use} documents of sft: \['t1'\],"
            r" expected none"
        ),
    ):
        check_lineage(["t1", "t2"], {"sft": ancestor})


def test_a_test_document_that_shares_text_with_one_that_was_learned_from_is_an_error() -> None:
    families = {"t1": "b", "b": "b", "t2": "t2"}
    learned = {"sft": learned_from("sft", "a", "b")}
    check_lineage(["t2"], learned, families=families)
    check_lineage(["t1", "t2"], learned)
    with pytest.raises(
        ValueError, match=r"1 documents .* sft: \['b'\], .*nor any that shares text"
    ):
        check_lineage(["t1", "t2"], learned, families=families)


def test_two_scorers_with_a_common_train_document_are_an_error() -> None:
    check_disjoint(learned_from("reward_scorer", "a"), learned_from("judge_scorer", "b"))
    with pytest.raises(
        ValueError, match=r"reward_scorer and judge_scorer share 1 train documents: \['b'\]"
    ):
        check_disjoint(learned_from("reward_scorer", "a", "b"), learned_from("judge_scorer", "b"))


# Metrics and progress -----------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2, "loss": 2.4}'])
def test_a_metrics_log_survives_a_torn_last_line(torn: str, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 2.5})
    with log.path.open("a") as file:
        file.write(torn)
    assert log.read() == [{"step": 1, "loss": 2.5}]
    again = MetricsLog(log.path)
    again.append({"step": 2})
    assert again.read() == [{"step": 1, "loss": 2.5}, {"step": 2}]


def test_a_metrics_log_goes_back_to_the_step_a_run_resumes_from(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        log.append({"step": step})
    log.append({"note": "no step"})
    log.rewind("step", 2)
    assert log.read() == [{"step": 0}, {"step": 1}, {"step": 2}, {"note": "no step"}]


def test_a_damaged_line_in_the_middle_of_a_metrics_log_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: got 'nonsense"):
        MetricsLog(path).read()


def test_progress_without_a_terminal_ends_in_one_line(told: list[str]) -> None:
    with stage_progress("shards", 2) as advance:
        advance()
        advance(note="last")
    assert [line.split(" in ")[0] for line in told] == ["shards: 2 of 2"]
