"""The command that made a dataset, from its manifest: to run it again, and to show it."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aligncurate.dataset.manifest import THRESHOLDS
from aligncurate.encoders.model_choice import HUB, TINY
from aligncurate.errors import RunError, UserError
from aligncurate.io.paths import AnyPath
from aligncurate.scoring.options import IngestOptions, ScoreOptions
from aligncurate.settings import field_types, option_name
from aligncurate.sources.options import SourceOptions
from aligncurate.verbs.filter.options import FilterOptions
from aligncurate.verbs.join.options import JoinOptions

_UIDS = re.compile(r"(.*) \(sha256 ([0-9a-f]{64})\)", re.DOTALL)
_SETTINGS: dict[str, tuple[type, ...]] = {
    "score": (ScoreOptions, SourceOptions),
    "ingest": (IngestOptions, SourceOptions),
    "filter": (FilterOptions,),
    "join": (JoinOptions,),
    "bucket": (),
    "merge": (),
}
_SHOWN = 20  # inputs in a command; of more, the first and the last


@dataclass(frozen=True)
class Rerun:
    """A run that makes what is missing in a dataset.

    Attributes:
        verb: what made the dataset.
        inputs: what it read.
        out: the dataset's folder.
        options: those of the verb that are not the default, by the names of its Python function.
        configs: the architectures of encoders that open_clip does not have, by name.
    """

    verb: str
    inputs: list[str]
    out: AnyPath
    options: dict[str, Any]
    configs: dict[str, Any]

    def __call__(self, *, quiet: bool) -> None:
        """Run it. Raises UserError if its inputs or options are not those of the dataset, RunError if it fails."""
        import aligncurate

        options = dict(self.options)
        if self.verb in ("score", "ingest"):
            options["source"] = SourceOptions(**{k: options.pop(k) for k in field_types(SourceOptions) if k in options})
        inputs: Any = self.inputs[0] if len(self.inputs) == 1 else self.inputs
        with _config_files(self.configs) as files:
            if files:
                options["model_config"] = files
            result = getattr(aligncurate, self.verb)(inputs, out=self.out, quiet=quiet, **options)
        if failures := getattr(result, "failures", None):
            raise RunError("; ".join(failure.error for failure in failures))

    def command(self) -> str:
        """The command, as one types it."""
        inputs = self.inputs if len(self.inputs) <= _SHOWN else [self.inputs[0], "…", self.inputs[-1]]
        words = ["aligncurate", self.verb, *inputs]
        flags = []
        for name, value in self.options.items():
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            if name == "table":
                words.append(text)
            else:
                flags += [_flag(self.verb, name)] if value is True else [_flag(self.verb, name), text]
        for name in self.configs:
            flags += ["--model-config", f"{name}.json"]
        return shlex.join([*words, "--out", str(self.out), *flags])


def rerun_of(folder: AnyPath, manifest: Mapping[str, Any], files: Sequence[Path]) -> Rerun:
    """How the dataset in `folder` was made.

    Args:
        folder: of the dataset.
        manifest: its manifest; options and inputs must be true.
        files: that the manifest knows only by name and sha256: weights, a joined table, a list of uids.

    Raises UserError where the manifest does not say enough.
    """
    verb = manifest["verb"]
    if verb not in _SETTINGS or manifest["schema_version"] < 2:
        made = f"made by `aligncurate {verb}`" if verb not in _SETTINGS else "of an earlier version"
        raise UserError(f"{folder}: this dataset is {made}, which cannot be run again from here; make it again.")
    run = Rerun(verb, list(_inputs(folder, manifest)), folder, _given(verb, manifest["options"]), {})
    if verb == "score":
        return _with_encoders(run, manifest, files)
    if verb == "bucket":
        options = dict(run.options)
        if options.pop("thresholds") == "frozen":
            options = {"thresholds": str(folder / THRESHOLDS), "score_column": options["score_column"]}
        return replace(run, options=options)
    if verb == "filter" and run.options.get("uids"):
        match = _UIDS.fullmatch(run.options["uids"])
        uids = _file(folder, match[1], match[2], files) if match else run.options["uids"]
        return replace(run, options={**run.options, "uids": str(uids)})
    if verb == "join":
        table = manifest["options"]["table"]
        file = _file(folder, table["name"], table["sha256"], files)
        return replace(run, options={**run.options, "table": file})
    return run


def _inputs(folder: AnyPath, manifest: Mapping[str, Any]) -> Iterator[str]:
    for line in manifest["inputs"]:
        if line["kind"] == "imagefolder":
            if "root" not in line:
                raise UserError(f"{folder}: its manifest does not say which folder was read; run the command again.")
            yield line["root"]
        elif "files" in line:
            yield from (file["uri"] for file in line["files"])
        else:
            yield line["uri"]


def _given(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not the default."""
    defaults = {f: c.__dataclass_fields__[f].default for c in _SETTINGS[verb] for f in field_types(c)}  # type: ignore[attr-defined]
    given = {}
    for name, value in options.items():
        value = tuple(value) if isinstance(value, list) else value
        if (name in defaults or not _SETTINGS[verb]) and value is not None and defaults.get(name) != value:
            given[name] = value
    return given


