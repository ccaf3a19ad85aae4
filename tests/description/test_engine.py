"""The generation engine against transformers' own `generate` and forward pass; its sampler."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from tiny import make_tiny_base
from torch import Tensor
from transformers import GPT2Config

from nla_ray.activation import vectors
from nla_ray.activation.injection import activations_attached
from nla_ray.base.adapters import adapter_active, adapter_state, add_lora, set_adapter_state
from nla_ray.base.encoding import end_ids_of
from nla_ray.base.families import FAMILIES, decoder_shape
from nla_ray.base.load import load_backbone, load_tokenizer, random_backbone
from nla_ray.base.prompts import (
    InjectionPrompt,
    LayerEnding,
    build_injection_prompt,
    injection_prompt,
    layer_endings,
)
from nla_ray.bench.families import small_sizes
from nla_ray.cpu.projection import packing_works
from nla_ray.description.engines.compact import CompactDecoder
from nla_ray.description.engines.interface import GenerationEngine, engine_name, make_engine
from nla_ray.description.engines.projection import (
    AdaptedProjection,
    PlainProjection,
    make_projection,
)
from nla_ray.description.engines.requests import GenerationCancelled
from nla_ray.description.engines.slots import SlotEngine
from nla_ray.description.record import Description
from nla_ray.description.sampling import Sampler, rollout_keys
from nla_ray.settings.config import BaseConfig, LoraSettings

LORA = LoraSettings(rank=4, alpha=8)
VARIANTS = {
    "qwen2 tied, one key-value head": {
        "architecture": "qwen2",
        "tied": True,
        "heads": 2,
        "key_value_heads": 1,
    },
    "qwen2 untied, full heads": {
        "architecture": "qwen2",
        "tied": False,
        "heads": 4,
        "key_value_heads": 4,
    },
    "llama tied, grouped heads": {
        "architecture": "llama",
        "tied": True,
        "heads": 4,
        "key_value_heads": 2,
    },
    "qwen3, norms of heads": {
        "architecture": "qwen3",
        "tied": False,
        "heads": 4,
        "key_value_heads": 2,
    },
    "qwen2 by plain": {"architecture": "qwen2", "engine": "plain"},
    **{
        f"{name} by plain": {"architecture": name, "heads": 4, "key_value_heads": 2}
        for name, family in FAMILIES.items()
        if family.parts is None
    },
}
COMPACT = [name for name in VARIANTS if "plain" not in name]
NUM_ACTIVATIONS = 9
NEW_TOKENS = 20


class Scene(NamedTuple):
    """A model with a random adapter, and activations to describe."""

    base: BaseConfig
    model: torch.nn.Module
    tokenizer: object
    prompt: InjectionPrompt
    state: dict[str, Tensor]
    activations: Tensor

    def engine(self, max_slots: int = 4, model: torch.nn.Module | None = None) -> GenerationEngine:
        engine = make_engine(
            model or self.model,
            self.tokenizer,
            self.prompt,
            self.base.injection_norm,
            max_slots,
            LORA,
            chosen=self.base.engine,
        )
        engine.load_weights(self.state, 7)
        return engine

    def compact(
        self, max_slots: int = 4, *, merged: bool, recorded: bool | None = None
    ) -> SlotEngine:
        """The compact engine, with the adapter in its weights or beside them."""
        decoder = CompactDecoder(self.model, rows=max_slots, merged=merged)
        engine = SlotEngine(
            decoder,
            end_ids_of(self.model.get_base_model(), self.tokenizer),
            self.tokenizer,
            self.prompt,
            self.base.injection_norm,
            max_slots,
            LORA,
            recorded=recorded,
        )
        engine.load_weights(self.state, 7)
        return engine


def make_scene(
    folder: Path, dtype: str = "float32", factor: float = 0.3, engine: str = "auto", **variant
) -> Scene:
    """`factor`: size of the adapter's second factors."""
    base = dataclasses.replace(make_tiny_base(folder, **variant), dtype=dtype, engine=engine)
    tokenizer, model = load_tokenizer(base), add_lora(load_backbone(base), LORA, trainable=False)
    generator = torch.Generator().manual_seed(3)
    state = {
        name: torch.randn(value.shape, generator=generator) * (factor if "lora_B" in name else 0.3)
        for name, value in adapter_state(model).items()
    }
    set_adapter_state(model, state)
    activations = torch.randn(NUM_ACTIVATIONS, variant.get("width", 32), generator=generator)
    scene = Scene(
        base, model, tokenizer, build_injection_prompt(tokenizer, base.marker), state, activations
    )
    # A random model hardly ever ends a text by itself: some tokens that it writes late end one
    # here, so that rows end at all lengths. 2 is the tokenizer's own.
    model.generation_config.eos_token_id = [2]
    written = library_greedy(scene, NEW_TOKENS)
    early = {token for row in written for token in row[:2]}
    late = ([token for token in row if token not in early] for row in written)
    last = {row[number % len(row)] for number, row in enumerate(late) if row}
    model.generation_config.eos_token_id = sorted({2, *last})
    return scene


