"""What the commands that make corpora write and say: the manifest, beside it the inventory where it is new, and a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click

from softlabel_schemas.corpus import Utterance, split_url, write_corpus
from softlabel_schemas.errors import InputError
from softlabel_schemas.inventory import ClassInventory
from softlabel_schemas.object_store import ObjectStore

INVENTORY = "inventory.json"


def write_and_summarise(
    output: str,
    utterances: Sequence[Utterance],
    inventory: ClassInventory | None,
    frame_shift_ms: float,
    *,
    is_new_inventory: bool,
) -> None:
    """Write the manifest last, so that an interrupted command leaves none.

    Raises:
        InputError: another inventory lies where the new one belongs, or a row breaks a rule of the format.
    """
    if inventory is not None and is_new_inventory:
        _write_inventory(inventory, output)
    write_corpus(output, utterances, inventory=inventory, hard_label_frame_shift_ms=frame_shift_ms)
    hours = sum(utterance.seconds for utterance in utterances) / 3600
    splits = ", ".join(f"{split} {count:,}" for split, count in Counter(each.split for each in utterances).items())
    click.echo(f"{output}: {len(utterances):,} utterances, {hours:.2f} h; {splits}")
    if inventory is not None:
        num_labelled = sum(utterance.hard_labels is not None for utterance in utterances)
        click.echo(
            f"{num_labelled:,} of them have hard labels, of {inventory.num_classes:,} classes, every {frame_shift_ms:g} ms"
        )
    num_without_text = sum(utterance.text is None for utterance in utterances)
    if num_without_text:
        click.echo(f"{num_without_text:,} have no text")


def _write_inventory(inventory: ClassInventory, output: str) -> None:
    """Raises InputError rather than replace another one."""
    store, data = ObjectStore(split_url(output)[0]), inventory.to_json()
    if not store.put_if_absent(INVENTORY, data) and store.read(INVENTORY) != data:
        raise InputError(
            f"{store.describe(INVENTORY)} holds other classes than these {inventory.num_classes}; write into another folder, "
            "or name the classes by --inventory where the command has it"
        )
    click.echo(f"{store.describe(INVENTORY)}: {inventory.num_classes:,} classes, those that occur")


def location_below(audio: str, output: str) -> str:
    """As the manifest at ``output`` names the file: relative to its folder where it lies below, so that both can be moved."""
    folder = split_url(output)[0]
    if "://" not in audio:
        audio = str(Path(audio).absolute())
    if "://" not in folder:
        folder = str(Path(folder).absolute())
    return audio.removeprefix(f"{folder}/")
