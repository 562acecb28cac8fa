"""Hugging Face CTC folders as teachers: what they say is what transformers says of each utterance alone; what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

pytest.importorskip("transformers", reason="no Hugging Face: pip install '.[hf]'")

from softlabel_schemas import InputError, IntegrityError
from softlabel_schemas.bundle import BundleReader
from softlabel_schemas.front_end import Fbank, Waveform
from teacher_service.batching import pad
from teacher_service.cli import main
from teacher_service.config import TeacherConfig
from teacher_service.hugging_face import import_folder
from teacher_service.teacher import Teacher, load_teacher
from tests.support.http_server import serving
from tests.support.hugging_face import MODELS, TOKENS, feature_extractor, save_folder, tiny_model

KINDS: list[tuple[str, str, dict[str, Any]]] = [
    *((model_type, norm, {}) for model_type in MODELS for norm in ("group", "layer")),
    ("hubert", "layer", {"conv_pos_batch_norm": True}),
]


def load(bundle: Path) -> Teacher:
    config = TeacherConfig(bundle=str(bundle))
    return load_teacher(config, BundleReader(bundle), weight=1.0, device="cpu", precision="float32")


def samples_of(*lengths: int) -> list[np.ndarray]:
    """In the range of 16-bit integers, each with an offset of its own."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(n) * 3000 + 500 * i).astype(np.float32) for i, n in enumerate(lengths)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("hf") / "tiny-wav2vec2", tiny_model("wav2vec2", "layer"))


@pytest.mark.parametrize(("model_type", "norm", "changes"), KINDS)
def test_logits_are_those_of_transformers_for_each_utterance_alone(
    tmp_path: Path, model_type: str, norm: str, changes: dict[str, Any]
) -> None:
    """In a batch of other lengths, too; an utterance shorter than a frame has none."""
    model = tiny_model(model_type, norm, **changes)
    made = import_folder(str(save_folder(tmp_path / "folder", model)), tmp_path / "bundle")
    assert (made.name, made.num_classes, made.frame_shift_ms) == ("folder", len(TOKENS), 20.0)
    teacher = load(tmp_path / "bundle")
    assert teacher.front_end == Waveform(sample_rate=16_000, normalize="utterance")
    assert (teacher.inventory.names, teacher.inventory.blank, teacher.inventory.blank_id) == (TOKENS, "<pad>", 4)
    samples = samples_of(8000, 399, 12345, 400, 5000)
    found_BTV, found_B = teacher.logits(*pad([teacher.front_end.compute(each) for each in samples]))
    assert found_B.tolist() == [24, 0, 38, 1, 15]
    extract = feature_extractor(model.config)
    for row, each in enumerate(samples):
        if len(each) < 400:
            continue
        with torch.inference_mode():
            inputs = extract(each / 32768, sampling_rate=16_000, return_tensors="pt")
            (expected_TV,) = model(inputs["input_values"]).logits
        torch.testing.assert_close(found_BTV[row, : found_B[row]], expected_TV, rtol=1e-3, atol=1e-3)
        # They are no constant, so that a shift of a frame would show.
        assert len(expected_TV) == 1 or expected_TV.std(dim=0).max() > 0.02


def test_a_student_can_have_as_many_frames() -> None:
    """Filterbanks with snipped edges, two stacked, against the lengths of the convolutions."""
    front_end = Fbank(stack=2, snip_edges=True)
    model = tiny_model("wav2vec2", "layer")
    for num_samples in [399, *range(400, 1400, 7), 16_000, 16_079, 16_080, 16_081]:
        expected = int(model._get_feat_extract_output_lengths(num_samples)) if num_samples >= 400 else 0
        assert front_end.num_frames(num_samples) == expected
    for (samples,) in (samples_of(400), samples_of(16_079)):
        assert len(front_end.compute(samples)) == front_end.num_frames(len(samples))