@pytest.fixture(scope="module", params=VARIANTS)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), **VARIANTS[request.param])


@pytest.fixture(scope="module", params=COMPACT)
def compact_scene(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), **VARIANTS[request.param])


@pytest.fixture(scope="module")
def one_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


def library_greedy(scene: Scene, max_new_tokens: int) -> list[list[int]]:
    """New tokens of `model.generate` through the embedding wrapper, up to the end of text.

    The adapter is run by PEFT.
    """
    with activations_attached(
        scene.model.get_base_model(), scene.activations, scene.base.injection_norm
    ) as wrapper:
        count = len(scene.activations) // scene.prompt.num_vectors
        ids = torch.tensor([scene.prompt.encode(row, wrapper.vocab_size) for row in range(count)])
        output = scene.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=scene.tokenizer.pad_token_id,
        )
    ends = set(scene.model.generation_config.eos_token_id)
    rows = []
    for row in output[:, ids.shape[1] :].tolist():
        length = next((count for count, token in enumerate(row, 1) if token in ends), len(row))
        rows.append(row[:length])
    return rows


def trainer_log_probs(scene: Scene, rollout: Description, temperature: float) -> Tensor:
    """Log-probabilities of a rollout's tokens by one forward pass of the library's model."""
    with activations_attached(
        scene.model.get_base_model(), scene.activations, scene.base.injection_norm
    ) as wrapper:
        ids = scene.prompt.encode(rollout.row, wrapper.vocab_size)
        with torch.no_grad():
            logits = scene.model(input_ids=torch.tensor([ids + rollout.token_ids])).logits[
                0, len(ids) - 1 : -1
            ]
    return (
        (logits / temperature)
        .log_softmax(-1)
        .gather(-1, torch.tensor(rollout.token_ids).unsqueeze(-1))
        .squeeze(-1)
    )


def tokens(rollouts: list[Description]) -> list[list[int]]:
    return [rollout.token_ids for rollout in rollouts]


# against the library ------------------------------------------------------------------------------


def test_greedy_output_equals_the_librarys_generate_token_for_token(scene: Scene) -> None:
    expected = library_greedy(scene, NEW_TOKENS)
    rollouts = scene.engine().generate(scene.activations, max_new_tokens=NEW_TOKENS)
    assert tokens(rollouts) == expected
    assert len({tuple(row) for row in expected}) > 1, (
        "the activations have no influence; the test shows little"
    )
    assert [rollout.finished for rollout in rollouts] == [
        row[-1] in scene.engine().end_ids for row in expected
    ]


def test_a_plain_base_without_adapter_is_generated_from_as_well(one_scene: Scene) -> None:
    engine = one_scene.engine()
    engine.load_weights(None, 8)
    with adapter_active(one_scene.model, None):
        expected = library_greedy(one_scene, 8)
    rollouts = engine.generate(one_scene.activations, max_new_tokens=8)
    assert (
        tokens(rollouts)
        == expected
        != tokens(one_scene.engine().generate(one_scene.activations, max_new_tokens=8))
    )
    assert {rollout.weight_version for rollout in rollouts} == {8}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_of_sampled_tokens_equal_the_trainers_within_1e_4(
    scene: Scene, temperature: float
) -> None:
    rollouts = scene.engine().generate(
        scene.activations, group_size=2, temperature=temperature, max_new_tokens=NEW_TOKENS, seed=1
    )
    for rollout in rollouts:
        expected = trainer_log_probs(scene, rollout, temperature or 1.0)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=0)


