"""What the metadata of a weights file may name: families with numbers, and settings that fetch nothing."""

from __future__ import annotations

from typing import Any

import pytest

from softcache.errors import ModelError, SoftcacheError, UntrustedError
from softcache.models import MODELS
from softcache.models.saved_metadata import check_config, check_spec, load_json
from softcache.spec import parse_spec

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 12,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "vocab_size": 30522,
    "use_cache": True,
    "pad_token_id": None,
    "attention_types": [["global", "local"], 2],
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "auto_map": None,
    "use_kernels": False,
    "conv_kernel_size": 9,
    "conv_kernel_sizes": [3, 5],
    "backbone_width": 0.5,
    "pretraining_tp": 1,
}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_of_ours_is_built_because_a_file_names_it(name: str) -> None:
    for query in ("", "?mean=0.1,0.2&std=1e-1&scale=255", "?hidden=&dropout=0.5", "?width=2&depth=40&in_channels=3"):
        check_spec(parse_spec(f"softcache:{name}{query}"), "runs/a", allow_code=False)


@pytest.mark.parametrize("text", ["torchvision:resnet50?mean=0.5", "timm:vit_tiny_patch16_224?img_size=32"])
def test_so_are_those_of_torchvision_and_timm(text: str) -> None:
    check_spec(parse_spec(text), "runs/a", allow_code=False)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "file.py:net",
            "dir/file.py:net?a=1",
            "package.module:factory",
            "./x:y",
            "hf:user/model",
            "hf:folder",
            "other:thing",
            "mlp",
        ),
        *("torchvision:resnet50?weights=IMAGENET1K_V2", "timm:resnet50?weights=1", "softcache:textcnn?vocabulary=1"),
        *(
            "softcache:textcnn?vocabulary=/etc/passwd",
            "softcache:mlp?hidden=a",
            "softcache:mlp?hidden=1/2",
            "softcache:mlp?x=$(id)",
        ),
        *("timm:hf-hub:user/model", "timm:../x", "softcache:a b", "softcache:mlp\u0435", "softcache:mlp?hidden=\u0661"),
    ],
)
def test_whatever_else_a_file_names_is_refused_and_allowed(text: str) -> None:
    with pytest.raises(
        UntrustedError, match=r"runs/a: says that it belongs to [\s\S]*name (it|the model) yourself: .*@runs/a"
    ):
        check_spec(parse_spec(text), "runs/a", allow_code=False)
    check_spec(parse_spec(text), "runs/a", allow_code=True)


@pytest.mark.parametrize("query", ["hidden=99999999999", "layers=1025", "depth=4096", "hidden=" + ",".join("4" * 1025)])
def test_numbers_that_no_network_has_are_refused(query: str) -> None:
    with pytest.raises(SoftcacheError, match="yourself"):
        check_spec(parse_spec(f"softcache:mlp?{query}"), "runs/a", allow_code=False)


def test_of_other_packages_only_small_numbers_are_taken() -> None:
    check_spec(parse_spec("timm:vit_tiny_patch16_224?img_size=4096"), "runs/a", allow_code=False)
    with pytest.raises(ModelError, match=r"in_channels is over 4,096[\s\S]*yourself"):
        check_spec(parse_spec("timm:resnet18?in_channels=16000000"), "runs/a", allow_code=False)


def test_the_settings_of_a_model_are_taken_as_they_are() -> None:
    assert check_config(BERT, "runs/a") == BERT


@pytest.mark.parametrize(
    "setting",
    [
        {"auto_map": {"AutoModel": "user/repo--modeling.Net"}},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": "eager"},
        {"text_config": {"_attn_implementation": "sdpa"}},
        {"_experts_implementation": "x"},
        {"use_kernels": True},
        {"quantization_config": {"quant_method": "x"}},
        {"_name_or_path": "user"},
        {"backbone": "resnet50"},
        {"use_pretrained_backbone": True},
        {"trust_remote_code": True},
        {"hidden_act": "a/b"},
        {"hidden_act": "a\\b"},
        {"hidden_act": "x" * 300},
        {"num_hidden_layers": 10**6},
        {"num_hidden_groups": 10**6},
        {"encoder": {"n_head": 10**6}},
        {"hidden_size": 2**40},
        {"a": {"b": {"c": {"d": {"e": {"f": {"g": {}}}}}}}},
        {"a": object()},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_that_could_fetch_or_choose_code_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"runs/a: its configuration of transformers has a config\.[\s\S]*hf:FOLDER"):
        check_config({**BERT, **setting}, "runs/a")


@pytest.mark.parametrize("told", [None, [], "bert", {}, {"model_type": 3}])
def test_what_is_no_configuration_is_refused(told: Any) -> None:
    with pytest.raises(ModelError, match="is damaged"):
        check_config(told, "runs/a")


def test_json_that_is_deeper_than_python_reads_is_a_value_error() -> None:
    assert load_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deeply"):
        load_json("[" * 100_000)
