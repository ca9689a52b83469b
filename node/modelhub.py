"""Where a model's files are: the demo model, a folder, or a download from the Hugging Face hub.

It owns the way from the name that a user gives to a folder on this machine. It reads no file in it; `models` and
`proxy` do. Only safetensors are ever fetched: a .bin or .pt file is a pickle, which can run code.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

DEMO_MODEL = "demo"
LINE_EVERY_S = 5.0
"""Between two lines about a download."""

TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")
"""All that a proxy needs: configuration, tokenizer, chat template."""
FETCHED = (*TEXT_FILES, "*.safetensors")
NOT_FETCHED = ("consolidated*", "original/*", "onnx/*")
"""Second copies of the weights in the formats of other programs."""

CONVERT_GGUF = (
    "GGUF files are not read: use the model's own repository on the hub, or write a folder from the file with "
    "transformers (AutoModelForCausalLM and AutoTokenizer: from_pretrained(FOLDER, gguf_file=FILE), then "
    "save_pretrained(NEW_FOLDER))"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_logger = logging.getLogger(__name__)


def locate_model(name: str, report: Callable[[str], None] | None = None, *, weights: bool = True) -> Path:
    """The folder of model `name`: "demo", a folder that holds config.json, or a hub id `org/name` (downloaded once).

    Raises SettingsError where there is none, with what to do about it. Blocks as long as a download takes, and shows
    the hub's progress bars; where stderr is no terminal, `report` gets a line every few seconds instead. Without
    `weights`, a download leaves them out.
    """
    if name == DEMO_MODEL:
        return _checked(_demo_folder())
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder.resolve())
    if folder.exists():
        more = f"; {CONVERT_GGUF}" if folder.suffix.lower() == ".gguf" else ""
        raise SettingsError(f"model {name!r} is a file: a Hugging Face model folder is needed{more}")
    if not _HUB_ID.fullmatch(name):
        raise SettingsError(f"model {name!r}: no such folder, and not a hub id either (those look like org/name)")
    return _checked(_download(name, report, FETCHED if weights else TEXT_FILES))


def _demo_folder() -> Path:
    """The demo model lies beside the packages, in a checkout as in an installed wheel."""
    return Path(__file__).resolve().parent.parent / "models" / "demo"


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        more = f"; {CONVERT_GGUF}" if any(folder.glob("*.gguf")) else ""
        raise SettingsError(f"model folder {folder} holds no config.json: it is not a Hugging Face model folder{more}")
    return folder


def _download(hub_id: str, report: Callable[[str], None] | None, wanted: tuple[str, ...]) -> Path:
    """Fetch what is missing of `hub_id` into the hub's own cache."""
    # Imported here: it takes a third of a second and 30 MB, which only a download needs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    log_event(_logger, "model_download", model=hub_id)
    try:
        with nullcontext() if report is None or sys.stderr.isatty() else _DownloadLines(hub_id, report):
            folder = snapshot_download(hub_id, allow_patterns=list(wanted), ignore_patterns=list(NOT_FETCHED))
    except GatedRepoError:
        reason = "its licence must be accepted on the hub first, and HF_TOKEN set to a token of that account"
    except RepositoryNotFoundError:
        reason = "no such folder here, and no such model on the hub (or a private one: set HF_TOKEN)"
    except LocalEntryNotFoundError:
        reason = "no such folder here, not in the hub's cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = f"the download failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    else:
        log_event(_logger, "model_ready", model=hub_id, folder=str(folder))
        return Path(folder)
    raise SettingsError(f"model {hub_id!r}: {reason}")


class _DownloadLines:
    """Reports the progress of a download by a thread of its own, in place of the hub's progress bars."""

    def __init__(self, hub_id: str, report: Callable[[str], None]) -> None:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        self._hub_id, self._report = hub_id, report
        self._blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model") / "blobs"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="download", daemon=True)

    def __enter__(self) -> None:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        from huggingface_hub.utils.tqdm import enable_progress_bars

        self._done.set()
        self._thread.join()
        enable_progress_bars()

    def _run(self) -> None:
        began_s = time.monotonic()
        while not self._done.wait(LINE_EVERY_S):
            took_s = time.monotonic() - began_s
            self._report(f"downloading {self._hub_id}: {self._on_disk_bytes() / (1 << 20):.0f} MiB ({took_s:.0f} s)")

    def _on_disk_bytes(self) -> int:
        """What the hub's cache holds of the model, whole files and others."""
        found = 0
        for path in self._blobs.glob("*"):
            try:
                found += path.stat().st_size
            except OSError:
                pass  # renamed since it was listed: its whole file is there
        return found
