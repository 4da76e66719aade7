"""Codecs of soft labels, the store that is read by memory map, and epochs that are used again."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from distill.cli import main
from distill.compose import compose
from distill.config import RelabelConfig
from distill.data import DistilledSet, SoftLabelStore, Views
from distill.data.labels import build_codec, epochs_stored, reused, stored_epoch
from distill.data.labels.float16 import Float16
from distill.data.labels.quantised import STEPS, Quantised
from distill.data.labels.shard import MappedShard
from distill.data.labels.topk import TopK
from distill.data.view_loader import ViewLoader
from distill.errors import ArtifactError, ConfigError, NonFiniteError
from distill.files import save_tensors
from tests.running import SMALL, command, ranks

CODECS = {
    "float16": RelabelConfig(),
    "topk1": RelabelConfig(codec="topk", top_k=1),
    "topk3": RelabelConfig(codec="topk", top_k=3),
    **{f"quantised{bits}": RelabelConfig(codec="quantised", bits=bits) for bits in (1, 2, 4, 8)},
}
each_codec = pytest.mark.parametrize("name", CODECS)


@pytest.fixture(scope="module")
def logits() -> Tensor:
    """float32 (450, 10): answers of a classifier of scanned digits on scans that it was not trained on."""
    images, labels = load_digits(return_X_y=True)
    classifier = LogisticRegression(max_iter=100).fit(images[450:] / 16, labels[450:])
    return torch.from_numpy(classifier.decision_function(images[:450] / 16)).float()


def centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("config", "classes", "size"),
    [
        (RelabelConfig(), 10, 20),
        (RelabelConfig(), 1000, 2000),
        (RelabelConfig(codec="topk", top_k=3), 10, 3 * 3),
        (RelabelConfig(codec="topk"), 256, 10 * 3),
        (RelabelConfig(codec="topk"), 257, 10 * 4),
        (RelabelConfig(codec="topk", top_k=10), 70_000, 10 * 6),
        (RelabelConfig(codec="quantised"), 10, 5 + 1),
        (RelabelConfig(codec="quantised", bits=1), 10, 2 + 1),
        (RelabelConfig(codec="quantised", bits=2), 10, 3 + 1),
        (RelabelConfig(codec="quantised", bits=8), 1000, 1000 + 1),
    ],
)
def test_bytes_of_an_image(config: RelabelConfig, classes: int, size: int) -> None:
    codec = build_codec(config, classes)
    assert codec.bytes_per_image == size
    stored = codec.encode(torch.linspace(-3, 5, 4 * classes).view(4, classes))
    assert {name: (t.dtype, tuple(t.shape[1:])) for name, t in stored.items()} == codec.layout
    assert sum(tensor.nbytes for tensor in stored.values()) == 4 * size
    assert codec.decode(stored).shape == (4, classes)


def test_float16_and_all_of_topk_lose_only_rounding(logits: Tensor) -> None:
    full = Float16(10)
    assert torch.equal(full.decode(full.encode(logits)), logits.half().float())
    for k in (10, 50):
        everything = TopK(10, k)
        assert torch.equal(everything.decode(everything.encode(logits)), logits.half().float())


@pytest.mark.parametrize("k", [1, 3, 9])
def test_topk_keeps_the_largest_and_spreads_the_rest_evenly(logits: Tensor, k: int) -> None:
    codec = TopK(10, k)
    decoded = centred(codec.decode(codec.encode(logits)))
    largest = logits.topk(k).indices
    torch.testing.assert_close(decoded.gather(1, largest), centred(logits).gather(1, largest), rtol=2e-3, atol=1e-2)
    rest = torch.ones_like(logits, dtype=torch.bool).scatter(1, largest, False)
    others = decoded[rest].view(len(logits), 10 - k)
    assert (others == others[:, :1]).all()
    # No other constant for the rest is nearer to the logits.
    expected = centred(logits)[rest].view(len(logits), 10 - k).mean(1)
    torch.testing.assert_close(others[:, 0], expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_is_wrong_by_half_a_step_at_most(logits: Tensor, bits: int) -> None:
    codec = Quantised(10, bits)
    stored = codec.encode(logits)
    steps = STEPS[stored["steps"].long()]
    span = logits.amax(1) - logits.amin(1)
    assert (steps <= 1.1 * span / (2**bits - 1)).all()
    error = codec.decode(stored) - (logits - logits.amax(1, keepdim=True))
    assert (error.abs() <= 0.5001 * steps[:, None]).all()


@pytest.mark.parametrize("bits", [1, 2])
def test_few_bits_take_the_step_of_least_error(logits: Tensor, bits: int) -> None:
    """Against every step that a byte can name."""
    codec = Quantised(10, bits)
    below = logits.amax(1, keepdim=True) - logits
    levels = (below / STEPS[:, None, None]).round().clamp_max(2**bits - 1) * STEPS[:, None, None]
    least = (below - levels).var(dim=2).amin(dim=0)
    found = (below + codec.decode(codec.encode(logits))).var(dim=1)
    assert found.sum() <= 1.02 * least.sum()
    assert (found >= least * 0.999).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_quantised_reaches_the_ends_of_float16(bits: int) -> None:
    largest = torch.finfo(torch.float16).max
    codec = Quantised(3, bits)
    logits = torch.tensor([[-largest, largest, 0.0], [0.0, 0.0, 0.0], [1e-6, 0.0, 0.0]])
    decoded = codec.decode(codec.encode(logits))
    torch.testing.assert_close(decoded[0, 0] - decoded[0, 1], torch.tensor(-2 * largest), rtol=0.5, atol=0)
    assert (decoded[1] == 0).all()
    assert (decoded[2] - decoded[2, 0]).abs().max() < 1e-4


def test_more_bytes_are_nearer_to_the_teacher(logits: Tensor) -> None:
    """KL at T = 20, as the student sees it."""

    def divergence(config: RelabelConfig) -> float:
        codec = build_codec(config, 10)
        kept, given = (x.double() / 20 for x in (codec.decode(codec.encode(logits)), logits))
        return float(torch.nn.functional.kl_div(kept.log_softmax(1), given.softmax(1), reduction="batchmean"))

    for kind in ("topk", "quantised"):
        found = [divergence(config) for name, config in CODECS.items() if name.startswith(kind)]
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0] / 2


@pytest.mark.parametrize("name", ["topk3", "quantised4", "quantised2"])
def test_a_constant_added_to_the_logits_changes_nothing(logits: Tensor, name: str) -> None:
    codec = build_codec(CODECS[name], 10)
    coarse = (logits * 8).round() / 8  # so that adding 64 is exact
    first, second = codec.encode(coarse), codec.encode(coarse + 64)
    for key, tensor in first.items():
        if key == "values":
            torch.testing.assert_close(tensor, second[key], rtol=1e-3, atol=0)
        else:
            assert torch.equal(tensor, second[key])


@each_codec
def test_equal_logits_are_the_same_bytes_in_any_company(logits: Tensor, name: str) -> None:
    codec = build_codec(CODECS[name], 10)
    ties = (logits / 4).round()
    whole = codec.encode(ties)
    order = torch.randperm(len(ties), generator=torch.Generator().manual_seed(0))
    mixed, single = codec.encode(ties[order]), codec.encode(ties[7:8])
    for key in codec.layout:
        assert torch.equal(mixed[key], whole[key][order])
        assert torch.equal(single[key], whole[key][7:8])
    if name == "topk3":
        assert codec.encode(torch.zeros(2, 10))["indices"].tolist() == [[0, 1, 2]] * 2


@each_codec
def test_rows_are_those_of_the_whole_epoch(logits: Tensor, name: str, tmp_path: Path) -> None:
    codec = build_codec(CODECS[name], 10)
    store = SoftLabelStore(tmp_path, codec)
    store.write(3, logits)
    store.write(4, -logits)
    whole = store.read(3, len(logits))
    assert torch.equal(whole, codec.decode(codec.encode(logits)))
    indices = [449, 0, 17, 17, 3]
    for epoch, source in ((3, logits), (4, -logits), (3, logits)):
        expected = codec.decode(codec.encode(source[indices]))
        assert torch.equal(store.rows(epoch, indices, len(logits)), expected)
    # A shard that is written again is read anew.
    store.write(3, 2 * logits)
    assert not torch.equal(store.read(3, len(logits)), whole)


def test_only_the_rows_of_a_batch_are_read(tmp_path: Path) -> None:
    """One shard of 2 GB, all zeros but the first rows, grows the process by a few MB."""
    codec, count = Float16(1000), 1_000_000
    store = SoftLabelStore(tmp_path, codec)
    store.write(0, torch.ones(2, 1000))
    header = json.dumps({"logits": {"dtype": "F16", "shape": [count, 1000], "data_offsets": [0, count * 2000]}})
    with open(store.path(0), "r+b") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + count * 2000)

    def resident() -> int:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    before = resident()
    rows = store.rows(0, range(0, count, 10_000), count)
    assert rows.shape == (100, 1000)
    assert resident() - before < 50e6


@each_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_logits_that_are_no_numbers_are_not_stored(logits: Tensor, tmp_path: Path, name: str, value: float) -> None:
    store = SoftLabelStore(tmp_path, build_codec(CODECS[name], 10))
    broken = logits.clone()
    broken[5, 5] = value
    with pytest.raises(NonFiniteError, match=r"epoch 2 .*train another"):
        store.write(2, broken)
    assert not store.path(2).exists()


FAULTS = {
    "missing": "does not exist",
    "truncated": "truncated",
    "cut in its header": "cut off",
    "no safetensors": "cut off|damaged|Expecting",
    "another number of images": r"\[450, 5\] where U8 \[449, 5\]",
    "another codec": "'codes'",
    "a further tensor": "extra",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_shards_are_told(logits: Tensor, tmp_path: Path, fault: str) -> None:
    store, count = SoftLabelStore(tmp_path, Quantised(10, 4)), len(logits)
    store.write(0, logits)
    content = store.path(0).read_bytes()
    if fault == "missing":
        store.path(0).unlink()
    elif fault == "truncated":
        store.path(0).write_bytes(content[:-1])
    elif fault == "cut in its header":
        store.path(0).write_bytes(content[:40])
    elif fault == "no safetensors":
        store.path(0).write_bytes(b"not labels at all, but a text of some length")
    elif fault == "another number of images":
        count -= 1
    elif fault == "another codec":
        SoftLabelStore(tmp_path, TopK(10, 3)).write(0, logits)
    else:
        save_tensors(store.path(0), {**store.codec.encode(logits), "extra": torch.zeros(1)})
    for read in (lambda: store.read(0, count), lambda: store.rows(0, [1], count), lambda: store.open(0, count)):
        with pytest.raises(ArtifactError, match=FAULTS[fault]) as told:
            read()
        assert "relabel" in str(told.value)


def test_every_dtype_of_a_shard(tmp_path: Path) -> None:
    """Classes up to 256, 65,536 and above are counted in bytes of their own."""
    for classes in (256, 257, 70_000):
        codec = TopK(classes, 2)
        logits = torch.zeros(3, classes)
        logits[:, classes - 1], logits[:, 255] = 2.0, 1.0
        store = SoftLabelStore(tmp_path, codec)
        store.write(classes, logits)
        assert isinstance(store.open(classes, 3), MappedShard)
        torch.testing.assert_close(store.rows(classes, [2], 3), logits[2:], rtol=0, atol=1e-3)


def test_each_stored_epoch_is_used_once_in_a_cycle() -> None:
    config = RelabelConfig(epochs=50, stored_epochs=7)
    used = [stored_epoch(config, 3, epoch) for epoch in range(50)]
    cycles = [used[start : start + 7] for start in range(0, 49, 7)]
    assert all(sorted(cycle) == list(range(7)) for cycle in cycles)
    assert len(set(map(tuple, cycles))) == len(cycles)
    assert [stored_epoch(config, 3, epoch) for epoch in reversed(range(50))] == used[::-1]
    assert [stored_epoch(config, 4, epoch) for epoch in range(50)] != used
    assert epochs_stored(config) == 7
    everything = RelabelConfig(epochs=50)
    assert [stored_epoch(everything, 3, epoch) for epoch in range(epochs_stored(everything))] == list(range(50))


VARIED = RelabelConfig(epochs=50, stored_epochs=7, reuse_shift=2, reuse_flip=True)


def scans() -> Tensor:
    """float32 (20, 3, 8, 8) in [0, 1], with a grey level for each place so that a move shows."""
    images = torch.from_numpy(load_digits().images[:20] / 16).float()[:, None].expand(-1, 3, -1, -1)
    return images / 2 + torch.arange(64).view(8, 8) / 128


def test_views_are_varied_when_they_come_again() -> None:
    images = scans()
    assert reused(VARIED, 3, 6, range(20), images) is images
    assert reused(RelabelConfig(epochs=50, stored_epochs=7), 3, 7, range(20), images) is images
    # Every image is moved and mirrored as a whole, in one of the ways that there are.
    ways = torch.stack(
        [
            torch.nn.functional.pad(source, (2, 2, 2, 2), mode="replicate")[..., down : down + 8, right : right + 8]
            for source in (images, images.flip(-1))
            for down in range(5)
            for right in range(5)
        ]
    )
    taken = set()
    for epoch in range(7, 50):
        varied = reused(VARIED, 3, epoch, range(20), images)
        way = (ways == varied).flatten(2).all(2)
        assert way.any(0).all()
        taken |= set(way.nonzero()[:, 0].tolist())
    assert taken == set(range(50))


def test_variation_depends_on_seed_epoch_and_image_alone() -> None:
    images = scans()
    whole = reused(VARIED, 3, 9, range(20), images)
    assert torch.equal(reused(VARIED, 3, 9, [17, 4], images[[17, 4]]), whole[[17, 4]])
    assert not torch.equal(reused(VARIED, 3, 10, range(20), images), whole)
    assert not torch.equal(reused(VARIED, 4, 9, range(20), images), whole)
    shifted = reused(RelabelConfig(epochs=50, stored_epochs=7, reuse_flip=True), 3, 9, range(20), images)
    kept = (shifted == images).flatten(1).all(1)
    assert torch.equal(shifted[~kept], images[~kept].flip(-1))
    assert 0 < kept.sum() < 20


@pytest.mark.parametrize("stored", [0, 3])
def test_the_loader_gives_views_with_their_labels(logits: Tensor, tmp_path: Path, stored: int) -> None:
    images = (torch.from_numpy(load_digits().images[:20]) * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    config = RelabelConfig(epochs=9, stored_epochs=stored, codec="topk", top_k=2, reuse_shift=1)
    views = Views(images.contiguous(), torch.from_numpy(load_digits().target[:20].astype(np.int64)), config, seed=5)
    store = SoftLabelStore(tmp_path, build_codec(config, 10))
    for epoch in range(epochs_stored(config)):
        store.write(epoch, logits[20 * epoch : 20 * epoch + 20])
    loader, orders = ViewLoader(views, 8, seed=1, labels=store), set()
    for epoch in range(9):
        loader.set_epoch(epoch)
        batches = list(loader)
        indices = torch.cat([batch.indices for batch in batches])
        taken = stored_epoch(config, 5, epoch)
        assert torch.equal(torch.cat([batch.logits for batch in batches]), store.rows(taken, indices.tolist(), 20))
        expected = reused(config, 5, epoch, indices.tolist(), views.batch(taken, indices.tolist()).images)
        assert torch.equal(torch.cat([b.images for b in batches]), expected)
        assert sorted(indices.tolist()) == list(range(20))
        orders.add(tuple(indices.tolist()))
        # Continued in the middle of an epoch, it gives the rest of it.
        loader.load_state_dict({"epoch": epoch, "position": 2})
        assert torch.equal(next(iter(loader)).images, batches[2].images)
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["relabel.bits=4"], "relabel.bits belongs to relabel.codec=quantised"),
        (["relabel.top_k=4", "relabel.codec=quantised"], "relabel.top_k belongs to relabel.codec=topk"),
        (["relabel.codec=quantised", "relabel.bits=3"], "relabel.bits=3"),
        (["relabel.stored_epochs=301", "relabel.epochs=300"], "relabel.stored_epochs=301"),
        (["relabel.mode=online", "relabel.stored_epochs=3"], "relabel.mode=online"),
        (["relabel.mode=online", "relabel.batch_size=50"], "relabel.batch_size=50 is about stored labels"),
        (["evaluate.labels=hard", "relabel.batch_size=50"], "evaluate.labels=hard stores none"),
        (["relabel.reuse_shift=2"], "set relabel.stored_epochs"),
        (["relabel.reuse_flip=true"], "set relabel.stored_epochs"),
        (["evaluate.labels=hard", "relabel.codec=topk"], "evaluate.labels=hard"),
    ],
)
def test_options_that_do_not_fit_together(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        compose(overrides)


RUN = [
    *SMALL,
    "squeeze.epochs=1",
    "recover.iterations=5",
    "relabel.epochs=6",
    "attacks.epsilon=[8]",
    "attacks.max_images=20",
    "evaluate.max_images=100",
    "evaluate.teacher=false",
    "monitor.tensorboard=false",
    "threads=1",
]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose teacher and images are made."""
    root = tmp_path_factory.mktemp("codecs")
    for stage in ("squeeze", "recover"):
        assert guard(root, "run", stage) == 0
    return root


