"""transformers' models (extra `text`), `hf:FOLDER`, or `hf:NAME` on the hub: classifiers of texts and of words, each with its
tokenizer, and causal language models.

Only safetensors are read, no code that a model brings is run, and the network is used for a NAME alone.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softcache.errors import ConfigError, ModelError, SoftcacheError, first_offenders, require_extra
from softcache.models.inputs import check_texts
from softcache.models.language_model import OF_TOKENS, LanguageModel, TokenInput, check_head
from softcache.models.model import Model
from softcache.models.saved_metadata import check_config
from softcache.models.word_pieces import ALIGN, PieceInput, WordPieces
from softcache.words import Words

# what a configuration says besides the network: who wrote it, and the classes, which are the data's
BESIDES = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "finetuning_task",
    "id2label",
    "label2id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
)
PROBE = ["A text.", "And a second one, naïve & longer: 12,345 letters? ½ of it."]  # both tokenizers must agree on it
WORDS = ["And", "12,345", "naïve", "letters", "?", "½"]  # likewise
OWN_COLLATE = "wrap it: file.py:factory may return a module with a method collate(items) of its own"
CONVERSION = "DISABLE_SAFETENSORS_CONVERSION"


@dataclass(frozen=True)
class TokenizerInput:
    """Strings, or pairs of them, as a dict of (B, L) int64 tensors: what the tokenizer gives and the network takes.

    Attributes:
        definition: the tokenizer as JSON, the content of a tokenizer.json.
        takes: of "input_ids", "token_type_ids" and "attention_mask" those that the tokenizer gives and the network takes.
        max_tokens: longer texts are cut, the special tokens counted in; None where nothing limits them.
        pad_id, pad_type_id: token id and type of padding.
        pad_side, cut_side: "right" or "left".
        prompt: stands before each text.
    """

    definition: str = field(repr=False)
    takes: tuple[str, ...]
    max_tokens: int | None
    pad_id: int
    pad_type_id: int = 0
    pad_side: str = "right"
    cut_side: str = "right"
    prompt: str = ""

    def __post_init__(self) -> None:
        special = self._tokenizer.num_special_tokens_to_add(False)
        if self.max_tokens is not None and self.max_tokens <= special:
            raise ConfigError(
                f"max_tokens={self.max_tokens} leaves no room for a text",
                tip=f"{special} of them are the tokenizer's special tokens; give more, or leave max_tokens out",
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What it reads texts with, as of every text model; here the definition, in one piece."""
        return (self.definition,)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self.definition)
        if self.max_tokens is not None:
            tokenizer.enable_truncation(self.max_tokens, direction=self.cut_side)
        return tokenizer

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """(B, L) int64 each, L as short as the longest text allows."""
        check_texts(items)
        # one by one: a batch would start threads, which do not survive the fork of the next worker
        rows = [self._tokenizer.encode(*self._texts(item)) for item in items]
        length = max(1, *map(len, rows))
        for row in rows:
            row.pad(length, direction=self.pad_side, pad_id=self.pad_id, pad_type_id=self.pad_type_id)
        columns = {
            "input_ids": [row.ids for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
        }
        return {name: torch.tensor(columns[name], dtype=torch.int64) for name in self.takes}

    @cached_property
    def _whole(self) -> Any:
        """The tokenizer without its cut, and the id of what it does not know (None: it knows everything)."""
        from tokenizers import Tokenizer

        tokenizer, told = Tokenizer.from_str(self.definition), json.loads(self.definition)["model"]
        named = told.get("unk_token")
        return tokenizer, told.get("unk_id") if named is None else tokenizer.token_to_id(named)

    def count(self, item: Any) -> tuple[int, int]:
        """How many tokens a text or a pair has, special ones included, and how many of those that are read are unknown."""
        tokenizer, unknown = self._whole
        read = self._tokenizer.encode(*self._texts(item)).ids
        return len(tokenizer.encode(*self._texts(item)).ids), 0 if unknown is None else read.count(unknown)

    def _texts(self, item: Any) -> tuple[str, ...]:
        """What the tokenizer is given: a text, or both of a pair."""
        texts = (item,) if isinstance(item, str) else tuple(item)
        return tuple(self.prompt + text for text in texts) if self.prompt else texts

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are."""
        return batch

    def describe(self) -> dict[str, Any]:
        """The definition as its sha256: it may have megabytes."""
        facts = {**_facts(self), "definition": _digest(self.definition), "takes": list(self.takes)}
        return {"kind": "tokenizer", **facts}


def _facts(taken: TokenizerInput | PieceInput) -> dict[str, Any]:
    """Its attributes; without the prompt where there is none, as before there was one."""
    facts = asdict(taken)
    return facts if facts.get("prompt") else {name: value for name, value in facts.items() if name != "prompt"}


def transformers_model(name: str, class_names: Sequence[str] = ()) -> Callable[..., Model]:
    """The builder of `hf:<name>`: a folder that `save_pretrained` wrote, or a model on the hub.

    Args:
        name: a folder that is there wins over a model on the hub.
        class_names: of the data.

    Raises:
        MissingExtraError: transformers is not installed.
        ModelError: no such folder.
    """
    require_extra("transformers", "text", f"the model 'hf:{name}'")
    place = _Place.of(name)

    def build(
        num_classes: int,
        max_tokens: int | None = None,
        pooling: Literal["", "cls", "mean"] = "",
        prompt: str = "",
        align: Literal["", "first", "mean"] = "",
        gives: Literal["", "tokens"] = "",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> Model:
        """`max_tokens`: longer texts are cut; by default to what the tokenizer and the network take. `prompt` stands before each.

        pooling: the network without a classifier, whose output is an embedding: of the first token ("cls"), or the mean over
        those that are no padding.
        align: the network tags words: a word's logits are those of its first piece, or the mean over its pieces. Empty: "first"
        of a network that was saved as a token classifier. Samples longer than `max_tokens` are then refused.
        gives: "tokens": a causal language model, asked for a row of logits of each token; its tokenizer is the data's.
        dtype: of such a model's weights.

        A network whose weights have no classifier gets a new one, see `Model.untrained`. Classes are those of the
        weights, by the names that their configuration gives them; where it gives none, or the data's classes are called
        0, 1, 2, ..., they are the data's in its order.

        Logits depend on the text alone. The average that `LAYER:mean_tokens` takes counts the padding too, of which there
        is as much as the batch's longest text needs.
        """
        config = place.config()
        if gives:
            asked = {"pooling": pooling, "prompt": prompt, "align": align}
            return _causal_model(place, config, num_classes, max_tokens, getattr(torch, dtype), asked)
        if dtype != "float32":
            raise ConfigError(f"{place.text}: dtype={dtype} is of language models", tip="leave it out: --autocast bf16")
        labels = _labels(config)
        way = _align(config, align, place.text, {"pooling": pooling, "prompt": prompt})
        place.check_kind(config, of_words=bool(way))
        tokenizer = place.tokenizer()
        if pooling:
            with place.explained("tokenizer"):
                return _encoder(place, config, tokenizer, max_tokens, pooling, prompt)
        net, untrained = place.network(config, num_classes, of_words=bool(way))
        with place.explained("tokenizer"):
            if way:
                model = _word_model(net, _word_input(tokenizer, net, place.text, max_tokens), way)
            else:
                model = _model(net, _input(tokenizer, net, place.text, max_tokens, prompt))
        model.untrained = untrained
        numbered = set(labels) != set(class_names) and list(class_names) == [str(i) for i in range(num_classes)]
        model.class_names = None if untrained or _unnamed(labels) or numbered else labels
        return model

    return build


def transformer_classes(name: str) -> tuple[str, ...] | None:
    """The classes that the configuration of `hf:<name>` names; None where they are LABEL_0, LABEL_1, ..."""
    require_extra("transformers", "text", f"the model 'hf:{name}'")
    labels = _labels(_Place.of(name).config())
    return None if _unnamed(labels) else labels


def _unnamed(labels: tuple[str, ...]) -> bool:
    return all(re.fullmatch(r"LABEL_\d+", label) for label in labels)


def describe_transformer(model: Model) -> dict[str, Any] | None:
    """JSON-able: what `rebuild_transformer` needs of one of these models; None for any other."""
    if not isinstance(model.input, TokenizerInput | PieceInput) or isinstance(model.net, PooledEncoder):
        return None  # pooled encoders are teachers
    net: Any = model.net.encoder if isinstance(model.net, WordPieces) else model.net
    return {
        "config": _settings(net.config),
        "input": {**_facts(model.input), "definition": json.loads(model.input.definition)},
        **({"align": model.net.align} if isinstance(model.net, WordPieces) else {}),
    }


def rebuild_transformer(told: Mapping[str, Any], num_classes: int, where: str) -> Model:
    """The model that `describe_transformer` described, with weights that are still to be loaded; needs no other file.

    The network is not used, and nothing is fetched or run because of what is told.

    Args:
        where: the file that told it, for messages.

    Raises:
        ModelError: no such model, or settings that are not believed.
    """
    require_extra("transformers", "text", "a student that is one of transformers' models")
    from transformers import AutoConfig

    try:
        align = told.get("align", "")
        if align not in ("", *ALIGN):
            raise ModelError(f"{where}: has no known way to align pieces with words: {str(align)[:40]!r}")
        auto, known = _kind(of_words=bool(align))
        settings = check_config(told["config"], where)
        with _hushed(), _offline():
            config = _tame(AutoConfig.for_model(**settings))
            config.num_labels = num_classes
            if type(config) not in known:
                raise ModelError(
                    f"{where}: {config.model_type!r} is no model that classifies {'words' if align else 'texts'}"
                )
            net = auto.from_config(config, trust_remote_code=False, dtype=torch.float32)
        facts = {**told["input"], "definition": _canonical(told["input"]["definition"])}
        facts["takes"] = tuple(facts["takes"])
        return _word_model(net, PieceInput(**facts), align) if align else _model(net, TokenizerInput(**facts))
    except ModelError:
        raise
    except Exception as exc:  # of many kinds, and from several libraries
        raise ModelError(
            f"transformers cannot build the student again: {_first_line(exc)}",
            tip="use a version of transformers that is at least as new as the one it was trained with",
        ) from exc


@contextmanager
def _offline() -> Iterator[None]:
    """Without the hub, whatever transformers might look for there."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@dataclass(frozen=True)
class _Place:
    """Where a model is read from.

    Attributes:
        name: the folder, or the name on the hub.
        is_folder: then the network is never used.
    """

    name: str
    is_folder: bool

    @classmethod
    def of(cls, name: str) -> _Place:
        """A folder that is there wins over a name on the hub; what can only be a folder is not looked up."""
        path = Path(name)
        if path.is_dir():
            return cls(name, True)
        is_below = len(path.parts) > 1 and Path(path.parts[0]).is_dir()
        if path.exists() or is_below or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
            raise ModelError(
                f"'hf:{name}': there is no folder {name}",
                tip="give the folder that save_pretrained wrote, as seen from here, or a name on the hub (user/model)",
            )
        return cls(name, False)

    @property
    def text(self) -> str:
        return f"'hf:{self.name}'"

    @property
    def _how(self) -> dict[str, Any]:
        return {"trust_remote_code": False, "local_files_only": self.is_folder}

    def config(self) -> Any:
        """ModelError where there is none."""
        from transformers import AutoConfig

        if self.is_folder and not Path(self.name, "config.json").is_file():
            raise ModelError(
                f"{self.text}: the folder holds no config.json",
                tip="give the folder that save_pretrained wrote; a run folder of softcache is named without 'hf:'",
            )
        with self.explained("configuration"), _hushed():
            config = _tame(AutoConfig.from_pretrained(self.name, **self._how))
        named = getattr(config, "transformers_weights", None)
        if named is not None and ".safetensors" not in named:
            raise ModelError(
                f"{self.text}: its config.json names the weights {named}",
                tip="only safetensors are read: save it again",
            )
        return config

    def check_kind(self, config: Any, *, of_words: bool) -> None:
        """ModelError where transformers makes no classifier of texts, or of words, of this configuration."""
        if type(config) not in _kind(of_words=of_words)[1]:
            made, what = ("token classifier", "their words") if of_words else ("sequence classifier", "them")
            raise ModelError(
                f"{self.text} is a {config.model_type!r} model, of which transformers makes no {made}",
                tip=f"use a model that takes texts and classifies {what}; others through file.py:factory",
            )

    def tokenizer(self) -> Any:
        """ModelError where there is none, or none of the library `tokenizers`."""
        from transformers import AutoTokenizer

        with self.explained("tokenizer"), _hushed():
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self._how)
        # without its files transformers makes one that knows the special tokens only
        if set(tokenizer.get_vocab()) <= {*tokenizer.all_special_tokens, "▁"}:
            raise ModelError(
                f"{self.text} comes without the files of its tokenizer",
                tip="save it beside the model: tokenizer.save_pretrained(FOLDER)",
            )
        if not tokenizer.is_fast:
            raise ModelError(
                f"{self.text}: its tokenizer, {type(tokenizer).__name__}, cannot be written as a tokenizer.json",
                tip=OWN_COLLATE,
            )
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f"{self.text}: its tokenizer has no padding token, so texts of unequal length cannot share a batch",
                tip="choose one (tokenizer.pad_token = tokenizer.eos_token, config.pad_token_id likewise) and save both again",
            )
        return tokenizer

    def network(self, config: Any, num_classes: int, *, of_words: bool = False) -> tuple[Any, tuple[str, ...]]:
        """The network in float32, and the tensors of its classifier that the weights do not hold.

        Raises:
            ModelError: weights of other classes or another network, or none as safetensors.
        """
        found = len(_labels(config))
        config.num_labels = num_classes
        with self.explained("weights"), _hushed():
            net, report = _kind(of_words=of_words)[0].from_pretrained(
                self.name,
                config=config,
                dtype=torch.float32,  # not that of the file: autocast is the user's to ask for
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # to tell of them below
                output_loading_info=True,
                **self._how,
            )
        body = f"{net.base_model_prefix}."
        missing = sorted(report["missing_keys"])
        misfits = sorted(key for key, *_ in report["mismatched_keys"])
        if misfits and found != num_classes and not any(name.startswith(body) for name in misfits):
            raise ModelError(
                f"{self.text}: the weights have {found} classes, the data has {num_classes}",
                tip="use data of the same classes; a student for others begins with weights that have no classifier",
            )
        # a pooler belongs to the classifier: what was trained without one has none
        lost = [name for name in missing if name.startswith(body) and "pooler" not in name]
        if lost or misfits:
            what = f"hold no {first_offenders(lost, len(lost))}" if lost else f"have another shape: {misfits[0]}"
            raise ModelError(
                f"{self.text}: the weights are of another network than its config.json says; they {what}",
                tip="save model and configuration again, together: model.save_pretrained(FOLDER)",
            )
        return net, tuple(missing)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Whatever transformers says of a place that it cannot read becomes one line and what to do."""
        try:
            yield
        except SoftcacheError:
            raise
        except Exception as exc:  # of many kinds, and from several libraries
            if "trust_remote_code" in str(exc):
                raise ModelError(
                    f"{self.text}: its {what} is code of its own, which is not run",
                    tip="if you trust it, load it in a factory of yours: file.py:factory",
                ) from exc
            reason = f"{self.text}: its {what} cannot be read: {_first_line(exc)}"
            tip = "give a folder that save_pretrained wrote"
            if what == "weights":
                tip += "; only safetensors are read: save old weights again with a current transformers"
            if not self.is_folder:
                reason = f"{self.text}: there is no such folder, and from the hub {reason.partition(': ')[2]}"
                tip = "check the name, and the network; with HF_HUB_OFFLINE=1 only what was downloaded before is read"
            raise ModelError(reason, tip=tip) from exc


class PooledEncoder(nn.Module):
    """An encoder with what its tokens give reduced to one vector: of the first, or the mean of all but padding."""

    output = "embedding"

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        tokens: Tensor = self.encoder(**batch).last_hidden_state  # (B, L, D)
        if self.pooling == "cls":
            return tokens[:, 0]
        mask = batch["attention_mask"][:, :, None].to(tokens.dtype)
        return (tokens * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _encoder(place: _Place, config: Any, tokenizer: Any, max_tokens: int | None, pooling: str, prompt: str) -> Model:
    """The network without a classifier, and one vector of what its tokens give."""
    from transformers import AutoModel

    if pooling == "cls" and tokenizer.padding_side == "left":
        raise ConfigError(
            f"{place.text}: pooling=cls takes the first token, and its tokenizer puts the padding there",
            tip="pooling=mean",
        )
    with place.explained("weights"), _hushed():
        net, report = AutoModel.from_pretrained(
            place.name, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **place._how
        )
    lost = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if lost or report["mismatched_keys"]:
        raise ModelError(
            f"{place.text}: the weights are of another network than its config.json says"
            + (f"; they hold no {first_offenders(lost, len(lost))}" if lost else ""),
            tip="save model and configuration again, together: model.save_pretrained(FOLDER)",
        )
    if hasattr(net, "pooler"):
        net.pooler = None  # of the first token alone, often random, and not asked here
    taken = _input(tokenizer, net, place.text, max_tokens, prompt)
    if "attention_mask" not in taken.takes:
        raise ModelError(f"{place.text}: its tokenizer gives no attention mask", tip=OWN_COLLATE)
    model = Model(PooledEncoder(net, pooling), taken)
    model.spec = f"hf:{type(net).__name__}?config={_digest(_canonical(_settings(net.config)))[:12]}&pooling={pooling}"
    model.told_input = {"pooling": pooling} | ({"prompt": prompt} if prompt else {})
    if taken.max_tokens is not None:
        model.told_input["max_tokens"] = str(taken.max_tokens)
    return model


def _causal_model(
    place: _Place,
    config: Any,
    num_classes: int,
    max_tokens: int | None,
    dtype: torch.dtype,
    others: Mapping[str, str],
) -> Model:
    """A causal language model that is asked about tokens; its head gives as many numbers as ids are in use, or more."""
    import transformers

    if asked := next((f"{name}={value}" for name, value in others.items() if value), None):
        raise ConfigError(f"{place.text}: {asked}, and it is asked about tokens", tip="leave it out")
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"{place.text} is a {config.model_type!r} model, of which transformers makes no causal language model",
            tip="ask a model that foretells the next token; others through file.py:factory",
        )
    if getattr(config, "is_decoder", True) is False and hasattr(config, "is_decoder"):
        saved = [str(one) for one in getattr(config, "architectures", None) or ()]
        if any("MaskedLM" in one for one in saved):
            raise ModelError(
                f"{place.text} was saved as {saved[0]}, which sees the tokens that it is to foretell",
                tip="ask a model that foretells the next token",
            )
    with place.explained("weights"), _hushed():
        read: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place.name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **place._how
        )
    net, report = read
    lost = sorted(report["missing_keys"])
    if lost or report["mismatched_keys"]:
        raise ModelError(
            f"{place.text}: the weights are of another network than its config.json says"
            + (f"; they hold no {first_offenders(lost, len(lost))}" if lost else ""),
            tip="save model and configuration again, together: model.save_pretrained(FOLDER)",
        )
    head, most = net.get_output_embeddings(), _positions(net)
    check_head(head.weight.shape[0], num_classes, place.text)
    if max_tokens is not None and most is not None and max_tokens > most:
        raise ConfigError(f"{place.text}: max_tokens={max_tokens}, the network takes {most} at most", tip="lower it")
    takes = tuple(name for name in OF_TOKENS if name in inspect.signature(net.forward).parameters)
    model = Model(LanguageModel(net, head), TokenInput(max_tokens or most, takes=takes))
    model.spec = f"hf:{type(net).__name__}?config={_digest(_canonical(_settings(net.config)))[:12]}"
    model.spec += "" if dtype == torch.float32 else f"&dtype={str(dtype).removeprefix('torch.')}"
    own = Path(place.name, "tokenizer.json")
    model.tokenizer = own.read_bytes() if place.is_folder and own.is_file() else None
    return model


def _model(net: Any, taken: TokenizerInput) -> Model:
    """The network itself, so that modules and tensors have transformers' names; hooks fit it to `Model`."""
    net.register_forward_pre_hook(_by_name, with_kwargs=True)
    net.register_forward_hook(_logits_only)
    model = Model(net, taken)
    # told by what it computes, wherever it lay: a network's settings are not seen in its weights' shapes
    model.spec = f"hf:{type(net).__name__}?config={_digest(_canonical(_settings(net.config)))[:12]}"
    return model


