"""The commands that are disturbed, and what they read."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from aligncurate.io.files import LOCK
from tests.support.inputs import jpeg, write_tar

TARS, PAIRS = 6, 24


@dataclass(frozen=True)
class Job:
    """A command without its --out.

    Attributes:
        name: of the job.
        words: the command.
        is_dataset: whether it makes a dataset, which `verify` can check.
        files: patterns of the files that must be equal; a training log has times in it.
    """

    name: str
    words: list[str]
    is_dataset: bool = True
    files: tuple[str, ...] = ("**/*",)

    def contents(self, out: Path) -> dict[str, str]:
        """The sha256 of every file that must be equal; the lock of a run that was killed at its very end stays."""
        found = {file for pattern in self.files for file in out.glob(pattern) if file.is_file() and file.name != LOCK}
        return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(found)}


def main(words: list[str]) -> None:
    """Run a command in this process, which ends with its exit code."""
    from aligncurate.cli.app import main as run
    from aligncurate.scoring import run as runs

    sys.argv = words
    runs._MANY_ROWS = 0  # type: ignore[misc]  # --workers gives worker processes, however few rows there are
    run()


def make_inputs(folder: Path) -> None:
    """Tars, a table, tiny models for training, and the datasets that the verbs read."""
    from tests.support import stage_data

    (folder / "tars").mkdir(parents=True)
    for tar in range(TARS):
        samples = {f"{tar}-{n}": {"jpg": jpeg(100 * tar + n), "txt": f"a thing {n}".encode()} for n in range(PAIRS)}
        samples[f"{tar}-x"] = {"jpg": b"not an image", "txt": b"broken"}
        write_tar(folder / f"tars/{tar:05d}.tar", samples)
    rows = "".join(f"{tar}-{n},licence {n % 3}\n" for tar in range(TARS) for n in range(PAIRS))
    (folder / "table.csv").write_text(f"key,licence\n{rows}")
    stage_data.make_models(folder)
    stage_data.captions(folder / "c.tar")
    stage_data.questions(folder / "q.tar")


def jobs(folder: Path) -> list[Job]:
    """All jobs, in an order in which each finds its inputs in `folder / <name of an earlier job>`."""

    def at(name: str) -> str:
        return str(folder / name)

    tiny = ["--llm", str(folder / "llm"), "--vision", str(folder / "vision"), "--attention", "eager"]
    fast = ["--dtype", "fp32", "--max-length", "96", "--token-budget", "128", "--batch-size", "4", "--workers", "2"]
    fast += ["--save-every", "3", "--warmup-ratio", "0", "--learning-rate", "0.01", "--log-every", "1"]
    model = ("model.safetensors", "config.json", "checkpoints/*/weights-*.safetensors")
    start = ["--init", at("pretrain"), "--attention", "eager", "--lora-rank", "2", "--template", "chat"]

    return [
        Job("ingest", ["ingest", at("tars"), "--embed-images"]),
        Job("score", ["score", at("tars"), "--model", "tiny", "--batch-size", "8"]),
        Job("score by workers", ["score", at("tars"), "--model", "tiny", "--batch-size", "8", "--workers", "2"]),
        Job("bucket", ["bucket", at("score"), "--levels", "4"]),
        Job("filter", ["filter", at("bucket"), "--where", "score < 2"]),
        Job("compact", ["filter", at("bucket"), "--sample", "100", "--rows-per-part", "15"]),
        Job("join", ["join", at("bucket"), at("table.csv")]),
        Job("merge", ["merge", at("bucket"), at("compact")]),
        Job("rewriting merge", ["merge", at("bucket"), at("join")]),
        Job("export", ["export", at("bucket"), "--shard-size", "16", "--workers", "2"], is_dataset=False),
        Job("export llava", ["export", at("bucket"), "--format", "llava-json"], is_dataset=False),
        Job("export uids", ["export", at("bucket"), "--format", "datacomp-uids"], is_dataset=False),
        Job("pretrain", ["train", "pretrain", at("c.tar"), *tiny, *fast], is_dataset=False, files=model),
        Job("finetune", ["train", "finetune", at("q.tar"), *start, *fast], is_dataset=False, files=model),
    ]  # fmt: skip


def verify(out: Path) -> None:
    """End this process with 0 if all that a stopped run committed in `out` is whole, else with 1 and what is not."""
    from aligncurate.errors import UserError
    from aligncurate.verbs.verify.verify import verify as check

    try:
        found = check(out, quiet=True)
    except UserError:  # nothing was committed yet
        return
    if left := [damage for damage in found.damages if damage.problem != "the dataset is not finished"]:
        sys.exit(json.dumps([f"{damage.file}: {damage.problem}" for damage in left]))
