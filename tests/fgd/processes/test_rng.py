import io
import random

import numpy as np
import torch

from fgd.processes import rng


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2)


def equal(a, b):
    return a[:4] == b[:4] and torch.equal(a[4], b[4])


def test_state_survives_a_file_and_repeats_every_generator():
    draw()  # gauss and randn now hold a second value back, which belongs to the state
    buffer = io.BytesIO()
    torch.save(rng.get_state(), buffer)
    first = draw()
    buffer.seek(0)
    rng.set_state(torch.load(buffer, weights_only=True))
    assert equal(draw(), first)


def test_preserved_hides_draws_even_when_it_fails():
    state = rng.get_state()
    first = draw()
    rng.set_state(state)
    try:
        with rng.preserved():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert equal(draw(), first)


def test_seeded_depends_on_its_whole_key_only():
    def inside(*key):
        with rng.seeded(*key):
            return draw()

    state = rng.get_state()
    first = inside(3, 0, 7)
    draw()
    assert equal(inside(3, 0, 7), first)
    for other in ((3, 0, 8), (3, 1, 7), (4, 0, 7)):
        values = inside(*other)
        assert all(a != b for a, b in zip(values[:4], first[:4], strict=True))
    rng.set_state(state)
    outside = draw()
    rng.set_state(state)
    inside(1)
    assert equal(draw(), outside)
