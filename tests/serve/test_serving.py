"""The HTTP endpoint: a real Ray Serve on a free port, in front of tiny random models."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from tiny import plain_nano

from nla_ray.activation import vectors
from nla_ray.activation.stage import load_activations
from nla_ray.base.load import load_tokenizer
from nla_ray.base.prompts import chat_prompt
from nla_ray.description.verbalizer import Verbalizer
from nla_ray.run.artifact import Run
from nla_ray.score.reconstructor import Reconstructor
from nla_ray.serve import application, schema
from nla_ray.serve.deployments import VerbalizerService
from nla_ray.serve.schema import Refusal, Sampling
from nla_ray.settings.config import BaseConfig, RunConfig, ServeConfig

D_MODEL = 32


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def config(published_run: RunConfig) -> RunConfig:
    """A run with every artifact that serving needs, small limits and a free port."""
    return dataclasses.replace(
        published_run, serve=ServeConfig(port=free_port(), max_text_chars=400, max_batch=3)
    )


@pytest.fixture(scope="module")
def client(config: RunConfig) -> Iterator[httpx.Client]:
    """The running application."""
    address = application.start(config)
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            yield client
    finally:
        application.stop()


@pytest.fixture(scope="module")
def activations(config: RunConfig) -> torch.Tensor:
    return load_activations(Run(config), "test").vectors[:3]


def refused(response: httpx.Response) -> tuple[str, str, str]:
    assert response.status_code == 422, response.text
    body = response.json()
    assert set(body) == {"what", "got", "expected"}
    return body["what"], body["got"], body["expected"]


# What is answered ---------------------------------------------------------------------------------


def test_descriptions_are_those_of_the_verbalizer_itself(
    client: httpx.Client, config: RunConfig, activations: torch.Tensor
) -> None:
    for name in ("grpo", "sft"):
        response = client.post(
            "/v1/describe", json={"activations": activations.tolist(), "verbalizer": name}
        )
        assert response.status_code == 200, response.text
        body = response.json()
        assert (body["verbalizer"], body["layer"]) == (name, 1)
        direct = Verbalizer.load(config.base, Path(config.run_dir) / name / "adapter").describe(
            activations, max_new_tokens=8
        )
        assert [answer["description"] for answer in body["descriptions"]] == [
            answer.text for answer in direct
        ]
        assert [answer["closed"] for answer in body["descriptions"]] == [
            answer.closed for answer in direct
        ]


def test_the_default_verbalizer_is_the_one_after_grpo(
    client: httpx.Client, activations: torch.Tensor
) -> None:
    assert (
        client.post("/v1/describe", json={"activations": activations.tolist()}).json()["verbalizer"]
        == "grpo"
    )


def test_a_text_is_described_as_its_captured_activation_is(
    client: httpx.Client, config: RunConfig
) -> None:
    table = load_activations(Run(config), "test")
    from_texts = client.post("/v1/describe", json={"texts": table.texts[:2]}).json()["descriptions"]
    from_activations = client.post(
        "/v1/describe", json={"activations": table.vectors[:2].tolist()}
    ).json()["descriptions"]
    assert from_texts == from_activations


def test_sampling_is_seeded(client: httpx.Client, activations: torch.Tensor) -> None:
    def sample(seed: int) -> list:
        body = {"activations": activations.tolist(), "temperature": 1.5, "seed": seed}
        return client.post("/v1/describe", json=body).json()["descriptions"]

    assert sample(1) == sample(1) != sample(2)


def test_scores_are_cosines_of_one_reconstruction(
    client: httpx.Client, config: RunConfig, activations: torch.Tensor
) -> None:
    descriptions = ["- Python test: frame", "", "- licence: copy"]
    items = [
        {"description": text, "activation": row}
        for text, row in zip(descriptions, activations.tolist(), strict=True)
    ]
    scores = client.post("/v1/score", json={"items": items}).json()["scores"]
    for name in ("reward", "judge"):
        reconstructor = Reconstructor.load(config.base, Path(config.run_dir) / f"{name}_scorer")
        reconstruction = reconstructor.reconstruct(descriptions)
        expected = vectors.centred_cosine(reconstruction, activations, reconstructor.mean)
        torch.testing.assert_close(
            torch.tensor([by_scorer[name]["centred_cosine"] for by_scorer in scores]),
            expected,
            atol=1e-5,
            rtol=0,
        )
        cosine = torch.tensor([by_scorer[name]["cosine"] for by_scorer in scores])
        torch.testing.assert_close(
            cosine, vectors.cosine(reconstruction, activations), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            torch.tensor([by_scorer[name]["squared_error"] for by_scorer in scores]),
            2 - 2 * cosine,
            atol=1e-4,
            rtol=0,
        )
    only = client.post("/v1/score", json={"items": items[:1], "scorers": ["judge"]}).json()[
        "scores"
    ]
    assert [set(by_scorer) for by_scorer in only] == [{"judge"}]


def test_a_text_is_explained_at_every_position_asked_for(
    client: httpx.Client, config: RunConfig
) -> None:
    text = "def frame(): index rows"
    body = client.post("/v1/explain", json={"text": text, "positions": [-1, 4, -2]}).json()
    last = body["num_tokens"] - 1
    assert [explanation["position"] for explanation in body["explanations"]] == [last, 4, last - 1]
    assert all(
        set(explanation["scores"]) == {"reward", "judge"} for explanation in body["explanations"]
    )
    described = client.post("/v1/describe", json={"texts": [text]}).json()["descriptions"][0]
    assert body["explanations"][0]["description"] == described["description"]


def test_a_pasted_chat_is_one_turn_over_http_too(client: httpx.Client, config: RunConfig) -> None:
    tokenizer = load_tokenizer(config.base)
    around = len(tokenizer.encode(chat_prompt(tokenizer, "")))
    text = "hi<|im_end|>\n<|im_start|>assistant\nanother turn"
    inside = len(tokenizer.encode(text, split_special_tokens=True))
    body = client.post("/v1/explain", json={"text": text, "positions": [5, -2]}).json()
    assert body["num_tokens"] == around + inside
    tokens = {explanation["token"] for explanation in body["explanations"]}
    assert not any("<|im" in token for token in tokens)


def test_several_samples_are_answered_by_the_best_of_them(
    client: httpx.Client, config: RunConfig, activations: torch.Tensor
) -> None:
    body = {"activations": activations.tolist(), "samples": 5, "temperature": 1.5, "seed": 3}
    answers = client.post("/v1/describe", json=body).json()["descriptions"]
    written = Verbalizer.load(config.base, Path(config.run_dir) / "grpo" / "adapter").describe(
        activations,
        max_new_tokens=8,
        temperature=1.5,
        seed=3,
        group_size=5,
        rows=[0] * len(activations),
    )
    reward = Reconstructor.load(config.base, Path(config.run_dir) / "reward_scorer")
    for row, answer in enumerate(answers):
        drawn = [sample.text for sample in written[5 * row : 5 * row + 5]]
        reconstruction = reward.reconstruct(drawn)
        fits = vectors.centred_cosine(reconstruction, activations[row], reward.mean)
        pairs = [
            vectors.centred_cosine(reconstruction[i], reconstruction[j], reward.mean)
            for i in range(5)
            for j in range(i)
        ]
        assert answer["description"] == drawn[fits.argmax()]
        assert answer["confidence"] == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
        assert (answer["samples"], answer["unsure"]) == (5, False)


def test_the_best_of_several_is_seeded_and_drawn_at_the_temperature_of_training(
    client: httpx.Client, config: RunConfig, activations: torch.Tensor
) -> None:
    def best(**settings: object) -> list:
        return client.post(
            "/v1/describe", json={"activations": activations.tolist(), "samples": 4} | settings
        ).json()["descriptions"]

    assert (
        best(seed=1)
        == best(seed=1)
        == best(seed=1, temperature=config.grpo.temperature)
        != best(seed=2)
    )


def test_one_sample_has_no_confidence_and_is_never_unsure(
    client: httpx.Client, activations: torch.Tensor
) -> None:
    for answer in client.post("/v1/describe", json={"activations": activations.tolist()}).json()[
        "descriptions"
    ]:
        assert (answer["samples"], answer["confidence"], answer["unsure"]) == (1, None, False)


def test_below_the_wanted_confidence_nothing_is_described(
    client: httpx.Client, activations: torch.Tensor
) -> None:
    def ask(**settings: object) -> list[dict]:
        body = {"activations": activations.tolist(), "samples": 4, "temperature": 1.5} | settings
        return client.post("/v1/describe", json=body).json()["descriptions"]

    free = ask()
    assert ask(min_confidence=-1.0) == free
    assert all(
        answer["description"] is None and answer["unsure"] for answer in ask(min_confidence=1.0)
    )
    middle = sorted(answer["confidence"] for answer in free)[1]  # of itself it is not below
    assert [answer["unsure"] for answer in ask(min_confidence=middle)] == [
        answer["confidence"] < middle for answer in free
    ]
    assert [answer["confidence"] for answer in ask(min_confidence=1.0)] == [
        answer["confidence"] for answer in free
    ]


def test_explain_scores_the_chosen_description_and_nothing_where_it_is_unsure(
    client: httpx.Client, config: RunConfig
) -> None:
    body = {
        "text": "def frame(): index rows",
        "positions": [-1, 4, -2],
        "samples": 4,
        "temperature": 1.5,
        "seed": 6,  # positions share its draws, and a base as small as this often says the same
    }
    free = client.post("/v1/explain", json=body).json()["explanations"]
    sampling = {key: body[key] for key in ("samples", "temperature", "seed")}
    described = client.post("/v1/describe", json={"texts": [body["text"]], **sampling}).json()[
        "descriptions"
    ][0]
    assert (free[0]["description"], free[0]["confidence"]) == (
        described["description"],
        pytest.approx(described["confidence"], abs=1e-5),
    )
    assert all(set(explanation["scores"]) == {"reward", "judge"} for explanation in free)
    most = max(explanation["confidence"] for explanation in free)
    some = client.post("/v1/explain", json=body | {"min_confidence": most}).json()["explanations"]
    for sure, explanation in zip(free, some, strict=True):
        unsure = sure["confidence"] < most
        expected = sure | {"description": None, "unsure": True, "scores": {}} if unsure else sure
        assert explanation | {"scores": {}} == expected | {"scores": {}}
        cosines = {name: score["cosine"] for name, score in explanation["scores"].items()}
        assert cosines == {
            name: pytest.approx(score["cosine"], abs=1e-5)  # read in another batch
            for name, score in expected["scores"].items()
        }
    assert 0 < sum(explanation["unsure"] for explanation in some) < len(some)
    none = client.post("/v1/explain", json=body | {"min_confidence": 1.0}).json()["explanations"]
    assert [(explanation["description"], explanation["scores"]) for explanation in none] == [
        (None, {})
    ] * 3


def test_models_names_base_adapters_and_fingerprints(
    client: httpx.Client, config: RunConfig
) -> None:
    body = client.get("/v1/models").json()
    assert (body["base"]["d_model"], body["base"]["layer"], body["base"]["num_layers"]) == (
        D_MODEL,
        1,
        3,
    )
    assert [model["name"] for model in body["verbalizers"]] == ["grpo", "sft"]
    assert [model["name"] for model in body["scorers"]] == ["reward", "judge"]
    assert body["verbalizers"][1]["fingerprint"] == Run(config).find("sft").fingerprint


def test_the_endpoint_is_ready_when_every_deployment_answers(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "waiting": 0}
    response = client.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "deployments": {"verbalizer": "ok", "scorer": "ok", "capture": "ok"},
    }


def test_the_openapi_page_describes_every_route_and_its_refusals(client: httpx.Client) -> None:
    page = client.get("/openapi.json").json()
    assert set(page["paths"]) == {
        "/v1/describe",
        "/v1/score",
        "/v1/explain",
        "/v1/models",
        "/healthz",
        "/readyz",
    }
    refusal = page["paths"]["/v1/describe"]["post"]["responses"]["422"]["content"][
        "application/json"
    ]["schema"]
    assert refusal == {"$ref": "#/components/schemas/ErrorBody"}


# What is refused ----------------------------------------------------------------------------------

ONES = [1.0] * D_MODEL


@pytest.mark.parametrize(
    ("path", "body", "what", "got", "expected"),
    [
        ("describe", {"activations": [[1.0] * 31]}, "activations[0]", "31 numbers", "32 numbers"),
        (
            "describe",
            {"activations": [ONES, [0.0] * D_MODEL]},
            "activations[1]",
            "norm 0",
            "at least 1e-06",
        ),
        (
            "describe",
            {"activations": [[*ONES[:-1], float("nan")]]},
            "activations[0][31]",
            "nan",
            "finite float32",
        ),
        (
            "describe",
            {"activations": [[float("inf"), *ONES[1:]]]},
            "activations[0][0]",
            "inf",
            "finite float32",
        ),
        (
            "describe",
            {"activations": [[1e39, *ONES[1:]]]},
            "activations[0][0]",
            "1e+39",
            "finite float32",
        ),
        (
            "describe",
            {"activations": [[1e30, *ONES[1:]]]},
            "activations[0]",
            "1e+30",
            "at most 1e+18",
        ),
        ("describe", {"activations": [["x", *ONES[1:]]]}, "activations.0.0", "x", "valid number"),
        ("describe", {"activations": []}, "activations", "0 items", "1 to 3 items"),
        ("describe", {"activations": [ONES] * 4}, "activations", "4 items", "1 to 3 items"),
        ("describe", {}, "body", "none", "exactly one of activations, texts, vectors"),
        ("describe", {"vectors": [[]]}, "vectors[0]", "0 vectors", "1 to 16"),
        (
            "describe",
            {"activations": [ONES], "texts": ["a"]},
            "body",
            "activations and texts",
            "exactly one",
        ),
        ("describe", {"activations": [ONES], "layer": 2}, "layer", "2", "1, the layer"),
        (
            "describe",
            {"activations": [ONES], "verbalizer": "gold"},
            "verbalizer",
            "gold",
            "one of grpo, sft",
        ),
        (
            "describe",
            {"activations": [ONES], "temperature": -1},
            "temperature",
            "-1",
            "greater than or equal to 0",
        ),
        (
            "describe",
            {"activations": [ONES], "max_new_tokens": 0},
            "max_new_tokens",
            "0",
            "greater than or equal to 1",
        ),
        (
            "describe",
            {"activations": [ONES], "max_new_tokens": 5_000},
            "max_new_tokens",
            "5000",
            "context has room for",
        ),
        (
            "describe",
            {"activations": [ONES], "temperature": float("nan")},
            "temperature",
            "nan",
            "finite",
        ),
        (
            "describe",
            {"activations": [ONES], "samples": 0},
            "samples",
            "0",
            "greater than or equal to 1",
        ),
        (
            "describe",
            {"activations": [ONES], "samples": 17},
            "samples",
            "17",
            "less than or equal to 16",
        ),
        (
            "describe",
            {"activations": [ONES], "samples": 2, "temperature": 0},
            "temperature",
            "0.0",
            "above 0",
        ),
        (
            "describe",
            {"activations": [ONES], "min_confidence": 0.5},
            "min_confidence",
            "0.5 with 1 sample",
            "samples of 2 to 16",
        ),
        (
            "describe",
            {"activations": [ONES], "samples": 2, "min_confidence": 1.01},
            "min_confidence",
            "1.01",
            "less than or equal to 1",
        ),
        (
            "describe",
            {"activations": [ONES], "samples": 2, "min_confidence": float("nan")},
            "min_confidence",
            "nan",
            "finite",
        ),
        (
            "describe",
            {"activations": [ONES], "temperature": 1e-38},
            "temperature",
            "1e-38",
            "0, which is greedy, or 0.01 to 2",
        ),
        ("describe", {"activation": [ONES]}, "activation", "[[1.0", "not permitted"),
        ("describe", {"texts": ["fine", " \n\t"]}, "texts[1]", "' ", "visible character"),
        ("describe", {"texts": []}, "texts", "0 items", "1 to 3"),
        (
            "describe",
            {"texts": ["a" * 401]},
            "texts[0]",
            "401 characters",
            "at most 400 characters",
        ),
        (
            "describe",
            {"texts": ["\u3042" * 390]},
            "texts[0]",
            "tokens with the chat template",
            "at most 256 tokens",
        ),
        ("score", {"items": []}, "items", "0 items", "1 to 3 items"),
        (
            "score",
            {"items": [{"description": "- a", "activation": [1.0]}]},
            "items[0].activation",
            "1 numbers",
            "32 numbers",
        ),
        (
            "score",
            {"items": [{"description": "a" * 401, "activation": ONES}]},
            "items[0].description",
            "401",
            "at most 400",
        ),
        (
            "score",
            {"items": [{"description": "- a"}]},
            "items.0.activation",
            "nothing",
            "Field required",
        ),
        (
            "score",
            {"items": [{"description": "- a", "activation": ONES}], "scorers": ["gold"]},
            "scorers",
            "gold",
            "one of reward, judge",
        ),
        (
            "score",
            {"items": [{"description": "- a", "activation": ONES}], "layer": -1},
            "layer",
            "-1",
            "1, the layer",
        ),
        ("explain", {"text": ""}, "text", "''", "visible character"),
        ("explain", {"text": "a", "positions": []}, "positions", "0 items", "1 to 3 items"),
        ("explain", {"text": "a", "positions": [500]}, "positions", "[500]", "the prompt's tokens"),
        (
            "explain",
            {"text": "a", "positions": [-500]},
            "positions",
            "[-500]",
            "the prompt's tokens",
        ),
        ("explain", {"text": "a", "layer": 0}, "layer", "0", "1, the layer"),
        (
            "explain",
            {"text": "a", "samples": 3, "temperature": 0.0},
            "temperature",
            "0.0",
            "ask for samples 1",
        ),
        (
            "explain",
            {"text": "a", "min_confidence": -1},
            "min_confidence",
            "-1.0 with 1 sample",
            "how far samples agree",
        ),
    ],
)
def test_bad_requests_are_refused_with_what_got_and_expected(
    client: httpx.Client, path: str, body: dict, what: str, got: str, expected: str
) -> None:
    # json.dumps writes NaN and Infinity as JavaScript does; httpx's own json= refuses to
    answer = refused(
        client.post(
            f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
    )
    assert answer[0] == what
    assert got in answer[1] and expected in answer[2]


def test_a_body_that_is_no_json_is_refused(client: httpx.Client) -> None:
    what, _, expected = refused(
        client.post(
            "/v1/describe", content=b'{"texts": [', headers={"Content-Type": "application/json"}
        )
    )
    assert "JSON" in expected and what


def test_after_all_refusals_the_endpoint_still_answers(client: httpx.Client) -> None:
    assert client.post("/v1/describe", json={"texts": ["def frame(): rows"]}).status_code == 200


@pytest.mark.parametrize(
    "route, body, what, got",
    [
        ("describe", {"texts": ["a\ud800b"]}, "texts[0]", "a lone surrogate"),
        ("describe", {"activations": [ONES], "verbalizer": "\ud800"}, "verbalizer", "\\ud800"),
        (
            "score",
            {"items": [{"description": "\ud800", "activation": ONES}]},
            "items[0].description",
            "a lone surrogate",
        ),
        ("explain", {"text": "\ud800"}, "text", "a lone surrogate"),
    ],
)
def test_a_lone_surrogate_is_refused_in_an_answer_that_can_be_read(
    client: httpx.Client, route: str, body: dict, what: str, got: str
) -> None:
    response = client.post(
        f"/v1/{route}", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert refused(response)[:2] == (what, got)


def test_without_the_scorer_that_chooses_one_sample_is_all_there_is() -> None:
    schema.check_choice(Sampling(samples=1), ["judge"])
    with pytest.raises(
        Refusal, match=r"samples: got 2, expected 1: the scorer 'reward'.*not served"
    ):
        schema.check_choice(Sampling(samples=2), ["judge"])


def test_the_openapi_page_says_what_unsure_means(client: httpx.Client) -> None:
    fields = client.get("/openapi.json").json()["components"]["schemas"]["DescriptionBody"][
        "properties"
    ]
    assert {"type": "null"} in fields["description"]["anyOf"]
    assert (
        "withheld" in fields["unsure"]["description"]
        and "Not a probability" in fields["confidence"]["description"]
    )


def test_a_client_that_leaves_takes_its_work_along(
    client: httpx.Client, config: RunConfig, activations: torch.Tensor
) -> None:
    longest = client.get("/v1/models").json()["base"]["max_new_tokens"]
    body = {"activations": activations.tolist(), "samples": 16, "max_new_tokens": longest}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/describe", json=body, timeout=0.2)
    while client.get("/healthz").json()["waiting"]:
        pass
    response = client.post("/v1/describe", json={"activations": activations.tolist()})
    assert response.status_code == 200


# What is missing ----------------------------------------------------------------------------------


def test_a_port_in_use_is_one_clear_message(client: httpx.Client, config: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"expected a free port.*--serve.port"):
        application.check_port(config.serve)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ValueError, match="in use"):
            application.check_port(ServeConfig(port=listener.getsockname()[1]))


def test_a_second_start_is_refused_and_the_first_goes_on_serving(
    client: httpx.Client, config: RunConfig
) -> None:
    with pytest.raises(ValueError, match="Ray Serve: got one on this cluster that runs nla_ray"):
        application.start(dataclasses.replace(config, serve=ServeConfig(port=free_port())))
    assert client.get("/healthz").status_code == 200


def test_descriptions_are_decoded_as_training_did_not_as_this_command_says(
    config: RunConfig, activations: torch.Tensor
) -> None:
    changed = dataclasses.replace(
        config, grpo=dataclasses.replace(config.grpo, max_new_tokens=1, temperature=0.01)
    )
    ours, theirs = (
        asyncio.run(
            VerbalizerService(settings, ["grpo"]).describe(
                "grpo", activations.numpy(), Sampling(samples=4, seed=1)
            )
        )
        for settings in (config, changed)
    )
    assert ours == theirs and any(answer.num_tokens > 1 for answer in ours)


def test_missing_artifacts_name_the_job_that_makes_them(
    tiny_base: BaseConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"artifact 'sft'.*jobs/sft\.py"):
        application.find_models(
            Run(dataclasses.replace(plain_nano(), base=tiny_base, run_dir=str(tmp_path)))
        )


def test_a_run_of_another_base_is_not_served(config: RunConfig, tmp_path: Path) -> None:
    from tiny import make_tiny_base

    another_base = make_tiny_base(tmp_path / "another_base", seed=1)
    with pytest.raises(ValueError, match=r"expected .* with which it was made"):
        application.find_models(Run(dataclasses.replace(config, base=another_base)))
