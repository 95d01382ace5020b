"""Scores by row, whatever the processes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from training.metrics.functional import multilabel_report
from training.scoring.predict import match_labels, predict

from ...forked import forked
from ...tolerance import assert_close_metrics, assert_close_outputs
from ..tiny_checkpoint import tiny_model

COUNTS = (1, 2, 11, 13, 24)


class Images(torch.utils.data.Dataset):
    """Rows as `MultiLabelDataset` and the collator with a processor give them."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 16, 16, generator=generator)
        self.labels = torch.randint(-1, 2, (count, 3), generator=generator).float()
        self.labels[self.labels < 0] = -100

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index], "index": index}


def test_scores_are_the_sigmoid_of_the_logits_row_by_row():
    model, data = tiny_model().train(), Images(11)
    scores, labels = predict(model, DataLoader(data, batch_size=4), progress=False)
    assert scores.dtype == labels.dtype == np.float32 and model.training
    model.eval()
    with torch.no_grad():
        expected = torch.stack([model(pixel_values=pixels[None]).logits[0].sigmoid() for pixels in data.pixels])
    assert_close_outputs(scores, expected)
    assert expected.std(0).min() > 1e-3  # else any order would pass
    np.testing.assert_array_equal(labels, data.labels)


def test_a_shuffling_loader_gives_the_same_rows():
    model, data = tiny_model(), Images(11)
    expected = predict(model, DataLoader(data, batch_size=4), progress=False)
    shuffled = predict(model, DataLoader(data, batch_size=4, shuffle=True), progress=False)
    assert_close_outputs(shuffled[0], expected[0])
    np.testing.assert_array_equal(shuffled[1], expected[1])


def test_the_sigmoid_of_a_bf16_model_is_fp32():
    scores, _ = predict(tiny_model().to(torch.bfloat16), DataLoader(Images(5), batch_size=4), progress=False)
    assert (torch.from_numpy(scores).to(torch.bfloat16).float().numpy() != scores).any()


def test_labels_that_a_model_left_out_score_zero():
    scores, _ = predict(tiny_model(candidate_labels=2), DataLoader(Images(5), batch_size=4), progress=False)
    assert ((scores == 0).sum(1) == 1).all()


def test_loaders_that_would_give_wrong_scores_are_refused():
    data = Images(5)
    with pytest.raises(RuntimeError, match="gave 4 of 5 rows"):
        predict(tiny_model(), DataLoader(data, batch_size=2, drop_last=True), progress=False)
    data.pixels = data.pixels.to(torch.uint8)
    with pytest.raises(ValueError, match="pixels are uint8"):
        predict(tiny_model(), DataLoader(data, batch_size=2), progress=False)


def launch(function, arguments, folder):
    """`function(*arguments, folder / "<n>")` on n = 1, 2 and 3 processes."""
    for n in (1, 2, 3):
        ended = forked(function, *arguments, folder / str(n), processes=n)
        assert ended.returncode == 0, ended.stderr


def predict_and_save(folder):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == int(folder.name)
    folder.mkdir(exist_ok=True)
    for count in COUNTS:
        loader = DataLoader(Images(count), batch_size=4)
        scores, labels = predict(tiny_model(), loader, accelerator, progress=False)
        np.savez(folder / f"{count}-{accelerator.process_index}.npz", scores=scores, labels=labels)


@pytest.mark.slow
def test_several_processes_equal_one(tmp_path):
    launch(predict_and_save, [], tmp_path)
    for count in COUNTS:
        expected = np.load(tmp_path / "1" / f"{count}-0.npz")
        np.testing.assert_array_equal(expected["labels"], Images(count).labels)
        for num_processes in (2, 3):
            for process in range(num_processes):
                found = np.load(tmp_path / str(num_processes) / f"{count}-{process}.npz")
                assert_close_outputs(found["scores"], expected["scores"])
                np.testing.assert_array_equal(found["labels"], expected["labels"])
                if count > 2:
                    assert_close_metrics(multilabel_report(**found), multilabel_report(**expected))


def test_matching_gives_each_checkpoint_label_its_column():
    assert match_labels(["a", "b", "c"], ["c", "a", "b"], "checkpoint", "data") == [1, 2, 0]
    many = [f"label {number}" for number in range(30)]
    with pytest.raises(ValueError, match=r"only data has 'label 0', .*'label 4' and 25 more;"):
        match_labels(["a"], ["a", *many], "checkpoint", "data")
