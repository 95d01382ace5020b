"""What our testers share: transformers' mixins, made to see classes from outside its tree, and the table applied."""

import contextlib
import fnmatch
import functools
import os
import sys
import tempfile
import traceback
import unittest
from unittest.mock import patch

import torch
from transformers import AutoImageProcessor
from transformers.models.auto import modeling_auto

from modeling_hsvlt import MultiLabelImageProcessor

from . import upstream
from .not_applicable import NOT_APPLICABLE, NotApplicable

sys.path.insert(0, str(upstream.FOLDER))

from transformers_tests import test_pipeline_mixin
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
)
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin
from transformers_tests.test_processing_common import ProcessorTesterMixin

# The tests look classes up by name: which have a loss, which are classifiers. One that is not listed passes them
# without having been run.
for model_type, name in (("hsvlt", "HSVLT"), ("mltr", "MlTr"), ("hp_dval", "HPDVAL")):
    modeling_auto.MODEL_MAPPING_NAMES[model_type] = f"{name}Model"
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[model_type] = f"{name}ForImageClassification"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["mltr"] = "MlTrBackbone"

test_pipeline_mixin.pipeline_test_mapping["image-classification"]["test"] = (
    f"{__package__}.pipelines.ImagePipelineTests"
)


class PeerTest:
    """Applies the table `not_applicable` to each test, and to each part of one that is a `subTest`.

    What the table names must fail, with the message it gives, and then counts as skipped. The first base of a tester;
    `unittest.TestCase` is the last.
    """

    def run(self, result=None):
        name = self._testMethodName
        test = getattr(self, name)

        @functools.wraps(test)
        def judged(*args, **kwargs):
            self._skipped_parts = []
            with self._apply(name):
                test(*args, **kwargs)
            if self._skipped_parts:
                raise unittest.SkipTest("; ".join(self._skipped_parts))

        setattr(self, name, judged)
        return super().run(result)

    @contextlib.contextmanager
    def subTest(self, msg=None, **params):  # noqa: N802
        # Without this, pytest would report a test as passed whose parts were all skipped.
        name = f"{self._testMethodName}[{msg or params}]"
        try:
            with self._apply(name):
                yield
        except unittest.SkipTest as skip:
            self._skipped_parts.append(str(skip))

    @contextlib.contextmanager
    def _apply(self, test: str):
        entry = find_entry(type(self).__name__, test)
        try:
            yield
        except unittest.SkipTest:
            raise
        except Exception as error:
            message = "".join(traceback.format_exception_only(error))
            if entry is None or entry.message not in message:
                raise
            raise unittest.SkipTest(f"not applicable: {entry}") from error
        else:
            if entry is not None:
                raise AssertionError(f"{test} passes; take it out of not_applicable.py: {entry}")


def find_entry(tester: str, test: str) -> NotApplicable | None:
    for entry in NOT_APPLICABLE:
        if fnmatch.fnmatchcase(test, entry.test) and any(fnmatch.fnmatchcase(tester, name) for name in entry.testers):
            return entry
    return None


class ModelTest(PeerTest, ModelTesterMixin, PipelineTesterMixin, unittest.TestCase):
    """Tests of a model and of its classifier. A subclass sets `tester_class`, `config_class`, `all_model_classes`."""

    __test__ = False
    tester_class = None
    config_class = None
    # Else a model whose file has no "Copyright 2023" or later is skipped.
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False  # of a vocabulary

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__test__ = cls.tester_class is not None
        cls.pipeline_model_mapping = {
            "image-classification": tuple(each for each in cls.all_model_classes if "Classification" in each.__name__)
        }

    def setUp(self):
        self.model_tester = self.tester_class()
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, common_properties=self.common_properties
        )

    common_properties = ()

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_get_set_embeddings(self):
        # Upstream wants a token table here, which every vision model there overrides likewise.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            embeddings = torch.nn.Embedding(10, 10)
            model.set_input_embeddings(embeddings)
            self.assertIs(model.get_input_embeddings(), embeddings)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if "labels" in inputs and not self._testMethodName.startswith("test_problem_types"):
            # Present, absent, unknown and soft; upstream's are class ids.
            labels = torch.tensor([1.0, 0.0, -100.0, 0.25]).repeat(self.model_tester.batch_size * 4)
            inputs["labels"] = labels[: self.model_tester.batch_size * self.model_tester.num_labels].view(
                self.model_tester.batch_size, -1
            )
        return inputs

    def run_pipeline_test(self, task, repo_name, model_architecture, **kwargs):
        """With a checkpoint of this tester in place of one on the Hub."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, model_architecture.config_class.model_type, repo_name)
            model_architecture(self.model_tester.get_config()).save_pretrained(path)
            side = self.model_tester.image_size
            MultiLabelImageProcessor(size={"height": side, "width": side}).save_pretrained(path)
            with patch.object(test_pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder):
                super().run_pipeline_test(task, repo_name, model_architecture, **kwargs)

    def run_task_tests(self, task, dtype="float32"):
        # A name that transformers has, for any image processor.
        entry = {"tokenizer_classes": [], "processor_classes": [AutoImageProcessor.__name__]}
        summary = {each.__name__: entry for each in self.pipeline_model_mapping["image-classification"]}
        with patch.dict(test_pipeline_mixin.tiny_model_summary, summary):
            super().run_task_tests(task, dtype)


class ModelTester:
    """A small model of one kind and its inputs, under the names that the mixins ask for."""

    batch_size = 3
    num_labels = 5
    image_size = 32
    num_channels = 3
    is_training = True

    def get_config(self):
        raise NotImplementedError

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": torch.rand(shape, generator=generator)}


__all__ = [
    "BackboneTesterMixin",
    "ConfigTester",
    "ImageProcessingTestMixin",
    "ImageProcessingTester",
    "ModelTest",
    "ModelTester",
    "PeerTest",
    "ProcessorTesterMixin",
]