def guard(root: Path, name: str, stage: str, *overrides: str) -> int:
    places = [f"run_root={root / 'runs'}", f"data_root={root / 'data'}", f"name={name}"]
    return main([stage, *RUN, *places, *overrides])


def copied(root: Path, name: str) -> Path:
    folder = root / "runs" / name
    for part in ("teacher", "distilled"):
        shutil.copytree(root / "runs/run" / part, folder / part)
    return folder


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("overrides", "codec", "stored", "size"),
    [
        ([], {"name": "float16"}, 6, 20),
        (["relabel.codec=topk", "relabel.top_k=2"], {"name": "topk", "top_k": 2}, 6, 6),
        (
            ["relabel.codec=quantised", "relabel.stored_epochs=2", "relabel.reuse_shift=1"],
            {"name": "quantised", "bits": 4},
            *(2, 6),
        ),
    ],
)
def test_labels_through_the_command_line(
    distilled: Path, overrides: list[str], codec: dict[str, object], stored: int, size: int
) -> None:
    folder = copied(distilled, f"{codec['name']}{stored}")
    assert guard(distilled, folder.name, "relabel", *overrides) == 0
    manifest = json.loads((folder / "labels/manifest.json").read_text())
    shards = sorted((folder / "labels").glob("epoch_*.safetensors"))
    assert (manifest["codec"], manifest["stored_epochs"], manifest["bytes_per_image"]) == (codec, stored, size)
    assert (len(shards), manifest["epochs"]) == (stored, 6)
    assert manifest["bytes"] == sum(path.stat().st_size for path in shards)
    assert 20 * stored * size < manifest["bytes"] <= stored * (20 * size + 200)
    assert guard(distilled, folder.name, "evaluate", *overrides) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["labels"] == {"codec": codec, "stored_epochs": stored, "bytes": manifest["bytes"]}
    opened = DistilledSet.open(folder)
    seen = [next(iter(opened.views(epoch, batch_size=20))) for epoch in range(6)]
    assert all(images.shape == (20, 3, 32, 32) and given.shape == (20, 10) for images, given in seen)
    assert len({given.numpy().tobytes() for _, given in seen}) == stored
    assert len({images.numpy().tobytes() for images, _ in seen}) == 6
    with pytest.raises(ArtifactError, match="not 6"):
        next(iter(opened.views(6)))


