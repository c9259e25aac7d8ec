"""Which GPUs there are, and who gets which share of them."""

import os
import types
from pathlib import Path

import pytest

from qserve.errors import ConfigurationError
from qserve_workers.replica.gpus import GpuLedger, NoGpuFree, gpus_here

ME = os.getpid()
NOBODY = 2**22 + 1


@pytest.fixture
def ledger(tmp_path: Path) -> GpuLedger:
    return GpuLedger(("0", "1"), tmp_path)


def test_whole_ones_are_given_to_one_replica_each(ledger: GpuLedger) -> None:
    assert [str(ledger.take(1, ME)), str(ledger.take(1, ME))] == ["0", "1"]
    with pytest.raises(NoGpuFree, match="waits for 1 GPU: 2 of 2 in use"):
        ledger.take(1, ME)
    with pytest.raises(NoGpuFree, match=r"waits for 0.25 GPU: 2 of 2 in use"):
        ledger.take(0.25, ME)


def test_parts_are_packed_so_that_whole_ones_stay_free(ledger: GpuLedger) -> None:
    assert [str(ledger.take(0.3, ME)) for _ in range(3)] == ["0 (0.3)"] * 3
    assert str(ledger.take(0.2, ME)) == "1 (0.2)"
    assert str(ledger.take(0.1, ME)) == "0 (0.1)"
    with pytest.raises(NoGpuFree, match=r"waits for 1 GPU: 1\.2 of 2 in use"):
        ledger.take(1, ME)


def test_several_are_given_at_once(ledger: GpuLedger) -> None:
    share = ledger.take(2, ME)
    assert (share.ids, str(share)) == (("0", "1"), "0,1")


def test_the_share_of_a_process_that_has_ended_is_free(ledger: GpuLedger) -> None:
    for _ in range(5):
        assert str(ledger.take(2, NOBODY)) == "0,1"


def test_a_file_that_was_cut_off_is_begun_anew(ledger: GpuLedger, tmp_path: Path) -> None:
    (tmp_path / "gpus.json").write_text('[{"pid": 1')
    assert str(ledger.take(1, ME)) == "0"


@pytest.mark.parametrize(("gpus", "text"), [((), "it has none"), (("4",), "it has 1: 4")])
def test_more_than_there_are_is_a_mistake(tmp_path: Path, gpus: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigurationError, match=f"needs 2 GPUs, and on this node {text}"):
        GpuLedger(gpus, tmp_path).take(2, ME)


def test_where_the_gpus_of_a_node_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = types.SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 3, NVMLError=OSError)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", driver)

    assert gpus_here("4, 5", {"CUDA_VISIBLE_DEVICES": "0"}) == ("4", "5")
    assert gpus_here("", {"CUDA_VISIBLE_DEVICES": "GPU-abc,1"}) == ("GPU-abc", "1")
    assert gpus_here("", {"CUDA_VISIBLE_DEVICES": ""}) == gpus_here("", {"CUDA_VISIBLE_DEVICES": "-1"}) == ()
    assert gpus_here("", {}) == ("0", "1", "2")
    monkeypatch.setattr(driver, "nvmlInit", lambda: (_ for _ in ()).throw(OSError("no driver")))
    assert gpus_here("", {}) == ()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert gpus_here("", {}) == ()
