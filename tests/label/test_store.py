"""The store of answers: what counts is on the disk, once, and survives crashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nla_ray.label.store import AnswerStore, FailedRequest, SentRequest, StoredAnswer, answer_key
from nla_ray.run.location import Location


def answer(number: int, usd: float = 0.25) -> StoredAnswer:
    return StoredAnswer(
        key=key(number),
        teacher="openai:m",
        prompt_sha256="p",
        parameters={"answer_tokens": 9},
        text_sha256="t",
        text_chars=3,
        text=f"answer {number}\n\u2028 with lines",
        fault="",
        input_tokens=10,
        output_tokens=None,
        usd=usd,
    )


def key(number: int) -> str:
    return answer_key(f"text {number}", "openai:m", "p", {"answer_tokens": 9})


def opened(folder: Path, run: str = "a") -> AnswerStore:
    return AnswerStore(Location.of(folder), run)


def test_a_key_is_of_everything_that_shapes_an_answer() -> None:
    given = ("text", "openai:m", "hash", {"answer_tokens": 9, "b": 1})
    others = [
        ("text ", *given[1:]),
        (given[0], "openai:n", *given[2:]),
        (*given[:2], "hash2", given[3]),
        (*given[:3], {"answer_tokens": 10, "b": 1}),
    ]
    keys = {answer_key(*given), *(answer_key(*other) for other in others)}
    assert len(keys) == 5
    assert answer_key(*given) == answer_key(*given[:3], {"b": 1, "answer_tokens": 9})


def test_answers_of_all_sessions_are_read_back_as_they_were(tmp_path: Path) -> None:
    for session in range(3):
        with opened(tmp_path) as store:
            store.write([answer(session * 2), answer(session * 2 + 1)])
            assert len(store) == session * 2 + 2
    with opened(tmp_path) as store:
        assert [store.get(key(number)) for number in range(6)] == [answer(n) for n in range(6)]
        assert store.get(key(9)) is None and key(9) not in store


def test_a_second_answer_of_a_key_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write([answer(1)])
        with pytest.raises(RuntimeError, match="is answered already"):
            store.write([answer(1)])


def test_a_torn_last_line_costs_itself_alone_wherever_it_is_torn(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write([answer(number) for number in range(4)])
    [path] = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in (start, start + 1, len(whole) // 2 + start // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with opened(tmp_path) as store:
            assert len(store) == 3 and store.torn_lines == (end > start)
            store.write([answer(3)])
        with opened(tmp_path) as store:
            assert store.get(key(3)) == answer(3)
        for other in tmp_path.glob("*.jsonl"):
            if other != path:
                other.unlink()


def test_bytes_that_are_no_record_cost_no_answer(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write([answer(0)])
    for content in (b"\x00\xff\n", b"[]\n", b'{"key": 3}\n', b'{"kind": "answer", "key": "zz"}\n'):
        (tmp_path / "damaged.jsonl").write_bytes(content)
        with opened(tmp_path) as store:
            assert store.torn_lines == 1 and store.get(key(0)) == answer(0)


def test_spending_is_of_a_run_and_counts_what_a_crash_left_open(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.write([SentRequest(key=key(0), usd=1.0), SentRequest(key=key(1), usd=2.0)])
        store.write([FailedRequest(key=key(0), reason="no answer in time", usd=1.0)])
        store.write([SentRequest(key=key(0), usd=1.0)])
        store.write([answer(0, usd=0.25)])
        assert (store.spent_usd, store.num_unsettled) == (1.0 + 0.25 + 2.0, 1)
    with opened(tmp_path, run="b") as store:
        assert (store.spent_usd, store.num_unsettled) == (0.0, 0)
    with opened(tmp_path) as store:  # asked again: two requests, one of them has an outcome
        store.write([SentRequest(key=key(1), usd=2.0)])
        store.write([answer(1, usd=0.5)])
        assert (store.spent_usd, store.num_unsettled) == (1.0 + 0.25 + 2.0 + 0.5, 1)


def test_what_is_spent_can_be_read_while_another_thread_writes(tmp_path: Path) -> None:
    def send(store: AnswerStore) -> None:
        for start in range(0, 6_000, 60):
            numbers = range(start, start + 60)
            store.write([SentRequest(key=key(number), usd=1.0) for number in numbers])

    with opened(tmp_path) as store, ThreadPoolExecutor(max_workers=1) as thread:
        sending, spent = thread.submit(send, store), [0.0]
        while not sending.done():
            spent += [store.spent_usd, float(store.num_unsettled)]
        sending.result()
        assert spent == sorted(spent)
        assert (store.spent_usd, store.num_unsettled) == (6_000.0, 6_000)


def test_a_store_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    expected = r"label.store .*: got a lock held by process .* or use another --label.store"
    with opened(tmp_path), pytest.raises(ValueError, match=expected):
        opened(tmp_path, run="b")
    opened(tmp_path, run="b").close()


def test_what_was_written_when_a_process_is_killed_is_there(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_store import answer, opened\n"
        "store = opened(Path(sys.argv[1]))\n"
        "for number in range(10_000):\n"
        "    store.write([answer(number)])\n"
        "    print(number, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "37\n":
                os.kill(process.pid, signal.SIGKILL)
                break
        said = [int(line), *(int(rest) for rest in process.stdout.read().split())]
    with opened(tmp_path) as store:
        assert all(store.get(key(number)) == answer(number) for number in range(max(said) + 1))


def test_a_store_on_an_object_store_is_one_like_a_folder(
    s3_uri: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    location = Location.of(s3_uri("answers"))
    with AnswerStore(location, "a") as store:
        store.write([SentRequest(key=key(0), usd=1.0)])
        store.write([answer(0), answer(1)])
        assert store.get(key(1)) == answer(1)
    with AnswerStore(location, "a") as store:
        store.write([answer(2)])
        assert [store.get(key(number)) for number in range(3)] == [answer(n) for n in range(3)]
    lines = [
        json.loads(line)
        for name in location.list_files()
        if name.endswith(".jsonl")
        for line in (location / name).read_text().splitlines()
    ]
    assert [line["kind"] for line in lines] == ["sent", "answer", "answer", "answer"]
