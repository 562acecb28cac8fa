"""Hugging Face CTC models (wav2vec 2.0, HuBERT) as teachers: a folder of ``AutoModelForCTC`` -> a bundle -> a module.

Nothing in a folder or a bundle is executed: weights are safetensors, and of a configuration only settings of the architecture
are taken (others could name code to be fetched and run).

**Padding.** Models whose first convolution is followed by a group norm (``feat_extract_norm = "group"``: wav2vec2-base,
hubert-base) take means over time and were trained without an attention mask: padding would change what they say. They run
one utterance at a time. Those with layer norm run as a padded batch with an attention mask, which gives each utterance what
it would get alone, up to rounding. Not so HuBERT with ``conv_pos_batch_norm``: its batch norm makes other numbers of the zeros
behind an utterance before a convolution reads them (logits of the tests' model differ by up to 3.8), and it runs one at a time.

Shape suffixes: B utterances, N samples, T frames, V classes.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import HubertConfig, HubertForCTC, Wav2Vec2Config, Wav2Vec2ForCTC

from softlabel_schemas.bundle import HuggingFaceCtc, TeacherBundle, write_model
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.front_end import Waveform
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.strict import parse, shortened

_CLASSES: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC),
    "hubert": (HubertConfig, HubertForCTC),
}
# Of a configuration, what says nothing of the architecture.
_NOT_ARCHITECTURE = frozenset({"architectures", "dtype", "model_type", "transformers_version", "id2label", "label2id"})
# What a folder is read for. Weights may be in several files, with an index.
_FILES = (".json", ".safetensors")
# Weights that pre-training has beside the model's.
_OF_PRE_TRAINING = ("quantizer.", "project_q.", "project_hid.")
# Of a configuration's strings and lists a stranger may have written any.
_BUILD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError)


class CtcModel(nn.Module):
    """What a bundle's model is, around a model of ``transformers``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # A setting of HuBERT alone.
        has_batch_norm = getattr(model.config, "conv_pos_batch_norm", False)
        self.is_masked = model.config.feat_extract_norm == "layer" and not has_batch_norm
        self.shortest = shortest(model.config)

    def forward(self, features_BN1: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and their lengths int64 [B], 0 for an utterance that is shorter than a frame's samples."""
        samples_BN = nn.functional.pad(features_BN1[:, :, 0], (0, max(0, self.shortest - features_BN1.shape[1])))
        if self.is_masked:
            # A mask needs a frame of each; those that have none are masked out by their lengths.
            at_least_B = lengths_B.clamp(min=self.shortest)
            mask_BN = torch.arange(samples_BN.shape[1], device=lengths_B.device) < at_least_B[:, None]
            logits_BTV = self.model(samples_BN, attention_mask=mask_BN.long()).logits
        else:
            one_by_one = [
                self.model(own_N[None, : max(length, self.shortest)]).logits[0]
                for own_N, length in zip(samples_BN, lengths_B.tolist(), strict=True)
            ]
            logits_BTV = nn.utils.rnn.pad_sequence(one_by_one, batch_first=True)
        num_frames_B = self.model._get_feat_extract_output_lengths(lengths_B).long()
        return logits_BTV, torch.where(lengths_B < self.shortest, 0, num_frames_B)


def shortest(config: Any) -> int:
    """Samples that a frame is made of: the receptive field of the convolutions."""
    samples, stride = 1, 1
    for kernel, own_stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        samples += (kernel - 1) * stride
        stride *= own_stride
    return samples


def build_ctc_model(description: HuggingFaceCtc, weights: bytes, *, where: str) -> CtcModel:
    """The model of a bundle, in evaluation mode. Raises InputError, IntegrityError."""
    config = _config(description.model_type, description.config, where=where)
    try:
        model = _CLASSES[description.model_type][1](config)
    except _BUILD_ERRORS as error:
        raise InputError(
            f"{where}: no {description.model_type} can be built with this configuration: {error}"
        ) from None
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise IntegrityError(f"{where}: weights do not fit the configuration: {error}") from None
    return CtcModel(model).eval()


def import_folder(folder: str, bundle: str | Path, *, name: str | None = None) -> TeacherBundle:
    """Write a folder that ``save_pretrained`` made of an ``AutoModelForCTC`` and its processor, local or at a URL, as a bundle.

    Raises:
        InputError: it is no CTC model of a kind known here, or a file or a class is missing; says which.
    """
    if "://" not in folder and not Path(folder).is_dir():
        raise InputError(
            f"{folder} is no folder; models are not fetched by name: download it first, such as with "
            f"'hf download {folder} --local-dir FOLDER'"
        )
    with _local(folder) as path:
        values = _read_json(Path(path) / "config.json", folder)
        model_type = values.get("model_type")
        if model_type not in _CLASSES:
            raise InputError(
                f"{folder}/config.json: model_type is {model_type!r}, expected one of {', '.join(_CLASSES)}; other models can "
                "be exported with torch.export, or made by a factory of yours (see teacher_service/README.md)"
            )
        if values.get("quantization_config") is not None:
            raise InputError(
                f"{folder}/config.json: quantization_config is set, and quantised weights are not supported; import the model "
                "that they were made of"
            )
        config_class, model_class = _CLASSES[model_type]
        known = _architecture_fields(config_class)
        settings = {key: value for key, value in values.items() if key in known}
        config = _config(model_type, settings, where=f"{folder}/config.json")
        front_end, inventory = _front_end(Path(path), folder), _inventory(Path(path), config, folder)
        model = _load(model_class, Path(path), config, folder)
    weights = safetensors.torch.save({key: value.float().contiguous() for key, value in model.state_dict().items()})
    stored = {key: value for key, value in config.to_dict().items() if key in known}
    return write_model(
        bundle,
        weights,
        {
            "name": name or folder.rstrip("/").rpartition("/")[2],
            "model": {"kind": "hugging_face_ctc", "model_type": model_type, "config": stored},
            "frame_shift_ms": 1000 * math.prod(config.conv_stride) / front_end.sample_rate,
        },
        front_end=front_end,
        inventory=inventory,
    )


def _architecture_fields(config_class: Any) -> frozenset[str]:
    return frozenset(config_class().to_dict()) - _NOT_ARCHITECTURE


def _config(model_type: str, settings: dict[str, Any], *, where: str) -> Any:
    config_class = _CLASSES[model_type][0]
    unknown = sorted(set(settings) - _architecture_fields(config_class))
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown)}: not settings of the architecture of {model_type}; refused")
    try:
        config = config_class(**settings)
    except Exception as error:  # noqa: BLE001 - transformers checks types with errors of its own
        raise InputError(f"{where}: not a configuration of {model_type}: {error}") from None
    if getattr(config, "add_adapter", False):
        raise InputError(f"{where}: add_adapter is true; models with an adapter behind the encoder are not supported")
    if config.feat_extract_norm not in ("group", "layer"):
        raise InputError(f'{where}: feat_extract_norm is {config.feat_extract_norm!r}, expected "group" or "layer"')
    return config


