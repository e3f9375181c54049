import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, prune

from model import Net


@pytest.mark.parametrize("num_classes", [10, 4])
def test_output_is_log_probabilities(num_classes):
    output, target = Net(num_classes=num_classes)(torch.randn(7, 1, 28, 28)), torch.zeros(7).long()
    assert output.shape == (7, num_classes)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(7))
    torch.testing.assert_close(F.nll_loss(output, target), nn.CrossEntropyLoss()(output, target))


def test_made_contiguous_it_works_where_the_docstring_says_so():
    net = Net().to(memory_format=torch.contiguous_format)
    assert f"{len(parameters_to_vector(net.parameters())):,} parameters" in Net.__doc__
    prune.global_unstructured([(net.conv2, "weight")], prune.L1Unstructured, amount=0.5)
    assert (net.conv2.weight == 0).double().mean() == 0.5


@pytest.mark.parametrize(
    "shape", [(28, 28), (1, 28, 28), (5, 28, 28), (5, 3, 28, 28), (5, 1, 32, 32)]
)
def test_wrong_shape_names_both(shape):
    with pytest.raises(ValueError) as error:
        Net()(torch.zeros(shape))
    assert "(N, 1, 28, 28)" in str(error.value) and str(shape) in str(error.value)