def test_the_command(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["import-hf", str(folder), str(tmp_path / "bundle"), "--name", "tiny"])
    assert result.exit_code == 0, result.output
    reader = BundleReader(tmp_path / "bundle")
    assert f"tiny, 8 classes every 20 ms, digest {reader.description.digest()}" in result.output
    assert reader.description.model.kind == "hugging_face_ctc"
    # Nothing of this machine, and nothing that is no setting of the architecture.
    text = (tmp_path / "bundle" / "teacher.json").read_text()
    assert str(tmp_path) not in text
    assert "transformers_version" not in text


def test_what_only_pre_training_needs_may_be_missing_and_is_the_same_in_each_import(
    folder: Path, tmp_path: Path
) -> None:
    """Transformers fills it in at random; published models lack it."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    del weights["wav2vec2.masked_spec_embed"]
    safetensors.torch.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    first, second = (import_folder(str(copy), tmp_path / name, name="same").digest() for name in ("first", "second"))
    assert first == second


def test_weights_that_the_model_has_no_place_for(folder: Path, tmp_path: Path) -> None:
    """Those of pre-training are left out; without an adapter the model would be another one."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = safetensors.torch.load_file(copy / "model.safetensors")

    def imported(extra: str) -> str:
        tensors = weights | {extra: torch.ones(2, 16)}
        safetensors.torch.save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return import_folder(str(copy), tmp_path / extra, name="same").digest()

    assert imported("project_q.weight") == import_folder(str(folder), tmp_path / "same", name="same").digest()
    extra = "wav2vec2.encoder.layers.0.attention.q_proj.lora_A.default.weight"
    with pytest.raises(InputError, match=rf"no place for 1 of the weights, the first: {re.escape(extra)}"):
        imported(extra)


def test_from_a_url(folder: Path, tmp_path: Path) -> None:
    here = import_folder(str(folder), tmp_path / "here")
    # As in the cache of Hugging Face's programs.
    (tmp_path / "links" / folder.name).mkdir(parents=True)
    for path in folder.iterdir():
        (tmp_path / "links" / folder.name / path.name).symlink_to(path)
    for url in (f"file://{folder}", f"file://{tmp_path}/links/{folder.name}"):
        assert import_folder(url, tmp_path / "there").digest() == here.digest()
    # One that knows no ranges.
    with serving(folder.parent) as url:
        assert import_folder(f"{url}/{folder.name}", tmp_path / "remote").digest() == here.digest()
    for url, message in (
        ("nowhere://model", "cannot use the URL nowhere://model"),
        (f"file://{tmp_path}/none", "has no config.json"),
        ("facebook/wav2vec2-base-960h", "is no folder; models are not fetched by name"),
    ):
        with pytest.raises(InputError, match=message):
            import_folder(url, tmp_path / "none")


