import torch

import latents


def test_relative_norm_runs_from_base_to_fine_tuned():
    norms = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [3.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(latents.relative_norm(norms), torch.tensor([0.0, 0.5, 1.0, 0.25, 0.5]))


def test_classes_cut_at_a_fifth_and_four_fifths():
    share = torch.tensor([0.0, 0.19, 0.21, 0.5, 0.79, 0.81, 1.0])
    norms = torch.stack([1 - share, share], dim=-1)
    assert [latents.CLASSES[i] for i in latents.classify(norms)] == ["base_only"] * 2 + ["shared"] * 3 + ["ft_only"] * 2


def test_counts_leave_dead_latents_out_of_the_classes():
    norms = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    dead = torch.tensor([False, False, False, True])
    assert latents.count_classes(norms, dead) == {"base_only": 1, "shared": 1, "ft_only": 1, "dead": 1}
