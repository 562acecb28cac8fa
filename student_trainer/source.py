"""TrainingSource: the training data of a configuration, for the processes of one machine.

The process that opens it first reads and checks the corpus. Those that it starts do neither: a forked one has its memory, one
that is spawned maps a file that the first one wrote. At five million utterances with labels a corpus has 6 GB, and checking it
takes a minute.
"""

from __future__ import annotations

import multiprocessing.context
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from softlabel_schemas.errors import InputError
from student_trainer.config import TrainConfig
from student_trainer.data import TrainingData
from student_trainer.inputs import CheckedInputs, Inputs, open_inputs, reopen_inputs


class TrainingSource:
    """
    Args:
        inputs: of ``config``, where this process has opened them.
    """

    def __init__(self, config: TrainConfig, inputs: Inputs | None = None) -> None:
        self.config = config
        self._checked: CheckedInputs | None = None
        self._opened: tuple[int, TrainingData] | None = None
        if inputs is not None:
            self._checked, self._opened = inputs.checked, (os.getpid(), inputs.data)
        self._file: str | None = None

    @property
    def data(self) -> TrainingData:
        """Raises InputError where inputs do not fit together."""
        # A forked process has its parent's connections and locks, which it cannot use.
        if self._opened is None or self._opened[0] != os.getpid():
            if self._checked is None:
                inputs = open_inputs(self.config)
                self._checked, data = inputs.checked, inputs.data
            else:
                data = reopen_inputs(self.config, self._checked)
            self._opened = os.getpid(), data
        return self._opened[1]

    def open(self) -> None:
        """Now, so that processes which are started later share the corpus. Raises as :attr:`data`."""
        _ = self.data

    @property
    def temperature(self) -> float:
        return self.config.soft_labels.temperature if self.config.soft_labels else 1.0

    def __getstate__(self) -> dict[str, Any]:
        """With the corpus as a file only for a process that is being spawned, which ends before this one."""
        is_spawning = multiprocessing.context.get_spawning_popen() is not None
        mapped = self._mapped() if is_spawning and self._checked is not None else None
        return {"config": self.config, "mapped": mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TrainingSource.__init__(self, state["config"])
        mapped: _Mapped | None = state["mapped"]
        if mapped is not None:
            self._checked, self._file = mapped.open(), mapped.path

    def remove_file(self) -> None:
        """In a process that was spawned, where the one that wrote it is gone."""
        if self._file is not None:
            shutil.rmtree(Path(self._file).parent, ignore_errors=True)

    def share(self) -> None:
        """Write the corpus for processes that will be spawned. Raises InputError where there is no room for it; and as
        :attr:`data`."""
        self.open()
        self._mapped()

    def _mapped(self) -> _Mapped:
        """The file is written once, and removed with this object."""
        assert self._checked is not None
        corpus = self._checked.corpus
        if self._file is None:
            folder = None
            try:
                folder = tempfile.mkdtemp(prefix="training-corpus-")
                weakref.finalize(self, _remove, folder, os.getpid())
                path = f"{folder}/corpus.arrow"
                with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, corpus.table.schema) as writer:
                    writer.write_table(corpus.table)
            except OSError as error:
                if folder is not None:
                    _remove(folder, os.getpid())
                raise InputError(
                    f"the training corpus, {corpus.table.nbytes:,} bytes, cannot be written for the processes that share it: "
                    f"{error}; make room in {tempfile.gettempdir()}, or set TMPDIR"
                ) from None
            self._file = path
        rest = replace(self._checked, corpus=corpus.with_table(corpus.table.schema.empty_table()))
        return _Mapped(path=self._file, rest=rest)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """Inputs whose corpus has no rows, and the file that they are in."""

    path: str
    rest: CheckedInputs

    def open(self) -> CheckedInputs:
        with pa.memory_map(self.path) as file:
            table = pa.ipc.open_file(file).read_all()
        return replace(self.rest, corpus=self.rest.corpus.with_table(table))


def _remove(folder: str, pid: int) -> None:
    """Not by a forked process, which has a copy of the object."""
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
