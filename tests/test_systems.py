"""Windows and macOS, as far as Linux can imitate them: files that are synced, new processes, what a system lacks."""
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, arguments, files

import ELMO
from data import corpus
from data.text import tokenize_texts
from run import machine

fcntl = pytest.importorskip("fcntl", reason="imitates Windows on another system")
SPAWN = """
import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
import ELMO

if __name__ == "__main__":
    ELMO.CACHE = Path({cache!r})
    multiprocessing.set_start_method("spawn")
    sys.exit(ELMO.main({argv!r}))
"""


@pytest.fixture
def windows_fsync(monkeypatch) -> list[int]:
    """os.fsync as on Windows: it refuses files that are open for reading only. Returns the other descriptors."""
    synced = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        """Syncs a file that is open for writing."""
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


def test_no_file_is_synced_that_is_open_for_reading_only(windows_fsync, tmp_path, monkeypatch, whole):
    tokens = tokenize_texts(["oil prices fall ."] * 3, tmp_path / "cache")
    assert len(tokens) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the cache is kept"
    (tmp_path / "a.txt").write_text("the bank .\n" * 30)
    monkeypatch.setattr(ELMO, "CACHE", tmp_path / "cache")
    argv = ["--corpus", str(tmp_path / "a.txt"), "--validation", "3", "--hidden", "8", "--epochs", "0.1"]
    assert ELMO.main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert len(windows_fsync) > 6


def test_a_corpus_is_tokenized_by_processes_that_start_anew(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"the bank sued court{i % 7} .\n" for i in range(3 * corpus.CHUNK)))
    argv = ["--corpus", str(tmp_path / "a.txt"), "--validation", "3", "--hidden", "8", "--epochs", "0.01",
            "--out", str(tmp_path / "out")]
    script = tmp_path / "spawn.py"
    script.write_text(SPAWN.format(root=str(ROOT), cache=str(tmp_path / "cache"), argv=argv))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(ELMO.ELMo.load(tmp_path / "out" / "bilstm.pt").words.words[4:]) >= {"the", "bank", "court3"}


def test_a_run_ends_on_a_system_without_resource_proc_or_prctl(builtin, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)              # importing it fails, as on Windows
    monkeypatch.setattr(machine, "Path", lambda _: Path(tmp_path / "missing"))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda _: None)     # then every function is missing
    monkeypatch.setattr(machine.dist, "is_available", lambda: False)
    monkeypatch.delattr(machine.dist, "is_torchelastic_launched")
    assert machine.peak_memory_gb() is None
    monkeypatch.setattr(machine, "Path", Path)
    assert ELMO.main(arguments("ELMO.py", tmp_path / "out", tmp_path)) == 0
    assert "bilstm.pt" in files(tmp_path / "out")
