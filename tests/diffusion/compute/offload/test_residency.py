"""Which components leave for another one, and what interruptions cost."""

from __future__ import annotations

import random

from vllm_omni.diffusion.compute.offload.residency import Residency

SIZES = {"text_encoder": 16, "transformer": 41, "vae": 1}


def come(residency: Residency, name: str) -> list[str]:
    leaving = residency.leaving_for(name)
    for other in leaving:
        residency.leave(other)
    residency.note_use(name)
    return leaving


def test_only_as_many_leave_as_needed_and_the_least_recently_used_first() -> None:
    residency = Residency(SIZES, 44)
    assert [come(residency, name) for name in ("text_encoder", "vae", "transformer")] == [[], [], ["text_encoder"]]
    assert residency.present == ("vae", "transformer")
    assert come(residency, "text_encoder") == ["vae", "transformer"]  # the VAE alone makes too little room
    assert residency.num_bytes == 16


def test_a_component_that_is_here_needs_no_room() -> None:
    residency = Residency(SIZES, 44)
    come(residency, "vae")
    come(residency, "transformer")
    assert come(residency, "vae") == []
    assert residency.present == ("transformer", "vae")


def test_a_component_larger_than_the_limit_is_alone() -> None:
    residency = Residency(SIZES, 10)
    come(residency, "vae")
    assert come(residency, "transformer") == ["vae"]
    assert residency.peak_bytes == 41
    assert Residency(SIZES, 44).peak_bytes == 44
    assert Residency(SIZES, 100).peak_bytes == 58


def test_one_in_use_stays() -> None:
    residency = Residency(SIZES, 44)
    come(residency, "transformer")
    assert residency.leaving_for("text_encoder", in_use=["transformer"]) == []


def test_an_interruption_costs_what_it_displaces_there_and_back() -> None:
    encode = ["text_encoder", "transformer"]
    assert Residency(SIZES, 44).bytes_of_interruption(["transformer"], encode) == 16 + 41
    assert Residency(SIZES, 44).bytes_of_interruption(["transformer"], ["vae"]) == 0
    assert Residency(SIZES, 41).bytes_of_interruption(["transformer"], ["vae"]) == 1 + 41
    assert Residency(SIZES, 58).bytes_of_interruption(["transformer"], encode) == 0


def test_random_uses_stay_within_the_limit_unless_one_alone_exceeds_it() -> None:
    rng = random.Random(0)
    for _ in range(50):
        sizes = {name: rng.randint(1, 50) for name in "abcd"}
        residency = Residency(sizes, rng.randint(1, 120))
        for _ in range(100):
            name = rng.choice("abcd")
            come(residency, name)
            assert residency.present[-1] == name
            assert residency.num_bytes <= max(residency.max_bytes, sizes[name])
            assert residency.num_bytes <= residency.peak_bytes
