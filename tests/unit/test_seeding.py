"""Keyed randomness."""

import torch

from ncfm.seeding import keyed_generator, keyed_seed


def test_seeds_are_stable_and_separate_their_keys() -> None:
    # Written down: a seed means the same in later versions and on other machines.
    assert keyed_seed(0, "real_batch", 3, 7) == 720796901087851648
    seeds = {
        keyed_seed(s, p, i, c)
        for s in range(3)
        for p in ("a", "b")
        for i in range(10)
        for c in range(10)
    }
    assert len(seeds) == 600
    assert keyed_seed(1, "x", 11) != keyed_seed(1, "x", 1, 1)  # keys do not run together
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_do_not_touch_the_global_one() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(5, generator=keyed_generator(0, "x"))
    assert torch.equal(first, torch.rand(5, generator=keyed_generator(0, "x")))
    assert torch.equal(before, torch.random.get_rng_state())
