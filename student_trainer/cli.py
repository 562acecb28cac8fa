"""``student-trainer``: train, evaluate, export and compare. Needs no teacher; only ``sweep`` needs ray."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from softlabel_schemas.command_line import CommandGroup, needs_extra
from softlabel_schemas.errors import InputError

if TYPE_CHECKING:
    from student_trainer.config import Units


@click.group(cls=CommandGroup, extra="student", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="essence-distill")
def main() -> None:
    """Train students from stored soft labels and hard labels; no teacher, no teacher GPU.

    \b
    Examples:
      student-trainer train student.toml
      student-trainer evaluate runs/student --corpus corpus.parquet --split test
      student-trainer export runs/student bundles/student
      student-trainer compare runs/* --split test --report report.html
    """


@main.command()
@click.argument("config", type=click.Path())
def train(config: str) -> None:
    """Train the model that CONFIG (TRAIN.toml) describes; run again to resume after an interruption.

    Without a [soft_labels] table it trains on hard labels alone, which is how teachers are made.

    \b
    Example:
      student-trainer train student.toml
    """
    from student_trainer.config import load_config
    from student_trainer.train import train as run_training

    # Schedulers stop a job with SIGTERM; end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = load_config(config)
    if run_training(settings):
        click.echo(f"{settings.output}: trained {settings.training.epochs} epochs")
    else:
        click.echo(f"{settings.output}: already complete ({settings.training.epochs} epochs); nothing to do")


@main.command()
@click.argument("run", type=click.Path(), required=False)
@click.option("--dataset", help="Evaluate the teacher ensemble from this dataset's targets, instead of a RUN.")
@click.option(
    "--corpus", required=True, help="Corpus manifest with hard labels (of CTC and for words with transcripts)."
)
@click.option("--split", "splits", multiple=True, required=True, help="May be given several times.")
@click.option("--graph", help="Decode words with this graph (student-trainer graph), for word error rates.")
@click.option("--decoder", help="Settings of the decoder (student-trainer tune-decoder); default: decoder.json of RUN.")
@click.option(
    "--ctc",
    type=click.Choice(["characters", "words"]),
    help="Of CTC teachers' labels: what transcripts are spelled in.",
)
@click.option("--output", help="JSON file for the result; default: evaluation-SPLIT.json in the run's folder.")
def evaluate(
    run: str | None,
    dataset: str | None,
    corpus: str,
    splits: tuple[str, ...],
    graph: str | None,
    decoder: str | None,
    ctc: Units | None,
    output: str | None,
) -> None:
    """Frame, phone and word error rate, cross-entropy and calibration error of RUN, or of a teacher ensemble.

    Of CTC, token and word error rate by greedy decoding.

    The cross-entropy of a teacher ensemble is that of the stored probabilities. A lossy codec stores none below its floor, so
    that no hard label costs more than 13.3 nats with mtf-sqrt and 15.9 with packed-u8.

    \b
    Examples:
      student-trainer evaluate runs/student --corpus corpus.parquet --split test
      student-trainer evaluate runs/student --corpus corpus.parquet --split test --graph graph
      student-trainer evaluate --dataset labels-test --corpus corpus.parquet --split test --output ensemble.json
    """
    from student_trainer.evaluate import WordDecoding, evaluate_dataset, evaluate_run
    from student_trainer.run_folder import DECODER, RunFolder

    if decoder is not None and graph is None:
        raise InputError("--decoder needs --graph: its settings are those of a word decoder")
    if ctc is not None and dataset is None:
        raise InputError("--ctc is for --dataset: a RUN knows what it was trained with")
    _check_run_or_dataset(run, dataset, output)
    decoding = None
    if graph is not None:
        if run is None and decoder is None:
            raise InputError("--graph with --dataset needs --decoder: a dataset holds no settings of a decoder")
        decoding = WordDecoding(graph=graph, settings=decoder or str(Path(run or "") / DECODER))
    if run is not None:
        result = evaluate_run(run, corpus, splits, output, decoding)
        if unfinished := RunFolder(run).unfinished():
            click.echo(f"warning: {run} {unfinished}", err=True)
    else:
        assert dataset is not None
        assert output is not None
        result = evaluate_dataset(dataset, corpus, splits, output, decoding, ctc)
    if "token_error_rate" in result:
        for name in ("token_error_rate", "word_error_rate"):
            if name in result:
                click.echo(f"{name:<18} {result[name]:.3f}")
        return
    for name in ("frame_error_rate", "phone_error_rate", "cross_entropy", "calibration_error"):
        if name == "phone_error_rate" and result[name] is None:
            # The inventory has no phones.
            continue
        value = "unknown (not every hard label was kept)" if result[name] is None else f"{result[name]:.3f}"
        click.echo(f"{name:<18} {value}")
    if graph is not None:
        click.echo(f"word_error_rate    {result['word_error_rate']:.3f}")
        click.echo(
            f"{result['num_words']} words, {result['out_of_vocabulary_rate']:.2f}% of them not in the graph; "
            f"{result['num_unfinished_decodings']} utterances decoded to no end of a sentence"
        )


@main.command()
@click.option("--corpus", required=True, help="Corpus manifest with transcripts and hard labels.")
@click.option("--split", "splits", multiple=True, required=True, help="Training splits; may be given several times.")
@click.option("--lexicon", required=True, help="Text file, one pronunciation a line: a word and its phones.")
@click.option(
    "--inventory", required=True, help="Class inventory of the models to decode; its phones are the lexicon's."
)
@click.option("--order", type=click.IntRange(1, 5), default=2, show_default=True, help="Of the n-gram language model.")
@click.option(
    "--min-phone-frames",
    type=click.IntRange(1, 10),
    default=1,
    show_default=True,
    help="Shortest phone; silence apart.",
)
@click.option("--output", required=True, help="Folder to write.")
def graph(
    corpus: str,
    splits: tuple[str, ...],
    lexicon: str,
    inventory: str,
    order: int,
    min_phone_frames: int,
    output: str,
) -> None:
    """Build a graph for decoding words: lexicon and n-gram, the n-gram of these splits' transcripts alone.

    \b
    Example:
      student-trainer graph --corpus corpus.parquet --split train --lexicon lexicon.txt --inventory inventory.json \\
        --output graph
    """
    from softlabel_schemas.inventory import ClassInventory

    with needs_extra("decode"):
        from student_trainer.graph_folder import make_graph

    made = make_graph(
        corpus,
        splits,
        lexicon,
        ClassInventory.load(inventory),
        output,
        ngram_order=order,
        min_phone_frames=min_phone_frames,
    )
    click.echo(f"{output}: {len(made.words)} words, {made.fst.num_states} states, {order}-gram")


@main.command()
@click.argument("run", type=click.Path(), required=False)
@click.option("--dataset", help="Tune for the teacher ensemble of this dataset, instead of a RUN.")
@click.option("--corpus", required=True, help="Corpus manifest with transcripts and hard labels.")
@click.option("--split", "splits", multiple=True, required=True, help="Dev splits: neither trained on nor tested on.")
@click.option("--graph", required=True, help="Folder of the graph (student-trainer graph).")
@click.option("--output", help="JSON file for the settings; default: decoder.json in the run's folder.")
def tune_decoder(
    run: str | None, dataset: str | None, corpus: str, splits: tuple[str, ...], graph: str, output: str | None
) -> None:
    """Choose acoustic scale, prior exponent and word insertion penalty by the word error rate of a dev split.

    \b
    Examples:
      student-trainer tune-decoder runs/student --graph graph --corpus corpus.parquet --split dev
      student-trainer tune-decoder --dataset labels-dev --graph graph --corpus corpus.parquet --split dev --output decoder.json
    """
    with needs_extra("decode"):
        from student_trainer.tune import tune_dataset, tune_run

    _check_run_or_dataset(run, dataset, output)
    if run is not None:
        tuned = tune_run(run, corpus, splits, graph, output)
    else:
        assert dataset is not None
        assert output is not None
        tuned = tune_dataset(dataset, corpus, splits, graph, output)
    for name, value in tuned.settings.model_dump().items():
        click.echo(f"{name:<22} {value:g}")
    click.echo(f"{'word_error_rate':<22} {tuned.word_error_rate:.3f}")


def _check_run_or_dataset(run: str | None, dataset: str | None, output: str | None) -> None:
    if (run is None) == (dataset is None):
        raise InputError("give a RUN or --dataset, one of the two")
    if run is None and output is None:
        raise InputError("--dataset needs --output: a dataset is never written to")


@main.command()
@click.argument("run", type=click.Path())
@click.argument("bundle", type=click.Path())
@click.option("--name", help="Name of the teacher; default: the run's name.")
def export(run: str, bundle: str, name: str | None) -> None:
    """Write the model of RUN as a teacher bundle into the folder BUNDLE.

    \b
    Example:
      student-trainer export runs/tdnn bundles/tdnn
    """
    from student_trainer.export import export as export_run

    description = export_run(run, bundle, name=name)
    click.echo(f"{bundle}: {description.name}, {description.num_classes} classes, digest {description.digest()}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--evaluation", "evaluations", multiple=True, help="Result without a run, e.g. the ensemble's JSON.")
@click.option("--dataset", "datasets", multiple=True, help="Published soft labels, for their size and histograms.")
@click.option("--split", "splits", multiple=True, required=True, help="As given to evaluate.")
@click.option("--report", required=True, type=click.Path(), help="HTML page to write.")
@click.option("--json", "json_path", type=click.Path(), help="JSON file for all numbers.")
def compare(
    runs: tuple[str, ...],
    evaluations: tuple[str, ...],
    datasets: tuple[str, ...],
    splits: tuple[str, ...],
    report: str,
    json_path: str | None,
) -> None:
    """Compare RUNS on one split: a table on stdout, and a self-contained page with figures.

    Runs of the same name are seeds of one arm. Each arm with soft labels is tested against the hard-only arms of the same
    model. Needs evaluation-SPLIT.json in every run (student-trainer evaluate).

    \b
    Example:
      student-trainer compare runs/* --evaluation ensemble.json --dataset labels-train --split test --report report.html
    """
    from student_trainer.compare import compare as compare_runs
    from student_trainer.compare import results as comparison_results
    from student_trainer.compare import text
    from student_trainer.report import render, write

    comparison = compare_runs(runs, evaluations, datasets, splits)
    click.echo(text(comparison))
    write(report, render(comparison))
    if json_path is not None:
        write(json_path, json.dumps(comparison_results(comparison), indent=1) + "\n")
    click.echo(f"report: {report}")


@main.command()
@click.argument("config", type=click.Path())
@click.option(
    "--address",
    envvar="RAY_ADDRESS",
    show_envvar=True,
    help="Of a Ray cluster (HOST:PORT); default: Ray on this machine, on loopback only.",
)
def sweep(config: str, address: str | None) -> None:
    """Train, evaluate and compare all arms and seeds of CONFIG (SWEEP.toml); run again to resume.

    \b
    Example:
      student-trainer sweep sweep.toml
    """
    with needs_extra("sweep"):
        from student_trainer.sweep import run_sweep

    # A cluster stops a job with SIGTERM; end as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_sweep(config, address=address)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option(
    "--output", required=True, type=click.Path(), help="Markdown page to write; figures and records lie beside."
)
@click.option(
    "--introduction", type=click.Path(), help="Markdown file to stand below the title; a copy is kept beside."
)
def results(files: tuple[str, ...], output: str, introduction: str | None) -> None:
    """Write a page of results from FILES (each sweep's sweep.json, or the JSON of an earlier page), and nothing else.

    \b
    Examples:
      student-trainer results sweep/sweep.json --output results.md
      student-trainer results sweep/sweep.json --introduction answers.md --output results.md
    """
    from student_trainer.results_page import write_results

    for path in write_results(files, output, introduction=introduction):
        click.echo(path)


if __name__ == "__main__":
    main()