def test_several_vectors_in_one_prompt_are_as_many_tokens_in_it(scene: Scene) -> None:
    several = scene._replace(prompt=dataclasses.replace(scene.prompt, num_vectors=3))
    expected = library_greedy(several, NEW_TOKENS)
    engine = scene.engine()
    alone = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)
    rollouts = engine.generate(scene.activations.view(3, 3, -1), max_new_tokens=NEW_TOKENS)
    assert tokens(rollouts) == expected and [rollout.row for rollout in rollouts] == [0, 1, 2]
    for rollout in rollouts:
        log_probs = trainer_log_probs(several, rollout, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), log_probs, atol=1e-4, rtol=0)
    assert tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)) == tokens(alone)
    with pytest.raises(ValueError, match="got no vector for a prompt"):
        engine.generate(scene.activations[:, None][:, :0])


def test_a_layer_of_its_own_ending_and_norm_is_generated_as_the_library_does(scene: Scene) -> None:
    base, ending = dataclasses.replace(scene.base, further_layers=(0,)), further_ending(scene)
    other = scene._replace(
        prompt=injection_prompt(scene.tokenizer, base, layer=0),
        base=dataclasses.replace(scene.base, injection_norm=9.0),
    )
    engine = scene.engine()
    own = tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS))
    rollouts = engine.generate(scene.activations, max_new_tokens=NEW_TOKENS, ending=ending)
    assert tokens(rollouts) == library_greedy(other, NEW_TOKENS) != own
    for rollout in rollouts:
        log_probs = trainer_log_probs(other, rollout, 1.0)
        torch.testing.assert_close(torch.tensor(rollout.log_probs), log_probs, atol=1e-4, rtol=0)
    assert tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)) == own


def test_a_cancelled_call_ends_between_two_tokens_and_leaves_nothing_behind(scene: Scene) -> None:
    engine = scene.engine()
    expected = tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS))
    asked = iter([False, False, True, True])
    with pytest.raises(GenerationCancelled, match="9 of 9 were not finished"):
        engine.generate(
            scene.activations, max_new_tokens=NEW_TOKENS, is_cancelled=lambda: next(asked)
        )
    assert list(asked) == [True], "asked three times, it went on twice"
    with pytest.raises(GenerationCancelled):
        engine.generate(scene.activations, max_new_tokens=1, is_cancelled=lambda: True)
    assert tokens(engine.generate(scene.activations, max_new_tokens=NEW_TOKENS)) == expected


def in_company(engine: GenerationEngine, asked: list[dict], first: int) -> list[list[Description]]:
    """What is submitted one after the other, two steps apart, the `first` ones at once."""
    submissions = [engine.submit(**arguments) for arguments in asked[:first]]
    while len(submissions) < len(asked) or any(part.missing for part in submissions):
        engine.step()
        engine.step()
        if len(submissions) < len(asked):
            submissions.append(engine.submit(**asked[len(submissions)]))
    return [part.descriptions for part in submissions]


def further_ending(scene: Scene) -> LayerEnding:
    """Of a layer that the scene's engines were not made for."""
    base = dataclasses.replace(scene.base, further_layers=(0,), further_norms=(9.0,))
    return layer_endings(scene.tokenizer, base)[0]


def mixed_requests(scene: Scene) -> list[dict]:
    """Submissions that differ in everything; alone they need from 1 to 9 slots."""
    activations, ending = scene.activations, further_ending(scene)
    assert len(ending.suffix_ids) > len(scene.prompt.suffix_ids)
    return [
        {"activations": activations, "max_new_tokens": NEW_TOKENS},
        {"activations": activations[:1], "max_new_tokens": 3, "temperature": 1.0, "seed": 4},
        {"activations": activations[:2], "max_new_tokens": NEW_TOKENS, "ending": ending},
        {"activations": activations.view(3, 3, -1), "max_new_tokens": 9},
        {
            "activations": activations[2:4],
            "group_size": 5,
            "max_new_tokens": 2 * NEW_TOKENS,
            "temperature": 0.7,
            "rows": [0, 0],
        },
        {"activations": activations[5:6], "max_new_tokens": 1},
        {"activations": activations[:0]},
        {"activations": activations[4:5], "max_new_tokens": NEW_TOKENS, "temperature": 0.7},
        {"activations": activations[6:], "group_size": 2, "temperature": 1.0, "ending": ending},
    ]


