"""MlTr in transformers' own tests."""

from modeling_hsvlt import MlTrBackbone, MlTrConfig, MlTrForImageClassification, MlTrModel

from .checks import BackboneTesterMixin, ModelTest, ModelTester


class MlTrTester(ModelTester):
    embed_dim = 8
    depths = (1, 1, 2, 1)
    num_heads = (2, 2, 4, 4)
    window_size = 4
    options = {}

    num_hidden_layers = sum(depths)  # attentions: one a block
    expected_num_hidden_layers = 5  # the embeddings and four stages
    num_hidden_states_types = 2  # as sequences and as maps
    num_attention_heads = num_heads[0]
    seq_length = 16 * 16
    hidden_size = embed_dim

    def get_config(self):
        return MlTrConfig(
            image_size=self.image_size,
            patch_size=2,
            embed_dim=self.embed_dim,
            depths=self.depths,
            num_heads=self.num_heads,
            window_size=self.window_size,
            num_labels=self.num_labels,
            **self.options,
        )


class CATTester(MlTrTester):
    options = {
        "stem_kernel_size": 3,
        "use_absolute_embeddings": True,
        "position_kernel_size": 3,
        "block_pattern": ("pixel", "mlp", "cross", "mlp", "pixel", "mlp"),
        "initializer_range": None,
        "drop_path_rate": 0.2,
        "thresholds": [0.1, 0.2, 0.3, 0.4, 0.5],
    }
    num_hidden_layers = 2 * sum(MlTrTester.depths)


class MlTrTest(ModelTest):
    tester_class = MlTrTester
    config_class = MlTrConfig
    all_model_classes = (MlTrModel, MlTrForImageClassification)
    common_properties = ("hidden_size", "num_attention_heads")

    def test_attention_outputs(self):
        # Windows attend, not the image.
        self.model_tester.seq_length = self.model_tester.window_size**2
        super().test_attention_outputs()


class MlTrCATTest(MlTrTest):
    tester_class = CATTester


class BackboneTester(MlTrTester):
    num_hidden_states_types = 1
    seq_length = hidden_size = 16  # hidden states are maps

    def get_config(self):
        config = super().get_config()
        config.set_output_features_output_indices(out_features=["stage2", "stage4"], out_indices=None)
        return config


class MlTrBackboneTest(MlTrTest, BackboneTesterMixin):
    tester_class = BackboneTester
    all_model_classes = (MlTrBackbone,)
