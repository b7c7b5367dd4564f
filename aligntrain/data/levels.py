"""The number of levels N: taken from the data for a new model, and compared with that of the model."""

from __future__ import annotations

from aligncurate.dataset.reader import Dataset
from aligncurate.errors import UserError
from aligncurate.levels import Thresholds
from aligncurate.progress import notice
from aligncurate.sources.base import Source
from aligntrain.data.index import Facts
from aligntrain.stage import StageConfig


def with_levels_of(source: Source, config: StageConfig) -> StageConfig:
    """The settings with `num_levels` as the data has it, if they give none for a new model.

    Levels that came with the source, such as AlignGPT's `similarity`, do not tell their number; then nothing changes.
    Raises UserError for inputs with different thresholds, see `check_levels`.
    """
    declared = _thresholds(source)
    if config.init is not None or config.num_levels is not None or config.align_mode == "none" or not declared:
        return config
    _check_same(declared, config)
    return config.replace(num_levels=next(iter(declared.values())).levels)


def check_levels(source: Source, config: StageConfig, num_levels: int) -> None:
    """Compare the levels of the data's datasets with each other and with those of the model.

    Args:
        source: the data.
        config: what it is used for.
        num_levels: N of the model; 0 without alignment, where levels are only counted.

    Raises UserError when they contradict each other.
    """
    declared = _thresholds(source)
    if num_levels and (unknown := [level for level in config.level_weights or {} if level > num_levels]):
        raise UserError(f"--level-weights: there is no level {unknown[0]}; the model has levels 1 to {num_levels}.")
    if num_levels:
        for uri, thresholds in declared.items():
            if thresholds.levels != num_levels:
                asked = config.init is None and config.num_levels is not None
                model = f"--num-levels is {num_levels}" if asked else f"the model has {num_levels}"
                other = "leave it out" if asked else f"run `aligncurate bucket` with --levels {num_levels}"
                raise UserError(f"{uri}: the data has {thresholds.levels} levels, but {model}; {other}.")
        _check_same(declared, config)


def warn_of_levels(config: StageConfig, facts: Facts, num_levels: int) -> None:
    """Say which rows of the level table pretraining will not change, because no sample has their level."""
    weights = config.level_weights or {}
    unused = [n for n in range(1, num_levels + 1) if not facts.levels[n] or weights.get(n) == 0]
    if config.stage == "pretrain" and unused:
        many = len(unused) > 1
        advice = (
            ""
            if config.init is not None or unused[-1] != num_levels
            else "; if the data has fewer levels, pass --num-levels"
        )
        notice(
            f"no sample of level{'s' if many else ''} {', '.join(map(str, unused))} is used, so "
            f"{'their embeddings are' if many else 'its embedding is'} not trained{advice}"
        )


def _thresholds(source: Source) -> dict[str, Thresholds]:
    """The thresholds in the manifests of the source's datasets, by folder."""
    found = {}
    for line in source.describe():
        if line["kind"] == "dataset":
            thresholds = Dataset(line["uri"]).manifest.get("thresholds")
            if thresholds is not None:
                found[str(line["uri"])] = Thresholds.from_json(thresholds, line["uri"])
    return found


def _check_same(declared: dict[str, Thresholds], config: StageConfig) -> None:
    """Raise UserError if levels that are used mean different scores in different datasets."""
    if config.stage != "pretrain" and not config.level_weights and not config.stratified:
        return  # finetuning learns nothing from them
    first = next(iter(declared), "")
    for uri, other in declared.items():
        one = declared[first]
        if (one.values, one.score_column) != (other.values, other.score_column):
            how = "so the same level means different scores"
            if one.levels != other.levels:
                how = f"one has {one.levels} levels, the other {other.levels}"
            raise UserError(
                f"{first} and {uri}: levelled with different thresholds, {how}; run "
                f"`aligncurate bucket {uri} --thresholds {first}` and use its output."
            )
