"""What is said when weights cannot be loaded."""

from __future__ import annotations

from pathlib import Path
from urllib.error import HTTPError, URLError

import open_clip
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from aligncurate.encoders.load import load, requested
from aligncurate.encoders.model_choice import DEFAULT_MODEL, DEFAULT_PRETRAINED, TINY_FOLDER, resolve_names
from aligncurate.errors import UserError


def failing(monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """Loading raises the last of `errors` while handling the one before."""

    def create(*args: object, **options: object) -> None:
        try:
            raise errors[0]
        except Exception:
            raise errors[-1]  # noqa: B904 (as open_clip raises it)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)


@pytest.mark.parametrize(
    "errors",
    [
        [URLError("Name or service not known")],
        [ConnectionError("Max retries exceeded")],
        [LocalEntryNotFoundError("not in the cache"), FileNotFoundError("Failed to download")],
    ],
)
def test_no_network_is_named(monkeypatch, errors) -> None:
    failing(monkeypatch, *errors)
    with pytest.raises(UserError) as caught:
        load("ViT-B-32", "openai", device="cpu")
    expected = "--model ViT-B-32 --pretrained openai: no network and no cached weights; use --pretrained FILE."
    assert str(caught.value) == expected
    with pytest.raises(UserError, match=r"^--model hf-hub:nobody/nothing: no network and no cached weights"):
        load("hf-hub:nobody/nothing", device="cpu")


def test_other_failures_of_a_download_are_not_the_network(monkeypatch) -> None:
    failing(monkeypatch, HTTPError("https://example.com/weights", 404, "Not Found", None, None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"could not be loaded \(HTTP Error 404: Not Found\)"):
        load("ViT-B-32", "openai", device="cpu")


def test_weights_that_do_not_fit_say_which_model_was_assumed(monkeypatch, tmp_path: Path) -> None:
    failing(monkeypatch, RuntimeError("Error(s) in loading state_dict for CLIP:\nmore"))
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    with pytest.raises(UserError) as caught:
        load(pretrained=str(weights), device="cpu")
    assert str(caught.value) == (
        f"--pretrained {weights}: could not be loaded into the default model, ViT-L-14-quickgelu "
        "(Error(s) in loading state_dict for CLIP:); "
        "name the architecture of these weights with --model or --model-config."
    )
    with pytest.raises(UserError, match="could not be loaded into model ViT-B-32 "):
        load("ViT-B-32", str(weights), device="cpu")


def test_an_empty_entry_of_the_weights_is_the_models_default(mini) -> None:
    config, weights = Path(mini["model_config"]), str(mini["pretrained"])
    for models, given in ((f"tiny,{config.stem}", f",{weights}"), (f" tiny , {config.stem}", f" , {weights}")):
        first, second = requested(models, given, [str(config)]).items()
        assert first == ("score", ("tiny", None, None))
        assert second == (f"score_{config.stem}", (config.stem, weights, config))
    last = requested(f"{config.stem},tiny", f"{weights},", [str(config)])
    assert last["score_tiny"] == ("tiny", None, None)
    assert resolve_names("tiny", None, None)[1] == str(TINY_FOLDER / "tiny.safetensors")
    for named in (None, DEFAULT_MODEL):
        assert resolve_names(named, None, None) == (DEFAULT_MODEL, DEFAULT_PRETRAINED, None)


@pytest.mark.parametrize(
    ("has_units", "precision", "told"), [(True, "auto", True), (True, "fp32", False), (False, "auto", False)]
)
def test_a_processor_with_bf16_units_is_told_of(monkeypatch, capsys, has_units, precision, told) -> None:
    failing(monkeypatch, RuntimeError("enough for this test"))
    monkeypatch.setattr("aligncurate.encoders.load.has_bf16_units", lambda: has_units)
    with pytest.raises(UserError):
        load("ViT-B-32", device="cpu", precision=precision, random_weights=True, quiet=False)
    assert ("--precision bf16 is faster" in capsys.readouterr().err) == told
