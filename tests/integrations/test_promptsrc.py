"""The whole of PromptSRC on one set of OpenAI weights: transformers, open_clip, and a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import graftune
from graftune.adapters.regularizers.templates import GENERAL_TEMPLATES
from graftune.integrations.objectives import ClassNameClassifier
from support import openai_clip, promptsrc
from support.clip import COLOURS, OpenClipTokenizer, transformers_tokenizer

NAMES = ["red", "light_grey", "blue"]
TEMPLATES = ["a photo of a {}.", "a drawing of the {}", "the {} photo of a drawing."]
WEIGHTS = openai_clip.weights()
LABELS = torch.tensor([0, 2, 1, 1])
SGD = {"lr": 0.0025, "momentum": 0.9, "weight_decay": 5e-4}
DEPTHS = [(3, 3), (2, 3), (1, 1), (0, 2), (3, 0)]
EACH = pytest.mark.parametrize("library", openai_clip.LIBRARIES)
AT_EACH_DEPTH = pytest.mark.parametrize(("depth_text", "depth_vision"), DEPTHS)


def pixels(count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)


def texts(template: str) -> Tensor:
    """What the tests' tokenizers make of the classes: (C, 16)."""
    return OpenClipTokenizer()([template.format(name.replace("_", " ")) for name in NAMES])


def tokenizer_of(library: str) -> Any:
    return transformers_tokenizer() if library == "transformers" else OpenClipTokenizer()


def near(found: Tensor, expected: Tensor, what: str) -> None:
    """Agree to 1e-9 of the largest number; what is nothing but for rounding, to 1e-15."""
    assert found.dtype == torch.float64, what
    error = (found.detach() - expected.detach()).abs().max()
    assert error <= max(1e-9 * expected.detach().abs().max(), 1e-15), f"{what}: {error}"


@dataclass
class Adapted:
    """A CLIP of one library with prompts of known values, through graftune's public names."""

    library: str
    model: nn.Module
    prompts: dict[str, nn.Parameter]  # (depth, n, width)
    objective: ClassNameClassifier
    regularization: graftune.Regularization

    def step(self) -> dict[str, Any]:
        batch = {"pixel_values": pixels(), "labels": LABELS}
        return self.regularization(self.objective, self.model, batch)

    def features(self, cut: bool = False) -> tuple[Tensor, Tensor]:
        """Features of pictures and texts as the library's own users ask for them."""
        tokens = texts(TEMPLATES[0])
        if self.library == "open_clip":
            return self.model.encode_image(pixels()), self.model.encode_text(tokens)
        image = self.model.get_image_features(pixel_values=pixels())
        if cut:
            tokens = tokens[:, : int(tokens.argmax(-1).max()) + 1]
        return image.pooler_output, self.model.get_text_features(input_ids=tokens).pooler_output


def adapted(library: str, depth_text: int, depth_vision: int, **fields: Any) -> Adapted:
    tokenizer = tokenizer_of(library)
    torch.manual_seed(3)
    model = graftune.wrap(
        openai_clip.LIBRARIES[library](WEIGHTS),
        "promptsrc",
        tokenizer=tokenizer,
        regularizers=[],
        **{"depth_text": depth_text, "depth_vision": depth_vision, **fields},
    )
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_vision = "vision" in name or "visual" in name
            found["vision" if is_vision else "text"] = parameter
    assert set(found) == {
        t for t, depth in (("text", depth_text), ("vision", depth_vision)) if depth
    }
    return Adapted(
        library,
        model,
        found,
        ClassNameClassifier(NAMES, tokenizer, TEMPLATES[0]),
        graftune.Regularization(model, [graftune.SelfRegulation(templates=TEMPLATES)]),
    )


def drawn(depth_text: int, depth_vision: int) -> promptsrc.Prompts:
    """Values for the prompts, as from a file: (depth, 4, width)."""
    generator = torch.Generator().manual_seed(7)
    depths = {"text": depth_text, "vision": depth_vision}
    return {
        tower: torch.randn(depth, 4, 32, generator=generator, dtype=torch.float64)
        for tower, depth in depths.items()
        if depth
    }


