from importlib.util import find_spec

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, prune
from torchvision.models.feature_extraction import create_feature_extractor

from model import Net


@pytest.mark.parametrize("num_classes", [10, 4])
def test_output_is_log_probabilities(num_classes):
    output, target = Net(num_classes=num_classes)(torch.randn(7, 1, 28, 28)), torch.zeros(7).long()
    assert output.shape == (7, num_classes)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(7))
    torch.testing.assert_close(F.nll_loss(output, target), nn.CrossEntropyLoss()(output, target))


def test_flattening_and_pruning_its_weights_works():
    net = Net()
    assert f"{len(parameters_to_vector(net.parameters())):,} parameters" in Net.__doc__
    prune.global_unstructured([(net.conv2, "weight")], prune.L1Unstructured, amount=0.5)
    assert (net.conv2.weight == 0).double().mean() == 0.5


def test_it_can_be_traced_and_exported(tmp_path):
    net, images = Net().eval(), torch.randn(3, 1, 28, 28)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net, (images,), dynamic_shapes=shapes)
    for copy in (torch.fx.symbolic_trace(net), exported.module()):
        for batch in (images, images[:2]):
            torch.testing.assert_close(copy(batch), net(batch))
    features = create_feature_extractor(net, ["conv1", "fc1"])(images)
    assert (features["conv1"].shape, features["fc1"].shape) == ((3, 16, 24, 24), (3, 64))
    if find_spec("onnxscript"):
        torch.onnx.export(net, (images,), tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "shape", [(28, 28), (1, 28, 28), (5, 28, 28), (5, 3, 28, 28), (9, 1, 32, 32), (4, 1, 16, 16)]
)
@pytest.mark.parametrize("training", [True, False])
def test_another_shape_is_refused(shape, training):
    with pytest.raises((RuntimeError, ValueError)):
        Net().train(training)(torch.zeros(shape))