@pytest.mark.parametrize("first", [1, 4])
def test_submissions_are_written_as_alone_whenever_they_come(scene: Scene, first: int) -> None:
    asked = mixed_requests(scene)
    alone = [tokens(scene.engine().generate(**arguments)) for arguments in asked]
    engine = scene.engine()
    for _ in range(2):
        assert [tokens(part) for part in in_company(engine, asked, first)] == alone
    assert [tokens(part) for part in in_company(engine, asked[::-1], first)] == alone[::-1]
    assert engine.step() == []


def test_recorded_steps_write_submissions_as_alone(compact_scene: Scene) -> None:
    asked = mixed_requests(compact_scene)
    alone = [tokens(compact_scene.engine().generate(**arguments)) for arguments in asked]
    engine = compact_scene.compact(merged=True, recorded=True)
    assert [tokens(part) for part in in_company(engine, asked, 1)] == alone


def test_a_cancelled_submission_frees_its_slots_and_the_others_go_on(scene: Scene) -> None:
    engine = scene.engine()
    long = {"activations": scene.activations, "group_size": 8, "temperature": 1.0}
    short = {"activations": scene.activations[:2], "max_new_tokens": 5}
    expected = tokens(engine.generate(**short))
    left = engine.submit(**long, max_new_tokens=4 * NEW_TOKENS)
    engine.step()
    engine.step()
    kept = engine.submit(**short)
    with pytest.raises(RuntimeError, match="got weights while 2 submissions are not finished"):
        engine.load_weights(scene.state, 8)
    engine.cancel(left)
    for _ in range(max(map(len, expected))):  # a prefill, and a step for each further token
        assert kept.descriptions is None
        engine.step()
    assert kept.descriptions is not None and tokens(kept.descriptions) == expected
    assert left.descriptions is None and engine.step() == []
    engine.cancel(kept)
    assert tokens(engine.generate(**short)) == expected


def test_a_short_submission_takes_turns_with_a_long_one(one_scene: Scene) -> None:
    engine = one_scene.engine(max_slots=2)
    engine.end_ids = frozenset()  # every description has its full length
    long = engine.submit(one_scene.activations, group_size=4, max_new_tokens=4)
    engine.step()
    short = engine.submit(one_scene.activations[:1], max_new_tokens=4)
    while short.descriptions is None:
        engine.step()
    assert long.count - long.missing <= 4, "the two that were begun, and as many beside it"


def test_the_models_own_weights_are_left_as_they_were(one_scene: Scene) -> None:
    before = {name: value.clone() for name, value in one_scene.model.state_dict().items()}
    one_scene.engine().generate(one_scene.activations, max_new_tokens=3)
    assert all(
        torch.equal(value, before[name]) for name, value in one_scene.model.state_dict().items()
    )


@pytest.mark.parametrize("size", [3e-4, 3e-2])
def test_bfloat16_weights_give_log_probs_near_the_trainers(tmp_path: Path, size: float) -> None:
    """`size`: of the adapter's second factor. The policy is PEFT's forward under autocast."""
    scene = make_scene(tmp_path, dtype="bfloat16", factor=size)
    gaps = []
    for rollout in scene.engine(16).generate(
        scene.activations, group_size=4, temperature=1.0, max_new_tokens=NEW_TOKENS
    ):
        with torch.autocast("cpu", torch.bfloat16):
            expected = trainer_log_probs(scene, rollout, 1.0).float()
        gaps.append(torch.tensor(rollout.log_probs) - expected)
    gap = torch.cat(gaps)
    assert gap.abs().mean() < 0.02  # measured: 0.010
    assert (gap.exp() - gap - 1).mean() < 5e-4  # measured: 1e-4


