"""Fixtures that several test files share: an embedded Ray, the tiny base, and a small corpus."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import checked_shapes  # noqa: F401  (before nla_ray: checks its shapes)
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nla_ray.run.artifact import Run
from nla_ray.run.identity import split_of
from nla_ray.run.manifest import Manifest
from nla_ray.settings.config import (
    BaseConfig,
    ComputeConfig,
    EvaluationConfig,
    GRPOSettings,
    RunConfig,
)
from nla_ray.text.chunks import CHUNK_SCHEMA

TEXTS = (
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "A licence that permits copying, with conditions.",
    "rows: 12\ncolumns: 3\n",
    "Two or three bullets: the topics, the tokens, the response. " * 3,
    "assert len(rows) == 3",
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The lines that nla_ray logs during a test, from INFO, whatever earlier tests did to its
    loggers."""
    lines: list[str] = []
    logger, handler = logging.getLogger("nla_ray"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    before = logger.level
    logger.setLevel(logging.INFO)  # not by monkeypatch: child loggers remember what was enabled
    yield lines
    logger.setLevel(before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """An embedded Ray of at least two CPUs, started as every job starts it."""
    from nla_ray.cluster.connect import connect

    with connect(ComputeConfig(threads=1)):
        yield


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseConfig:
    """A random Qwen2 model on disk: d_model 32, 3 blocks."""
    from tiny import make_tiny_base

    return make_tiny_base(tmp_path_factory.mktemp("tiny_base"))


@pytest.fixture
def tiny_run(tiny_base: BaseConfig, tmp_path: Path) -> Callable[..., Run]:
    """Makes runs in the test's own folder on the tiny base: `tiny_run("name",
    capture=CaptureConfig(...))`."""

    def make(name: str = "run", run_dir: str | None = None, **sections: object) -> Run:
        from tiny import plain_nano

        sections.setdefault("base", tiny_base)
        sections.setdefault("compute", ComputeConfig(threads=1, capture_cpus=0.5))
        return Run(
            dataclasses.replace(plain_nano(), run_dir=run_dir or str(tmp_path / name), **sections)
        )

    return make


@pytest.fixture(scope="session")
def published_run(
    ray_cluster: None, tiny_base: BaseConfig, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A run on the tiny base with every artifact up to `grpo`; tests that change it copy it
    first."""
    from tiny import plain_nano
    from tiny_artifacts import make_artifacts

    compute = ComputeConfig(threads=1, capture_cpus=0.5, rollout_cpus=0.5, serve_cpus=0.1)
    config = dataclasses.replace(
        plain_nano(),
        run_dir=str(tmp_path_factory.mktemp("published")),
        base=tiny_base,
        compute=compute,
        grpo=GRPOSettings(max_new_tokens=8),
        evaluation=EvaluationConfig(min_documents=10, bootstrap_resamples=200),
    )
    make_artifacts(Run(config))
    return config


@pytest.fixture
def publish_corpus() -> Callable[..., Manifest]:
    """Publishes a corpus artifact by hand: `publish_corpus(run, shards=[["text", ...], ...])`; two
    chunks a document."""

    def publish(run: Run, shards: Sequence[Sequence[str]] = (TEXTS, TEXTS[::-1])) -> Manifest:
        stage = run.open_artifact("corpus", "corpus")
        for number, texts in enumerate(shards):
            sink = pa.BufferOutputStream()
            pq.write_table(corpus_table(number, texts), sink)
            (stage.location / f"part-{number:05}.parquet").write_bytes(sink.getvalue().to_pybytes())
        return stage.publish()

    return publish


def corpus_table(shard: int, texts: Sequence[str]) -> pa.Table:
    """Chunks `doc-{shard}-{n}#{0 or 1}` with the given texts."""
    rows = []
    for index, text in enumerate(texts):
        doc_id = f"doc-{shard:03}-{index // 2:04}"
        rows.append(
            {
                "text_id": f"{doc_id}#{index % 2}",
                "doc_id": doc_id,
                "split": split_of(doc_id),
                "domain": "prose",
                "chunk_index": index % 2,
                "text": text,
            }
        )
    return pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA)


@pytest.fixture(scope="session")
def s3_uri() -> Iterator[Callable[[str], str]]:
    """Run directories on a local S3 server: `s3_uri("name")` ->
    `s3://key:secret@bucket/name?...`."""
    import socket

    import boto3
    from moto.server import ThreadedMotoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    ).create_bucket(Bucket="runs")
    yield (
        lambda name: (
            f"s3://test:test@runs/{name}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        )
    )
    server.stop()
