"""Every loss against a loop over single entries in plain Python, and against torch where torch has it."""

from math import exp, inf, log, log1p, nan

import pytest
import torch
import torch.nn.functional as F

from modeling_hsvlt.losses_multilabel import (
    MULTILABEL_LOSSES,
    UNKNOWN_LABEL,
    asymmetric_loss,
    binary_cross_entropy_loss,
    distribution_balanced_loss,
    focal_loss,
    multilabel_loss,
    partial_binary_cross_entropy_loss,
    two_way_loss,
    weak_assume_negative_loss,
    zlpr_loss,
)

COUNTS = [30, 2, 9, 0, 60]  # one label never, one always present
# With its own weight this one learns from unknown entries; without, it promises what the others do.
KWARGS = {
    "distribution_balanced": {"class_counts": COUNTS, "num_samples": 60},
    "weak_assume_negative": {"unknown_weight": 0},
}


def sigmoid(x):
    return 1 / (1 + exp(-x))


def softplus(x):
    return log1p(exp(-abs(x))) + max(x, 0.0)


def example(seed=0, batch=6, num_labels=5):
    """Logits, hard labels with some unknown ones (row 0 has no positive), and the known entries."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, num_labels, generator=generator)
    labels = (torch.rand(batch, num_labels, generator=generator) < 0.4).float()
    labels[torch.rand(batch, num_labels, generator=generator) < 0.2] = UNKNOWN_LABEL
    labels[0] = torch.tensor([0.0, 0, UNKNOWN_LABEL, 0, 0])
    return logits, labels, labels != UNKNOWN_LABEL


def loop(entry_loss, logits, labels):
    """Mean of `entry_loss(logit, label)` over known entries, one at a time in Python floats."""
    losses = [
        entry_loss(s, y)
        for row, targets in zip(logits.tolist(), labels.tolist(), strict=True)
        for s, y in zip(row, targets, strict=True)
        if y != UNKNOWN_LABEL
    ]
    return sum(losses) / len(losses)


# --- element by element -------------------------------------------------------------------------------------------


def bce_entry(s, y):
    return -(y * log(sigmoid(s)) + (1 - y) * log(1 - sigmoid(s)))


def focal_entry(s, y, gamma=2.0, alpha=None):
    p = sigmoid(s)
    positive, negative = -((1 - p) ** gamma) * log(p), -(p**gamma) * log(1 - p)
    if alpha is not None:
        positive, negative = alpha * positive, (1 - alpha) * negative
    return y * positive + (1 - y) * negative


def asl_entry(s, y, gamma_neg=4.0, gamma_pos=0.0, clip=0.05):
    p = sigmoid(s)
    shifted = max(p - clip, 0.0)
    return -((1 - p) ** gamma_pos) * log(p) if y == 1 else -(shifted**gamma_neg) * log(1 - shifted)


@pytest.mark.parametrize(
    ("loss", "entry", "kwargs"),
    [
        (binary_cross_entropy_loss, bce_entry, {}),
        (focal_loss, focal_entry, {}),
        (focal_loss, focal_entry, {"gamma": 1.5, "alpha": 0.25}),
        (asymmetric_loss, asl_entry, {}),
        (asymmetric_loss, asl_entry, {"gamma_neg": 2.0, "gamma_pos": 1.0, "clip": 0.0}),
    ],
)
def test_elementwise_losses_match_a_loop(loss, entry, kwargs):
    logits, labels, known = example()
    expected = loop(lambda s, y: entry(s, y, **kwargs), logits, labels)
    assert loss(logits, labels, **kwargs).item() == pytest.approx(expected, rel=1e-5)
    total = loss(logits, labels, reduction="sum", **kwargs).item()
    assert total == pytest.approx(expected * known.sum().item(), rel=1e-5)


def test_bce_matches_torch_with_positive_weights():
    logits, labels, _ = example()
    labels = labels.clamp(min=0)
    weight = [1.0, 2.0, 0.5, 3.0, 1.0]
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(weight))
    torch.testing.assert_close(binary_cross_entropy_loss(logits, labels, pos_weight=weight), expected)


def test_asymmetric_focusing_weight_is_a_constant_for_the_gradient():
    logits, labels, _ = example()
    logits, labels = logits.double().requires_grad_(), labels.clamp(min=0)
    asymmetric_loss(logits, labels, reduction="sum").backward()
    p = logits.detach().sigmoid()
    shifted = (p - 0.05).clamp(min=0)
    negative = shifted**4 / (1 - shifted) * p * (1 - p) * (shifted > 0)
    torch.testing.assert_close(logits.grad, torch.where(labels == 1, p - 1, negative), rtol=1e-4, atol=1e-6)


def test_soft_labels_lie_between_the_hard_ones():
    logits, labels, _ = example()
    labels = labels.clamp(min=0)
    for loss in (binary_cross_entropy_loss, focal_loss):
        soft = loss(logits, 0.25 + 0.5 * labels)
        torch.testing.assert_close(soft, 0.75 * loss(logits, labels) + 0.25 * loss(logits, 1 - labels))


# --- distribution-balanced ----------------------------------------------------------------------------------------


def distribution_balanced_loop(
    logits,
    labels,
    *,
    class_counts,
    num_samples,
    tau=0.1,
    beta=10.0,
    mu=0.2,
    negative_scale=2.0,
    kappa=0.025,
    positive_weight="none",
    focal_gamma=0.0,
    focal_alpha=2.0,
):
    """HP-DVAL eq. 11 to 15 as printed (with the positives in the denominator), entry by entry."""
    losses = []
    counts = [min(max(n, 1), num_samples - 1) for n in class_counts]
    for scores, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        denominator = sum(1 / n for n, y in zip(counts, targets, strict=True) if y == 1)
        for s, y, n in zip(scores, targets, counts, strict=True):
            if y == UNKNOWN_LABEL:
                continue
            ratio = 1 / n / denominator if denominator else inf
            r = tau + (sigmoid(beta * (ratio - mu)) if ratio < 60 else 1.0)
            z = s - kappa * log(num_samples / n - 1)
            w = {"none": 1.0, "class": n / max(counts)}.get(positive_weight, positive_weight)
            bce = softplus(-w * z) if y == 1 else softplus(negative_scale * z)
            loss = r * (bce if y == 1 else bce / negative_scale)
            if focal_gamma:
                loss *= focal_alpha * (1 - exp(-bce)) ** focal_gamma
            losses.append(loss)
    return sum(losses) / len(losses)


# The specification's fixture F1, computed apart from this code.
F1 = {
    "logits": torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.3, -0.4]]),
    "labels": torch.tensor([[1, 0, 1], [0, 1, 0]]),
    "class_counts": [50, 10, 2],
    "num_samples": 60,
}


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, 0.3402099),
        ({"positive_weight": "class"}, 0.3591594),
        ({"focal_gamma": 2.0}, 0.1381774),  # 0.1192095 where the focal factor is one number a batch
    ],
)
def test_distribution_balanced_fixture(kwargs, expected):
    assert distribution_balanced_loss(**F1, **kwargs).item() == pytest.approx(expected, abs=1e-7)
    assert distribution_balanced_loop(**F1, **kwargs) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"positive_weight": "class", "mu": 0.3, "negative_scale": 5.0, "kappa": 0.01},
        {"positive_weight": 5.0, "tau": 0.3, "beta": 4.0},
        {"focal_gamma": 2.0},
        {"focal_gamma": 1.5, "focal_alpha": 0.7, "positive_weight": "class"},
    ],
)
def test_distribution_balanced_matches_a_loop(kwargs):
    logits, labels, known = example()
    kwargs = {**KWARGS["distribution_balanced"], **kwargs}
    expected = distribution_balanced_loop(logits, labels, **kwargs)
    assert distribution_balanced_loss(logits, labels, **kwargs).item() == pytest.approx(expected, rel=1e-5)
    total = distribution_balanced_loss(logits, labels, reduction="sum", **kwargs).item()
    assert total == pytest.approx(expected * known.sum().item(), rel=1e-5)


def test_class_positive_weight_nearly_removes_the_gradient_of_rare_positives():
    # Fixture F2: gradient of the positive term at s = v, for classes of 1128, 100, 20 and 6 images.
    counts, num_samples = [1128, 100, 20, 6], 1909
    prior = [0.025 * log(num_samples / n - 1) for n in counts]
    logits = torch.tensor([prior], requires_grad=True)
    # With tau = 1 and a huge mu the re-balanced weight is 1: what is left is the positive term.
    distribution_balanced_loss(
        logits,
        torch.ones(1, 4),
        class_counts=counts,
        num_samples=num_samples,
        tau=1.0,
        mu=1e6,
        positive_weight="class",
        reduction="sum",
    ).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.5, -0.04433, -0.00887, -0.00266]]), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"class_counts": [1, 2]}, "each of the 3 labels"),
        ({"class_counts": [1, 2, 61]}, "between 0 and num_samples=60"),
        ({"class_counts": [1, 2, nan]}, "between 0 and num_samples=60"),
        ({"positive_weight": "clas"}, "'none', 'class' or a number"),
    ],
)
def test_distribution_balanced_names_what_is_wrong(kwargs, message):
    with pytest.raises(ValueError, match=message):
        distribution_balanced_loss(**{**F1, **kwargs})


# --- losses that compare the labels of an image ------------------------------------------------------------------


def test_zlpr_matches_a_loop():
    logits, labels, _ = example()
    labels[1] = UNKNOWN_LABEL  # a row without any known label is no image of the mean
    losses = []
    for scores, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        pairs = [(s, y) for s, y in zip(scores, targets, strict=True) if y != UNKNOWN_LABEL]
        if pairs:
            losses.append(
                log(1 + sum(exp(-s) for s, y in pairs if y == 1)) + log(1 + sum(exp(s) for s, y in pairs if y == 0))
            )
    assert len(losses) == len(logits) - 1
    assert zlpr_loss(logits, labels).item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert zlpr_loss(logits, labels, reduction="sum").item() == pytest.approx(sum(losses), rel=1e-5)


def test_zlpr_of_one_label_is_bce():
    logits = torch.tensor([[1.5], [-0.3]])
    labels = torch.tensor([[1.0], [0.0]])
    torch.testing.assert_close(zlpr_loss(logits, labels), binary_cross_entropy_loss(logits, labels))


def test_two_way_image_without_negatives_has_no_loss():
    logits = torch.tensor([[-300.0, -300.0, 0.0]], requires_grad=True)
    loss = two_way_loss(logits, torch.tensor([[1, 1, UNKNOWN_LABEL]]))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


def test_two_way_matches_a_loop():
    logits, labels, _ = example()
    labels[:, 4] = torch.tensor([0.0, 0, UNKNOWN_LABEL, 0, 0, 0])  # a column without a positive
    labels[5] = 1  # a row without a negative: no loss, but part of the mean
    temperature, expected, total = 3.0, 0.0, 0.0
    for table in (
        list(zip(logits.tolist(), labels.tolist(), strict=True)),
        list(zip(logits.T.tolist(), labels.T.tolist(), strict=True)),
    ):
        losses = []
        for scores, targets in table:
            positives = [exp(-s / temperature) for s, y in zip(scores, targets, strict=True) if y == 1]
            negatives = [exp(s) for s, y in zip(scores, targets, strict=True) if y == 0]
            if positives:
                losses.append(softplus(log(sum(negatives)) + temperature * log(sum(positives))) if negatives else 0.0)
        expected += sum(losses) / len(losses)
        total += sum(losses)
    assert two_way_loss(logits, labels, positive_temperature=temperature).item() == pytest.approx(expected, rel=1e-5)
    summed = two_way_loss(logits, labels, positive_temperature=temperature, reduction="sum").item()
    assert summed == pytest.approx(total, rel=1e-5)


# --- partly labelled images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"alpha": 1, "beta": 0, "gamma": -1}, {"alpha": -2, "beta": 3, "gamma": 0.5}])
def test_partial_bce_matches_a_loop(kwargs):
    logits, labels, _ = example()
    labels[4] = UNKNOWN_LABEL
    alpha, beta, gamma = (kwargs.get(key, default) for key, default in (("alpha", -4.45), ("beta", 5.45), ("gamma", 1)))
    expected = []
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        losses = [bce_entry(s, y) for s, y in zip(row, targets, strict=True) if y != UNKNOWN_LABEL]
        if losses:
            fraction = len(losses) / len(row)
            expected.append((alpha * fraction**gamma + beta) / len(row) * sum(losses))
    assert len(expected) == 5
    result = partial_binary_cross_entropy_loss(logits, labels, **kwargs)
    assert result.item() == pytest.approx(sum(expected) / 5, rel=1e-5)
    total = partial_binary_cross_entropy_loss(logits, labels, reduction="sum", **kwargs)
    assert total.item() == pytest.approx(sum(expected), rel=1e-5)


def test_partial_bce_of_whole_labels_is_bce():
    logits, labels, _ = example()
    labels = labels.clamp(min=0)
    expected = binary_cross_entropy_loss(logits, labels)
    torch.testing.assert_close(partial_binary_cross_entropy_loss(logits, labels), expected)


@pytest.mark.parametrize("weight", [None, 0.3, 1.0, 0.0])
def test_weak_assume_negative_matches_a_loop(weight):
    logits, labels, _ = example()
    labels[4] = UNKNOWN_LABEL
    factor = 1 / 4 if weight is None else weight
    losses = [
        bce_entry(s, y) if y != UNKNOWN_LABEL else factor * bce_entry(s, 0)
        for row, targets in zip(logits.tolist(), labels.tolist(), strict=True)
        if max(targets) >= 0
        for s, y in zip(row, targets, strict=True)
    ]
    assert len(losses) == 25
    result = weak_assume_negative_loss(logits, labels, unknown_weight=weight)
    assert result.item() == pytest.approx(sum(losses) / 25, rel=1e-5)
    total = weak_assume_negative_loss(logits, labels, unknown_weight=weight, reduction="sum")
    assert total.item() == pytest.approx(sum(losses), rel=1e-5)


def test_weak_assume_negative_pushes_unknown_labels_down_where_something_is_known():
    logits = torch.zeros(2, 5, requires_grad=True)
    labels = torch.full((2, 5), UNKNOWN_LABEL)
    labels[0, 2] = 1
    weak_assume_negative_loss(logits, labels, reduction="sum").backward()
    # The four unknown labels of an image weigh together what its positive weighs.
    assert logits.grad.tolist() == [[0.125, 0.125, -0.5, 0.125, 0.125], [0] * 5]


def test_only_a_loss_with_negatives_learns_from_single_positives():
    """Each image shows what its coordinates say, and one present label of it is known."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(512, 4, generator=generator)
    truth = images > 0
    first = torch.where(truth, torch.rand(512, 4, generator=generator), -1.0).argmax(1)
    labels = torch.full((512, 4), float(UNKNOWN_LABEL))
    labels[torch.arange(512), first] = 1
    accuracy = {}
    for name in ("partial_bce", "weak_assume_negative"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            multilabel_loss(model(images), labels, name).backward()
            optimizer.step()
        answers = model(images) > 0
        accuracy[name] = ((answers == truth).float().mean().item(), answers.float().mean().item())
    assert accuracy["partial_bce"][1] > 0.8  # yes to nearly everything, while half is absent
    assert accuracy["weak_assume_negative"][0] > 0.75


# --- what every loss promises -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MULTILABEL_LOSSES)
class TestEveryLoss:
    def loss(self, name, logits, labels, **kwargs):
        return MULTILABEL_LOSSES[name](logits, labels, **KWARGS.get(name, {}), **kwargs)

    def test_unknown_entries_have_exactly_no_gradient(self, name):
        logits, labels, known = example()
        # What an unknown entry holds must not matter, whatever it is.
        logits[~known] = torch.tensor([nan, inf, -inf]).repeat(10)[: (~known).sum()]
        logits.requires_grad_()
        loss = self.loss(name, logits, labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert (logits.grad[~known] == 0).all()
        assert (logits.grad[known] != 0).any()
        assert torch.isfinite(logits.grad).all()

    def test_unknown_entries_do_not_change_the_loss(self, name):
        logits, labels, known = example()
        changed = torch.where(known, logits, 7.0)
        assert self.loss(name, changed, labels).item() == self.loss(name, logits, labels).item()

    def test_nothing_known_gives_zero_with_a_gradient(self, name):
        logits = torch.randn(3, 5, requires_grad=True)
        loss = self.loss(name, logits, torch.full((3, 5), UNKNOWN_LABEL))
        loss.backward()
        assert loss.item() == 0
        assert (logits.grad == 0).all()

    def test_half_precision_and_integer_labels(self, name):
        logits, labels, _ = example()
        expected = self.loss(name, logits.bfloat16().float(), labels)
        result = self.loss(name, logits.bfloat16(), labels.long())
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected)

    def test_extreme_logits_stay_finite(self, name):
        logits = torch.tensor([[60.0, -60.0, 60.0, -60.0, 0.0]], requires_grad=True)
        loss = self.loss(name, logits, torch.tensor([[1, 1, 0, 0, 1]]))
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()

    def test_unknown_reduction_is_an_error(self, name):
        logits, labels, _ = example()
        with pytest.raises(ValueError, match="reduction must be"):
            self.loss(name, logits, labels, reduction="average")

    def test_the_config_chooses_it(self, name):
        logits, labels, _ = example()
        chosen = multilabel_loss(logits, labels, name, KWARGS.get(name))
        assert chosen.item() == self.loss(name, logits, labels).item()


# Not the asymmetric loss: its focusing weight is a constant for the gradient, which is tested by formula above.
@pytest.mark.parametrize("name", sorted(MULTILABEL_LOSSES.keys() - {"asl"}))
def test_gradient_matches_finite_differences(name):
    loss, kwargs = MULTILABEL_LOSSES[name], KWARGS.get(name, {})
    logits, labels, known = example(seed=3, batch=4)
    logits = logits.clamp(-2, 2).requires_grad_()
    loss(logits, labels, **kwargs).backward()
    step = 1e-2
    for row, column in known.nonzero().tolist():
        bump = torch.zeros_like(logits)
        bump[row, column] = step
        with torch.no_grad():
            rise = loss(logits + bump, labels, **kwargs) - loss(logits - bump, labels, **kwargs)
        assert logits.grad[row, column].item() == pytest.approx(rise.item() / (2 * step), abs=1e-4)


def test_unknown_loss_type_is_an_error():
    with pytest.raises(ValueError, match="'hinge' is unknown; choose one of"):
        multilabel_loss(torch.zeros(1, 2), torch.zeros(1, 2), "hinge")
