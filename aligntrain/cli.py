"""The command line of training and of trained models: parses, calls one function and prints.

``app`` is ``aligncurate train``; ``generate``, ``chat`` and ``convert`` are commands of their own. What is heavy is
imported when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aligncurate.cli.options import with_settings
from aligncurate.errors import UserError
from aligncurate.settings import parse
from aligntrain.stage import StageConfig

if TYPE_CHECKING:
    from aligntrain.tools.preview import Preview

app = typer.Typer()
"""Commands that `aligncurate` adds to its own."""

train_app = typer.Typer(
    help="Train AlignGPT from levelled pairs (pretrain) and instructions (finetune).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(train_app, name="train")

_stdout = Console(highlight=False)
_with_stage_settings = with_settings(StageConfig, leave_out=("stage", "data"))

Data = Annotated[
    list[str],
    typer.Argument(metavar="DATA...", help="Dataset folders, exported tars, or any source.", show_default=False),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, by name.", show_default=False)
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a trained model.", show_default=False)]
Picture = Annotated[Path | None, typer.Option("--image", help="Picture to ask about.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens after which an answer is cut.")]
Temperature = Annotated[float, typer.Option(min=0, help="0: the likeliest token each time.")]
ShowAlignment = Annotated[bool, typer.Option("--show-alignment", help="Print the gate's weights over the levels.")]


@train_app.command()
@_with_stage_settings
def pretrain(data: Data, config: ConfigFile = None, set: Sets = None, **options: Any) -> None:
    """Stage 1: learn projector and level embeddings from captioned pictures with levels."""
    _train(_config("pretrain", data, config, set, options))


@train_app.command()
@_with_stage_settings
def finetune(data: Data, config: ConfigFile = None, set: Sets = None, **options: Any) -> None:
    """Stage 2: learn projector, gate and LLM from conversations about pictures."""
    _train(_config("finetune", data, config, set, options))


@train_app.command()
@_with_stage_settings
def plan(
    data: Data,
    config: ConfigFile = None,
    set: Sets = None,
    stage: Annotated[
        str | None, typer.Option(help="pretrain or finetune.", show_default="finetune with --init, else pretrain")
    ] = None,
    ranks: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    **options: Any,
) -> None:
    """Show what a stage would do: steps, packing, tokens, levels, rows left out, time. Trains nothing."""
    from aligntrain.tools.preview import preview

    stage = stage or ("finetune" if options.get("init") else "pretrain")
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}; it must be at least 1.")
    settings = _config(stage, data, config, set, options)
    _show_preview(preview(settings, ranks), settings, ranks)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Question or request.", show_default=False)],
    image: Picture = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    show_alignment: ShowAlignment = False,
) -> None:
    """Answer one question about a picture."""
    from aligntrain.tools.generate import alignment, answer, load, open_picture

    picture = open_picture(image) if image is not None else None
    trained, processor = load(model)
    turns = [{"role": "user", "content": prompt}]
    if show_alignment:
        _show_gate(alignment(trained, processor, turns, picture) if picture is not None else None, picture is not None)
    print(answer(trained, processor, turns, picture, max_new_tokens=max_new_tokens, temperature=temperature))


@app.command()
def chat(
    model: Model,
    image: Picture = None,
    max_new_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    show_alignment: ShowAlignment = False,
) -> None:
    """Talk about a picture, turn by turn; an empty line ends it."""
    from aligntrain.tools.generate import alignment, answer, load, open_picture

    picture = open_picture(image) if image is not None else None
    trained, processor = load(model)
    turns: list[dict[str, str]] = []
    while True:
        try:
            question = _stdout.input("[bold cyan]you[/]  ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not question:
            break
        turns.append({"role": "user", "content": question})
        if show_alignment:
            with_image = picture is not None
            _show_gate(alignment(trained, processor, turns, picture) if picture is not None else None, with_image)
        _stdout.print("[bold green]model[/]  ", end="")
        told = answer(
            trained,
            processor,
            turns,
            picture,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            on_text=lambda piece: print(piece, end="", flush=True),
        )
        print()
        turns.append({"role": "assistant", "content": told})


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder or .bin file.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder, or .bin file.", show_default=False)],
    llm: Annotated[Path | None, typer.Option(help="The LLM of a projector's .bin.", show_default=False)] = None,
    vision: Annotated[Path | None, typer.Option(help="The vision tower's folder.", show_default=False)] = None,
) -> None:
    """Turn official AlignGPT and LLaVA checkpoints into a model, or a model into the official layout."""
    from aligntrain.tools.convert.convert import convert as run

    done = run(source, target, llm=llm, vision=vision)
    _stdout.print(f"converted {escape(done)} in {escape(str(target))}", soft_wrap=True)


def _config(
    stage: str, data: list[str], file: Path | None, sets: list[str] | None, options: dict[str, Any]
) -> StageConfig:
    """The settings: the paper's, over them the file's, over them those of the command line."""
    given: dict[str, Any] = {"data": tuple(data), **options}
    for item in sets or []:
        name, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: write it as key=value, such as --set learning_rate=1e-4.")
        name = name.strip().replace("-", "_")
        given[name] = parse(StageConfig, name, text.strip())
    return StageConfig.of(stage, given) if file is None else StageConfig.from_toml(file, stage, **given)


def _train(config: StageConfig) -> None:
    import os

    from aligncurate.progress import duration
    from aligntrain.training.loop import train

    summary = train(config)
    if os.environ.get("RANK", "0") != "0":
        return
    if summary.stopped:
        _stdout.print(f"stopped after step {summary.steps:,} of {summary.total:,}; the same command goes on from there")
        raise typer.Exit(128 + summary.stopped)
    if summary.again:
        _stdout.print(
            f"nothing to do: these {summary.steps:,} steps were done before, and the model is in "
            f"{escape(str(summary.out))}; to train anew name another --out, or say --no-resume",
            soft_wrap=True,
        )
        return
    done = {"pretrain": "pretrained", "finetune": "finetuned"}[config.stage]
    loss = f", loss {summary.loss:.4f}" if summary.loss is not None else ""
    _stdout.print(
        f"[bold]{done}[/] in {summary.total:,} steps ({duration(summary.seconds)}){loss}: {escape(str(summary.out))}",
        soft_wrap=True,
    )
    if summary.unreadable:
        _stdout.print(f"[yellow]{summary.unreadable:,}[/] images could not be read; nothing was learned from them")
    following = (
        f"aligncurate train finetune DATA --init {summary.out} --out TUNED"
        if config.stage == "pretrain"
        else f"aligncurate chat {summary.out} --image PICTURE"
    )
    _stdout.print(f"next: {following}", style="dim", soft_wrap=True, markup=False)


def _show_preview(found: Preview, config: StageConfig, ranks: int) -> None:
    from aligncurate.progress import duration

    facts = found.facts
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("stage", config.stage)
    table.add_row("samples", f"{facts.rows:,}")
    table.add_row("steps", f"{found.steps:,} of {config.batch_size} samples, {config.epochs} epochs")
    table.add_row("micro-batches", f"{found.micro_batches:,} an epoch and rank, {ranks} ranks")
    table.add_row("tokens", f"{found.tokens:,} an epoch")
    table.add_row("images", f"{found.images:,} an epoch")
    how = {"auto": "several samples in a row, if the LLM can keep them apart, which training finds out",
           "on": "several samples in a row", "off": "one sample in a row"}[config.packing]  # fmt: skip
    table.add_row("packing efficiency", f"{found.efficiency:.1%} ({how})")
    table.add_row("cut at max_length", f"{facts.truncated:,}")
    how = "measured" if found.measured else "data sheet"
    table.add_row(
        "estimated time",
        f"{duration(found.seconds)} for {found.flops:.2e} FLOPs, at 40% of {found.flops_per_s:.2e} FLOP/s ({how})",
    )
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in vars(found.memory).items())
    table.add_row("estimated memory", f"{found.memory.total / 1e9:.1f} GB a device: {parts}")
    _stdout.print(table)
    counts = Table("level", "samples", box=box.SIMPLE_HEAD)
    for level, count in sorted(facts.levels.items()):
        counts.add_row(str(level or "none"), f"{count:,}")
    _stdout.print(counts)
    if facts.skipped:
        skipped = Table("rows left out", "cause", "such as", box=box.SIMPLE_HEAD)
        for cause, count in facts.skipped.most_common():
            skipped.add_row(f"{count:,}", escape(cause), escape(facts.examples[cause]))
        _stdout.print(skipped)


def _show_gate(weights: list[float] | None, with_image: bool) -> None:
    if not with_image:
        _stdout.print("without a picture there is no alignment vector (--image gives one)", style="dim")
        return
    if weights is None:
        _stdout.print("the model's alignment vector does not depend on the question (it has no gate)", style="dim")
        return
    largest = max(weights)
    for level, weight in enumerate(weights, 1):
        _stdout.print(f"level {level}  {weight:.3f}  [cyan]{'█' * round(20 * weight / largest)}[/]")