def given(library: str, depth_text: int, depth_vision: int) -> tuple[Adapted, promptsrc.Prompts]:
    """A model whose prompts have these values, and the same as leaves for the reference."""
    values = drawn(depth_text, depth_vision)
    found = adapted(library, depth_text, depth_vision, init_text=None)
    for tower, parameter in found.prompts.items():
        assert parameter.shape == values[tower].shape
        parameter.data.copy_(values[tower])
    return found, {tower: value.requires_grad_() for tower, value in values.items()}


def reference(prompts: promptsrc.Prompts) -> promptsrc.Reference:
    frozen = [texts(template) for template in TEMPLATES]
    return promptsrc.step(WEIGHTS, prompts, pixels(), LABELS, texts(TEMPLATES[0]), frozen)


@EACH
def test_the_libraries_models_are_the_reference(library: str) -> None:
    model, tokens = openai_clip.LIBRARIES[library](WEIGHTS), texts(TEMPLATES[0])
    with torch.no_grad():
        if library == "open_clip":
            image, text = model.encode_image(pixels()), model.encode_text(tokens)
        else:
            image = model.get_image_features(pixel_values=pixels()).pooler_output
            text = model.get_text_features(input_ids=tokens).pooler_output
    near(image, promptsrc.image_features(WEIGHTS, pixels(), None), "image")
    near(text, promptsrc.text_features(WEIGHTS, tokens, None), "text")


@EACH
@AT_EACH_DEPTH
def test_features_are_the_references(library: str, depth_text: int, depth_vision: int) -> None:
    found, prompts = given(library, depth_text, depth_vision)
    tokens = texts(TEMPLATES[0])
    with torch.no_grad():
        for cut in (False, True):
            image, text = found.features(cut)
            expected = promptsrc.image_features(WEIGHTS, pixels(), prompts.get("vision"))
            near(image, expected, "image")
            expected = promptsrc.text_features(WEIGHTS, tokens, prompts.get("text"))
            near(text, expected, "text")


@EACH
@AT_EACH_DEPTH
def test_a_training_step_is_the_references(
    library: str, depth_text: int, depth_vision: int
) -> None:
    found, prompts = given(library, depth_text, depth_vision)
    ours = torch.optim.SGD(found.prompts.values(), **SGD)
    theirs = torch.optim.SGD(prompts.values(), **SGD)
    for number in range(2):  # the second with momentum, and with frozen text features kept
        result, expected = found.step(), reference(prompts)
        near(result["features"]["image"], expected.image, "image features")
        near(result["features"]["text"], expected.text, "text features")
        near(result["logits"], expected.logits, "logits")
        near(result["task_loss"], expected.terms["task"], "cross entropy")
        for name in ("text", "image", "logits"):
            near(result["terms"][f"self_regulation_{name}"], expected.terms[name], name)
        near(result["loss"], expected.loss, "loss")
        for optimizer, loss in ((ours, result["loss"]), (theirs, expected.loss)):
            optimizer.zero_grad()
            loss.backward()
        for tower, prompt in prompts.items():
            near(found.prompts[tower].grad, prompt.grad, f"gradient of the {tower} prompts")
        ours.step()
        theirs.step()
        for tower, prompt in prompts.items():
            near(found.prompts[tower], prompt, f"{tower} prompts after step {number}")


@EACH
def test_the_recipe_starts_as_the_words_and_at_random(library: str) -> None:
    found = adapted(library, 3, 3)
    words = transformers_tokenizer()("a photo of a", add_special_tokens=False)["input_ids"]
    embedding = WEIGHTS["token_embedding.weight"][words]
    assert torch.equal(found.prompts["text"][0].detach(), embedding)
    random = torch.cat([found.prompts["text"][1:].flatten(), found.prompts["vision"].flatten()])
    assert random.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(random.mean().item()) < 0.003


