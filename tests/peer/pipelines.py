"""The part of PipelineTesterMixin that the source distribution lacks: what a pipeline must give."""

import unittest

import numpy as np
from PIL import Image
from transformers import ImageClassificationPipeline


class ImagePipelineTests(unittest.TestCase):
    """transformers' own image-classification pipeline on our checkpoints."""

    __test__ = False

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **kwargs):
        rng = np.random.default_rng(0)
        images = [Image.fromarray(rng.integers(0, 256, (40, side, 3), dtype=np.uint8)) for side in (30, 50)]
        return ImageClassificationPipeline(model=model, image_processor=image_processor, dtype=dtype, top_k=2), images

    def run_pipeline_test(self, pipeline, examples):
        names = set(pipeline.model.config.id2label.values())
        single = pipeline(examples[0])
        batch = pipeline(examples)
        self.assertEqual(len(batch), len(examples))
        for result in (single, *batch):
            self.assertEqual(len(result), 2)
            for entry in result:
                self.assertIn(entry["label"], names)
                self.assertTrue(0 < entry["score"] < 1)
        for one, other in zip(single, batch[0], strict=True):
            self.assertEqual(one["label"], other["label"])
            self.assertAlmostEqual(one["score"], other["score"], places=4)
