"""TRAIN.toml: what is refused and how, where paths lead, and what decides the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from softlabel_schemas import InputError
from softlabel_schemas.front_end import Fbank
from softlabel_schemas.selection import Mass
from student_trainer.cli import main
from student_trainer.config import TrainConfig, load_config

SHORTEST = """
name = "student"
output = "runs/student"

[corpus]
manifest = "corpus.parquet"
inventory = "inventory.json"
"""
LONG = (
    SHORTEST
    + """
train_splits = ["train", "extra"]
dev_splits = []

[soft_labels]
url = "labels"
weight = 0.7
temperature = 2.0
tail = "to_hard_label"
num_heads = 2
selection = { policy = "mass", mass = 0.9, max_entries = 8 }

[front_end]
kind = "fbank"
stack = 2

[model]
architecture = "conformer"
arguments = { hidden = 64 }

[training]
epochs = 3
"""
)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(text)
    return path


class TestLoad:
    def test_defaults(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, SHORTEST))
        assert config.soft_labels is None
        assert (config.seed, config.corpus.train_splits, config.corpus.dev_splits) == (0, ("train",), ("dev",))
        assert config.front_end == Fbank(stack=3)
        assert config.front_end.output_frame_shift_ms == 30.0
        assert (config.model.architecture, config.model.arguments) == ("tdnn", {})
        training = config.training
        assert (training.epochs, training.batch_seconds, training.pool_seconds) == (12, 60.0, 36_000.0)
        assert (training.learning_rate, training.warmup, training.num_threads) == (2e-3, 0.1, None)

    def test_every_table(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, LONG))
        soft = config.soft_labels
        assert soft is not None
        assert (soft.weight, soft.temperature, soft.tail, soft.num_heads) == (0.7, 2.0, "to_hard_label", 2)
        assert soft.selection == Mass(mass=0.9, max_entries=8)
        assert config.corpus.train_splits == ("train", "extra")
        assert config.corpus.dev_splits == ()
        assert config.model.arguments == {"hidden": 64}

    def test_paths_are_relative_to_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "experiment"
        folder.mkdir()
        write(folder, LONG)
        monkeypatch.chdir(tmp_path)
        config = load_config("experiment/train.toml")
        assert config.output == str(folder / "runs/student")
        assert config.corpus.manifest == str(folder / "corpus.parquet")
        assert config.corpus.inventory == str(folder / "inventory.json")
        assert config.soft_labels is not None
        assert config.soft_labels.url == str(folder / "labels")

    def test_so_is_the_cache(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, LONG))
        assert config.soft_labels is not None
        assert (config.soft_labels.cache, config.soft_labels.cache_gib) == (None, 50.0)
        for cache, expected in (("cache", f"{tmp_path}/cache"), ("/cache", "/cache"), ("s3://b/c", "s3://b/c")):
            more = f'num_heads = 2\ncache = "{cache}"\ncache_gib = 0.5'
            config = load_config(write(tmp_path, LONG.replace("num_heads = 2", more)))
            assert config.soft_labels is not None
            assert (config.soft_labels.cache, config.soft_labels.cache_gib) == (expected, 0.5)

    def test_absolute_paths_and_urls_stay(self, tmp_path: Path) -> None:
        text = LONG.replace('"labels"', '"s3://bucket/labels"').replace('"corpus.parquet"', '"/data/corpus.parquet"')
        config = load_config(write(tmp_path, text))
        assert config.corpus.manifest == "/data/corpus.parquet"
        assert config.soft_labels is not None
        assert config.soft_labels.url == "s3://bucket/labels"

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("epochs = 3", "epoch = 3", "training.epoch: unknown key 'epoch'; did you mean 'epochs'?"),
            ("weight = 0.7", "wieght = 0.7", "soft_labels.wieght: unknown key 'wieght'; did you mean 'weight'?"),
            ("epochs = 3", "epochs = 0", "training.epochs: "),
            ('name = "student"', f'name = "student"\nseed = {2**64}', "seed: "),
            ("epochs = 3", 'device = "gpu"', "training.device: "),
            ("weight = 0.7", "weight = 1.1", "soft_labels.weight: "),
            ("weight = 0.7", "weight = 0.0", "soft_labels.weight: "),
            ("weight = 0.7", "cache_gib = 0", "soft_labels.cache_gib: "),
            ("num_heads = 2", "num_heads = 3", "soft_labels.num_heads: "),
            ('"to_hard_label"', '"drop"', "soft_labels.tail: "),
            ('name = "student"', 'name = "a/b"', "name must be a plain, non-empty name"),
            ("max_entries = 8", "max_entries = 0", "max_entries: "),
            ('"mass", mass', '"best", mass', "'best'"),
            ('["train", "extra"]', "[]", "corpus.train_splits: "),
            ("dev_splits = []", "hard_label_splits = []", "corpus.hard_label_splits: "),
            (
                "dev_splits = []",
                'dev_splits = ["dev", "extra"]',
                "corpus.train_splits and corpus.dev_splits share extra: the best epoch would be chosen on training speech",
            ),
            (
                "dev_splits = []",
                'hard_label_splits = ["extra", "dev"]',
                "hard_label_splits must be among train_splits, train, extra; found dev",
            ),
            ("[model]", "[augmentation]\nspeeds = []\n[model]", "augmentation.speeds: "),
            ("[model]", "[augmentation]\nspeeds = [3.0]\n[model]", "augmentation.speeds.0: "),
            ("[model]", "[augmentation]\nmax_frequency_mask = 41\n[model]", "is 41, more than the 40 mel bins"),
            (
                'kind = "fbank"\nstack = 2',
                'kind = "precomputed"\nnum_features = 4\nframe_shift_ms = 10\n[augmentation]',
                "augmentation needs the front end 'fbank'",
            ),
            (
                "stack = 2",
                "frame_shift_ms = 0.01",
                "frame_shift_ms is 0.01, less than a sample at 16000 Hz; expected one or more",
            ),
            ("weight = 0.7", "frames = { silence = 1.5 }", "soft_labels.frames.silence: "),
            (
                "weight = 0.7",
                "frames = { min_top1 = 0.3 }",
                "soft_labels.frames: no frame is selected: give disagreeing",
            ),
            ("weight = 0.7", "final_weight = 1.1", "soft_labels.final_weight: "),
            ("weight = 0.7", "weight = 1.0\nfinal_weight = 1.0", "leaves the hard head untrained"),
            ("num_heads = 2", 'num_heads = 1\ndecoding_head = "soft"', "needs num_heads = 2"),
            ("weight = 0.7", "weight = 1.0", "leaves the hard head untrained; use num_heads = 1"),
            (
                "weight = 0.7",
                'weight = 1.0\ndecoding_head = "soft"',
                "leaves the hard head untrained; use num_heads = 1 and leave decoding_head out",
            ),
            ('url = "labels"', "", "give url or urls, one of the two; found neither"),
            ('url = "labels"', 'url = "labels"\nurls = ["a", "b"]', "give url or urls, one of the two; found both"),
            ('url = "labels"', 'urls = ["a"]', "soft_labels.urls: "),
            ('url = "labels"', 'urls = ["a", "./a", "a"]', "urls must differ"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        assert old in LONG
        with pytest.raises(InputError, match=r"train\.toml is not valid") as error:
            load_config(write(tmp_path, LONG.replace(old, new)))
        assert message in str(error.value)


class TestResultSettings:
    def of(self, tmp_path: Path, text: str) -> dict[str, Any]:
        return load_config(write(tmp_path, text)).result_settings()

    def test_without_names_places_and_the_device(self, tmp_path: Path) -> None:
        """What lies at a place has a digest of its own."""
        replacements = {
            'name = "student"': 'name = "other"',
            '"runs/student"': '"elsewhere"',
            '"corpus.parquet"': '"other.parquet"',
            '"inventory.json"': '"other.json"',
            '"labels"': '"others"',
            'url = "labels"': 'urls = ["labels", "others"]',
            "num_heads = 2": 'num_heads = 2\ncache = "cache"\ncache_gib = 1.0',
            "epochs = 3": 'epochs = 3\ndevice = "cuda:1"\ncheckpoint_minutes = 1.0',
        }
        assert all(old in LONG for old in replacements)
        for pair in replacements.items():
            assert self.of(tmp_path, LONG.replace(*pair)) == self.of(tmp_path, LONG)

    def test_all_else_is_in_them(self, tmp_path: Path) -> None:
        replacements = {
            'output = "runs/student"': 'output = "runs/student"\nseed = 1',
            '["train", "extra"]': '["train"]',
            "dev_splits = []": 'dev_splits = ["dev"]',
            "\n\n[soft_labels]": '\nhard_label_splits = ["train"]\n[soft_labels]',
            "weight = 0.7": "weight = 0.6",
            "temperature = 2.0\n": "temperature = 2.0\nframes = { silence = 0.5 }\n",
            "weight = 0.7\n": "weight = 0.7\nfinal_weight = 0.7\n",
            "temperature = 2.0": "temperature = 4.0",
            '"to_hard_label"': '"uniform"',
            "num_heads = 2": "num_heads = 1",
            "num_heads = 2\n": 'num_heads = 2\ndecoding_head = "soft"\n',
            "max_entries = 8": "max_entries = 9",
            "stack = 2": "stack = 1",
            "[model]": "[augmentation]\n[model]",
            "stack = 2\n": "stack = 2\nsnip_edges = true\n",
            "\nweight = 0.7": "\nframes = { blank = 0.5 }\nweight = 0.7",
            "[model]\n": "[augmentation]\ntime_masks = 3\n[model]\n",
            '"conformer"': '"tdnn"',
            "hidden = 64": "hidden = 65",
            "epochs = 3": "epochs = 4",
            "epochs = 3\n": 'epochs = 3\nprecision = "bfloat16"\n',
        }
        assert all(old in LONG for old in replacements)
        found = [
            repr(self.of(tmp_path, text)) for text in (LONG, *(LONG.replace(*pair) for pair in replacements.items()))
        ]
        assert len(set(found)) == len(replacements) + 1

    def test_ctc_is_in_it(self, tmp_path: Path) -> None:
        texts = (SHORTEST, SHORTEST + "\n[ctc]\n", SHORTEST + '\n[ctc]\nunits = "words"\n')
        assert len({repr(self.of(tmp_path, text)) for text in texts}) == 3

    def test_it_survives_the_run_folder(self, tmp_path: Path) -> None:
        config = load_config(write(tmp_path, LONG))
        assert TrainConfig.model_validate(config.model_dump(mode="json")).result_settings() == config.result_settings()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing.toml does not exist"),
        ("name = ", "missing.toml is not valid TOML"),
        (SHORTEST + 'dev_split = ["dev"]', "did you mean 'dev_splits'?"),
        (SHORTEST, "class inventory {folder}/inventory.json does not exist"),
    ],
)
def test_train_with_bad_input_exits_with_2_and_one_message(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "missing.toml"
    if content is not None:
        path.write_text(content)
    result = CliRunner().invoke(main, ["train", str(path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message.format(folder=tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)
