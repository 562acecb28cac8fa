"""What datasets there are under a prefix: found by walking its folders, each described by its own documents.

No index is kept anywhere, so that none can be wrong: a folder with a ``spec.json`` is a dataset, or a run that is not finished,
and is not looked into further; folders called ``names`` hold names. A dataset takes one listing and a few reads of small
documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from softlabel_schemas import layout
from softlabel_schemas.about import About, read_about
from softlabel_schemas.commit import committed_shards, read_spec
from softlabel_schemas.dataset import open_dataset
from softlabel_schemas.deprecation import Deprecation, deprecation_of
from softlabel_schemas.describe import description, selection_words
from softlabel_schemas.errors import InputError, IntegrityError
from softlabel_schemas.names import NAMES, list_names
from softlabel_schemas.object_store import ObjectStore
from softlabel_schemas.read_ahead import read_ahead
from softlabel_schemas.spec import DatasetSpec
from softlabel_schemas.strict import printable

_DATASETS_AT_ONCE = 8
# Of folders: deeper than any bucket is laid out by people.
_MAX_DEPTH = 12
_MAX_PROBLEM = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One dataset, or what should be one.

    Attributes:
        path: relative to the prefix; empty where the prefix is the dataset itself.
        names: ``name:version``, those of its own prefix and of the prefixes above.
        state: "unreadable" is what is whole, but of a newer format version.
        problem: why it is not published or cannot be read, or why its description cannot; empty where all can.
        facts: of :func:`softlabel_schemas.describe.description`; None unless published.
    """

    url: str
    path: str
    state: Literal["published", "unfinished", "unreadable", "damaged"]
    names: tuple[str, ...] = ()
    problem: str = ""
    facts: dict[str, Any] | None = None
    spec: DatasetSpec | None = None
    about: About | None = None
    deprecation: Deprecation | None = None

    @property
    def title(self) -> str:
        """For people: the title its maker gave it, or else where it is."""
        own = self.about.description.title if self.about else None
        return own or self.path or self.url.rstrip("/").rpartition("/")[2]

    @property
    def standing(self) -> str:
        """The state in words: published, or why it should not be used."""
        if self.deprecation is not None:
            return self.deprecation.sentence()
        if self.state in ("damaged", "published") and self.problem:
            return f"{self.state}: {self.problem}"
        return self.problem or self.state


@dataclass(frozen=True, slots=True)
class Catalog:
    """Attributes:
    problems: what could not be read beside the datasets, such as a damaged name or a folder of somebody else's.
    """

    url: str
    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Found:
    """What a walk meets. ``homes``: folders that hold names; ``problems``: of folders that cannot be listed."""

    datasets: list[str] = field(default_factory=list)
    homes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_catalog(url: str) -> Catalog:
    """Every dataset under ``url``, by path; what is damaged or half-made is an entry too, and says so.

    Raises:
        InputError, OSError: it is no folder, or cannot be listed.
    """
    store = ObjectStore(url)
    # A URL has no folders: nothing there is nothing yet.
    if store.is_local and not Path(store.path("")).is_dir():
        raise InputError(f"{url} is no folder; give the folder, or the URL, under which datasets lie")
    found = _Found()
    _walk(store, "", found, depth=0)
    names, problems = _names(store, found.homes)
    entries = [
        coming.result()
        for coming in read_ahead(
            lambda path: read_entry(store, path, tuple(names[path])), found.datasets, num_parallel=_DATASETS_AT_ONCE
        )
    ]
    return Catalog(store.url, tuple(entries), (*found.problems, *problems))


def read_entry(store: ObjectStore, path: str, names: tuple[str, ...] = ()) -> Entry:
    """The dataset at ``path`` under ``store``."""
    url = f"{store.url.rstrip('/')}/{path}" if path else store.url
    try:
        own = ObjectStore(url)
        about, problem = _about(own)
        if not own.exists(layout.MANIFEST):
            num_shards = read_spec(own).storage.num_shards
            done = f"not finished: {len(committed_shards(own))} of {num_shards} shards are committed"
            problem = "; ".join(filter(None, (done, problem)))
            return Entry(url=url, path=path, names=names, state="unfinished", problem=problem, about=about)
        # With the "/" it is no name, whatever the folder is called.
        dataset = open_dataset(f"{url}/" if "://" in url else url)
        return Entry(
            url=url,
            path=path,
            names=names,
            state="published",
            problem=problem,
            facts=description(dataset),
            spec=dataset.manifest.spec,
            about=about,
            deprecation=deprecation_of(own),
        )
    except (InputError, IntegrityError, OSError) as error:
        return Entry(
            url=url,
            path=path,
            names=names,
            state="unreadable" if isinstance(error, InputError) else "damaged",
            problem=printable(str(error), _MAX_PROBLEM),
        )