@EACH
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_prompts_start_as_the_first_words(library: str, count: int) -> None:
    found = adapted(library, 2, 1, num_tokens_text=count)
    words = transformers_tokenizer()("a photo of a", add_special_tokens=False)["input_ids"]
    embedding = WEIGHTS["token_embedding.weight"][words[:count]]
    assert torch.equal(found.prompts["text"][0].detach(), embedding)
    assert found.model.active_peft_config.init_token_ids == words[:count]


def test_an_adapter_of_one_library_has_the_numbers_of_the_other() -> None:
    """Prompts are named by the modules of a library; their values are the same in both."""
    results = {}
    for library in openai_clip.LIBRARIES:
        found, _ = given(library, 3, 2)
        averaging = graftune.GaussianAveraging(mean=2, std=1)
        regulation = graftune.SelfRegulation(templates=TEMPLATES)
        run = graftune.Regularization(found.model, [regulation, averaging])
        run.start(steps=3, epochs=3)
        optimizer = torch.optim.SGD(found.prompts.values(), **SGD)
        for _ in range(3):
            batch = {"pixel_values": pixels(), "labels": LABELS}
            run(found.objective, found.model, batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            run.epoch_end()
        run.end()
        results[library] = found.prompts
    for tower, prompts in results["open_clip"].items():
        near(results["transformers"][tower], prompts, tower)


ADAPTERS: dict[str, Any] = {
    "flora": lambda model: graftune.wrap(model, "flora", r=2),
    "lora": lambda model: graftune.wrap(model, LoraConfig(r=2)),
}


@EACH
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_self_regulation_of_any_adapter(library: str, adapter: str) -> None:
    """Adapters that start as the base model differ from it in the templates alone, at first."""
    torch.manual_seed(0)
    model = ADAPTERS[adapter](openai_clip.LIBRARIES[library](WEIGHTS))
    objective = ClassNameClassifier(NAMES, tokenizer_of(library), TEMPLATES[0])
    alone = [
        graftune.SelfRegulation(**{f"{other}_weight": 0.0 for other in others}, templates=TEMPLATES)
        for others in (("image", "logits"), ("text", "logits"), ("text", "image"), ())
    ]
    expected = reference({}).terms
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = (["text"], ["image"], ["logits"], list(expected))
    for regularizer, kept in zip(alone, parts, strict=True):
        run = graftune.Regularization(model, [regularizer])
        found = run(objective, model, {"pixel_values": pixels(), "labels": LABELS})
        for name in ("text", "image", "logits"):
            value = expected[name] if name in kept else torch.zeros((), dtype=torch.float64)
            near(found["terms"][f"self_regulation_{name}"], value, name)
        found["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    optimizer.step()
    moved = run(objective, model, {"pixel_values": pixels(), "labels": LABELS})["terms"]
    assert moved["self_regulation_image"] > 1e-4
    with torch.no_grad():
        frozen = regularizer._text_of(model, objective)
        near(frozen, _frozen_text(), "frozen text after a step")


def _frozen_text() -> Tensor:
    features = [promptsrc.text_features(WEIGHTS, texts(t), None) for t in TEMPLATES]
    mean = torch.stack(features).mean(0)
    return mean / mean.norm(dim=-1, keepdim=True)


def test_general_templates_are_averaged_before_they_are_scaled() -> None:
    found, _ = given("open_clip", 2, 2)
    names = list(COLOURS)
    objective = found.objective.with_class_names(names)
    regularizer = graftune.SelfRegulation()
    frozen = regularizer._text_of(found.model, objective)
    every = OpenClipTokenizer()([t.format(n) for t in GENERAL_TEMPLATES for n in names])
    features = promptsrc.text_features(WEIGHTS, every, None)
    mean = features.unflatten(0, (len(GENERAL_TEMPLATES), len(names))).mean(0)
    near(frozen, mean / mean.norm(dim=-1, keepdim=True), "frozen text")
