"""The model card: README.md beside a model."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from aligntrain.model.configuration import AlignGPTConfig

_TEXT = """---
{metadata}
---

# AlignGPT model

An image-text model of the AlignGPT kind ([arXiv 2405.14129](https://arxiv.org/abs/2405.14129)), made with AlignCurate.

| | |
|---|---|
| LLM | {llm} |
| vision tower | {tower}, {pixels} pixels, {patches} patches per image |
| projector | {projector} |
| alignment | {alignment} |
{facts}
## Use

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER", trust_remote_code=True)
```

With AlignCurate installed: `aligncurate chat THIS_FOLDER --image PICTURE`.

## To fill in

Data, intended use, limits, licence. The licences of the LLM, the vision tower and the data apply.
"""


def write_card(folder: Path, config: AlignGPTConfig, facts: dict[str, str] | None = None) -> None:
    """Write README.md, unless the folder has one.

    Args:
        folder: of the model.
        config: the model's.
        facts: further rows of the table, such as the training's.
    """
    file = folder / "README.md"
    if file.exists():
        return
    llm, tower = config.text_config, config.vision_config
    names = [name for part in (llm, tower) if _is_hub_name(name := part.name_or_path)]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["aligngpt"],
        base_model=names or None,
    )
    levels = f"{config.num_levels} levels, mode {config.align_mode}"
    file.write_text(
        _TEXT.format(
            metadata=metadata.to_yaml().strip(),
            llm=f"{llm.model_type}, {llm.num_hidden_layers} layers, {llm.hidden_size} wide",
            tower=tower.model_type,
            pixels=config.pixel_size,
            patches=config.num_patches,
            projector=config.projector_type,
            alignment="none (LLaVA)" if config.align_mode == "none" else levels,
            facts="".join(f"| {name} | {value} |\n" for name, value in (facts or {}).items()),
        ),
        "utf-8",
    )


def _is_hub_name(name: str | None) -> bool:
    return bool(name) and str(name).count("/") <= 1 and not Path(str(name)).exists()