def _load(model_class: Any, path: Path, config: Any, folder: str) -> Any:
    try:
        model, report = model_class.from_pretrained(
            path,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # noqa: BLE001 - of a damaged file or a wrong shape, transformers may raise anything
        raise InputError(
            f"{folder}: the weights cannot be loaded (safetensors are needed, not pickles): {error}"
        ) from None
    # The embedding of masked frames serves pre-training alone.
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("masked_spec_embed"))
    if missing or report["mismatched_keys"]:
        raise InputError(
            f"{folder}: weights are missing or of another shape: {', '.join(missing) or report['mismatched_keys']}; a model "
            "that was not fine-tuned for CTC has no lm_head"
        )
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(_OF_PRE_TRAINING))
    if unexpected:
        # Such as scales of quantised weights, or an adapter: without them the model is another one.
        raise InputError(
            f"{folder}: the model has no place for {len(unexpected)} of the weights, the first: {unexpected[0]}; merge an "
            "adapter into the model, and save it without quantisation"
        )
    with torch.no_grad():
        for key in report["missing_keys"]:
            # At random as transformers fills it in, each import would be another teacher.
            model.get_parameter(key).zero_()
    return model


def _front_end(path: Path, folder: str) -> Waveform:
    name = "preprocessor_config.json"
    if (path / name).exists():
        values = _read_json(path / name, folder)
    else:
        # Written by processors of transformers 5.
        name = "processor_config.json"
        processor = _read_json(path / name, folder)
        if "feature_extractor" not in processor:
            raise InputError(f"{folder} has no preprocessor_config.json, and {name} has no feature_extractor")
        values = _object(processor, "feature_extractor", where=f"{folder}/{name}")
    expected = "Wav2Vec2FeatureExtractor"
    if values.get("feature_extractor_type", expected) != expected or values.get("feature_size", 1) != 1:
        raise InputError(
            f"{folder}: the feature extractor is {values.get('feature_extractor_type')}, expected {expected}"
        )
    found = {
        "sample_rate": values.get("sampling_rate", 16_000),
        "normalize": "utterance" if values.get("do_normalize", True) else "none",
    }
    return parse(Waveform, found, where=f"{folder}: feature extractor")


