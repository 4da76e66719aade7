"""The last batch of an epoch: micro-batches and ranks of unequal size weigh as much as they have images."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from distill.data.batch import Batch
from distill.training.engine import Task
from distill.training.processes import Processes
from distill.training.torch_engine import TorchEngine


class Linear(Task):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Linear(64, 10)

    def forward(self, batch):
        loss = F.cross_entropy(self.network(batch.images.flatten(1).float() / 16), batch.labels)
        return {"loss": loss}


def gradient(batch, accumulation):
    task = Linear()
    engine = TorchEngine(Processes(0, 1, torch.device("cpu")))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    engine.prepare(task, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), accumulation)
    terms = engine.step(batch)
    return task.network.weight.grad.clone(), terms["loss"]


def digits(count, weight=1.0):
    data = load_digits()
    images = torch.from_numpy(data.images[:count]).to(torch.uint8)[:, None]
    return Batch(images, torch.from_numpy(data.target[:count]).long(), torch.arange(count), 0, weight)


def test_five_images_in_two_micro_batches_give_the_mean_over_five():
    for count in (5, 6, 3, 1):
        whole, loss = gradient(digits(count), 1)
        parts, same = gradient(digits(count), 2)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(same, loss)


def test_the_weight_of_a_batch_scales_its_gradient():
    whole, _ = gradient(digits(6), 1)
    heavier, _ = gradient(digits(6, weight=1.5), 1)
    torch.testing.assert_close(heavier, 1.5 * whole)
