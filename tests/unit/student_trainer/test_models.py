"""The networks: shapes, independence of padding, gradients, and a user's own encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from softlabel_schemas import InputError
from student_trainer.models import ENCODERS, AcousticModel, build_acoustic_model

NUM_FEATURES, NUM_CLASSES = 12, 7
SMALL: dict[str, dict[str, Any]] = {
    "tdnn": {"hidden": 16, "num_layers": 4},
    "blstm": {"hidden": 8},
    "conv_glu": {"hidden": 16, "num_layers": 3},
    "conformer": {"hidden": 16, "num_layers": 2, "num_heads": 2, "kernel_size": 5},
}
OWN = "tests.support.speech:pair_encoder"


def build(architecture: str, *, num_heads: int = 1, **arguments: Any) -> AcousticModel:
    torch.manual_seed(0)
    return build_acoustic_model(
        architecture=architecture,
        num_features=NUM_FEATURES,
        num_classes=NUM_CLASSES,
        num_heads=num_heads,
        arguments=SMALL.get(architecture, {}) | arguments,
    )


def test_every_architecture_is_tested() -> None:
    assert set(SMALL) == set(ENCODERS)


@pytest.mark.parametrize("architecture", SMALL)
class TestArchitectures:
    def test_shapes(self, architecture: str) -> None:
        model = build(architecture)
        lengths_B = torch.tensor([9, 20, 1])
        logits_BTV, out_lengths_B = model(torch.randn(3, 20, NUM_FEATURES), lengths_B)
        assert logits_BTV.shape == (3, 20, NUM_CLASSES)
        assert torch.equal(out_lengths_B, lengths_B)

    def test_default_arguments(self, architecture: str) -> None:
        model = build_acoustic_model(architecture=architecture, num_features=120, num_classes=5, arguments={})
        assert model(torch.randn(1, 3, 120), torch.tensor([3]))[0].shape == (1, 3, 5)

    def test_what_is_in_the_padding_never_reaches_a_valid_frame(self, architecture: str) -> None:
        model = build(architecture).eval()
        lengths = [9, 40, 1, 25]
        features_BTD = 100 * torch.randn(4, 40, NUM_FEATURES)
        utterances = [torch.randn(length, NUM_FEATURES) for length in lengths]
        for row, features_TD in enumerate(utterances):
            features_BTD[row, : len(features_TD)] = features_TD
        with torch.no_grad():
            batched_BTV, _ = model(features_BTD, torch.tensor(lengths))
            for row, features_TD in enumerate(utterances):
                alone_BTV, _ = model(features_TD[None], torch.tensor([len(features_TD)]))
                torch.testing.assert_close(batched_BTV[row, : lengths[row]], alone_BTV[0], atol=1e-5, rtol=0)

    def test_neighbouring_frames_are_seen(self, architecture: str) -> None:
        model = build(architecture).eval()
        features_BTD = torch.randn(1, 20, NUM_FEATURES)
        changed_BTD = features_BTD.clone()
        changed_BTD[0, 10] += 1
        with torch.no_grad():
            before, after = (model(features, torch.tensor([20]))[0][0] for features in (features_BTD, changed_BTD))
        assert ((before - after).abs().max(dim=-1).values > 1e-6)[9:12].all()

    def test_gradients_reach_every_parameter(self, architecture: str) -> None:
        model = build(architecture, num_heads=2, dropout=0.0)
        logits, _ = model.all_heads(torch.randn(2, 20, NUM_FEATURES), torch.tensor([20, 12]))
        torch.stack(logits).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name

    def test_dropout_acts_in_training_only(self, architecture: str) -> None:
        model, features_BTD = build(architecture, dropout=0.5), torch.randn(1, 20, NUM_FEATURES)
        lengths_B = torch.tensor([20])
        assert not torch.equal(model(features_BTD, lengths_B)[0], model(features_BTD, lengths_B)[0])
        model.eval()
        assert torch.equal(model(features_BTD, lengths_B)[0], model(features_BTD, lengths_B)[0])


class TestHeads:
    def test_the_first_of_two_decodes(self) -> None:
        model = build("tdnn", num_heads=2).eval()
        features_BTD, lengths_B = torch.randn(2, 9, NUM_FEATURES), torch.tensor([9, 4])
        logits, out_lengths_B = model.all_heads(features_BTD, lengths_B)
        assert len(logits) == 2
        assert torch.equal(out_lengths_B, lengths_B)
        logits_BTV, _ = model(features_BTD, lengths_B)
        valid_NV = torch.cat([logits_BTV[0], logits_BTV[1, :4]])
        torch.testing.assert_close(logits[0], valid_NV, atol=1e-6, rtol=0)
        assert not torch.allclose(logits[0], logits[1])

    def test_one(self) -> None:
        logits, _ = build("tdnn").all_heads(torch.randn(2, 9, NUM_FEATURES), torch.tensor([9, 4]))
        assert len(logits) == 1


class TestOwnEncoder:
    def test_is_imported_by_name(self) -> None:
        model = build(OWN, hidden=5)
        assert isinstance(model.encoder, nn.Module)
        assert model.encoder.output_dim == 5
        logits_BTV, lengths_B = model(torch.randn(2, 9, NUM_FEATURES), torch.tensor([9, 4]))
        assert logits_BTV.shape == (2, 5, NUM_CLASSES)
        assert lengths_B.tolist() == [5, 2]

    @pytest.mark.parametrize(
        ("architecture", "arguments", "message"),
        [
            ("tdn", {}, "unknown architecture 'tdn'; use tdnn, blstm, conv_glu, conformer or 'package.module:factory'"),
            (":factory", {}, "unknown architecture ':factory'; use tdnn"),
            ("..module:factory", {}, "unknown architecture '..module:factory'; use tdnn"),
            (
                "tdnn",
                {"dilation": 0},
                "'tdnn' cannot be built .*: dilation must be a whole number of 1 or more, found 0",
            ),
            ("tdnn", {"dilation": 1.5}, "dilation must be a whole number of 1 or more, found 1.5"),
            ("tdnn", {"hidden": 0}, "hidden must be a whole number of 1 or more, found 0"),
            ("tdnn", {"num_layers": -3}, "num_layers must be a whole number of 1 or more, found -3"),
            ("blstm", {"num_layers": True}, "num_layers must be a whole number of 1 or more, found True"),
            ("conv_glu", {"kernel_size": -1}, "kernel_size must be a whole number of 1 or more, found -1"),
            ("conv_glu", {"num_layers": 0}, "num_layers must be a whole number of 1 or more, found 0"),
            ("conformer", {"num_heads": 0}, "num_heads must be a whole number of 1 or more, found 0"),
            ("conformer", {"num_heads": 2.0}, "num_heads must be a whole number of 1 or more, found 2.0"),
            ("no_such_module:factory", {}, "'no_such_module:factory' cannot be imported: No module named"),
            ("tests.support.speech:missing", {}, "cannot be imported: .* has no attribute 'missing'"),
            ("tests.support.speech:not_an_encoder", {}, "must return a torch module with an 'output_dim'"),
            ("tdnn", {"hiden": 3}, "'tdnn' cannot be built with .*'hiden': 3.*: .*unexpected keyword argument 'hiden'"),
            ("tdnn", {"num_features": 3}, "cannot be built .* multiple values for keyword argument 'num_features'"),
            ("tdnn", {"hidden": "wide"}, "'tdnn' cannot be built"),
            ("tdnn", {"dropout": 1.5}, "'tdnn' cannot be built .* between 0 and 1"),
            ("blstm", {"hidden": -1}, "'blstm' cannot be built"),
            ("conv_glu", {"kernel_size": 4}, "'conv_glu' cannot be built .*: kernel_size must be odd, found 4"),
            ("conformer", {"kernel_size": 4}, "'conformer' cannot be built .*: kernel_size must be odd, found 4"),
            ("conformer", {"hidden": 15}, "'conformer' cannot be built .*: hidden must be even and .* found 15"),
            ("conformer", {"hidden": 14, "num_heads": 4}, "multiple of num_heads, 4; found 14"),
        ],
    )
    def test_what_cannot_be_built(self, architecture: str, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            build_acoustic_model(
                architecture=architecture, num_features=NUM_FEATURES, num_classes=NUM_CLASSES, arguments=arguments
            )