def edited(folder: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> str:
    """A copy of the folder with one JSON file changed."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    values = json.loads((copy / name).read_bytes())
    change(values)
    (copy / name).write_text(json.dumps(values))
    return str(copy)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda v: v.update(model_type="whisper"), "model_type is 'whisper', expected one of wav2vec2"),
        (
            "config.json",
            lambda v: v.update(quantization_config={"load_in_8bit": True}),
            "quantised weights are not supp",
        ),
        ("config.json", lambda v: v.update(add_adapter=True), "models with an adapter behind the encoder"),
        ("config.json", lambda v: v.update(feat_extract_norm="batch"), 'expected "group" or "layer"'),
        ("config.json", lambda v: v.update(pad_token_id=99), "CTC's blank, is 99, no output of the model"),
        ("config.json", lambda v: v.update(vocab_size=9), "has 9 outputs, vocab.json names 8 of them; number 8"),
        ("config.json", lambda v: v.update(hidden_size=20), "the weights cannot be loaded|of another shape"),
        ("preprocessor_config.json", lambda v: v.update(sampling_rate="fast"), "feature extractor is not valid"),
        ("preprocessor_config.json", lambda v: v.update(feature_size=80), "feature extractor is Wav2Vec2"),
        ("vocab.json", lambda v: v.update(eng={"A": 1}), "expected one vocabulary, a number for each token"),
        *(
            (
                "tokenizer_config.json",
                lambda v, added=added: v.update(added_tokens_decoder=added),
                rf"copy/tokenizer_config\.json: added_tokens_decoder: expected {message}",
            )
            for added, message in (
                (None, "an object, found NoneType"),
                ([], "an object, found list"),
                ({"0": "<pad>"}, r"numbers, each with an object .* found \{'0': '<pad>'\}"),
                ({"0": {"content": 1}}, r"numbers, each with an object .* found \{'0': \{'content': 1\}\}"),
                ({"zero": {"content": "A"}}, r"numbers, each with an object .* found \{'zero': \{'content': 'A'\}\}"),
            )
        ),
    ],
)
def test_folders_that_are_refused(
    folder: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        import_folder(edited(folder, tmp_path, name, change), tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "teacher.json").exists()


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            {"feature_extractor": None},
            r"copy/processor_config\.json: feature_extractor: expected an object, found NoneT",
        ),
        ({"feature_extractor": ["fbank"]}, r"copy/processor_config\.json: feature_extractor: .*, found list"),
        ({"processor_class": "Wav2Vec2Processor"}, r"no preprocessor_config\.json, and .* has no feature_extractor"),
    ],
)
def test_a_processor_without_a_feature_extractor_is_refused(
    folder: Path, tmp_path: Path, processor: dict[str, object], message: str
) -> None:
    copy = Path(edited(folder, tmp_path, "config.json", lambda v: None))
    (copy / "preprocessor_config.json").unlink()
    (copy / "processor_config.json").write_text(json.dumps(processor))
    with pytest.raises(InputError, match=message):
        import_folder(str(copy), tmp_path / "bundle")


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(edited(folder, tmp_path, "config.json", lambda v: None))
    weights = (copy / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "vocab.json", "config.json"):
        (copy / name).unlink()
        expected = "safetensors are needed, not pickles" if name.startswith("model") else f"has no {name}"
        with pytest.raises(InputError, match=re.escape(expected)):
            import_folder(str(copy), tmp_path / "bundle")
        if name.startswith("model"):
            (copy / name).write_bytes(weights)


def test_a_model_without_an_output_layer_is_refused(tmp_path: Path) -> None:
    """As after pre-training: transformers would only warn, and make one up."""
    folder = save_folder(tmp_path / "folder", tiny_model("wav2vec2", "layer"))
    tiny_model("wav2vec2", "layer").wav2vec2.save_pretrained(folder)
    with pytest.raises(InputError, match=r"weights are missing or of another shape: lm_head\.bias, lm_head\.weight"):
        import_folder(str(folder), tmp_path / "bundle")


@pytest.mark.parametrize("key", ["attn_implementation", "auto_map", "_attn_implementation", "quantization_config"])
def test_a_bundle_cannot_name_code(folder: Path, tmp_path: Path, key: str) -> None:
    """Such settings of a stranger's bundle could have code fetched and run."""
    import_folder(str(folder), tmp_path)
    path = tmp_path / "teacher.json"
    values = json.loads(path.read_bytes())
    values["model"]["config"][key] = "stranger/kernel"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"{key}: not settings of the architecture of wav2vec2; refused"):
        load(tmp_path)


def test_weights_of_another_configuration_are_refused(folder: Path, tmp_path: Path) -> None:
    import_folder(str(folder), tmp_path)
    path = tmp_path / "teacher.json"
    values = json.loads(path.read_bytes())
    values["model"]["config"]["intermediate_size"] = 28
    path.write_text(json.dumps(values))
    with pytest.raises(IntegrityError, match="weights do not fit the configuration"):
        load(tmp_path)


def test_a_machine_without_the_library(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a job another may have it."""
    import_folder(str(folder), tmp_path / "bundle")
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "teacher_service.hugging_face")
    with pytest.raises(OSError, match=r"bundle: this machine lacks a package that the model needs: .*transformers"):
        load(tmp_path / "bundle")
    result = CliRunner().invoke(main, ["import-hf", str(folder), str(tmp_path / "other")])
    assert result.exit_code == 2
    assert "transformers" in result.stderr
    assert "this needs: pip install 'essence-distill[hf]'" in result.stderr