def _with_encoders(run: Rerun, manifest: Mapping[str, Any], files: Sequence[Path]) -> Rerun:
    """The run with the encoders and the device that the manifest names."""
    encoders = list((manifest.get("encoders") or {"score": manifest["encoder"]}).values())
    environments = manifest.get("computed_with", [])
    weights = [_weights(run.out, encoder, files) for encoder in encoders]
    options: dict[str, Any] = {"model": ",".join(encoder["model"] for encoder in encoders)}
    if any(weights):
        options["pretrained"] = ",".join(weights)
    options["precision"] = encoders[0]["precision"]
    if encoders[0].get("compiled"):
        options["compiled"] = True
    if len(environments) > 1:
        options["mixed_devices"] = True
    elif environments:
        options["device"] = environments[0]["device"]["kind"]
    configs = {e["model"]: e["config"] for e in encoders if e.get("config") and not _is_known(e["model"])}
    if configs and len(encoders) == 1:
        del options["model"]  # the config's file is named after it
    return replace(run, options={**run.options, **options}, configs=configs)


def _is_known(model: str) -> bool:
    import open_clip

    return model == TINY or model in open_clip.list_models()


def _weights(folder: AnyPath, encoder: Mapping[str, Any], files: Sequence[Path]) -> str:
    """What --pretrained was: a tag, or a file; empty for a model that has its weights."""
    from open_clip.pretrained import list_pretrained_tags_by_model

    model, name = encoder["model"], encoder["pretrained"]
    if name is None or model.startswith(HUB) or (model == TINY and name == f"{TINY}.safetensors"):
        return ""
    if name in list_pretrained_tags_by_model(model):
        return str(name)
    return str(_file(folder, name, encoder["weights_sha256"], files))


def _file(folder: AnyPath, name: str, sha256: str, files: Sequence[Path]) -> Path:
    """The file of this name and sha256, among those that were given or in the current folder."""
    for file in [*files, Path(name)]:
        if file.name == name and file.is_file():
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() == sha256:
                    return file
    raise UserError(
        f"{folder}: it was made with {name}, of which the manifest knows only the name and sha256; give that file with "
        f"--input {name}."
    )


def _flag(verb: str, name: str) -> str:
    fields = (c.__dataclass_fields__[name] for c in _SETTINGS[verb] if name in field_types(c))  # type: ignore[attr-defined]
    return next((field.metadata["flag"] for field in fields if field.metadata["flag"]), option_name(name))


@contextmanager
def _config_files(configs: Mapping[str, Any]) -> Iterator[list[str]]:
    """The configs as files, named after their models."""
    with TemporaryDirectory() as folder:
        files = []
        for name, config in configs.items():
            files.append(f"{folder}/{name}.json")
            Path(files[-1]).write_text(json.dumps(config), "utf-8")
        yield files
