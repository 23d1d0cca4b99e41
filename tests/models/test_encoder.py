"""The transformer encoder: its formula, and logits that depend on the text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, SoftcacheError
from softcache.features.spec import parse_features
from softcache.features.taps import Taps, classifier_feature, classifier_of, list_modules
from softcache.models import Model, initialise, load_model, save_student
from softcache.students.traced_program import Batch, trace

WORDS = tuple("abcdefgh")
SMALL = "softcache:encoder?width=8&layers=3&heads=2&hidden=12&max_tokens=10"
LONG = "h g f e d c b a a b c d e f"  # more than 10 tokens
TEXTS = ["a b", "", "c", "a b c d unknown f g", "", LONG, "b a"]


def made(spec: str = SMALL, seed: int = 0) -> Model:
    """In eval mode, with every parameter drawn large enough to be noticed."""
    torch.manual_seed(seed)
    model = load_model(spec, num_classes=3, vocabulary=WORDS).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def logits_of(model: Model, texts: list[str]) -> Tensor:
    with torch.no_grad():
        return model(model.input.collate(texts))


def oracle(net: Any, ids: Tensor, heads: int) -> Tensor:
    """(C,) of the ids (L,) of one text without padding, in their dtype's precision."""

    def normed(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    x = net.embedding.weight[ids] + net.positions.weight[: len(ids)]  # (L, D)
    for layer in net.layers:
        attention, h = layer.self_attn, normed(x, layer.norm1)
        q, k, v = (h @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
        parts = []
        for q1, k1, v1 in zip(*(t.chunk(heads, dim=1) for t in (q, k, v)), strict=True):
            parts.append((q1 @ k1.T / q1.shape[1] ** 0.5).softmax(1) @ v1)  # (L, D / heads)
        x = x + torch.cat(parts, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
        h = normed(x, layer.norm2) @ layer.linear1.weight.T + layer.linear1.bias
        h = h * (1 + torch.erf(h / 2**0.5)) / 2  # GELU
        x = x + h @ layer.linear2.weight.T + layer.linear2.bias
    return net.fc.weight @ normed(x, net.norm).mean(0) + net.fc.bias


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_it_is_its_formula(heads: int) -> None:
    model = made(SMALL.replace("heads=2", f"heads={heads}")).double()
    for text in ["a", "a b", "c c unknown d", LONG]:
        (ids,) = model.input.collate([text])
        torch.testing.assert_close(model(ids[None])[0], oracle(model.net, ids, heads), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradients", [False, True])  # without them torch takes another way through a layer
def test_padding_does_not_change_the_logits(gradients: bool) -> None:
    model = made()
    with torch.set_grad_enabled(gradients):
        together = model(model.input.collate(TEXTS))
        assert together.shape == (7, 3) and together.isfinite().all()
        assert (together[0] - together[6]).abs().max() > 0.01  # order counts
        for text, logits in zip(TEXTS, together, strict=True):
            ids = model.input.collate([text])
            torch.testing.assert_close(model(ids)[0], logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(F.pad(ids, (0, 5)))[0], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1], together[4])  # two empty texts


def test_a_text_is_cut_at_max_tokens() -> None:
    model = made()
    assert model.input.collate([LONG, "a"]).shape == (2, 10)
    first_ten = " ".join(LONG.split()[:10])
    assert torch.equal(logits_of(model, [LONG]), logits_of(model, [first_ten]))
    wider = made(SMALL.replace("max_tokens=10", "max_tokens=20"))
    assert (logits_of(wider, [LONG]) - logits_of(wider, [first_ten])).abs().max() > 0.01


def test_the_first_weights() -> None:
    torch.manual_seed(0)
    net: Any = load_model("softcache:encoder", num_classes=3, vocabulary=WORDS).net
    per_layer = 4 * 128 * 128 + 4 * 128 + 2 * 128 * 512 + 512 + 128 + 4 * 128
    total = (len(WORDS) + 2 + 64) * 128 + 4 * per_layer + 2 * 128 + 3 * 129
    assert sum(p.numel() for p in net.parameters()) == total
    assert not net.embedding.weight[0].any()
    for table in (net.embedding.weight[1:], net.positions.weight):
        assert float(table.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(net.layers[0].linear1.weight, net.layers[1].linear1.weight)
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_gradients_are_finite_and_reach_every_parameter() -> None:
    model = made().train()
    model(model.input.collate(TEXTS)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    net: Any = model.net
    assert not net.embedding.weight.grad[0].any()  # padding learns nothing


def test_dropout_is_for_training() -> None:
    model = made(f"{SMALL}&dropout=0.5")
    net: Any = model.net
    assert torch.equal(logits_of(model, TEXTS), logits_of(model, TEXTS))
    for part in (net.dropout, net.layers[1]):
        model.eval()
        part.train()
        assert not torch.equal(logits_of(model, TEXTS), logits_of(model, TEXTS))


def test_what_can_be_tapped() -> None:
    model = made()
    ids = model.input.collate(TEXTS)
    head = classifier_of(model.net, ids)
    assert head is model.net.fc
    assert str(classifier_feature(model.net, ids, head)) == "pool:flatten"
    shapes = {module.name: (module.shape, module.calls) for module in list_modules(model.net, ids)}
    assert [shapes[f"layers.{i}"] for i in range(3)] == [((7, 10, 8), 1)] * 3
    with Taps(model.net, parse_features(["layers.1:cls,pool:flatten"], [*shapes])) as taps, torch.no_grad():
        model(ids)
        together = taps.values()
        for i, text in enumerate(TEXTS):
            model(model.input.collate([text]))
            for name, value in taps.values().items():
                torch.testing.assert_close(value[0], together[name][i], rtol=1e-4, atol=1e-5)


def test_a_smaller_one_begins_with_every_second_layer(tmp_path: Path) -> None:
    teacher = made(seed=1)
    save_student(teacher, tmp_path / "student.safetensors", metadata={})
    student = made(SMALL.replace("layers=3", "layers=2"))
    done = initialise(student, str(tmp_path), ["layers.1=layers.2"])
    small: Any = student.net
    large: Any = teacher.net
    assert not done.left and all(name.startswith("layers.1.") for name in done.unused)
    for mine, other in ((small.layers[0], large.layers[0]), (small.layers[1], large.layers[2])):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name])
    again = load_model(str(tmp_path), num_classes=3).eval()
    assert torch.equal(logits_of(again, TEXTS), logits_of(teacher, TEXTS))


@pytest.mark.slow
def test_a_traced_graph_takes_every_length() -> None:
    model = made(SMALL.replace("layers=3", "layers=1"))
    batch = Batch.of(model, ["a b", "c", "a b c"], ["a b", "c", "a b c d", "e"])
    program = trace(model, batch, "encoder").module()
    for texts in (["a"], [""], [LONG], ["a", "b c"], TEXTS):
        ids = model.input.collate(texts)
        torch.testing.assert_close(program(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words", "error", "message"),
    [
        ("encoder", None, ModelError, r"softcache:encoder needs a vocabulary[\s\S]*vocabulary=FILE"),
        ("encoder", ("a", "b", "a"), ModelError, "repeats 1 token"),
        ("encoder?width=10", WORDS, ConfigError, r"width=10, layers=4, heads=4[\s\S]*multiple of heads"),
        ("encoder?layers=0", WORDS, ConfigError, "layers=0"),
        ("encoder?heads=0", WORDS, ConfigError, "heads=0"),
        ("encoder?hidden=0", WORDS, ConfigError, "hidden=0"),
        ("encoder?width=0", WORDS, ConfigError, "width=0"),
        ("encoder?dropout=1", WORDS, ConfigError, "dropout=1.0"),
        ("encoder?max_tokens=0", WORDS, ConfigError, "max_tokens=0"),
    ],
)
def test_encoders_that_cannot_be_built(spec: str, words: Any, error: type[SoftcacheError], message: str) -> None:
    with pytest.raises(error, match=message):
        load_model(f"softcache:{spec}", num_classes=3, vocabulary=words)
