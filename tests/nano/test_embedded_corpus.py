"""The embedded corpus: where its documents come from, its balance, and no twin across a split."""

from collections import Counter

import numpy as np
import pytest

from nla_ray.nano import installed_texts
from nla_ray.nano.embedded_corpus import embedded_chunks
from nla_ray.run.identity import split_of
from nla_ray.settings.config import CorpusConfig
from nla_ray.settings.presets import preset
from nla_ray.text.chunks import Chunk
from nla_ray.text.duplicates import jaccard_similarity, minhash_signatures


@pytest.mark.parametrize(
    ("path", "domain"),
    [
        ("torch/nn/modules/linear.py", "python_code"),
        ("pandas/tests/frame/test_api.py", "python_test"),
        ("networkx/algorithms/cuts.py", "api_reference"),
        ("transformers/models/bert/modeling_bert.py", "model_code"),
        ("torch/include/ATen/Tensor.h", "native_code"),
        ("ray/includes/common.cc", "native_code"),
        ("torch/include/ATen/ops/add.h", None),
        ("numpy/__init__.pyi", "type_stub"),
        ("numpy-2.4.6.dist-info/METADATA", "package_metadata"),
        ("numpy-2.4.6.dist-info/licenses/LICENSE.txt", "licence"),
        ("google/protobuf/any.proto", "protocol_buffer"),
        ("ray/dashboard/client/build/static/js/main.js", None),
        ("../../../bin/ninja", None),
    ],
)
def test_a_file_belongs_to_one_domain_by_its_path(path: str, domain: str | None) -> None:
    assert installed_texts.domain_of(path) == domain


def test_native_code_is_one_domain_whose_ids_keep_headers_and_sources_apart() -> None:
    prefixes = {
        source.doc_id.split("/")[0]
        for source in installed_texts.list_sources()
        if source.domain == "native_code"
    }
    assert prefixes == {"cpp_header", "cpp_source"}


def test_documents_are_named_without_the_version_of_their_package() -> None:
    assert (
        installed_texts._without_version("numpy-2.4.6.dist-info/METADATA")
        == "numpy.dist-info/METADATA"
    )
    assert (
        installed_texts._without_version("torch-2.13.0+cpu.dist-info/RECORD")
        == "torch.dist-info/RECORD"
    )
    assert installed_texts._without_version("ray/data/dataset.py") == "ray/data/dataset.py"


def test_packages_that_only_the_tests_need_are_outside_the_corpus() -> None:
    names = {
        distribution.name.lower()
        for distribution in installed_texts.closure_distributions(installed_texts.CORE_REQUIREMENTS)
    }
    assert {"torch", "ray", "numpy", "jinja2"} <= names
    assert not {"pytest", "moto", "boto3", "coverage"} & names


def test_docstrings_come_under_the_names_they_document() -> None:
    code = (
        'def outer():\n    """Says hello."""\n    if True:\n        class Inner:\n            """Is'
        ' nested."""\n\ndef bare():\n    return 1\n'
    )
    assert installed_texts.extract_docstrings(code) == "outer\nSays hello.\n\nInner\nIs nested."
    assert installed_texts.extract_docstrings("def broken(:") == ""


@pytest.fixture(scope="module")
def corpus() -> list[Chunk]:
    return embedded_chunks(CorpusConfig())


def test_the_embedded_corpus_is_large_balanced_and_in_order(corpus: list[Chunk]) -> None:
    domains = Counter(chunk.domain for chunk in corpus)
    assert len(corpus) >= 3_000 and len(domains) >= 10
    assert max(domains.values()) / len(corpus) < 0.25
    assert len({chunk.doc_id for chunk in corpus if chunk.split == "test"}) >= 400
    text_ids = [chunk.text_id for chunk in corpus]
    assert text_ids == sorted(set(text_ids))
    assert all(
        chunk.split == split_of(chunk.doc_id)
        and chunk.text_id == f"{chunk.doc_id}#{chunk.chunk_index}"
        for chunk in corpus
    )


def test_the_embedded_corpus_is_large_enough_for_a_report_of_the_small_real_model() -> None:
    config = preset("smollm2-135m")
    chunks = embedded_chunks(config.corpus)
    assert len({chunk.doc_id for chunk in chunks}) == len(chunks) <= config.corpus.max_chunks
    assert (
        len([chunk for chunk in chunks if chunk.split == "test"])
        >= 1.1 * config.evaluation.min_documents
    )


def test_documents_keep_their_ids_outside_this_machine(corpus: list[Chunk]) -> None:
    assert not [
        chunk.doc_id
        for chunk in corpus
        if "site-packages" in chunk.doc_id or chunk.doc_id.startswith("/")
    ]


def test_no_text_has_a_near_duplicate_on_another_side_of_the_split(corpus: list[Chunk]) -> None:
    signatures = minhash_signatures([chunk.text for chunk in corpus])
    is_train = np.array([chunk.split == "train" for chunk in corpus])
    train, held_out = signatures[is_train], signatures[~is_train]
    closest = max(jaccard_similarity(train, row).max() for row in held_out)
    # The search may miss a pair exactly at the threshold of 0.7; from 0.8 on it misses one in ten
    # million.
    assert closest < 0.8
    assert not {chunk.text for chunk in corpus if chunk.split == "train"} & {
        chunk.text for chunk in corpus if chunk.split != "train"
    }
