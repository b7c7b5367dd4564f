"""What all tests share: where the real data is, and an encoder that costs nothing."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_MINI = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 16, "patch_size": 112},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def pytest_configure() -> None:
    """Tests send SIGINT to programs they start; a job in the background (`make test &`) would have them ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indexes of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are retried at once."""
    monkeypatch.setattr("aligncurate.io.retries.WAITS", (0.0, 0.0, 0.0))


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data, which is not part of the project."""
    folder = Path(os.environ.get("ALIGN_REAL_DATA", ROOT.parent / "shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ALIGN_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An open_clip model of two million random weights, as `--model-config` and `--pretrained`."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("mini")
    config, weights = folder / "mini-clip.json", folder / "mini-clip.safetensors"
    config.write_text(json.dumps(_MINI))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    save_file(open_clip.create_model("mini-clip", load_weights=False).state_dict(), weights)
    return {"model_config": config, "pretrained": weights}
