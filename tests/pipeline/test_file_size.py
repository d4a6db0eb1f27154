"""Units and bits out of one budget: the best of all choices, in files that are as small as they were to be."""

import itertools

import pytest
import torch
from scored_models import bert, snapshot, text_batch

from hap_hf import BitConfig, ConfigError, HapConfig, Sensitivity, prune_to_bytes, quantize_
from hap_hf.bits import bit_sensitivity
from hap_hf.file_size import Candidate, candidate_of
from hap_hf.model.quantizing import file_bytes, saved_state
from hap_hf.names.bits import Stored

BATCHES = [text_batch(rows=6, labels=torch.tensor([0, 1, 1, 0, 1, 0]))]
LEAST = HapConfig(target_params=0.3, progress=False)


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_of_bits_within_the_bytes_is_better(seed):
    random = torch.Generator().manual_seed(seed)
    shapes = {f"l{i}": [tuple(torch.randint(2, 9, (2,), generator=random).tolist())] for i in range(5)}
    rise = {name: {b: 2.0**-b * float(torch.rand((), generator=random)) for b in (3, 4, 8)} for name in shapes}
    sizes = {name: rows * columns for name, [(rows, columns)] in shapes.items()}
    padded = Candidate(1.0, 0.0, Sensitivity(rise, {}, sizes), shapes, 100)
    shapes = {name: [(rows, 8 * columns)] for name, [(rows, columns)] in shapes.items()}
    even = Candidate(1.0, 0.0, Sensitivity(rise, {}, {n: 8 * s for n, s in sizes.items()}), shapes, 100)
    for candidate in (padded, even):
        every = [dict(zip(shapes, bits, strict=True)) for bits in itertools.product((3, 4, 8), repeat=5)]
        most, least = (candidate.num_bytes(dict.fromkeys(shapes, b)) for b in (8, 3))
        target = (most + least) // 2
        found = candidate.within(target)
        best = min(
            (sum(rise[n][b] for n, b in bits.items()) for bits in every if candidate.num_bytes(bits) <= target),
        )
        assert candidate.num_bytes(found.bits) <= target
        if candidate is even:  # where no row ends within a byte
            assert found.rise == pytest.approx(best)
        assert found.rise >= best - 1e-12
        assert candidate.within(least - 1) is None


def test_units_and_bits_are_chosen_by_one_sum_and_the_file_has_the_bytes():
    settings = {"held_out": BATCHES, "menu": (4, 8), "num_shares": 5}
    sensitivity = bit_sensitivity(bert(), BATCHES, menu=(4, 8), progress=False)
    whole = candidate_of(bert(), None, 1.0, sensitivity)
    eight, four = (whole.num_bytes(dict.fromkeys(sensitivity.rise, b)) for b in (8, 4))
    for target, everything_stays in ((eight, True), (four - 1, False)):
        model = bert()
        report = prune_to_bytes(model, BATCHES, target, LEAST, **settings)
        state = saved_state(model, model.state_dict(), Stored.CODES)
        assert file_bytes(state) == report.bits.bytes_after <= target
        assert report.rise == min(rise for _, rise in report.tried)
        assert dict(report.tried)[report.keep] == report.rise
        assert (report.keep == 1) is everything_stays is (report.pruning is None)
        assert len(report.tried) == (5 if everything_stays else 4)
        assert "rises by share" in str(report)


def test_shares_of_the_whole_model_are_compared_too():
    model = bert()
    settings = {"held_out": BATCHES, "menu": (4, 8), "num_shares": 3}
    target = prune_to_bytes(bert(), BATCHES, 10**6, LEAST, **settings).bits.bytes_after - 1
    report = prune_to_bytes(model, BATCHES, target, HapConfig(target_model_params=0.8, progress=False), **settings)
    assert report.bits.bytes_after <= target
    assert min(keep for keep, _ in report.tried) == pytest.approx(0.8)
    assert model.num_parameters() >= 0.75 * bert().num_parameters()


def test_the_bytes_are_those_of_the_file_whatever_the_bits():
    model = bert()
    sensitivity = bit_sensitivity(model, BATCHES, menu=(3, 8), progress=False)
    candidate = candidate_of(model, None, 1.0, sensitivity)
    bits = {name: (3, 8)[i % 2] for i, name in enumerate(sensitivity.rise)}
    for names in sensitivity.tied:
        bits |= dict.fromkeys(names, 3)
    report = quantize_(model, BATCHES, BitConfig().with_weight_bits(bits))
    assert candidate.num_bytes(bits) == report.bytes_after
    assert candidate.removed == 0


def test_what_cannot_be_met_is_refused_before_anything_changes():
    model = bert()
    before = snapshot(model)
    for target, config, words in (
        (1000, LEAST, "no choice fits into 1,000 bytes: with 0.3 kept and 3 bits the file has"),
        (0, LEAST, "target_bytes must be"),
        (10**6, HapConfig(target_params=0.3, implant_ratio=0.3), "implant_ratio=0"),
        (10**6, HapConfig(target_params=0.3, method="magnitude"), "says nothing of the loss"),
    ):
        with pytest.raises(ConfigError, match=words):
            prune_to_bytes(model, BATCHES, target, config, num_shares=2)
    assert snapshot(model) == before
