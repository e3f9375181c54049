import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Net


@pytest.mark.parametrize("num_classes", [10, 4])
def test_output_is_log_probabilities(num_classes):
    output, target = Net(num_classes=num_classes)(torch.randn(7, 1, 28, 28)), torch.zeros(7).long()
    assert output.shape == (7, num_classes)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(7))
    torch.testing.assert_close(F.nll_loss(output, target), nn.CrossEntropyLoss()(output, target))


def test_it_can_be_traced_and_exported():
    net, images = Net().eval(), torch.randn(3, 1, 28, 28)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net, (images,), dynamic_shapes=shapes)
    for copy in (torch.fx.symbolic_trace(net), exported.module()):
        for batch in (images, images[:2]):
            torch.testing.assert_close(copy(batch), net(batch))


@pytest.mark.parametrize("training", [True, False])
def test_another_shape_is_refused(training):
    for shape in (28, 28), (1, 28, 28), (5, 28, 28), (5, 3, 28, 28), (9, 1, 32, 32), (4, 1, 16, 16):
        with pytest.raises((RuntimeError, ValueError)):
            Net().train(training)(torch.zeros(shape))
