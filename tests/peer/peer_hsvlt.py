"""HSVLT in transformers' own tests."""

from modeling_hsvlt import HSVLTConfig, HSVLTForImageClassification, HSVLTModel

from .checks import ModelTest, ModelTester


class HSVLTTester(ModelTester):
    num_hidden_layers = 4  # attentions: one a stage
    expected_num_hidden_layers = 4
    num_hidden_states_types = 3  # visual maps, label tokens, multi-modal states
    # Visual maps end in (height, width), attentions in (labels, height, width): these names are upstream's.
    num_attention_heads = ModelTester.num_labels
    encoder_seq_length = key_length = hidden_size = 16

    backbone_config = {
        "model_type": "convnext",
        "hidden_sizes": [8, 12, 16, 24],
        "depths": [1, 1, 2, 1],
        "patch_size": 2,
        "layer_scale_init_value": 1.0,
    }
    options = {}

    def get_config(self):
        return HSVLTConfig(
            backbone_config=dict(self.backbone_config),
            image_size=self.image_size,
            label_embedding_dim=10,
            num_labels=self.num_labels,
            **self.options,
        )


class TwoHeadsTester(HSVLTTester):
    options = {"num_attention_heads": 2}


class EveryOptionTester(HSVLTTester):
    backbone_config = {
        "model_type": "convnextv2",
        "hidden_sizes": [8, 12, 16, 24],
        "depths": [1, 1, 2, 1],
        "patch_size": 2,
    }
    options = {
        "interaction_depths": [1, 2, 1, 1],
        "num_attention_heads": 2,
        "absorb_projections": False,
        "label_update": "none",
        "aggregation": "topdown",
        "normalize_visual_tokens": True,
        "normalize_label_tokens": True,
        "normalize_multimodal_states": True,
        "initializer_range": None,
        "label_seed": 3,
        "label_chunk_size": 2,
        "candidate_labels": 5,  # all of them; see CandidatesTester
        "residual_attention": True,
        "loss_type": "asl",
        "thresholds": [0.1, 0.2, 0.3, 0.4, 0.5],
    }


class CandidatesTester(EveryOptionTester):
    options = {**EveryOptionTester.options, "candidate_labels": 3}


class SwinTester(HSVLTTester):
    backbone_config = {
        "model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1],
        "num_heads": [1, 2, 2, 4], "window_size": 2,
    }  # fmt: skip


class MlTrBackboneTester(HSVLTTester):
    backbone_config = {**SwinTester.backbone_config, "model_type": "mltr", "window_size": 4}


class HSVLTTest(ModelTest):
    tester_class = HSVLTTester
    config_class = HSVLTConfig
    all_model_classes = (HSVLTModel, HSVLTForImageClassification)


class HSVLTTwoHeadsTest(HSVLTTest):
    tester_class = TwoHeadsTester


class HSVLTEveryOptionTest(HSVLTTest):
    tester_class = EveryOptionTester


class HSVLTCandidatesTest(HSVLTTest):
    tester_class = CandidatesTester


class HSVLTSwinTest(HSVLTTest):
    tester_class = SwinTester
    _is_composite = True


class HSVLTMlTrTest(HSVLTTest):
    tester_class = MlTrBackboneTester
    _is_composite = True
