"""The commands that need a trained model or train one, `demo` too: each parses options, calls one function and prints.

Heavy modules are imported when a command runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from aligncurate.cli.options import Quiet, with_settings
from aligncurate.errors import UserError
from aligncurate.progress import duration, make_console, safe_text
from aligncurate.settings import parse
from aligntrain.stage import StageConfig

if TYPE_CHECKING:
    from aligntrain.tools.preview import Preview

app = typer.Typer()
"""Commands that `aligncurate` adds to its own."""

train_app = typer.Typer(
    help="Train AlignGPT on pairs with levels (pretrain), then on instructions (finetune).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(train_app, name="train")

_stdout = make_console()
_with_stage_settings = with_settings(StageConfig, leave_out=("stage", "data"), over_file=True)

Data = Annotated[
    list[str],
    typer.Argument(metavar="DATA...", help="Dataset folders, exported tars, or any other source.", show_default=False),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file with settings.", show_default=False)]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any option by name.", show_default=False)
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a trained model.", show_default=False)]
Picture = Annotated[Path | None, typer.Option("--image", help="Image to ask about.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 decodes greedily.")]
ShowAlignment = Annotated[bool, typer.Option("--show-alignment", help="Print the gate's weight for each level.")]


@train_app.command()
@_with_stage_settings
def pretrain(data: Data, config: ConfigFile = None, set: Sets = None, **options: Any) -> None:
    """Stage 1: train the projector and level embeddings on captioned images with levels."""
    _train(_config("pretrain", data, config, set, options))


@train_app.command()
@_with_stage_settings
def finetune(data: Data, config: ConfigFile = None, set: Sets = None, **options: Any) -> None:
    """Stage 2: train the projector, gate and LLM on conversations about images."""
    _train(_config("finetune", data, config, set, options))


@train_app.command()
@_with_stage_settings
def plan(
    data: Data,
    config: ConfigFile = None,
    set: Sets = None,
    stage: Annotated[
        Literal["pretrain", "finetune"] | None,
        typer.Option(help="Stage to plan.", show_default="finetune with --init, else pretrain"),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Number of devices.")] = 1,
    **options: Any,
) -> None:
    """Show what a stage would do (steps, tokens, levels, time, memory) without training."""
    from aligntrain.tools.preview import preview

    stage = stage or ("finetune" if options.get("init") else "pretrain")
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: use a number of at least 1.")
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
    """Answer one question about an image."""
    from aligntrain.inputs.pictures import open_picture
    from aligntrain.tools.generate import alignment, answer, load

    picture = open_picture(image) if image is not None else None
    trained, processor = load(model)
    turns = [{"role": "user", "content": prompt}]
    if show_alignment:
        weights = alignment(trained, processor, turns, picture) if picture is not None else None
        _show_gate(weights, trained.config.align_mode, with_image=picture is not None)
    reply = answer(trained, processor, turns, picture, max_new_tokens=max_new_tokens, temperature=temperature)
    print(safe_text(reply, keep="\n"))


@app.command()
def chat(
    model: Model,
    image: Picture = None,
    max_new_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    show_alignment: ShowAlignment = False,
) -> None:
    """Chat about an image; an empty line ends it."""
    from aligntrain.inputs.pictures import open_picture
    from aligntrain.tools.generate import alignment, answer, load

    picture = open_picture(image) if image is not None else None
    trained, processor = load(model)
    turns: list[dict[str, str]] = []
    while True:
        try:
            question = _stdout.input("[bold cyan]you[/]  ", markup=True).strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not question:
            break
        turns.append({"role": "user", "content": question})
        if show_alignment:
            weights = alignment(trained, processor, turns, picture) if picture is not None else None
            _show_gate(weights, trained.config.align_mode, with_image=picture is not None)
        _stdout.print("[bold green]model[/]  ", end="", markup=True)
        reply = answer(
            trained,
            processor,
            turns,
            picture,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            on_text=lambda piece: print(safe_text(piece, keep="\n"), end="", flush=True),
        )
        print()
        turns.append({"role": "assistant", "content": reply})


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Checkpoint folder, or projector .bin file.", show_default=False)
    ],
    target: Annotated[
        Path,
        typer.Argument(metavar="DST", help="Output folder, or .bin file for the projector alone.", show_default=False),
    ],
    llm: Annotated[
        Path | None,
        typer.Option(help="LLM of a projector .bin or of LoRA adapters: a folder or Hub name.", show_default=False),
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option(help="Vision tower, if SRC does not contain it: a folder or Hub name.", show_default=False),
    ] = None,
) -> None:
    """Convert official AlignGPT and LLaVA checkpoints to a model, or a model to the official layout."""
    from aligntrain.tools.convert.convert import convert as run

    done = run(source, target, llm=llm, vision=vision)
    _stdout.print(safe_text(f"converted {done} in {target}"), soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder.")] = Path("demo"),
    count: Annotated[int, typer.Option(help="Number of pairs to draw.")] = 4_000,
    train: Annotated[bool, typer.Option("--train/--no-train", help="Also train a small AlignGPT on them.")] = True,
    quiet: Quiet = False,
) -> None:
    """Run the whole workflow offline on drawn scenes with known captions, and show that it works."""
    from aligncurate.demo.curation import curate

    started = time.monotonic()
    curate(out, count=count, quiet=quiet)
    if train:
        from aligntrain.tools.demo import train_and_ask

        train_and_ask(out, count=count, quiet=quiet)
    if quiet:
        return
    odd = f"aligncurate filter {out / 'levelled'} --out {out / 'odd'}"
    commands = [
        f"aligncurate inspect {out / 'levelled'} --examples 3",
        f"{odd} --where \"correctness = 'one_detail_wrong' and level >= 7\"",
        *([f"aligncurate chat {out / 'finetuned'} --image {out / 'fresh.png'} --show-alignment"] if train else []),
        "aligncurate score YOUR_DATA --out scored    # tars, Parquet, JSON, CSV; downloads OpenAI's ViT-L/14",
    ]
    _stdout.print(
        f"\nDone in [bold]{duration(time.monotonic() - started)}[/]. What to look at and try next:", markup=True
    )
    for command in commands:
        _stdout.print(f"  {safe_text(command)}", style="cyan", soft_wrap=True)


def _config(
    stage: str, data: list[str], file: Path | None, sets: list[str] | None, options: dict[str, Any]
) -> StageConfig:
    """The settings: of the paper, overridden by those of the file, overridden by the command line."""
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

    from aligncurate.progress import count, duration
    from aligntrain.data.schedule import shortfall
    from aligntrain.training.loop import train

    result = train(config)
    if os.environ.get("RANK", "0") != "0":
        return
    out = safe_text(str(result.out))
    if result.stopped:
        _stdout.print(
            f"Interrupted after step {result.steps:,} of {result.total:,}. The checkpoint is saved; rerun to resume.",
            soft_wrap=True,
        )
        raise typer.Exit(128 + result.stopped)
    if result.already_done:
        _stdout.print(
            f"nothing to do: all {count(result.steps, 'step')} are done and the model is in {out}; "
            "to train again use another --out, or pass --no-resume",
            soft_wrap=True,
        )
        if short := shortfall(config, result.total):
            _stdout.print(short, style="yellow", soft_wrap=True)
        return
    done = {"pretrain": "pretrained", "finetune": "finetuned"}[config.stage]
    loss = ""
    if result.first_loss is not None and result.loss is not None:
        both = result.first_loss != result.loss
        loss = f", loss {result.first_loss:.4f} -> {result.loss:.4f}" if both else f", loss {result.loss:.4f}"
    _stdout.print(
        Text.assemble(
            (done, "bold"),
            f" in {count(result.total, 'step')} ({duration(result.seconds)}){loss}; the model is in {out}",
        ),
        soft_wrap=True,
    )
    if short := shortfall(config, result.total):
        _stdout.print(short, style="yellow", soft_wrap=True)
    if result.unreadable:
        unreadable = count(result.unreadable, "image")
        _stdout.print(f"[yellow]{unreadable}[/] could not be read; their samples were skipped", markup=True)
    following = (
        f"aligncurate train finetune DATA --init {result.out} --out TUNED"
        if config.stage == "pretrain"
        else f"aligncurate chat {result.out} --image PICTURE"
    )
    _stdout.print(f"next: {safe_text(following)}", style="dim", soft_wrap=True)


def _show_preview(plan: Preview, config: StageConfig, ranks: int) -> None:
    from aligncurate.progress import count, duration
    from aligntrain.data.schedule import shortfall

    facts = plan.facts
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("stage", config.stage)
    table.add_row("samples", f"{facts.rows:,}")
    table.add_row("steps", f"{plan.steps:,} of {count(config.batch_size, 'sample')}, {count(config.epochs, 'epoch')}")
    if short := shortfall(config, plan.steps):
        table.add_row("", short)
    table.add_row("micro-batches", f"{plan.micro_batches:,} per epoch and rank, {count(ranks, 'rank')}")
    table.add_row("tokens", f"{plan.tokens:,} per epoch")
    table.add_row("images", f"{plan.images:,} per epoch")
    how = {"auto": "several samples per row, if the LLM supports it",
           "on": "several samples per row", "off": "one sample per row"}[config.packing]  # fmt: skip
    table.add_row("packing efficiency", f"{plan.efficiency:.1%} ({how})")
    table.add_row("truncated at max_length", f"{facts.truncated:,}")
    how = "measured" if plan.measured else "data sheet"
    table.add_row(
        "estimated time",
        f"{duration(plan.seconds)} for {plan.flops:.2e} FLOPs, at 40% of {plan.flops_per_s:.2e} FLOP/s ({how})",
    )
    size, unit = (1e9, "GB") if plan.memory.total >= 1e9 else (1e6, "MB")
    parts = ", ".join(f"{name} {bytes / size:.1f}" for name, bytes in vars(plan.memory).items())
    table.add_row("estimated memory", f"{plan.memory.total / size:.1f} {unit} per device: {parts}")
    _stdout.print(table)
    weighted = ["per epoch"] if config.level_weights else []
    counts = Table("level", "samples", *weighted, box=box.SIMPLE_HEAD)
    for level, samples in sorted(facts.levels.items()):
        used = [f"{plan.levels[level]:,}"] if weighted else []
        counts.add_row(str(level or "none"), f"{samples:,}", *used)
    _stdout.print(counts)
    if facts.skipped:
        skipped = Table("skipped rows", "cause", "such as", box=box.SIMPLE_HEAD)
        for cause, rows in facts.skipped.most_common():
            skipped.add_row(f"{rows:,}", safe_text(cause), safe_text(facts.examples[cause]))
        _stdout.print(skipped)


def _show_gate(weights: list[float] | None, align_mode: str, *, with_image: bool) -> None:
    """Print a bar for the weight of each level that the gate controls, or why there is none."""
    if not with_image:
        _stdout.print("without an image there is no alignment vector; pass --image", style="dim")
        return
    if weights is None:
        _stdout.print("this model has no gate: its alignment vector is the same for every question", style="dim")
        return
    largest = max(weights)
    for level, weight in enumerate(weights, 1):
        _stdout.print(f"level {level}  {weight:.3f}  [cyan]{'█' * round(20 * weight / largest)}[/]", markup=True)
    if align_mode == "gated":
        _stdout.print(f"level {len(weights) + 1}  always on; the gate adds the others to it", style="dim")
