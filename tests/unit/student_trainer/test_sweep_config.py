"""SWEEP.toml: arms are the base with changes; whatever cannot be trained or compared is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from softlabel_schemas import InputError
from softlabel_schemas.selection import Mass, TopK
from student_trainer.config import CtcConfig, TrainConfig, TrainingConfig, load_config
from student_trainer.sweep_config import Sweep, load_sweep

BASE = """
[base.corpus]
manifest = "corpus.parquet"
inventory = "inventory.json"

[base.soft_labels]
url = "labels"
weight = 0.8
selection = { policy = "mass", mass = 0.9, max_entries = 20 }
"""
HARD = '[[arms]]\nname = "hard"\nsoft_labels = false\n'


def write(
    folder: Path, arms: str = HARD, *, head: str = 'output = "sweep"\nseeds = [0, 1]\n', base: str = BASE
) -> Path:
    path = folder / "sweep.toml"
    path.write_text(f"{head}{base}{arms}", encoding="utf-8")
    return path


def arms_of(sweep: Sweep) -> dict[str, TrainConfig]:
    return {run.name: run for run in sweep.runs}


class TestArms:
    def test_every_arm_and_seed_is_a_run_of_its_own(self, tmp_path: Path) -> None:
        sweep = load_sweep(write(tmp_path, HARD + '[[arms]]\nname = "essence"\nseeds = [1, 2]\n'))
        folders = [Path(run.output).relative_to(tmp_path) for run in sweep.runs]
        # All arms of a seed before the next.
        assert [str(folder) for folder in folders] == [
            f"sweep/runs/{name}" for name in ("hard-0", "hard-1", "essence-1", "essence-2")
        ]
        assert [run.seed for run in sweep.runs] == [0, 1, 1, 2]
        assert sweep.arms == ("hard", "essence")

    def test_changes_are_merged_and_false_removes_a_table(self, tmp_path: Path) -> None:
        more = '[[arms]]\nname = "wide"\nsoft_labels = { weight = 0.5, selection = false }\n'
        arms = arms_of(load_sweep(write(tmp_path, HARD + more)))
        assert arms["hard"].soft_labels is None
        soft = arms["wide"].soft_labels
        assert soft is not None
        assert (soft.url, soft.weight, soft.selection) == (str(tmp_path / "labels"), 0.5, None)

    def test_false_is_a_value_among_the_arguments_of_a_model(self, tmp_path: Path) -> None:
        """Which have no tables: ``false`` there switches something off, whether or not the base says anything of it."""
        off = '[[arms]]\nname = "off"\nmodel = { arguments = { causal = false, hidden = 32 } }\n'
        base = BASE + "[base.model.arguments]\nhidden = 64\n"
        assert arms_of(load_sweep(write(tmp_path, off, base=base)))["off"].model.arguments == {
            "causal": False,
            "hidden": 32,
        }

    def test_a_table_that_is_not_there_can_be_removed(self, tmp_path: Path) -> None:
        none = '[[arms]]\nname = "none"\nctc = false\nsoft_labels = { frames = false }\n'
        arm = arms_of(load_sweep(write(tmp_path, none)))["none"]
        assert arm.soft_labels is not None
        assert (arm.ctc, arm.soft_labels.frames) == (None, None)

    def test_a_weight_that_does_not_change(self, tmp_path: Path) -> None:
        """``false`` is no number: it is not to end at 0."""
        constant = '[[arms]]\nname = "constant"\nsoft_labels = { final_weight = false }\n'
        base = BASE.replace("weight = 0.8", "weight = 0.8\nfinal_weight = 0.5")
        arm = arms_of(load_sweep(write(tmp_path, constant, base=base)))["constant"]
        assert arm.soft_labels is not None
        assert (arm.soft_labels.weight, arm.soft_labels.final_weight) == (0.8, None)

    def test_a_selection_of_the_same_policy_is_merged_another_replaces_it(self, tmp_path: Path) -> None:
        same = '[[arms]]\nname = "same"\nsoft_labels = { selection = { mass = 0.8 } }\n'
        other = '[[arms]]\nname = "other"\nsoft_labels = { selection = { policy = "top_k", k = 5 } }\n'
        arms = arms_of(load_sweep(write(tmp_path, same + other)))
        selections = [arm.soft_labels.selection for arm in arms.values() if arm.soft_labels]
        assert selections == [Mass(mass=0.8, max_entries=20), TopK(k=5)]

    def test_several_datasets_take_the_place_of_one(self, tmp_path: Path) -> None:
        several = '[[arms]]\nname = "switched"\nsoft_labels = { urls = ["labels-a", "s3://bucket/labels"] }\n'
        soft = arms_of(load_sweep(write(tmp_path, HARD + several)))["switched"].soft_labels
        assert soft is not None
        assert (soft.url, soft.weight) == (None, 0.8)
        assert soft.locations == (str(tmp_path / "labels-a"), "s3://bucket/labels")

    def test_the_base_can_be_a_training_file_elsewhere(self, tmp_path: Path) -> None:
        (tmp_path / "base").mkdir()
        tables = BASE.replace("[base.", "[")
        training = 'name = "student"\noutput = "runs/student"\nseed = 7\n' + tables + "[training]\nnum_threads = 2\n"
        (tmp_path / "base" / "train.toml").write_text(training, encoding="utf-8")
        head = 'output = "sweep"\nseeds = [3]\nbase = "base/train.toml"\n'
        arm = '[[arms]]\nname = "other-labels"\nsoft_labels = { url = "labels" }\n[[arms]]\nname = "as-it-is"\n'
        arms = arms_of(load_sweep(write(tmp_path, arm, head=head, base="")))
        alone = load_config(tmp_path / "base" / "train.toml")
        expected = alone.model_copy(update={"name": "as-it-is", "seed": 3})
        assert arms["as-it-is"] == expected.model_copy(update={"output": arms["as-it-is"].output})
        # An arm's paths are relative to the sweep's file, the base's to its own.
        assert arms["other-labels"].soft_labels is not None
        assert arms["other-labels"].soft_labels.url == str(tmp_path / "labels")

    def test_one_thread_for_each_run_unless_told_otherwise(self, tmp_path: Path) -> None:
        threads = '[[arms]]\nname = "two"\ntraining = { num_threads = 2 }\n'
        arms = arms_of(load_sweep(write(tmp_path, HARD + threads)))
        assert [arm.training.num_threads for arm in arms.values()] == [1, 2]

    def test_a_gpu_of_a_number_is_any(self, tmp_path: Path) -> None:
        numbered = '[[arms]]\nname = "two"\ntraining = { device = "cuda:1" }\n'
        arms = arms_of(load_sweep(write(tmp_path, HARD + numbered)))
        assert [arm.training.device for arm in arms.values()] == ["auto", "cuda"]

    def test_an_arm_without_the_table_has_one_thread(self, tmp_path: Path) -> None:
        removed = '[[arms]]\nname = "defaults"\ntraining = false\n'
        base = BASE + "[base.training]\nepochs = 3\nnum_threads = 2\n"
        hard, defaults = (
            arm.training for arm in arms_of(load_sweep(write(tmp_path, HARD + removed, base=base))).values()
        )
        assert (hard.num_threads, hard.epochs) == (2, 3)
        assert (defaults.num_threads, defaults.epochs) == (1, TrainingConfig().epochs)


class TestCtc:
    BASE = BASE + "[base.ctc]\n"

    def test_units_are_those_of_the_base(self, tmp_path: Path) -> None:
        weighed = '[[arms]]\nname = "weighed"\nsoft_labels = { frames = { blank = 0.1 } }\n'
        sweep = load_sweep(write(tmp_path, HARD + weighed, base=self.BASE))
        assert [run.ctc for run in sweep.runs] == [CtcConfig(units="characters")] * 4
        assert sweep.units == "characters"
        assert load_sweep(write(tmp_path)).units is None

    def test_all_arms_may_have_others(self, tmp_path: Path) -> None:
        words = '[[arms]]\nname = "{}"\nctc = {{ units = "words" }}\nsoft_labels = {{ weight = 0.{} }}\n'
        sweep = load_sweep(write(tmp_path, words.format("a", 1) + words.format("b", 2), base=self.BASE))
        assert sweep.units == "words"

    @pytest.mark.parametrize(
        ("arms", "message"),
        [
            ('[[arms]]\nname = "b"\nctc = false\n', r"'hard' and 'b' .* \[ctc\] in characters and labels of frames;"),
            (
                '[[arms]]\nname = "b"\nctc.units = "words"\n',
                r"\[ctc\] in characters and \[ctc\] in words; .* sweep of its own",
            ),
            ('[evaluate]\ngraph = "graph"\n', r"evaluate\.graph decodes the phones of each frame, .* leave it out"),
            (
                '[[arms]]\nname = "b"\nsoft_labels.tail = "to_hard_label"\n',
                r"arm 'b'(.|\n)*with \[ctc\] there are none",
            ),
        ],
    )
    def test_what_cannot_be_compared(self, tmp_path: Path, arms: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_sweep(write(tmp_path, HARD + arms, base=self.BASE))


class TestRefused:
    def test_all_bad_arms_are_named_at_once(self, tmp_path: Path) -> None:
        bad = '[[arms]]\nname = "a"\nsoft_labels = { wieght = 0.5 }\n[[arms]]\nname = "b"\ntraining = { epochs = 0 }\n'
        with pytest.raises(InputError) as error:
            load_sweep(write(tmp_path, HARD + bad))
        message = str(error.value)
        assert "arm 'a'" in message
        assert "did you mean 'weight'?" in message
        assert "arm 'b'" in message
        assert "training.epochs" in message
        assert "arm 'hard'" not in message

    def test_trials_are_evaluated_on_dev_speech(self, tmp_path: Path) -> None:
        assert load_sweep(write(tmp_path, HARD + '[evaluate]\nsplits = ["dev"]\n')).evaluate.splits == ("dev",)

    @pytest.mark.parametrize(
        ("arms", "message"),
        [
            (
                HARD + 'corpus.train_splits = ["train", "dev"]\n',
                "arm 'hard' is not valid: .* share dev: the best epoch",
            ),
            (HARD + '[[arms]]\nname = "again"\nsoft_labels = false\n', "'hard' and 'again' are the same configuration"),
            (HARD + HARD, "more than one is named hard"),
            (HARD.replace("hard", "ensemble"), "an arm is named ensemble, which means the teacher ensemble"),
            (HARD + f"seeds = [{2**64}]\n", r"arms\.0\.seeds\.0: .*less than 18446744073709551616"),
            (HARD.replace("hard", "a/b"), "name must be a plain, non-empty name"),
            (HARD + "seeds = []\n", "seeds"),
            (HARD + "seeds = [1, 1]\n", "seeds must differ"),
            (HARD + "seed = 1\n", "seeds are given as seeds"),
            (HARD + 'output = "x"\n', "output: the sweep sets this"),
            (HARD + 'corpus = { manifest = "other.parquet" }\n' + '[[arms]]\nname = "b"\n', "different corpora"),
            (HARD + '[compare]\npairs = [["hard", "ensemble"]]\n', "compare.pairs names ensemble; the arms are hard"),
            (HARD + '[compare]\ngain = ["hard", "all"]\n', "compare.gain names all; the arms are hard"),
            (HARD + '[compare]\ngain = ["hard", "hard"]\n', "gain needs two arms, a baseline and a reference"),
            (
                HARD + '[evaluate]\nensemble = "labels"\n[compare]\ngain = ["hard", "ensemble"]\n',
                "compare.gain names ensemble; the arms are hard",
            ),
            (
                HARD + '[[arms]]\nname = "b"\ncorpus.dev_splits = []\n[evaluate]\ngraph = "graph"\n',
                "are chosen on corpus.dev_splits, which the arms b have none of",
            ),
            (
                HARD + '[[arms]]\nname = "b"\ncorpus.train_splits = ["train", "more"]\n[evaluate]\nsplits = ["more"]\n',
                r"evaluate.splits has more, which the arm 'b' trains on \(corpus.train_splits\)",
            ),
            (HARD + '[evaluate]\nspltis = ["test"]\n', "did you mean 'splits'"),
            (HARD + '[evaluate]\nensemble = "labels"\ngraph = "graph"\n', "dev_ensemble is needed"),
            ("arms = []\n", "arms"),
        ],
    )
    def test_sweeps_that_cannot_be_compared(self, tmp_path: Path, arms: str, message: str) -> None:
        head, base = 'output = "sweep"\nseeds = [0, 1]\n', BASE
        if arms.startswith("arms"):
            head, arms = head + arms, ""
        with pytest.raises(InputError, match=message):
            load_sweep(write(tmp_path, arms, head=head, base=base))

    def test_a_base_table_does_not_name_a_seed(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="seed: the sweep sets this"):
            load_sweep(write(tmp_path, base="[base]\nseed = 1\n" + BASE))