def _kind(*, of_words: bool) -> tuple[Any, Any]:
    """transformers' class that makes classifiers of words or of texts, and the configurations of which it does."""
    import transformers

    if of_words:
        return transformers.AutoModelForTokenClassification, transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    return transformers.AutoModelForSequenceClassification, transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def _align(config: Any, align: str, where: str, others: Mapping[str, str]) -> str:
    """How pieces become words; "" of a network that tags none."""
    saved = getattr(config, "architectures", None) or ()
    asked = next((f"{name}={value}" for name, value in others.items() if value), None)
    if align and asked:
        raise ConfigError(
            f"{where}: align={align} and {asked}", tip="a tagger of words has neither pooling nor a prompt"
        )
    if align or asked or not any(str(one).endswith("ForTokenClassification") for one in saved):
        return align
    return "first"


def _word_model(net: Any, taken: PieceInput, align: str) -> Model:
    model = Model(WordPieces(net, align), taken)
    model.spec = f"hf:{type(net).__name__}?config={_digest(_canonical(_settings(net.config)))[:12]}&align={align}"
    model.told_input = {"align": align}
    return model


def _by_name(_net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    (batch,) = args
    return (), {**batch, **kwargs}


def _logits_only(_net: nn.Module, _args: Any, output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _input(tokenizer: Any, net: Any, where: str, max_tokens: int | None, prompt: str = "") -> TokenizerInput:
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    most = _positions(net)
    if max_tokens is not None and most is not None and max_tokens > most:
        raise ConfigError(f"{where}: max_tokens={max_tokens}, the network takes {most} at most", tip="lower it")
    # a tokenizer that was not told has a limit of 1e30
    limits = [n for n in (most, tokenizer.model_max_length) if n is not None and n < 2**31]
    # a network may take what its tokenizer does not give (GPT-2 adds token types where there are any), and the reverse
    given = set(tokenizer.model_input_names) & set(inspect.signature(net.forward).parameters)
    taken = TokenizerInput(
        definition=_canonical(json.loads(backend.to_str())),
        takes=tuple(name for name in ("input_ids", "token_type_ids", "attention_mask") if name in given),
        max_tokens=max_tokens if max_tokens is not None else min(limits, default=None),
        pad_id=tokenizer.pad_token_id,
        pad_type_id=tokenizer.pad_token_type_id,
        pad_side=tokenizer.padding_side,
        cut_side=tokenizer.truncation_side,
        prompt=prompt,
    )
    cut = {} if taken.max_tokens is None else {"truncation": True, "max_length": taken.max_tokens}
    theirs = tokenizer([prompt + text for text in PROBE], padding=True, return_tensors="pt", **cut)
    if any(not torch.equal(tensor, theirs[name]) for name, tensor in taken.collate(PROBE).items()):
        raise ModelError(
            f"{where}: its tokenizer, {type(tokenizer).__name__}, does more than a tokenizer.json can say",
            tip=OWN_COLLATE,
        )
    return taken


def _word_input(tokenizer: Any, net: Any, where: str, max_tokens: int | None) -> PieceInput:
    """As `_input`, of words; its tokenizer must give the pieces that transformers gives of words."""
    whole = _input(tokenizer, net, where, max_tokens)
    taken = PieceInput(
        whole.definition,
        whole.takes,
        whole.max_tokens,
        whole.pad_id,
        whole.pad_type_id,
        whole.pad_side,
        tokenizer.unk_token,
    )
    try:
        theirs = tokenizer(WORDS, is_split_into_words=True)
    except AssertionError as exc:  # of tokenizers that tell a word by the space before it
        raise ModelError(
            f"{where}: its tokenizer, {type(tokenizer).__name__}, takes no words that are cut already",
            tip="load it with add_prefix_space=True, and save it again",
        ) from exc
    ours = replace(taken, max_tokens=None).encoded(Words(WORDS))
    if ours.ids != theirs["input_ids"] or ours.word_ids != theirs.word_ids():
        raise ModelError(
            f"{where}: its tokenizer, {type(tokenizer).__name__}, cuts words otherwise than a tokenizer.json can say",
            tip=OWN_COLLATE,
        )
    return taken


def _positions(net: Any) -> int | None:
    """How many tokens have a position of their own; None where any number has."""
    tables = [
        m for name, m in net.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    ]
    if tables and tables[0].padding_idx is not None:  # such tables begin behind the row of padding
        return tables[0].num_embeddings - tables[0].padding_idx - 1
    most = getattr(net.config, "max_position_embeddings", None)
    return most if most is not None and most > 0 else None


def _tame(config: Any) -> Any:
    """Without what would have transformers fetch code: attention and experts computed by a package on the hub."""
    config._attn_implementation = None
    config._experts_implementation = None
    return config


def _labels(config: Any) -> tuple[str, ...]:
    """The names of the classes, in the order of the logits; LABEL_0, LABEL_1, ... where they have none."""
    return tuple(str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels))


def _settings(config: Any) -> dict[str, Any]:
    """What a configuration says of the network, as far as it is not the default."""
    told: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    return {key: value for key, value in told.items() if key not in BESIDES}


def _canonical(definition: Any) -> str:
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}".splitlines()[0]


@contextmanager
def _hushed() -> Iterator[None]:
    """Without progress bars and reports of transformers, and without its asking the hub to convert somebody's weights."""
    from transformers.utils import logging

    level, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    before = os.environ.get(CONVERSION)
    os.environ[CONVERSION] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows_bars:
            logging.enable_progress_bar()
        if before is None:
            del os.environ[CONVERSION]
        else:
            os.environ[CONVERSION] = before
