"""HP-DVAL in transformers' own tests."""

from modeling_hsvlt import HPDVALConfig, HPDVALForImageClassification, HPDVALModel

from .checks import ModelTest, ModelTester


class HPDVALTester(ModelTester):
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 16
    seq_length = 1 + 16  # class token and patches

    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text_config = {
        **tower,
        "vocab_size": 32 + 2 * 4,
        "max_position_embeddings": 24,
        "bos_token_id": 30,
        "eos_token_id": 31,
        "pad_token_id": 31,
        "projection_dim": 12,
    }
    vision_config = {
        **tower,
        "model_type": "clip_vision_model",
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 12,
    }
    options = {}

    def get_config(self):
        return HPDVALConfig(
            text_config=dict(self.text_config),
            vision_config=dict(self.vision_config),
            projection_dim=12,
            local_top_k=5,
            num_labels=self.num_labels,
            **self.options,
        )


class ViTStudentTester(HPDVALTester):
    vision_config = {
        **HPDVALTester.tower,
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 8,
    }
    options = {
        "teacher_config": HPDVALTester.vision_config,
        "learn_logit_scale": True,
        "score_normalization": "class_l2",
    }


class InferenceOnlyTester(HPDVALTester):
    options = {"has_teacher": False, "has_text_model": False, "distillation_weight": 0.0}


class HPDVALTest(ModelTest):
    tester_class = HPDVALTester
    config_class = HPDVALConfig
    all_model_classes = (HPDVALModel, HPDVALForImageClassification)
    _is_composite = True
    test_resize_embeddings = True


class HPDVALViTTest(HPDVALTest):
    tester_class = ViTStudentTester


class HPDVALInferenceTest(HPDVALTest):
    tester_class = InferenceOnlyTester
    test_resize_embeddings = False
