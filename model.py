"""The network: a small convolutional classifier of 28×28 grey images."""

import torch.nn as nn
import torch.nn.functional as F


class Net(nn.Module):
    """Three convolutions and two fully connected layers, 105,114 parameters for ten classes.

    Input: float tensor of shape (N, 1, 28, 28), normalised (see `utils.BatchLoader`). 29 to 31
    pixels work as well, because the pooling drops the last ones; PyTorch refuses most other sizes.
    Output: log-probabilities of shape (N, num_classes).

    `F.nll_loss` is the matching criterion. `nn.CrossEntropyLoss` works as well: it applies
    log-softmax, which leaves log-probabilities unchanged.
    """

    def __init__(self, num_classes=10):
        super().__init__()
        # Batch norm has a bias of its own, so the convolutions before it need none. They do not pad
        # either: MNIST's digits keep clear of the border, and smaller maps are less work.
        self.conv1 = nn.Conv2d(1, 16, kernel_size=5, bias=False)
        self.pool1 = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 48, kernel_size=3, bias=False)
        self.pool2 = nn.MaxPool2d(2)
        self.norm2 = nn.BatchNorm2d(48)
        self.conv3 = nn.Conv2d(48, 96, kernel_size=3, bias=False)
        self.norm3 = nn.BatchNorm2d(96)
        self.fc1 = nn.Linear(96 * 3 * 3, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):
        # Pooling first leaves batch norm and ReLU a quarter of the work.
        x = F.relu(self.norm1(self.pool1(self.conv1(x))))  # (N, 16, 12, 12)
        x = F.relu(self.norm2(self.pool2(self.conv2(x))))  # (N, 48, 5, 5)
        x = F.relu(self.norm3(self.conv3(x)))  # (N, 96, 3, 3)
        x = x.reshape(x.shape[0], 96 * 3 * 3)  # (N, 864)
        x = F.relu(self.fc1(x))  # (N, 64)
        return F.log_softmax(self.fc2(x), dim=1)  # (N, num_classes)
