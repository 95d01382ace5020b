"""Interruptions in the middle of a batch."""

import signal

import training.loop.step


def interrupt(monkeypatch, at_batch, how):
    """`how` is called in the middle of batch `at_batch` (counted over the whole run)."""
    batches = iter(range(10_000))
    plain = training.loop.step.normalize_pixels

    def normalize_pixels(*arguments):
        if next(batches) == at_batch:
            how()
        return plain(*arguments)

    monkeypatch.setattr(training.loop.step, "normalize_pixels", normalize_pixels)


def at_once():
    raise KeyboardInterrupt


def sigterm():
    signal.raise_signal(signal.SIGTERM)
