"""The card of a dataset: what it is, where it comes from, how good it is, how to load it; for pages and as Markdown.

The Markdown begins with the YAML that Hugging Face's hub reads (huggingface.co/docs/hub/datasets-cards), so that it can be the
``README.md`` of a repository there. What people wrote is escaped: it shows as it was typed, whatever it holds.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from softlabel_schemas.about import Description
from softlabel_schemas.catalog import Entry
from softlabel_schemas.describe import codec_kl, selection_words
from softlabel_schemas.errors import InputError
from softlabel_schemas.manifest import ShardRecord
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.strict import printable

_MARKDOWN = re.compile(r"([\\`*_{}\[\]|#~$])")
# What would begin a list, a rule, a heading or a quotation at the start of a line.
_BEGINNING = re.compile(r"^(?:\s*(?=[-+=])|\s*\d+(?=[.)]\s))", flags=re.MULTILINE)
# Of the identifiers that the hub knows, those that data are put under.
_HUB_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "cc", "cc0-1.0", "cc-by-3.0", "cc-by-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
    *("cc-by-nc-nd-4.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0"),
    *("cdla-permissive-2.0", "odc-by", "odbl", "pddl"),
}
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")
# Beyond this the front matter names all shards by a pattern.
_MAX_FILES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """``rows``: facts with their labels. ``code``: Python."""

    title: str
    paragraphs: Sequence[str] = ()
    rows: Sequence[tuple[str, str]] = ()
    code: str = ""


def sections(entry: Entry) -> list[Section]:
    """The card of a published dataset. Raises InputError for any other."""
    if entry.facts is None or entry.spec is None:
        raise InputError(f"{entry.url} is not a published dataset: {entry.problem}")
    said = entry.about.description if entry.about else Description()
    facts, spec = entry.facts, entry.spec
    return [
        Section(title="What it is", paragraphs=[*_paragraphs(said.text), _WHAT], rows=_what(said, facts)),
        Section(title="Teachers and lineage", rows=list(_lineage(entry, facts, spec))),
        Section(title="Selection and storage", rows=_storage(facts, spec)),
        Section(title="Quality", paragraphs=[_QUALITY], rows=_quality(facts, spec)),
        Section(title="How to load it", code=_LOADING.format(url=json.dumps(entry.url, ensure_ascii=False))),
        Section(title="Restrictions and biases", paragraphs=[*_paragraphs(said.restrictions), *_biases(spec)]),
    ]


_WHAT = (
    "Soft labels for knowledge distillation: for each frame of speech a few classes with the probabilities that an ensemble of "
    "teachers gave them, and the mass of all the others. It holds no audio and no transcripts; utterances are joined with a "
    "corpus by id."
)
_QUALITY = (
    "Means over all frames. Entropy and agreement are of the whole posterior, before anything was left out; agreement is the "
    "share of frames whose likeliest class is the hard label of the corpus."
)
_LOADING = """\
from softlabel_schemas import open_dataset

