"""Small acoustic models: an encoder, and one or two output layers on top.

Shape suffixes: B utterances, T frames, D features, H hidden units, V classes.

An encoder takes features_BTD (zero-padded) and lengths_B and gives hidden_BTH and lengths_B; it has ``output_dim`` and,
where it drops frames, ``subsampling``. Padding never reaches a valid frame: every layer that looks at neighbours
masks its input, so an utterance's result does not depend on what it is batched with (up to rounding).

A user's own encoder is ``package.module:factory``, called with ``num_features`` and the arguments of the configuration.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softlabel_schemas.errors import InputError


def frame_mask(lengths_B: Tensor, num_frames: int) -> Tensor:
    """Valid frames, bool [B, T]."""
    return torch.arange(num_frames, device=lengths_B.device)[None, :] < lengths_B[:, None]


class Tdnn(nn.Module):
    """Time-delay network: dilated convolutions (Peddinti et al., 2015) with layer norm instead of batch norm."""

    def __init__(
        self, num_features: int, hidden: int = 256, num_layers: int = 5, dropout: float = 0.1, dilation: int = 3
    ) -> None:
        super().__init__()
        _check_whole(hidden=hidden, num_layers=num_layers, dilation=dilation)
        self.output_dim = hidden
        dilations = [1] + [min(1 + layer, dilation) for layer in range(1, num_layers)]
        inputs = [num_features] + [hidden] * (num_layers - 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(size, hidden, kernel_size=3, dilation=step, padding=step)
            for size, step in zip(inputs, dilations, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in self.layers)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        mask_BT1 = frame_mask(lengths_B, features_BTD.shape[1])[:, :, None]
        hidden = features_BTD
        for layer, norm in zip(self.layers, self.norms, strict=True):
            convolved = layer((hidden * mask_BT1).transpose(1, 2)).transpose(1, 2)
            hidden = self.dropout(norm(convolved).relu())
        return hidden, lengths_B


class ConvGlu(nn.Module):
    """Residual gated convolutions (Dauphin et al., "Language Modeling with Gated Convolutional Networks", 2017)."""

    def __init__(
        self, num_features: int, hidden: int = 128, num_layers: int = 6, kernel_size: int = 5, dropout: float = 0.1
    ) -> None:
        super().__init__()
        _check_whole(hidden=hidden, num_layers=num_layers, kernel_size=kernel_size)
        _check_odd(kernel_size)
        self.output_dim = hidden
        self.input = nn.Linear(num_features, hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(num_layers))
        self.layers = nn.ModuleList(
            nn.Conv1d(hidden, 2 * hidden, kernel_size, padding=kernel_size // 2) for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        mask_BT1 = frame_mask(lengths_B, features_BTD.shape[1])[:, :, None]
        hidden = self.input(features_BTD)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            convolved = layer((norm(hidden) * mask_BT1).transpose(1, 2)).transpose(1, 2)
            hidden = hidden + self.dropout(nn.functional.glu(convolved, dim=-1))
        return self.final_norm(hidden), lengths_B


class Blstm(nn.Module):
    """Bidirectional LSTM (Graves et al., 2013); packed, so that the backward direction starts at the last frame."""

    def __init__(self, num_features: int, hidden: int = 160, num_layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        _check_whole(hidden=hidden, num_layers=num_layers)
        self.output_dim = 2 * hidden
        between = dropout if num_layers > 1 else 0.0
        self.lstm = nn.LSTM(num_features, hidden, num_layers, batch_first=True, bidirectional=True, dropout=between)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(
            features_BTD, lengths_B.cpu(), batch_first=True, enforce_sorted=False
        )
        hidden, _ = nn.utils.rnn.pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=features_BTD.shape[1]
        )
        return self.dropout(hidden), lengths_B


class ConformerBlock(nn.Module):
    def __init__(self, hidden: int, num_heads: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.feed_forward = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, 4 * hidden),
                nn.SiLU(),
                nn.Dropout(dropout),
                nn.Linear(4 * hidden, hidden),
                nn.Dropout(dropout),
            )
            for _ in range(2)
        )
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.conv_norm = nn.LayerNorm(hidden)
        self.pointwise_in = nn.Linear(hidden, 2 * hidden)
        self.depthwise = nn.Conv1d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden)
        self.depthwise_norm = nn.LayerNorm(hidden)
        self.pointwise_out = nn.Linear(hidden, hidden)
        self.final_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BTH: Tensor, mask_BT: Tensor) -> Tensor:
        hidden = hidden_BTH + 0.5 * self.feed_forward[0](hidden_BTH)
        hidden = hidden + self.dropout(self._attend(self.attention_norm(hidden), mask_BT))
        hidden = hidden + self.dropout(self._convolve(self.conv_norm(hidden), mask_BT))
        hidden = hidden + 0.5 * self.feed_forward[1](hidden)
        normed: Tensor = self.final_norm(hidden)
        return normed

    def _attend(self, hidden: Tensor, mask_BT: Tensor) -> Tensor:
        batch, frames, size = hidden.shape
        heads = self.query_key_value(hidden).view(batch, frames, 3, self.num_heads, size // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask_BT[:, None, None, :])
        output: Tensor = self.attention_output(attended.transpose(1, 2).reshape(batch, frames, size))
        return output

    def _convolve(self, hidden: Tensor, mask_BT: Tensor) -> Tensor:
        gated = nn.functional.glu(self.pointwise_in(hidden), dim=-1) * mask_BT[:, :, None]
        convolved = self.depthwise(gated.transpose(1, 2)).transpose(1, 2)
        output: Tensor = self.pointwise_out(nn.functional.silu(self.depthwise_norm(convolved)))
        return output


class Conformer(nn.Module):
    """Conformer (Gulati et al., 2020) with sinusoidal positions and layer norm in the convolution module."""

    def __init__(
        self,
        num_features: int,
        hidden: int = 128,
        num_layers: int = 3,
        num_heads: int = 4,
        kernel_size: int = 15,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        _check_whole(hidden=hidden, num_layers=num_layers, num_heads=num_heads, kernel_size=kernel_size)
        _check_odd(kernel_size)
        if hidden % 2 or hidden % num_heads:
            raise ValueError(f"hidden must be even and a multiple of num_heads, {num_heads}; found {hidden}")
        self.output_dim = hidden
        self.input = nn.Linear(num_features, hidden)
        self.blocks = nn.ModuleList(ConformerBlock(hidden, num_heads, kernel_size, dropout) for _ in range(num_layers))

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        mask_BT = frame_mask(lengths_B, features_BTD.shape[1])
        hidden = self.input(features_BTD)
        hidden = hidden + _sinusoids(hidden.shape[1], hidden.shape[2], hidden)
        for block in self.blocks:
            hidden = block(hidden, mask_BT)
        return hidden, lengths_B


def _check_whole(**sizes: object) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, found {size}")


def _check_odd(kernel_size: int) -> None:
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, found {kernel_size}")


def _sinusoids(num_frames: int, size: int, like: Tensor) -> Tensor:
    frequencies = torch.exp(torch.arange(0, size, 2, device=like.device) * (-math.log(10_000.0) / size))
    angles = torch.arange(num_frames, device=like.device)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(like.dtype)


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "tdnn": Tdnn,
    "blstm": Blstm,
    "conv_glu": ConvGlu,
    "conformer": Conformer,
}


class AcousticModel(nn.Module):
    """Encoder and output layers; ``forward`` gives the logits of the first one, which decodes.

    Args:
        encoder: see the module's docstring.
        num_classes: size of the class inventory.
        num_heads: 1, or 2 for a hard head and a soft head (multitask).
    """

    def __init__(self, encoder: nn.Module, num_classes: int, num_heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(nn.Linear(encoder.output_dim, num_classes) for _ in range(num_heads))  # type: ignore[arg-type]

    def forward(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTH, lengths_B = self.encoder(features_BTD, lengths_B)
        return self.heads[0](hidden_BTH), lengths_B

    def all_heads(self, features_BTD: Tensor, lengths_B: Tensor) -> tuple[list[Tensor], Tensor]:
        """Valid frames of all utterances, in order, through each head: logits_NV of head 0, of head 1.

        Padding is left out before the heads: over thousands of classes, to copy logits costs as much as a loss.
        """
        hidden_BTH, lengths_B = self.encoder(features_BTD, lengths_B)
        hidden_NH = hidden_BTH[frame_mask(lengths_B, hidden_BTH.shape[1])]
        return [head(hidden_NH) for head in self.heads], lengths_B


def build_acoustic_model(
    *, architecture: str, num_features: int, num_classes: int, num_heads: int = 1, arguments: dict[str, Any]
) -> AcousticModel:
    """Build a model by the name of its architecture or by ``package.module:factory``.

    Raises:
        InputError: the name, the factory or an argument is unknown.
    """
    factory = ENCODERS.get(architecture) or _import_factory(architecture)
    try:
        encoder = factory(num_features=num_features, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"model '{architecture}' cannot be built with {arguments}: {error}") from None
    if not isinstance(encoder, nn.Module) or not hasattr(encoder, "output_dim"):
        raise InputError(f"model '{architecture}': the factory must return a torch module with an 'output_dim'")
    return AcousticModel(encoder, num_classes, num_heads)


def _import_factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, function_name = name.partition(":")
    # A relative name has no package that it is relative to.
    if not function_name or not module_name or module_name.startswith("."):
        raise InputError(f"unknown architecture '{name}'; use {', '.join(ENCODERS)} or 'package.module:factory'")
    try:
        factory: Callable[..., nn.Module] = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"model factory '{name}' cannot be imported: {error}") from None
    return factory
