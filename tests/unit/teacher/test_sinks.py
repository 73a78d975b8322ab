import logging
from types import SimpleNamespace

import pytest
import torch

from medalign.contracts import TeacherTargets
from medalign.teacher import sinks
from medalign.teacher.loading import load_teacher
from medalign.teacher.sinks import SinkMonitor, mask_outliers, sink_shares


def targets(attention: torch.Tensor) -> TeacherTargets:
    return TeacherTargets(torch.zeros(*attention.shape, 2), attention)


def batch(images: int, patches: int, weight: float = 1.0) -> SimpleNamespace:
    valid = torch.ones(images, patches, dtype=torch.bool)
    valid[:, : patches // 4] = False
    return SimpleNamespace(image_weight=torch.full((images,), weight), patch_valid=valid)


@pytest.mark.parametrize(("patches", "top"), [(64, 1), (100, 1), (101, 2), (576, 6)])
def test_shares_of_an_even_map_are_shares_of_patches(patches, top):
    shares = sink_shares(torch.full((2, patches), 0.7), batch(2, patches).patch_valid)
    torch.testing.assert_close(shares.top, torch.full((2,), top / patches))
    torch.testing.assert_close(shares.padding, torch.full((2,), (patches // 4) / patches))


def test_shares_of_a_map_with_a_sink():
    attention = torch.full((1, 100), 0.5 / 99)
    attention[0, 3] = 0.5
    shares = sink_shares(attention, batch(1, 100).patch_valid)
    assert shares.top.item() == pytest.approx(0.5)
    assert shares.padding.item() == pytest.approx(0.5 + 24 * 0.5 / 99)


@pytest.mark.parametrize(("sink", "warnings"), [(0.01, 0), (0.2, 1), (0.5, 2)])
def test_the_monitor_reports_once_and_warns_past_the_limits(caplog, sink, warnings):
    """A sink of 0.2 on padding is more than the 10 % allowed there, one of 0.5 is also more than 30 % in one patch."""
    attention = torch.full((20, 100), (1 - sink) / 99)
    attention[:, 0] = sink
    valid = torch.ones(20, 100, dtype=torch.bool)
    valid[:, 0] = False
    monitor, seen = SinkMonitor(), SimpleNamespace(image_weight=torch.ones(20), patch_valid=valid)
    with caplog.at_level(logging.INFO, "medalign"):
        monitor(targets(attention), seen)
        assert not caplog.records  # 20 of 32 images
        monitor(targets(attention), seen)
        monitor(targets(attention), seen)
    assert caplog.records[0].getMessage() == (
        f"attention of the teacher: {100 * sink:.1f} % in the top 1 % of patches (1.0 % if even), "
        f"{100 * sink:.1f} % on padding"
    )
    assert [record.levelno for record in caplog.records[1:]] == [logging.WARNING] * warnings
    assert all(
        "teacher.mask_sinks" in r.getMessage() or "losses.ignore_padding" in r.getMessage() for r in caplog.records[1:]
    )


def test_a_peak_on_a_small_grid_is_not_taken_for_a_sink(caplog):
    attention = torch.full((sinks.IMAGES, 64), 0.5 / 63)
    attention[:, 20] = 0.5
    with caplog.at_level(logging.INFO, "medalign"):
        SinkMonitor()(targets(attention), batch(sinks.IMAGES, 64))
    assert "50.0 % in the top 1 % of patches (1.6 % if even)" in caplog.records[0].getMessage()
    assert all("teacher.mask_sinks" not in record.getMessage() for record in caplog.records)


def test_dummy_images_are_not_counted():
    monitor = SinkMonitor()
    monitor(targets(torch.ones(sinks.IMAGES, 16)), batch(sinks.IMAGES, 16, weight=0.0))
    assert not monitor._seen


def test_patches_with_an_outlying_norm_get_no_attention():
    generator = torch.Generator().manual_seed(0)
    patches = torch.nn.functional.normalize(torch.randn(2, 9, 5, generator=generator), dim=-1)
    patches[0, 4] *= 3.5
    patches[1, 2] *= 2.5
    attention = torch.rand(2, 9, generator=generator)
    masked = mask_outliers(attention, patches.norm(dim=-1), 3)
    expected = attention.clone()
    expected[0, 4] = 0
    assert torch.equal(masked, expected)


def test_a_teacher_masks_its_sinks(folder, pixels):
    plain, masking = load_teacher(folder), load_teacher(folder, mask_sinks=1.1)
    features, attention = masking(pixels)
    assert torch.equal(features, plain(pixels)[0])
    norms = plain.tower.encode(pixels).after.norm(dim=-1)
    outlying = norms > 1.1 * norms.median(1, keepdim=True).values
    assert 0 < outlying.sum() < outlying.numel() / 2
    assert (attention[outlying] == 0).all() and torch.equal(attention[~outlying], plain(pixels)[1][~outlying])
