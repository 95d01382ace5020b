from io import StringIO

from tqdm import tqdm

from training.loop.fit import show
from training.loop.run import Progress


def test_the_bar_shows_the_score_once_there_is_one():
    progress = Progress(label_names=["cat"], dataset="photos", total_steps=3, batches=[1, 1, 1, 0], options={})
    with tqdm(total=3, file=StringIO()) as bar:
        show(bar, progress, loss=0.25)
        assert "loss=0.25" in str(bar) and "mAP" not in str(bar)
        progress.best_mAP = 0.5
        show(bar, progress)
        assert "best_mAP=0.5" in str(bar)
