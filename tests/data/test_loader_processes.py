"""All ranks of 1 to 4 real processes together: every image once per epoch, whatever reads them; resuming is exact."""

import json
import sys

import pytest

from tests.data.reading import KINDS, configure
from tests.running import ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def by_world_size(photographs, tmp_path_factory):
    """World size → what each rank wrote."""
    kinds = []
    for kind in KINDS:
        if kind in ("files with workers", "ffcv squares", "dali squares"):
            continue
        configure(photographs, kind)
        kinds.append(kind)
    out = tmp_path_factory.mktemp("shares")
    done = ranks(4, [sys.executable, "-m", "tests.data.shares", str(photographs.folder), str(out), json.dumps(kinds)])
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        count: [json.loads((out / f"{count}-{rank}.json").read_text()) for rank in range(count)]
        for count in (1, 2, 3, 4)
    }


def test_every_image_once_per_epoch_over_all_ranks(by_world_size):
    count = 0
    for processes in by_world_size.values():
        for case in processes[0]:
            _, size, batch_size, drop_last = case.split("/")
            size, batch_size = int(size), int(batch_size)
            whole = size // batch_size * batch_size if drop_last == "True" else size
            orders = []
            for epoch in (0, 1):
                shares = [rank[case][0][epoch] for rank in processes]
                assert {len(batches) for batches in shares} == {len(shares[0])}
                seen = [index for batches in shares for indices, _ in batches for index in indices]
                assert len(set(seen)) == len(seen) == whole
                orders.append(seen)
            if whole > 10:
                assert orders[0] != orders[1], "epochs differ"
            count += 1
    assert count > 100


def test_resuming_yields_the_remaining_batches_and_no_others(by_world_size):
    for processes in by_world_size.values():
        for rank in processes:
            for case, (epochs, position, rest) in rank.items():
                assert rest == epochs[1][position:], case


def test_all_loaders_have_one_order(by_world_size):
    for processes in by_world_size.values():
        for rank in processes:
            orders = {}
            for case, (epochs, _, _) in rank.items():
                kind, setting = case.split("/", 1)
                if "quasi" not in kind:
                    orders.setdefault(setting, []).append([[indices for indices, _ in batches] for batches in epochs])
            assert all(order == same[0] for same in orders.values() for order in same)
