"""The verb `score`: from sources to a dataset with scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aligncurate.dataset.manifest import MANIFEST
from aligncurate.dataset.reader import Dataset
from aligncurate.encoders.model_choice import TINY
from aligncurate.errors import UserError
from aligncurate.io.files import as_path
from aligncurate.io.paths import AnyPath
from aligncurate.progress import notice
from aligncurate.scoring.options import ScoreOptions
from aligncurate.settings import lists_settings, make, recorded
from aligncurate.sources.base import Source
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.devices import device_names
from aligncurate.verbs.from_sources import ScoreResult, find_finished, make_dataset, nothing_to_do, open_sources

if TYPE_CHECKING:
    from aligncurate.encoders.load import Encoder

_CPU_BATCH = 32


@lists_settings(ScoreOptions)
def score(
    sources: str | Path | Sequence[str | Path],
    out: str | AnyPath,
    *,
    source: SourceOptions | None = None,
    quiet: bool = False,
    **settings: Any,
) -> ScoreResult:
    """Score image-text pairs: the cosine of an image-text encoder's unit embeddings.

    Args:
        sources: what to read; see `open_source`.
        out: folder of the new dataset. If an interrupted run left it, the run is resumed.
        source: how to read the sources.
        quiet: no progress and notices.
        settings: fields of `aligncurate.scoring.options.ScoreOptions`, described there.

    Raises UserError for options and inputs that cannot be used. Rows that cannot be scored get a status instead.
    """
    from aligncurate.encoders.load import load_all

    options = make(ScoreOptions, settings)
    source = source or SourceOptions()
    opened = open_sources(sources, source)
    if TINY in (options.model or "").split(",") and "correctness" not in opened.extras:  # the demo's scenes have it
        notice(
            "the tiny encoder knows only the drawn scenes of the demo; its scores of other images mean little, so use "
            "another --model, or none for the default.",
            quiet=quiet,
        )
    if finished := _find_scored(opened, out, options, source):
        return nothing_to_do(finished)
    if options.engine == "ray" and options.devices is not None:
        raise UserError("--devices is for one machine; with --engine ray, use --num-gpus and --concurrency.")
    devices = device_names(options.devices) if options.devices is not None else []
    encoders = load_all(
        options.model,
        options.pretrained,
        options.model_config or (),
        devices[0] if devices else options.device,
        options.precision,
        compiled=options.compiled,
        quiet=quiet,
    )
    check_decode(options, next(iter(encoders.values())))
    batch = options.batch_size or earlier_batch(out) or min(default_batch(encoder) for encoder in encoders.values())
    for encoder in encoders.values():
        encoder.towers.batch = batch
    options = replace(options, batch_size=batch)
    several = devices if len(devices) > 1 else []
    return make_dataset(
        "score", opened, out, encoders, options, recorded(options), source, devices=several, quiet=quiet
    )


def _find_scored(opened: Source, out: str | AnyPath, options: ScoreOptions, source: SourceOptions) -> Dataset | None:
    """The dataset, if an earlier run has finished it; found without loading the encoder."""
    from aligncurate.encoders.load import expected_identity, requested

    settings = {**recorded(options), "batch_size": options.batch_size or earlier_batch(out)}
    dataset = find_finished("score", opened, out, settings, source, retry_errors=options.retry_errors)
    if dataset is None:
        return None
    requests = requested(options.model, options.pretrained, options.model_config or ())
    identities = {column: dataset.encoder_of(column) for column in requests}
    same = len(requests) == max(1, len(dataset.manifest.get("encoders", {}))) and all(
        identity is not None
        and expected_identity(requests[column], options.precision, options.compiled, identity) == identity
        for column, identity in identities.items()
    )
    return dataset if same else None


def check_decode(options: ScoreOptions, encoder: Encoder) -> None:
    """Raises UserError for `--decode gpu` without a GPU."""
    if options.decode == "gpu" and encoder.device.type != "cuda":
        raise UserError("--decode gpu needs a CUDA device; use --decode fast on the CPU.")


def default_batch(encoder: Encoder) -> int:
    """The batch size that is used if none is given."""
    if encoder.device.type != "cuda":
        return _CPU_BATCH
    return encoder.towers.fitting_batch(encoder.preprocess.size or 224, encoder.identity["context_length"])


def earlier_batch(out: str | AnyPath) -> int | None:
    """The batch size of the run that this one resumes: all parts of a dataset must share it."""
    try:
        return int(json.loads((as_path(out) / MANIFEST).read_text("utf-8"))["options"]["batch_size"])
    except (OSError, ValueError, KeyError, TypeError):  # no earlier run, or none that can be resumed
        return None