def _about(store: ObjectStore) -> tuple[About | None, str]:
    """And why it cannot be read, which is no damage to the dataset: a newer writer's may hold more."""
    try:
        return read_about(store), ""
    except (IntegrityError, PermissionError) as error:
        return None, printable(str(error), _MAX_PROBLEM)


def _walk(store: ObjectStore, folder: str, found: _Found, *, depth: int) -> None:
    try:
        folders, files = store.children(folder)
    except OSError as error:
        if not depth:
            raise
        # One folder of many, such as a disk's lost+found, which is root's.
        found.problems.append(printable(str(error), _MAX_PROBLEM))
        return
    if layout.SPEC in files or layout.MANIFEST in files:
        found.datasets.append(folder)
        return
    if NAMES in folders:
        found.homes.append(folder)
    within = [name for name in folders if name != NAMES]
    if within and depth == _MAX_DEPTH:
        where = printable(f"{store.url.rstrip('/')}/{folder}", _MAX_PROBLEM)
        found.problems.append(f"{where}: the folders in it are not looked into, {_MAX_DEPTH} levels below {store.url}")
        return
    for name in within:
        _walk(store, f"{folder}/{name}" if folder else name, found, depth=depth + 1)


def _names(store: ObjectStore, homes: list[str]) -> tuple[defaultdict[str, list[str]], list[str]]:
    """Names by the path of their dataset, and the homes whose names cannot be read."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    problems = []
    for home in homes:
        url = f"{store.url.rstrip('/')}/{home}" if home else store.url
        try:
            for record in list_names(ObjectStore(url)):
                names[f"{home}/{record.path}" if home else record.path].append(f"{record.name}:{record.version}")
        except (InputError, IntegrityError, OSError) as error:
            problems.append(printable(str(error), _MAX_PROBLEM))
    return names, problems


def entry_json(entry: Entry) -> dict[str, Any]:
    """What ``softlabels catalog --json`` says of a dataset."""
    about = {} if entry.about is None else entry.about.model_dump(mode="json", exclude_none=True)
    return {
        "url": entry.url,
        "path": entry.path,
        "names": list(entry.names),
        "state": entry.state,
        "problem": entry.problem or None,
        "deprecated": entry.deprecation.model_dump(mode="json", exclude_none=True) if entry.deprecation else None,
        "software": about.get("software"),
        "description": about.get("description", {}),
        "facts": entry.facts,
    }


def entry_lines(entry: Entry) -> Iterator[str]:
    """What ``softlabels catalog`` prints of a dataset."""
    names = f"  ({', '.join(entry.names)})" if entry.names else ""
    yield f"{printable(entry.path or entry.url, _MAX_PROBLEM)}{names}"
    said = entry.about.description if entry.about else None
    rows: list[tuple[str, str | None]] = [("state", entry.standing)]
    if said is not None:
        rows += [("title", said.title), ("owner", said.owner), ("licence", said.licence)]
    if entry.facts is not None and entry.spec is not None:
        facts, corpus = entry.facts, f"{entry.spec.corpus_digest[:12]}"
        agreement = facts["hard_label_agreement"]
        quality = f"kept mass {facts['kept_mass']:.3f}, entropy {facts['entropy_nats']:.3f} nats"
        rows += [
            ("corpus", f"{said.corpus} ({corpus})" if said and said.corpus else corpus),
            ("teachers", ", ".join(printable(teacher) for teacher in facts["teachers"])),
            ("labels", f"{facts['utterances']:,} utterances, {facts['hours']:,.1f} h"),
            ("selection", selection_words(entry.spec.selection)),
            ("stored", f"{facts['bytes_per_frame']:.2f} bytes and {facts['entries_per_frame']:.2f} entries per frame"),
            ("quality", quality + ("" if agreement is None else f", agreement with hard labels {agreement:.3f}")),
        ]
    for label, value in rows:
        if value is not None:
            yield f"  {label:<10}{value}"
