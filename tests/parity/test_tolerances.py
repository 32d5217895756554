"""The comparison up to rounding, without recorded cases: rounding passes, a mistake does not."""

import torch
from originals import assert_all_close, assert_mistakes_are_caught, compute_twice

from clipfusionvad import create_model


def test_rounding_passes_and_a_mistake_of_one_in_ten_thousand_does_not():
    torch.manual_seed(3)
    options = {"embed_dim": 64, "visual_width": 64, "visual_length": 32, "visual_layers": 1}
    model = create_model("clipfusionvad", ["normal", "fire"], clip="toy", **options).eval()
    visual, lengths = torch.randn(3, 32, 64), torch.tensor([32, 20, 7])

    def compute(model):
        with torch.no_grad():
            out = model(visual, lengths)
        return {"coarse": out.coarse_logits, "fine": out.fine_logits}

    ours, exact = compute_twice(model, compute)
    assert exact["fine"].dtype == torch.float64
    assert_all_close((ours, exact), exact)
    assert_mistakes_are_caught((ours, exact), exact)