def _inventory(path: Path, config: Any, folder: str) -> ClassInventory:
    """Classes by their ids in the vocabulary; CTC's blank is the padding token."""
    vocabulary = _read_json(path / "vocab.json", folder)
    if (path / "added_tokens.json").exists():
        vocabulary = _read_json(path / "added_tokens.json", folder) | vocabulary
    if (path / "tokenizer_config.json").exists():
        vocabulary = _added_tokens(path / "tokenizer_config.json", folder) | vocabulary
    if not all(isinstance(number, int) for number in vocabulary.values()):
        raise InputError(
            f"{folder}/vocab.json: expected one vocabulary, a number for each token; found several or none"
        )
    names = {number: token for token, number in vocabulary.items()}
    missing = [number for number in range(config.vocab_size) if number not in names]
    if missing:
        raise InputError(
            f"{folder}: the model has {config.vocab_size} outputs, vocab.json names {config.vocab_size - len(missing)} of "
            f"them; number {missing[0]} has no token"
        )
    if config.pad_token_id not in range(config.vocab_size):
        raise InputError(
            f"{folder}/config.json: pad_token_id, CTC's blank, is {config.pad_token_id}, no output of the model"
        )
    tokens = tuple(names[number] for number in range(config.vocab_size))
    return ClassInventory(names=tokens, blank=tokens[config.pad_token_id])


def _added_tokens(path: Path, folder: str) -> dict[str, int]:
    """The number of each token that the tokenizer's configuration adds."""
    found = dict[str, int]()
    where = f"{folder}/{path.name}"
    for number, entry in _object(_read_json(path, folder), "added_tokens_decoder", where=where).items():
        if not number.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise InputError(
                f'{where}: added_tokens_decoder: expected numbers, each with an object that has a string "content", found '
                f"{shortened({number: entry})}"
            )
        found[entry["content"]] = int(number)
    return found


def _object(values: dict[str, Any], key: str, *, where: str) -> dict[str, Any]:
    """The object at ``key``; empty where there is no such key."""
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise InputError(f"{where}: {key}: expected an object, found {type(found).__name__}")
    return found


def _read_json(path: Path, folder: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {path.name}; save_pretrained of the model and of its processor writes all that is needed"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder}/{path.name} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{folder}/{path.name}: expected an object, found {type(values).__name__}")
    return values


def _local(folder: str) -> AbstractContextManager[str]:
    """A local folder with the files of ``folder``, which goes with the context if it is a copy."""
    if "://" not in folder:
        return nullcontext(folder)
    store = ObjectStore(folder)
    if store.is_local:
        return nullcontext(store.path(""))
    copy = tempfile.TemporaryDirectory()
    for name in store.children("")[1]:
        if name.endswith(_FILES):
            (Path(copy.name) / name).write_bytes(store.read(name))
    return copy
