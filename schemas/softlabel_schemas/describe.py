"""What a dataset is, in facts and in words, from its manifest alone."""

from __future__ import annotations

from typing import Any

from softlabel_schemas.codec import LOG_PROB_STEP
from softlabel_schemas.dataset import SoftLabelDataset
from softlabel_schemas.frame_selection import FrameSelection
from softlabel_schemas.mtf_kernels import LEVELS
from softlabel_schemas.selection import AnySelection
from softlabel_schemas.spec import CodecName, TeacherSpec


def description(dataset: SoftLabelDataset) -> dict[str, Any]:
    """The facts of a dataset by name, from its manifest: sizes, quality, selection, lineage."""
    manifest, spec = dataset.manifest, dataset.manifest.spec
    frames = max(manifest.num_frames, 1)
    labelled = sum(shard.sums.num_labelled_frames for shard in manifest.shards)
    agreement = sum(shard.sums.agreement for shard in manifest.shards)
    return {
        "url": dataset.store.url,
        "format_version": spec.format_version,
        "fingerprint": manifest.fingerprint,
        "content_digest": manifest.content_digest,
        "utterances": manifest.num_utterances,
        "skipped": len(manifest.skipped),
        "frames": manifest.num_frames,
        "hours": manifest.num_frames * spec.frame_shift_ms / 3_600_000,
        "entries": manifest.num_entries,
        "bytes": manifest.num_bytes,
        "shards": len(manifest.shards),
        "entries_per_frame": manifest.num_entries / frames,
        "bytes_per_frame": manifest.num_bytes / frames,
        "kept_mass": sum(shard.sums.kept_mass for shard in manifest.shards) / frames,
        "entropy_nats": sum(shard.sums.entropy for shard in manifest.shards) / frames,
        "hard_label_agreement": agreement / labelled if labelled else None,
        "num_classes": spec.num_classes,
        "frame_shift_ms": spec.frame_shift_ms,
        "combination": spec.combination,
        "teachers": [_teacher_line(teacher) for teacher in spec.teachers],
        "num_folds": spec.num_folds,
        "combined_from": [f"{each.content_digest} ({each.weight:.3g})" for each in spec.combined_from or ()],
        "subset_of": spec.subset_of and f"{spec.subset_of.content_digest} ({spec.subset_of.choice})",
        "temperatures": list(spec.temperatures),
        "selection": spec.selection.model_dump(mode="json"),
        "codec": spec.codec,
        "shard_format": manifest.storage.shard_format,
        "corpus_digest": spec.corpus_digest,
        "inventory_digest": spec.inventory_digest,
    }


def _teacher_line(teacher: TeacherSpec) -> str:
    fold = "" if teacher.fold is None else f", fold {teacher.fold}"
    return f"{teacher.name} ({teacher.weight:.3g}, {teacher.digest[:12]}{fold})"


def selection_words(selection: AnySelection) -> str:
    """``mass: mass 0.95, max_entries 20, keep_hard_label``, and which frames are dropped."""
    settings = selection.model_dump(mode="json", exclude={"policy", "frames"})
    # As they are: a rounded seed would be another one.
    words = [
        name if value is True else f"{name} {str(value).removesuffix('.0')}"
        for name, value in settings.items()
        if value is not False
    ]
    dropped = "" if selection.frames is None else f"; without frames that are {_dropped(selection.frames)}"
    return f"{selection.policy}: {', '.join(words)}{dropped}"


def _dropped(frames: FrameSelection) -> str:
    names = [name for name in ("disagreeing", "silence") if getattr(frames, name) == 0]
    return ", ".join([*names, *([f"uncertain (below {frames.min_top1})"] if frames.uncertain == 0 else [])])


def codec_kl(codec: CodecName, entries_per_frame: float) -> float:
    """About what the codec adds to the divergence of a frame's posterior from its stored one, nats; see FORMAT.md, section 7.

    Steps are uniform in the square root of p ("mtf-sqrt") or in its logarithm ("packed-u8"), so that errors have a variance of
    step^2 / 12. KL is to second order 2 sum (error of sqrt p)^2, or half the variance of the error of ln p.
    """
    if codec == "mtf-sqrt":
        return (entries_per_frame + 1) / (6 * LEVELS**2)
    return float(LOG_PROB_STEP) ** 2 / 24 if codec == "packed-u8" else 0.0
