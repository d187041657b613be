"""Measure a PyTorch module of your own, with its normalisation and a DataLoader.

    python own_model.py

Radii stay in the units of the data: calipers puts (x - mean) / std in front of the module.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import calipers

torch.manual_seed(0)
mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
y = torch.arange(64) % 2
x = (0.35 + 0.3 * y.view(-1, 1, 1, 1) + 0.1 * torch.randn(64, 3, 8, 8)).clamp(0, 1)
standardised = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
for _ in range(60):
    optimiser.zero_grad()
    nn.functional.cross_entropy(net(standardised), y).backward()
    optimiser.step()

model = calipers.Classifier(net.eval(), mean=mean, std=std)
loader = DataLoader(TensorDataset(x, y), batch_size=16)  # brings its labels along
result = calipers.measure(model, loader, None, calipers.Ball("linf", 0.12), plan="quick")
print(model)
print(result)
robust = result.robust_accuracy
print(f"between {robust.certified.count} and {robust.attacked.count} of {len(x)} points are robust")