dataset = open_dataset({url})
utterance = dataset[0]  # or dataset["utterance-id"], dataset.read_shard(0), or iterate
print(utterance.utterance_id, utterance.targets.num_frames, utterance.targets.class_ids)"""


def _paragraphs(text: str | None) -> list[str]:
    return [each.strip() for each in re.split(r"\n\s*\n", text) if each.strip()] if text else []


def _what(said: Description, facts: dict[str, Any]) -> list[tuple[str, str]]:
    skipped = f"; {facts['skipped']:,} were skipped" if facts["skipped"] else ""
    return [
        ("Owner", said.owner or "not stated"),
        ("Licence", said.licence or "not stated"),
        ("Corpus", said.corpus or "not stated"),
        ("Languages", ", ".join(said.languages) or "not stated"),
        ("Utterances", f"{facts['utterances']:,}{skipped}"),
        ("Speech", f"{facts['hours']:,.2f} hours in {facts['frames']:,} frames of {facts['frame_shift_ms']:g} ms"),
        ("Classes", f"{facts['num_classes']:,}"),
    ]


def _lineage(entry: Entry, facts: dict[str, Any], spec: DatasetSpec) -> Iterator[tuple[str, str]]:
    for teacher in spec.teachers:
        fold = "" if teacher.fold is None else f", labelled fold {teacher.fold} of {spec.num_folds}"
        yield f"Teacher {teacher.name}", f"weight {teacher.weight:.3g}{fold}, digest {teacher.digest}"
    how = "the mean of their posteriors" if spec.combination == "arithmetic" else "their normalised geometric mean"
    if len(spec.teachers) > 1:
        yield "Ensemble", f"{how}, in {spec.precision}"
    for each in spec.combined_from or ():
        yield "Combined from", f"the dataset {each.content_digest}, weight {each.weight:.3g}"
    if spec.subset_of is not None:
        yield "Subset of", f"the dataset {spec.subset_of.content_digest}: {spec.subset_of.choice}"
    yield "Corpus digest" if spec.subset_of is None else "Corpus digest of the whole", spec.corpus_digest
    yield "Class inventory", spec.inventory_digest
    yield "Fingerprint of the settings", facts["fingerprint"]
    yield "Content digest", facts["content_digest"]
    software = (entry.about and entry.about.software) or "software not stated"
    yield "Made by", f"{software}, format version {spec.format_version}"


def _storage(facts: dict[str, Any], spec: DatasetSpec) -> list[tuple[str, str]]:
    temperatures = ", ".join(f"{each:g}" for each in spec.temperatures)
    return [
        ("Selection", selection_words(spec.selection)),
        ("Temperatures", temperatures),
        ("Entries", f"{facts['entries_per_frame']:.2f} per frame"),
        ("Size", f"{facts['bytes']:,} bytes in {facts['shards']:,} shards, {facts['bytes_per_frame']:.2f} per frame"),
        ("Format", f"{facts['shard_format']}, codec {spec.codec}"),
    ]


def _quality(facts: dict[str, Any], spec: DatasetSpec) -> list[tuple[str, str]]:
    agreement = facts["hard_label_agreement"]
    return [
        ("Kept mass", f"{facts['kept_mass']:.4f}"),
        ("Entropy", f"{facts['entropy_nats']:.4f} nats"),
        ("Agreement with hard labels", "not known" if agreement is None else f"{agreement:.4f}"),
        (
            "Divergence added by the codec",
            f"about {codec_kl(spec.codec, facts['entries_per_frame']):.1e} nats per frame",
        ),
    ]


def _biases(spec: DatasetSpec) -> Iterator[str]:
    yield (
        "The labels carry the errors and the biases of the teachers, and of the speech that these were trained on. What may be "
        "done with them is bounded by the terms of the corpus and of the teachers too."
    )
    if spec.num_folds is None:
        yield "Teachers are over-confident on speech that they were trained on; nothing here says that they were not."
    else:
        yield f"Each speaker was labelled by teachers that were trained without their fold, one of {spec.num_folds}."
    if spec.selection.frames is not None:
        yield "Some frames were left out by what the teachers or the alignment said of them, which favours easy speech."


# As Markdown


def card_markdown(entry: Entry, shards: Sequence[ShardRecord]) -> str:
    """``README.md``. ``shards``: of the manifest. Raises InputError unless the dataset is published."""
    content = sections(entry)
    assert entry.facts is not None
    lines = ["---", *_front_matter(entry, shards), "---", "", f"# {_cell(entry.title)}", ""]
    if entry.deprecation is not None:
        lines += [f"> **Warning.** This dataset is {_escaped(entry.deprecation.sentence())}", ""]
    for section in content:
        lines += [f"## {section.title}", ""]
        for paragraph in section.paragraphs:
            lines += [_escaped(paragraph), ""]
        if section.rows:
            rows = [f"| {_cell(label)} | {_cell(value)} |" for label, value in section.rows]
            lines += ["| | |", "|---|---|", *rows, ""]
        if section.code:
            lines += ["```python", section.code, "```", ""]
    return "\n".join(lines)


def _front_matter(entry: Entry, shards: Sequence[ShardRecord]) -> Iterator[str]:
    """YAML, of which JSON is a part: values are written as JSON."""
    assert entry.facts is not None
    said = entry.about.description if entry.about else Description()
    fields: dict[str, Any] = {"pretty_name": entry.title, **_licence(said.licence)}
    if said.languages:
        fields["language"] = sorted({code.partition("-")[0] for code in said.languages})
        regional = [code for code in said.languages if "-" in code]
        fields |= {"language_bcp47": regional} if regional else {}
    fields |= {
        "task_categories": ["automatic-speech-recognition"],
        "tags": ["knowledge-distillation", "soft-labels", "speech"],
        "size_categories": [_size_category(entry.facts["utterances"])],
    }
    if entry.facts["shard_format"] == "parquet":
        # Named one by one: what losing writers left beside them is not data.
        paths = [f"{shard.folder}/shard.parquet" for shard in shards if shard.num_utterances]
        named: list[str] | str = paths
        if len(paths) > _MAX_FILES:
            named = "shards/*/shard.parquet"
            yield "# The pattern also matches what losing writers left; 'softlabels gc URL --delete' removes that."
        fields["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": named}]}]
    for name, value in fields.items():
        yield f"{name}: {json.dumps(value, ensure_ascii=False)}"


def _licence(licence: str | None) -> dict[str, str]:
    if licence is None:
        return {"license": "unknown"}
    if licence.lower() in _HUB_LICENCES:
        return {"license": licence.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-") or "other"}


def _size_category(num_utterances: int) -> str:
    """As the hub names sizes: ``n<1K``, ``1K<n<10K``, ..."""
    power = sum(num_utterances >= 10**exponent for exponent in range(3, 10))
    if power == 0:
        return f"n<{_SIZES[0]}"
    return f"{_SIZES[power - 1]}<n<{_SIZES[power]}" if power < len(_SIZES) else f"{_SIZES[-1]}<n<10B"


def _cell(text: str) -> str:
    """On one line: the name of a teacher or of a folder can be any text."""
    return _escaped(" ".join(text.split()))


def _escaped(text: str) -> str:
    shown = "\n".join(printable(line, len(line)) for line in text.split("\n"))
    safe = _MARKDOWN.sub(r"\\\1", html.escape(shown, quote=False))
    return _BEGINNING.sub(r"\g<0>\\", safe)
