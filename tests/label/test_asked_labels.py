"""The stage of labels with teachers over the network: what is asked, listed and never told."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from teacher_server import REPEATABLE, TeacherServer, teacher_server
from test_labels import all_labels, write_corpus

from nla_ray.activation.positions import TextEncoder
from nla_ray.base.load import load_tokenizer
from nla_ray.label.instructions import CLEANER_PROMPT, TeacherPrompt
from nla_ray.label.stage import label_texts
from nla_ray.label.store import AnswerStore
from nla_ray.label.subjects import subjects_of
from nla_ray.plan.facts import PlanFacts
from nla_ray.plan.requests import CLEANER_PROMPT_TOKENS, TEACHER_PROMPT_TOKENS
from nla_ray.plan.text import describe_plan
from nla_ray.run.artifact import Run
from nla_ray.run.identity import text_hash
from nla_ray.run.location import Location
from nla_ray.settings.config import CaptureConfig, LabelConfig

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-planted-0123456789"
TEXTS = {f"doc{number}": f"text number {number} about rows and files" for number in range(12)}
DRIVER = """
import pickle, sys
from pathlib import Path
from nla_ray.label.stage import label_texts
from nla_ray.run.artifact import Run
from nla_ray.run.log import configure_logging

run = Run(pickle.load(open(sys.argv[1], "rb")))
configure_logging(Path(run.root.path) / "run.log")
print("started", flush=True)
label_texts(run)
"""


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("OPENAI", "ANTHROPIC", "ENDPOINT"):
        monkeypatch.setenv(f"{name}_API_KEY", KEY)
    yield monkeypatch


def two_teachers(server: TeacherServer, patch: pytest.MonkeyPatch) -> tuple[str, str]:
    patch.setenv("ANTHROPIC_BASE_URL", server.url)
    return f"endpoint:model-a@{server.url}/v1", "anthropic:model-b"


def refused_of(run: Run) -> list[dict]:
    return [
        json.loads(line)
        for line in (run.root / "labels/refused.jsonl").read_text().split("\n")
        if line
    ]


def test_two_houses_and_an_offline_teacher_label_every_text_or_it_is_listed(
    tiny_run: Callable[..., Run], keys: pytest.MonkeyPatch
) -> None:
    with teacher_server(behaviours=("refusal", "length"), share=0.5, seed=2, key=KEY) as server:
        teachers = (*two_teachers(server, keys), "offline-content-first")
        run = tiny_run(label=LabelConfig(teachers=teachers))
        write_corpus(run, TEXTS)
        manifest = label_texts(run)
        billed = sum(server.billed.values())
        rows, refused = all_labels(run), refused_of(run)
        assert label_texts(run) == manifest
        shutil.rmtree(Path(run.root.path) / "labels")  # as a user who changes another setting
        label_texts(run)
        assert (all_labels(run), refused_of(run)) == (rows, refused)
        assert sum(server.billed.values()) == billed == 24
    expected = {(f"{doc}#0", teacher) for doc in TEXTS for teacher in teachers}
    labelled = {(row["text_id"], row["teacher"]) for row in rows}
    listed = {(row["text_id"], row["teacher"]) for row in refused}
    assert labelled | listed == expected and not labelled & listed and listed
    assert {row["reason"] for row in refused} <= {"refusal", "cut off at label.answer_tokens"}
    assert all(
        row["label"].startswith("- tokens: ") for row in rows if row["teacher"] in teachers[:2]
    )
    asked = manifest.metrics["asked"]
    assert {name: counts["requests"] for name, counts in asked.items()} == dict.fromkeys(
        teachers[:2], 12
    )
    assert sum(manifest.metrics["refused"].values()) == len(refused)


def test_a_key_stands_in_no_file_and_no_line(
    tiny_run: Callable[..., Run], keys: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    behaviours = ("429", "500", "refusal", "policy")  # errors repeat the key that they were sent
    with teacher_server(behaviours=behaviours, share=0.5, seed=1, key=KEY) as server:
        run = tiny_run(label=LabelConfig(teachers=two_teachers(server, keys)))
        write_corpus(run, TEXTS)
        said = drive(run, tmp_path).communicate()[0]
    assert len(refused_of(run)) > 0 and "started" in said
    files = [path for path in Path(run.root.path).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"manifest.json", "run.log", "refused.jsonl"}
    assert any("status 500" in path.read_text() for path in files if path.suffix == ".jsonl")
    for content in (said.encode(), *(path.read_bytes() for path in files)):
        assert KEY.encode() not in content


def drive(run: Run, tmp_path: Path) -> subprocess.Popen[str]:
    """The stage in a process of its own."""
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(run.config))
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "config.pkl")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_kill_in_the_middle_costs_what_was_under_way_and_nothing_else(
    tiny_run: Callable[..., Run], keys: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = {f"doc{number}": f"text number {number} about rows" for number in range(200)}
    behaviours = ("429", "500", "529", "cut", "no_json", "no_choice", "empty", "refusal", "length")
    assert set(behaviours) & set(REPEATABLE)
    with teacher_server(behaviours=behaviours, share=0.15, seed=5, key=KEY) as server:
        behaviour = server.behaviour

        def until_the_kill(model: str, text: str) -> str:
            with server.lock:
                billed = sum(server.billed.values())
            if billed >= 150:
                process.kill()  # this request is under way; once the process is gone: no effect
            return behaviour(model, text)

        server.behaviour = until_the_kill  # type: ignore[method-assign]
        run = tiny_run(label=LabelConfig(teachers=two_teachers(server, keys), max_concurrency=12))
        write_corpus(run, texts, shard_rows=50)
        process = drive(run, tmp_path)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with AnswerStore(
            Location.of(run.root.path) / "teacher_answers", text_hash(str(run.root))[:16]
        ) as store:
            kept, under_way = len(store), store.num_unsettled
        assert 0 < kept < 400 and 0 < under_way <= 24

        label_texts(run)
        billed = server.billed.copy()
        shutil.rmtree(Path(run.root.path) / "labels")
        manifest = label_texts(run)
        assert server.billed == billed  # a second run bills nothing

    lines = [
        json.loads(line)
        for path in (Path(run.root.path) / "teacher_answers").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    failed = [line for line in lines if line["kind"] == "failed"]
    lost = [line for line in failed if not line["reason"].startswith("status ")]
    assert sum(billed.values()) <= 400 + under_way + len(lost)
    keys_of_answers = [line["key"] for line in lines if line["kind"] == "answer"]
    assert len(keys_of_answers) == len(set(keys_of_answers)) == 400
    refused = refused_of(run)
    assert manifest.metrics["labels"] + len(refused) == 400
    assert {row["reason"] for row in refused} == {
        "empty answer",
        "refusal",
        "cut off at label.answer_tokens",
    }


def test_a_run_that_is_moved_goes_on_with_what_it_has_spent(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    with teacher_server() as server:
        teacher = f"endpoint:model-a@{server.url}/v1"
        label = LabelConfig(
            teachers=(teacher,),
            prices=(f"{teacher}=10/100",),
            answer_tokens=50,
            max_usd=0.03,
            store=str(tmp_path / "store"),
        )
        run = tiny_run("here", label=label)
        write_corpus(run, TEXTS)
        with pytest.raises(ValueError, match=r"label.max_usd 0.03"):
            label_texts(run)
        billed = sum(server.billed.values())
        shutil.move(run.root.path, tmp_path / "there")
        with pytest.raises(ValueError, match=r"label.max_usd 0.03"):
            label_texts(tiny_run("there", label=label))
        assert sum(server.billed.values()) == billed > 0


def test_a_teacher_sees_the_text_up_to_the_position_as_capture_reads_it(
    tiny_run: Callable[..., Run],
) -> None:
    with teacher_server() as server:
        label = LabelConfig(teachers=(f"endpoint:model-a@{server.url}/v1",), prompt="content")
        run = tiny_run(capture=CaptureConfig(positions="random:2"), label=label)
        write_corpus(run, TEXTS)
        label_texts(run)
    encoder = TextEncoder(load_tokenizer(run.config.base), run.config.base, run.config.capture)
    template = TeacherPrompt.load("content")
    expected = set()
    for doc, text in TEXTS.items():
        for subject in subjects_of({"text_id": f"{doc}#0", "text": text}, encoder):
            assert text.startswith(subject.read)
            expected.add(template.message(subject.read))
    assert {body["messages"][0]["content"] for body in server.bodies} == expected
    assert {row["n_raw_tokens"] for row in all_labels(run)} != {0}


def test_a_text_that_capture_leaves_out_is_not_paid_for(tiny_run: Callable[..., Run]) -> None:
    with teacher_server() as server:
        run = tiny_run(label=LabelConfig(teachers=(f"endpoint:model-a@{server.url}/v1",)))
        long = "word " * run.config.base.max_tokens
        write_corpus(run, {**TEXTS, "long": long})
        label_texts(run)
        assert len(server.bodies) == len(TEXTS)
    [refused] = refused_of(run)
    assert (refused["text_id"], refused["reason"]) == ("long#0", "not captured: too_long")


def test_another_prompt_is_another_label_and_said_so(
    tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Describe it. {text}")
    with teacher_server() as server:
        teachers = (f"endpoint:model-a@{server.url}/v1",)
        run = tiny_run(label=LabelConfig(teachers=teachers, prompt=str(prompt)))
        write_corpus(run, TEXTS)
        manifest = label_texts(run)
        assert manifest.config["inputs"] == {"prompt": TeacherPrompt.load(str(prompt)).sha256}
        prompt.write_text("Describe it well. {text}")
        with pytest.raises(ValueError, match=r"inputs.prompt: there"):
            label_texts(run)


def test_a_plan_says_requests_tokens_cost_and_time_of_each_teacher(
    tiny_run: Callable[..., Run],
) -> None:
    label = LabelConfig(
        teachers=("openai:gpt-6-sol", "endpoint:m@http://host/v1", "offline-content-first"),
        requests_per_minute=6,
        cleaner="anthropic:claude-sonnet-5-5",
    )
    run = tiny_run(label=label)
    write_corpus(run, TEXTS)
    plan = describe_plan(run.config, "label")
    texts = run.config.corpus.max_chunks
    text_tokens = PlanFacts.of(run).text_tokens
    read, written = texts * (text_tokens + TEACHER_PROMPT_TOKENS), texts * 150
    [line] = [line for line in plan.splitlines() if "gpt-6-sol" in line]
    assert f"openai:gpt-6-sol: {texts:,} requests, about {read + written:,.0f} tokens" in line
    assert f"({written:,.0f} of answers), about {(read * 2 + written * 10) / 1e6:,.2f} US" in line
    chars = run.config.corpus.chunk_chars + TEACHER_PROMPT_TOKENS * 4 + 64
    assert f"at most {texts * (chars * 2 + 2_000 * 10) / 1e6:,.2f}" in line
    assert f"{texts / 6 / 60:.1f} h at the limits" in line
    assert f"endpoint:m@http://host/v1: {texts:,} requests" in plan
    assert "at a price that is not known: --label.prices" in plan
    assert f"{3 * texts:,} labels of 1 offline teachers and 2 teachers over the network" in plan
    cleaned = 3 * texts * (150 + CLEANER_PROMPT_TOKENS + 60)
    assert f"  cleaner    anthropic:claude-sonnet-5-5: {3 * texts:,} requests" in plan
    assert f"about {cleaned:,.0f} tokens" in plan
    for name in ("activation", "content"):
        tokens = len(TeacherPrompt.load(name).template) / 4
        assert 0.8 < tokens / TEACHER_PROMPT_TOKENS < 1.2
    tokens = len(TeacherPrompt.load(CLEANER_PROMPT).template) / 4
    assert 0.8 < tokens / CLEANER_PROMPT_TOKENS < 1.2
