"""Does a claim follow the model when its weights change, and do shared switches come back when
several threads hold them?
"""

import threading

import torch
from torch import nn

import calipers
from calipers.bounds.rounding import plain_sums


def test_a_certificate_and_the_float64_copy_follow_the_weights() -> None:
    module = nn.Linear(2, 2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        module.bias.zero_()
    model, x, y = calipers.Classifier(module), torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    ball = calipers.Ball("linf", 0.25)
    assert bool(calipers.certify(model, x, y, ball, calipers.certificates.CROWN()).certified.all())
    before = model.logits64(x)
    with torch.no_grad():
        module.weight.neg_()
    assert torch.equal(model.logits64(x), -before)
    assert not bool(
        calipers.certify(model, x, y, ball, calipers.certificates.CROWN()).certified.any()
    )


def test_the_last_of_several_holders_puts_the_switches_back() -> None:
    before = torch.backends.cudnn.enabled
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with plain_sums():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=hold)
    with plain_sums():
        other.start()
        assert inside.wait(10)
    assert not torch.backends.cudnn.enabled, "one holder is left"
    leave.set()
    other.join()
    assert torch.backends.cudnn.enabled == before