def test_another_codec_is_not_mixed_in(distilled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(distilled, "changed")
    assert guard(distilled, "changed", "relabel") == 0
    assert guard(distilled, "changed", "relabel", "relabel.codec=topk", "relabel.stored_epochs=3") == 1
    told = capsys.readouterr().err
    assert "relabel.codec (was 'float16', now 'topk')" in told
    assert "relabel.stored_epochs (was 0, now 3)" in told
    assert (folder / "labels/manifest.json").is_file()


def test_labels_are_the_same_bytes_after_a_kill_and_from_any_number_of_workers(distilled: Path) -> None:
    options = ["relabel.codec=quantised", "relabel.stored_epochs=4"]
    folder = copied(distilled, "one")
    assert guard(distilled, "one", "relabel", *options) == 0

    def content(run: Path) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (run / "labels").iterdir() if not p.name.startswith(".")}

    whole = content(folder)
    assert len([name for name in whole if name.startswith("epoch_")]) == 4
    # As a kill leaves it: no manifest, a shard that is missing and one that was being written.
    for name in ("manifest.json", "epoch_0002.safetensors"):
        (folder / "labels" / name).unlink()
    (folder / f"labels/.epoch_0002.safetensors.{os.getpid()}.tmp").write_bytes(b"half")
    assert guard(distilled, "one", "relabel", *options) == 0
    assert content(folder) == whole
    shared = copied(distilled, "two")
    done = ranks(2, command(distilled, *RUN[len(SMALL) :], *options, name="two", stage="relabel"))
    assert done.returncode == 0, done.stderr
    assert content(shared) == whole
