"""Tiny CTC models of Hugging Face with random weights, in the folders that ``save_pretrained`` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

# The blank is not the first, and the likeliest class of some of the frames of random models.
TOKENS = ("|", "<s>", "</s>", "<unk>", "<pad>", "A", "B", "C")
MODELS: dict[str, tuple[Any, Any]] = {
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC),
    "hubert": (HubertConfig, HubertForCTC),
}


def tiny_model(model_type: str, feat_extract_norm: str, **changes: Any) -> Any:
    """With the convolutions of the real models: frames of 400 samples, every 320."""
    config_class, model_class = MODELS[model_type]
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "conv_dim": (8,) * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": feat_extract_norm,
        "do_stable_layer_norm": feat_extract_norm == "layer",
        "pad_token_id": TOKENS.index("<pad>"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config_class(**settings | changes))
        with torch.no_grad():
            # Peaked posteriors.
            model.lm_head.weight.mul_(50)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm1d):
                    # As after training: one that is new makes 0 of 0, whatever else it is used on.
                    module.running_mean.normal_()
    return model.eval()


def save_folder(folder: Path, model: Any) -> Path:
    """The model, its tokenizer and its feature extractor."""
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(TOKENS)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    feature_extractor(model.config).save_pretrained(folder)
    return folder


def feature_extractor(config: Any) -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=config.feat_extract_norm == "layer")