def test_an_engine_that_keeps_the_factors_beside_the_weights_gives_the_same(
    compact_scene: Scene,
) -> None:
    engines = [compact_scene.compact(merged=merged) for merged in (True, False)]
    expected, actual = (
        engine.generate(compact_scene.activations, max_new_tokens=NEW_TOKENS) for engine in engines
    )
    assert tokens(actual) == tokens(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(ours.log_probs), torch.tensor(theirs.log_probs), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("merged", [True, False])
def test_steps_of_all_slots_over_all_columns_give_the_same(
    compact_scene: Scene, merged: bool
) -> None:
    """What a GPU records, called: with slots that nobody holds, and over two adapters' weights."""
    scene = compact_scene
    engine = scene.compact(merged=merged, recorded=True)
    arguments = {"group_size": 3, "temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": 5}
    other = {name: value + 0.05 for name, value in scene.state.items()}
    for state in (None, scene.state, other, scene.state):
        expected = scene.engine()
        for version, loaded in enumerate((expected, engine)):
            loaded.load_weights(state, version)
        actual = engine.generate(scene.activations, **arguments)
        assert tokens(actual) == tokens(expected.generate(scene.activations, **arguments))


def test_beside_bfloat16_weights_a_small_adapter_does_what_it_does_in_training() -> None:
    """Merged into them, rounding takes most of it away."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, size: float) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    linear = torch.nn.Linear(256, 512, bias=False, dtype=torch.bfloat16)
    linear.weight.data = normal(512, 256, size=0.03).bfloat16()
    config = peft.LoraConfig(r=32, lora_alpha=64)
    layer = peft.tuners.lora.Linear(linear, "default", config=config, r=32, lora_alpha=64)
    down, up = normal(32, 256, size=0.04), normal(512, 32, size=1e-4)
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = down, up
    rows = normal(1024, 256, size=1.0).bfloat16()
    frozen = make_projection(linear.weight.data)
    beside = AdaptedProjection(frozen, down.bfloat16(), (2 * up).bfloat16())
    merged = make_projection((linear.weight.data.float() + 2 * up @ down).bfloat16())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = layer(rows).double()

    def error(answer: Tensor) -> float:
        """Of the adapter's effect, relative to it."""
        return float((answer - trained).norm() / (trained - frozen(rows)).norm())

    assert error(beside(rows)) < 0.25
    assert error(merged(rows)) > 0.7


# slots, order, seeds ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_slots", [1, 2, 5, 64])
def test_samples_do_not_depend_on_the_number_of_slots(one_scene: Scene, max_slots: int) -> None:
    arguments = {"group_size": 3, "temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": 5}
    expected = one_scene.engine(4).generate(one_scene.activations, **arguments)
    actual = one_scene.engine(max_slots).generate(one_scene.activations, **arguments)
    assert tokens(actual) == tokens(expected)
    for first, second in zip(actual, expected, strict=True):
        assert first.log_probs == pytest.approx(second.log_probs, abs=1e-4)


def test_samples_belong_to_seed_row_and_sample_and_not_to_the_order_of_rows(
    one_scene: Scene,
) -> None:
    engine = one_scene.engine()
    arguments = {"group_size": 2, "temperature": 1.0, "max_new_tokens": NEW_TOKENS, "seed": 5}
    expected = tokens(engine.generate(one_scene.activations, **arguments))
    order = [4, 1, 8, 0, 2, 7, 3, 6, 5]
    shuffled = engine.generate(one_scene.activations[order], rows=order, **arguments)
    assert [rollout.row for rollout in shuffled] == [row for row in order for _ in range(2)]
    for index, row in enumerate(order):
        assert tokens(shuffled[2 * index : 2 * index + 2]) == expected[2 * row : 2 * row + 2]
    larger = engine.generate(one_scene.activations, **{**arguments, "group_size": 3})
    assert [tokens(larger)[3 * row] for row in range(NUM_ACTIVATIONS)] == expected[::2]
    assert tokens(engine.generate(one_scene.activations, **{**arguments, "seed": 6})) != expected


def test_rollouts_come_ordered_by_activation_and_sample_with_text_and_version(
    one_scene: Scene,
) -> None:
    rollouts = one_scene.engine().generate(
        one_scene.activations[:2], group_size=2, rows=[30, 10], temperature=1.0, max_new_tokens=4
    )
    assert [rollout.row for rollout in rollouts] == [30, 30, 10, 10]
    assert {rollout.weight_version for rollout in rollouts} == {7}
    for rollout in rollouts:
        assert rollout.written == one_scene.tokenizer.decode(
            rollout.token_ids, skip_special_tokens=True
        )


def test_every_sampled_id_is_below_the_vocabulary_size(scene: Scene) -> None:
    rollouts = scene.engine().generate(
        scene.activations, group_size=4, temperature=5.0, max_new_tokens=NEW_TOKENS
    )
    ids = [token for rollout in rollouts for token in rollout.token_ids]
    assert min(ids) >= 0 and max(ids) < scene.model.config.vocab_size


def test_one_new_token_needs_no_decoding_step(one_scene: Scene) -> None:
    assert tokens(one_scene.engine().generate(one_scene.activations, max_new_tokens=1)) == [
        row[:1] for row in library_greedy(one_scene, 2)
    ]


def test_no_activations_give_no_rollouts(one_scene: Scene) -> None:
    assert one_scene.engine().generate(torch.empty(0, 32)) == []


# refusals -----------------------------------------------------------------------------------------


def test_a_base_without_a_row_is_refused_by_name(one_scene: Scene) -> None:
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(**small_sizes("gemma"), vocab_size=50)
    with pytest.raises(ValueError, match=r"got model type 'gemma', expected one of llama, qwen2"):
        one_scene.engine(model=GemmaForCausalLM(config))
    with pytest.raises(ValueError, match="got model type 'gemma'"):
        decoder_shape(config)


def test_the_engine_of_a_base_is_chosen_by_its_blocks_or_by_its_user(one_scene: Scene) -> None:
    compact, plain = one_scene.model.config, GPT2Config()
    assert [engine_name(compact), engine_name(plain)] == ["compact", "plain"]
    assert engine_name(compact, "plain") == "plain"
    with pytest.raises(ValueError, match=r"base\.engine: got 'compact' for blocks of 'gpt2'"):
        engine_name(plain, "compact")
    with pytest.raises(ValueError, match="compact engine: got blocks of 'gpt2'"):
        CompactDecoder(random_backbone(plain), rows=4)


@pytest.mark.parametrize(
    "activations, message",
    [
        (torch.ones(2, 16), r"expected \[n, 32\]"),
        (torch.full((2, 32), torch.nan), "non-finite"),
        (torch.ones(32), r"expected \[n, 32\]"),
    ],
)
def test_activations_that_cannot_be_described_are_refused(
    one_scene: Scene, activations: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        one_scene.engine().generate(activations)


def test_more_tokens_than_the_context_holds_are_refused(one_scene: Scene) -> None:
    with pytest.raises(ValueError, match="at most 512 positions"):
        one_scene.engine().generate(one_scene.activations, max_new_tokens=500)


def test_adapter_weights_that_do_not_fit_are_refused(one_scene: Scene) -> None:
    engine = one_scene.engine()
    with pytest.raises(ValueError, match="without a place"):
        engine.load_weights(
            {
                **one_scene.state,
                "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 32),
            },
            1,
        )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(ValueError, match="of another base"):
        engine.load_weights({**one_scene.state, name: torch.ones(4, 16)}, 1)
    bare = make_engine(one_scene.model, one_scene.tokenizer, one_scene.prompt, 1.0)
    with pytest.raises(ValueError, match="lora=LoraSettings"):
        bare.load_weights(one_scene.state, 1)


def test_a_diverged_adapter_is_a_broken_promise_and_names_its_version(one_scene: Scene) -> None:
    engine = one_scene.engine()
    engine.load_weights(
        {name: torch.full_like(value, torch.nan) for name, value in one_scene.state.items()}, 12
    )
    with pytest.raises(RuntimeError, match="weight version 12"):
        engine.generate(one_scene.activations)


# the sampler --------------------------------------------------------------------------------------


def test_sampled_frequencies_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    draws = 40_000
    keys = rollout_keys(3, list(range(draws)), [0] * draws)
    chosen, log_probs = Sampler(5, 1.0).choose(
        probabilities.log().repeat(draws, 1), keys, torch.zeros(draws, dtype=torch.int64)
    )
    expected = draws * probabilities
    chi_squared = ((torch.bincount(chosen, minlength=5) - expected).square() / expected).sum()
    assert chi_squared < 18.5, "beyond the 0.1% point of chi-squared with 4 degrees of freedom"
    torch.testing.assert_close(log_probs, probabilities[chosen].log())


def test_noise_is_standard_exponential_and_unrelated_between_tokens_steps_and_rows() -> None:
    sampler, keys = Sampler(4_096, 1.0), rollout_keys(0, list(range(64)), [1] * 64)
    first = -sampler.negative_noise(keys, torch.zeros(64, dtype=torch.int64))
    second = -sampler.negative_noise(keys, torch.ones(64, dtype=torch.int64))
    assert first.min() > 0
    count = first.numel()
    assert abs(first.mean() - 1) < 4 / count**0.5
    assert (
        abs(first.var() - 1) < 4 * 8**0.5 / count**0.5
    )  # the variance of a squared deviation is 8
    for noise, shifted in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(((noise - 1) * (shifted - 1)).mean()) < 4 / noise.numel() ** 0.5


def test_temperature_divides_logits_and_zero_takes_the_best() -> None:
    logits, zeros = torch.tensor([[1.0, 2.0, 0.0]]), torch.zeros(1, dtype=torch.int64)
    chosen, log_probs = Sampler(3, 0.0).choose(logits, zeros, zeros)
    assert chosen.tolist() == [1]
    assert log_probs.item() == pytest.approx(
        2 - torch.tensor([1.0, 2.0, 0.0]).exp().sum().log().item()
    )
    chosen, log_probs = Sampler(3, 0.5).choose(logits, zeros, zeros)
    assert log_probs.item() == pytest.approx(
        (2 * logits).log_softmax(-1)[0, chosen.item()].item(), abs=1e-6
    )


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampler(3, -1.0)


def test_rollout_keys_differ_by_seed_row_and_sample_and_do_not_mix_them_up() -> None:
    keys = [
        rollout_keys(seed, [row], [sample]).item()
        for seed in (0, 1, 2)
        for row in (0, 1, 2)
        for sample in (0, 1, 2)
    ]
    assert len(set(keys)) == 27


# projections --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_and_plain_projections_compute_the_same(rows: int, with_bias: bool) -> None:
    weight, x, other = torch.randn(48, 32), torch.randn(rows, 32), torch.randn(rows, 48)
    bias = torch.randn(48) if with_bias else None
    fast, plain = make_projection(weight, bias), PlainProjection(weight, bias)
    expected = x @ weight.T + (bias if with_bias else 0)
    for projection in (fast, plain):
        torch.testing.assert_close(projection(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            projection.silu(x), expected * expected.sigmoid(), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            projection.times(x, other), expected * other, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            projection.plus(x, other), expected + other, atol=1e-4, rtol=1e-4
        )


def test_the_engine_gives_the_same_with_plain_projections(
    one_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = one_scene.engine().generate(one_scene.activations, max_new_tokens=6)
    monkeypatch.setattr(
        "nla_ray.description.engines.projection.packing_works", lambda weight: False
    )
    assert tokens(one_scene.engine().generate(one_scene.activations, max_new_tokens=6)) == tokens(
        expected
    )
    assert not packing_works(torch.empty(2, 2, dtype=torch.float64))


def test_injection_uses_the_norm_and_not_the_length_of_the_activation(one_scene: Scene) -> None:
    engine = one_scene.engine()
    longer = engine.generate(one_scene.activations * 1000, max_new_tokens=5)
    assert tokens(longer) == tokens(
        engine.generate(vectors.direction(one_scene.activations), max_new_tokens=5)
    )


# self-check ---------------------------------------------------------------------------------------


def test_an_engine_that_generates_otherwise_than_the_base_is_refused_with_both_values(
    one_scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = CompactDecoder.logits
    monkeypatch.setattr(CompactDecoder, "logits", lambda self, stream: decode(self, stream).flip(1))
    with pytest.raises(ValueError, match=r"self-check of base .*: got greedy tokens \[.*expected"):
        one_scene.engine()


def test_a_check_leaves_the_base_and_its_adapter_as_they_were(one_scene: Scene) -> None:
    """A trainer in the same process has its activations in the base."""
    before = {name: value.clone() for name, value in one_scene.model.state_dict().items()}
    base = one_scene.model.get_base_model()
    with activations_attached(base, one_scene.activations, 4.0) as wrapper:
        one_scene.engine()
        assert base.get_input_embeddings() is wrapper
        assert wrapper.bank is one_scene.activations
    after = one_scene.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert one_scene.model.active_adapter == "default"
