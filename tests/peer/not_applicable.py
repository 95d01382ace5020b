"""Tests of transformers that do not apply to our models, each with its reason, and how many are skipped."""

from typing import NamedTuple


class NotApplicable(NamedTuple):
    """
    Args:
        test: Name of the test, or `test[part]` for a `subTest`; with wildcards.
        testers: The classes it concerns; with wildcards.
        message: What the failure says; another failure is not covered.
        reason: Why it does not apply.
    """

    test: str
    testers: tuple[str, ...]
    message: str
    reason: str

    def __str__(self) -> str:
        return f"{self.test} of {', '.join(self.testers)} ({self.message}): {self.reason}"


HSVLT, MLTR, HP_DVAL = ("HSVLT*",), ("MlTr*",), ("HPDVAL*",)
MODELS = HSVLT + MLTR + HP_DVAL

NOT_APPLICABLE = [
    NotApplicable(
        "test_problem_types[[]*single_label_classification*",
        MODELS,
        "labels must be multi-hot",
        "The models are multi-label; labels of another form are refused.",
    ),
    NotApplicable(
        "test_problem_types[[]*regression*",
        MODELS,
        "labels must be multi-hot",
        "The models are multi-label; labels of another form are refused.",
    ),
    NotApplicable(
        "test_num_layers_is_small",
        HSVLT + MLTR,
        "<= 2",
        "Both methods have four stages, and attentions of each.",
    ),
    # HSVLT
    NotApplicable(
        "test_attention_outputs",
        ("HSVLTCandidatesTest",),
        "Lists differ: [3, 16, 16] != [5, 16, 16]",
        "The classifier attends for the candidates alone, HSVLTModel for all labels; this wants one number of both.",
    ),
    # MlTr
    NotApplicable(
        "test_retain_grad_hidden_states_attentions",
        ("MlTrBackboneTest",),
        "'tuple' object has no attribute 'flatten'",
        "The first output of any backbone is the tuple of its feature maps.",
    ),
    # HP-DVAL
    NotApplicable(
        "test_training_gradient_checkpointing*[[]HPDVALForImageClassification]",
        ("HPDVALTest", "HPDVALViTTest"),
        "requires gradients, but phase1 keeps it frozen",
        "It unfreezes the teacher, which no stage trains; HPDVALInferenceTest has none and runs it.",
    ),
    NotApplicable(
        "test_model_forward_default_config_values",
        HP_DVAL,
        "leaves no room for 8 context tokens",
        "It drops the ids of start and end, and CLIP's own lie outside of a small vocabulary.",
    ),
    NotApplicable(
        "test_resize_tokens_embeddings",
        ("HPDVALTest", "HPDVALViTTest"),
        "tokens are contexts, which would lie elsewhere",
        "The text tower's last tokens are contexts: another size is refused, and says what to do.",
    ),
    NotApplicable(
        "test_model_get_set_embeddings",
        ("HPDVALInferenceTest",),
        "None is not an instance of",
        "Input embeddings are those of the text tower, which it has not.",
    ),
    # Processors
    *(
        NotApplicable(test, ("ProcessorTest",), "reads images and no text", "It gives text, which is refused.")
        for test in (
            "test_flat_kwarg_applied_when_modality_dict_lacks_it",
            "test_model_input_names",
            "test_processor_text_has_no_visual",
        )
    ),
    NotApplicable(
        "test_processor_from_and_save_pretrained*",
        ("ProcessorTest",),
        "auto_map",
        "transformers notes where a class's code is as it saves a processor from outside its tree, not as it loads it.",
    ),
    NotApplicable(
        "test_image_processor_from_dict_with_kwargs_has_attributes",
        ("ImageProcessorTest",),
        "do_convert_rgb=False is not supported",
        "Every image becomes RGB, and who wants another is told so.",
    ),
    NotApplicable(
        "test_call_numpy_4_channels",
        ("ImageProcessorTest",),
        "do_convert_rgb=False is not supported",
        "Every image becomes RGB, and who wants another is told so.",
    ),
    NotApplicable(
        "test_new_models_require_torchvision_backend",
        ("ImageProcessorTest",),
        "must support the torchvision backend",
        "The project does without torchvision.",
    ),
]

# Skipped tests of each tester, those of the table included.
SKIPPED = {
    "HPDVALInferenceTest": 107,
    "HPDVALTest": 107,
    "HPDVALViTTest": 106,
    "HSVLTCandidatesTest": 107,
    "HSVLTEveryOptionTest": 106,
    "HSVLTMlTrTest": 107,
    "HSVLTSwinTest": 103,
    "HSVLTTest": 106,
    "HSVLTTwoHeadsTest": 106,
    "ImageProcessorTest": 12,
    "MlTrBackboneTest": 111,
    "MlTrCATTest": 110,
    "MlTrTest": 110,
    "ProcessorTest": 54,
}
