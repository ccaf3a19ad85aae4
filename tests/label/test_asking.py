"""Teachers over HTTP are asked about every text, once: through failures, limits and the budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from teacher_server import BILLED_FAILURES, FINAL, REPEATABLE, TeacherServer, teacher_server

from nla_ray.label.asking import Asked, AskedTeacher, ask_teachers
from nla_ray.label.limits import Patience
from nla_ray.label.store import AnswerStore
from nla_ray.run.location import Location
from nla_ray.settings.config import LabelConfig

KEY = "sk-planted-0123456789"
QUICK = Patience(first_seconds=0.01, rest_seconds=0.01, failures_in_row=200)
TEXTS = [f"text number {number} about frame index" for number in range(40)]


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setenv("ENDPOINT_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    yield monkeypatch


def settings(server: TeacherServer, *models: str, **fields: object) -> LabelConfig:
    teachers = tuple(f"endpoint:{model}@{server.url}/v1" for model in models or ("model-a",))
    return LabelConfig(teachers=teachers, **{"timeout_seconds": 60.0, **fields})


def asked(
    config: LabelConfig,
    folder: Path,
    texts: list[str] = TEXTS,
    run: str = "run",
    patience: Patience = QUICK,
) -> tuple[Asked, AnswerStore]:
    with AnswerStore(Location.of(folder), run) as store:
        teachers = AskedTeacher.all_of(config)
        return ask_teachers(teachers, lambda: iter(texts), store, config, patience=patience), store


def lines_of(folder: Path) -> list[dict]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]


def test_under_any_failures_every_text_gets_its_answer_or_its_reason_and_is_paid_once(
    tmp_path: Path,
) -> None:
    behaviours = REPEATABLE + FINAL
    with teacher_server(behaviours=behaviours, share=0.4, seed=3, key=KEY) as server:
        config = settings(server, "model-a", "model-b", max_concurrency=16, timeout_seconds=3.0)
        result, store = asked(config, tmp_path)
        billed = server.billed.copy()
        again, _ = asked(config, tmp_path)
    assert result.failures == {} and again.failures == {}
    assert server.billed == billed  # a second start asks nothing
    met = Counter()
    for teacher in AskedTeacher.all_of(config):
        for text in TEXTS:
            final, answer = server.final(teacher.teacher.model, text), store.get(teacher.key(text))
            assert answer is not None and bool(answer.fault) == (final != "good"), final
            met[final] += 1
    assert set(met) == {"good", *FINAL}
    # What a teacher may have billed without an answer that arrived, as the client saw it.
    failed = [line for line in lines_of(tmp_path) if line["kind"] == "failed"]
    lost = [line for line in failed if not line["reason"].startswith("status ")]
    needed = 2 * len(TEXTS) - met["policy"]
    assert sum(billed.values()) <= needed + len(lost)
    assert all(billed[name] for name in BILLED_FAILURES)
    assert sum(billed[name] for name in BILLED_FAILURES) <= len(lost)
    answers = [line["key"] for line in lines_of(tmp_path) if line["kind"] == "answer"]
    assert len(answers) == len(set(answers)) == 2 * len(TEXTS)


def test_texts_that_are_alike_are_asked_once(tmp_path: Path) -> None:
    with teacher_server(seconds=0.05) as server:
        asked(settings(server), tmp_path, texts=["the same"] * 20 + ["another"])
    assert server.billed == {"good": 2}


def test_another_run_base_or_order_pays_nothing_for_what_is_in_the_store(tmp_path: Path) -> None:
    with teacher_server() as server:
        config = settings(server)
        asked(config, tmp_path, run="first")
        result, _ = asked(config, tmp_path, [*TEXTS[::-1], "a new text"], run="second")
        assert result.counts[config.teachers[0]].requests == 1
        asked(settings(server, answer_tokens=9), tmp_path, TEXTS[:2])
    assert server.billed == {"good": len(TEXTS) + 1 + 2}


def test_no_more_requests_are_under_way_than_are_allowed(tmp_path: Path) -> None:
    with teacher_server(seconds=0.02) as server:
        asked(settings(server, max_concurrency=6), tmp_path)
    assert 1 < server.most_under_way <= 6


def test_the_budget_is_never_passed_and_everything_is_kept(tmp_path: Path) -> None:
    with teacher_server(behaviours=("cut", "500"), share=0.2, seed=1) as server:
        config = settings(server)
        price = f"{config.teachers[0]}=10/100"
        # An answer costs 100 x 10 + 20 x 100 = 3,000 millionths; a request at most
        # (bytes + 64) x 10 + 50 x 100.
        limits = {"prices": (price,), "answer_tokens": 50, "max_concurrency": 8}
        config = settings(server, max_usd=0.1, **limits)
        [teacher] = AskedTeacher.all_of(config)
        most = teacher.most_usd(teacher.prompt.message(TEXTS[0]))
        with pytest.raises(ValueError, match=r"label.max_usd 0.1: .* answers are kept: raise"):
            asked(config, tmp_path)
        billed = sum(server.billed.values())
        with AnswerStore(Location.of(tmp_path), "run") as store:
            kept, spent = len(store), store.spent_usd
        assert 0 < kept < len(TEXTS) and 0.1 - most * 1.1 < spent <= 0.1
        with pytest.raises(ValueError, match=r"label.max_usd"):
            asked(config, tmp_path)  # another start has no budget of its own
        assert sum(server.billed.values()) == billed
        result, store = asked(settings(server, max_usd=10.0, **limits), tmp_path)
        assert len(store) == len(TEXTS) and result.failures == {}
    assert server.billed["good"] == len(TEXTS)


def test_a_budget_needs_a_price(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"that of openai:unheard-of is not. Set --label.prices"):
        LabelConfig(teachers=("openai:unheard-of",), max_usd=1.0)
    LabelConfig(teachers=("openai:unheard-of",), max_usd=1.0, prices=("openai:unheard-of=1/2",))
    with pytest.raises(ValueError, match=r"expected `TEACHER=INPUT/OUTPUT`"):
        LabelConfig(prices=("openai:gpt-6-sol=2",))


def test_a_teacher_that_is_gone_ends_the_job_after_rests_and_keeps_what_it_said(
    tmp_path: Path,
) -> None:
    with teacher_server() as server:
        good = server.behaviour
        server.behaviour = lambda model, text: (  # type: ignore[method-assign]
            good(model, text) if sum(server.billed.values()) < 10 else "500"
        )
        config = settings(server, max_concurrency=2)
        patience = Patience(first_seconds=0.001, failures_in_row=3, rest_seconds=0.001, rests=2)
        with pytest.raises(ValueError, match=r"got 3 failures in a row, the last one status 500"):
            asked(config, tmp_path, patience=patience)
        with AnswerStore(Location.of(tmp_path), "run") as store:
            assert len(store) == sum(server.billed.values()) >= 10
            assert store.num_unsettled == 0


def test_a_request_that_no_text_can_pass_ends_the_job_at_once(tmp_path: Path) -> None:
    with teacher_server() as server:
        server.behaviour = lambda model, text: "bad"  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=r"unsupported_parameter not for .key.") as raised:
            asked(settings(server), tmp_path, patience=Patience(failures_in_row=4))
        assert KEY not in str(raised.value)
        result, store = asked(settings(server), tmp_path, TEXTS[:3])
    assert len(store) == 0  # a set-up that is corrected asks them again
    assert len(result.failures) == 3


@pytest.mark.parametrize("wrong", ["key", "model"])
def test_one_wrong_teacher_of_two_is_said_before_any_request(tmp_path: Path, wrong: str) -> None:
    with teacher_server(key=KEY if wrong == "model" else "") as server:
        url, other = server.url, "http://127.0.0.1:9/v1"
        names = {"key": f"endpoint:model-b@{other}", "model": f"endpoint:model-z@{url}/v1"}
        config = LabelConfig(teachers=(f"endpoint:model-a@{url}/v1", names[wrong]))
        with pytest.raises(ValueError, match=f"teacher {names[wrong]}"):
            asked(config, tmp_path)
    assert server.bodies == [] and lines_of(tmp_path) == []


def test_a_limit_is_waited_out_however_often_it_comes(tmp_path: Path) -> None:
    with teacher_server() as server:
        good = server.behaviour

        def behaviour(model: str, text: str) -> str:
            return "429" if server.under_way > 2 else good(model, text)

        server.behaviour = behaviour  # type: ignore[method-assign]
        server.seconds = 0.01
        result, store = asked(settings(server, max_concurrency=16), tmp_path)
    assert result.failures == {} and len(store) == len(TEXTS)
    assert server.billed == {"good": len(TEXTS)}


def test_a_full_disk_is_an_error_and_not_a_paid_answer_that_is_lost_silently(
    tmp_path: Path,
) -> None:
    with teacher_server() as server, AnswerStore(Location.of(tmp_path), "run") as store:
        write = store.write

        def full(records: list) -> None:
            if len(store) >= 5:
                raise OSError(28, "No space left on device")
            write(records)

        store.write = full  # type: ignore[method-assign, assignment]
        with pytest.raises(OSError, match="No space left"):
            config = settings(server)
            ask_teachers(AskedTeacher.all_of(config), lambda: iter(TEXTS), store, config)
