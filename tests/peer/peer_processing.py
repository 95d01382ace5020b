"""The image processor and the processor in transformers' own tests."""

import unittest

from modeling_hsvlt import MultiLabelImageProcessor, MultiLabelProcessor

from .checks import ImageProcessingTester, ImageProcessingTestMixin, PeerTest, ProcessorTesterMixin


class MultiLabelImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 20, "width": 24})
        kwargs.setdefault("resize_mode", "pad")
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": MultiLabelImageProcessor}


class ImageProcessorTest(PeerTest, ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = MultiLabelImageProcessingTester
    test_cast_dtype = True


class ProcessorTest(PeerTest, ProcessorTesterMixin, unittest.TestCase):
    processor_class = MultiLabelProcessor

    @classmethod
    def _setup_image_processor(cls):
        return MultiLabelImageProcessor(size={"height": 20, "width": 24})

    @staticmethod
    def prepare_processor_dict():
        return {"id2label": {0: "cat", 1: "dog"}, "thresholds": [0.25, 0.75]}
