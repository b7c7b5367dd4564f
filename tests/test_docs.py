"""The documentation's commands run, and its tables say what the code says."""

import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

import aligncurate
from aligncurate.cli.app import app
from aligncurate.dataset import record as pairs
from aligncurate.demo.scenes import pairs as scene_pairs
from aligncurate.demo.scenes import write_tars
from aligncurate.images import decode as images
from aligntrain.cli import app as training

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture
def user_data(tmp_path, monkeypatch) -> Path:
    """A folder with the data that the examples speak of."""
    monkeypatch.chdir(tmp_path)
    write_tars(tmp_path / "pairs", 120, seed=21, shard_size=60)
    (tmp_path / "photos").mkdir()
    rows, talks = ["image,caption"], []
    for pair in scene_pairs(24, seed=22):
        pair.image.save(tmp_path / f"photos/{pair.key}.png")
        rows.append(f'{pair.key}.png,"{pair.caption}"')
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": pair.caption}]
        talks.append({"id": pair.key, "image": f"photos/{pair.key}.png", "conversations": turns})
    pair.image.save(tmp_path / "photo.png")
    (tmp_path / "photos/captions.csv").write_text("\n".join(rows))
    with tarfile.open(tmp_path / "pairs/00000.tar") as tar:
        keys = sorted({name.partition(".")[0] for name in tar.getnames()})
    (tmp_path / "licences.csv").write_text("key,licence,author\n" + "".join(f"{key},cc0,me\n" for key in keys))
    (tmp_path / "llava.json").write_text(json.dumps(talks))
    return tmp_path


@pytest.mark.filterwarnings("default::UserWarning", "default::FutureWarning")  # of transformers and torch
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.name)
def test_the_commands_of_a_page_run(page, user_data) -> None:
    for block in blocks(page, "bash"):
        for line in block.strip().splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            assert words[0] == "aligncurate"
            if words[1] == "score":
                words += ["--model", "tiny"]  # the default encoder would have to be downloaded
            for option in ("--llm", "--vision"):
                if option in words:
                    words[words.index(option) + 1] = "tiny"
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_python_examples_run(user_data) -> None:
    for block in blocks(ROOT / "README.md", "python"):
        names: dict = {}
        exec(compile(block, "README.md", "exec"), names)
        made = aligncurate.open_dataset("levelled")
        assert made.levels == 8 and 0 < names["best"].rows < made.rows
        for example in blocks(ROOT / "docs/training.md", "python"):  # goes on with the dataset that the first made
            exec(compile(example, "training.md", "exec"), {})


def test_the_columns_table_is_the_schema() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\S.*?) \| (.*?) \|$", (ROOT / "docs/dataset.md").read_text(), re.MULTILINE)
    assert rows == pairs.describe_columns()


def test_every_status_is_explained() -> None:
    text = (ROOT / "docs/dataset.md").read_text()
    statuses = text.partition("## Statuses")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", statuses, re.MULTILINE) == [s.value for s in pairs.Status]
    assert f"{images.MAX_PIXELS:,}" in text


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs/verbs.md").read_text() + (ROOT / "docs/training.md").read_text()
    commands = typer.main.get_command(app).commands | typer.main.get_command(training).commands
    commands |= {f"train {name}": command for name, command in commands.pop("train").commands.items()}
    for name, command in commands.items():
        section = re.search(rf"^## [^\n]*\b{name}\b.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section, f"docs has no section on {name}"
        # The stages and their plan share one table of settings.
        where = (ROOT / "docs/training.md").read_text() if name.startswith("train ") else section[0]
        for parameter in command.params:
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}`" in where, f"{name} {option}"
    documented = set(re.findall(r"`(--[a-z0-9-]+)`", text))
    known = {o for c in commands.values() for p in c.params for o in (*p.opts, *p.secondary_opts)}
    assert documented - known <= {"--help", "--version", "--install-completion"}


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
